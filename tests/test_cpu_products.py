"""Many tokens over an NF4 weight on AMX: panels are decoded, and torch multiplies them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, linear

import pylora
import pylora.functional as F
from pylora import NF4Weight, selfcheck
from pylora.backends import cpu, cpu_products, extension, limits
from pylora.nn import LoRALinear, NF4Linear
from pylora.ops.spec import SPECS
from pylora.selfcheck import cpu_isa
from pylora.testing import assert_as_accurate_as_torch

pytestmark = pytest.mark.skipif(
    cpu.BACKEND.unavailable() is not None, reason="the extension was not built"
)
BF16 = torch.bfloat16
VARIANT = "amx, panels multiplied in torch"
# out_features, in_features: several panels of rows, of columns, and less than one
SHAPES = [(300, 128), (96, 320), (40, 64)]


@pytest.fixture(params=extension.load()[0].cpu_isas() if extension.load()[0] else [])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes every machine plan as one with AMX does for many tokens, and panels small. Each of its
    instruction sets decodes in turn."""
    monkeypatch.setattr(limits, "CPU_AMX_PRODUCTS_FROM", 1)
    monkeypatch.setattr(limits, "CPU_AMX_PRODUCTS_WORK", 1)
    monkeypatch.setattr(cpu_products, "PANEL", 128)
    with cpu_isa(request.param):
        monkeypatch.setattr(cpu, "_instruction_set", lambda: "amx")
        yield


def nf4(
    out_features: int, in_features: int, blocksize: int = 64, double_quant: bool = False
) -> NF4Weight:
    weight = torch.randn(out_features, in_features) * in_features**-0.5
    return pylora.quantize_nf4(weight.to(BF16), blocksize, double_quant)


def lora(weight: NF4Weight, rank: int = 4) -> tuple[Tensor, Tensor]:
    out_features, in_features = weight.shape
    A, B = torch.randn(rank, in_features) * in_features**-0.5, torch.randn(out_features, rank)
    return A.to(BF16), B.to(BF16)


def gradients_of(y: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    """(y, the gradients of a sum that weighs the elements of y by their places)"""
    grad = torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype)
    return y.detach(), *torch.autograd.grad(y, leaves, grad)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", [(64, False), (32, True)], ids=["plain", "nested"])
def test_the_linear_layer_obeys_the_numerics_rule(
    products: None, shape: tuple[int, int], options: tuple[int, bool]
) -> None:
    w, x = nf4(*shape, *options), torch.randn(2, 35, shape[1]).to(BF16)
    for bias in (None, torch.randn(shape[0]).to(BF16)):
        assert pylora.explain("nf4_linear", x, w, bias).variant == VARIANT

        def ours(x: Tensor, bias: Tensor | None = bias) -> tuple[Tensor, ...]:
            x = x.detach().requires_grad_()
            return gradients_of(F.nf4_linear(x, w, bias), x)

        def in_torch(x: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
            x = x.detach().requires_grad_()
            return gradients_of(linear(x, w.dequantize(x.dtype), bias), x)

        assert_as_accurate_as_torch(ours(x), in_torch, x, bias)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", ["identity", "gelu"])
def test_lora_obeys_the_numerics_rule(
    products: None, shape: tuple[int, int], activation: str
) -> None:
    w, x = nf4(*shape), torch.randn(70, shape[1]).to(BF16)
    biases = [torch.randn(size).to(BF16) for size in (shape[0], 4, shape[0])]
    tensors = (x, *lora(w), *biases)

    def leaves_of(tensors: tuple[Tensor, ...]) -> list[Tensor]:
        return [tensor.detach().requires_grad_() for tensor in tensors]

    def in_torch(*tensors: Tensor) -> tuple[Tensor, ...]:
        x, A, B, bias, A_bias, B_bias = leaves = leaves_of(tensors)
        h = linear(x, A, A_bias)
        delta = linear(gelu(h) if activation == "gelu" else h, B, B_bias)
        return gradients_of(linear(x, w.dequantize(x.dtype), bias) + 0.5 * delta, *leaves)

    x, A, B, bias, A_bias, B_bias = leaves = leaves_of(tensors)
    options = {"activation": activation, "lora_A_bias": A_bias, "lora_B_bias": B_bias}
    assert pylora.explain("lora_linear", x, w, A, B, 0.5, bias, **options).variant == VARIANT
    y = F.lora_linear(x, w, A, B, 0.5, bias, **options)
    assert_as_accurate_as_torch(gradients_of(y, *leaves), in_torch, *tensors)


def test_only_the_gradients_that_are_wanted_are_computed(products: None) -> None:
    w = nf4(96, 128)
    A, B = lora(w)
    y = F.lora_linear(torch.randn(20, 128).to(BF16), w, A, B.requires_grad_(), 0.5)
    y.sum().backward()
    assert A.grad is None and B.grad is not None and B.grad.any()


def test_a_call_that_the_products_do_not_take_stays_on_the_tiles(products: None) -> None:
    def variant(w: NF4Weight, dtype: torch.dtype, lora_dtype: torch.dtype, **options: Any) -> str:
        x = torch.zeros(20, w.shape[1], dtype=dtype)
        A, B = (t.to(lora_dtype) for t in lora(w))
        return pylora.explain("lora_linear", x, w, A, B, 0.5, **options).variant

    w = nf4(96, 128)
    assert variant(w, BF16, BF16) == VARIANT
    assert variant(w, BF16, BF16, dropout_p=0.1) == "amx"
    assert variant(w, BF16, torch.float32) == "amx"
    assert variant(w, torch.float16, torch.float16) == "amx"
    assert variant(nf4(96, 96), BF16, BF16) == "amx"  # a block straddles rows


def test_few_tokens_and_little_work_stay_on_the_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_instruction_set", lambda: "amx")
    w = nf4(512, 1024)
    least = limits.CPU_AMX_PRODUCTS_FROM
    assert 512 * 1024 * least == limits.CPU_AMX_PRODUCTS_WORK

    def variant(w: NF4Weight, tokens: int) -> str:
        return pylora.explain("nf4_linear", torch.zeros(tokens, 1024, dtype=BF16), w).variant

    assert variant(w, least) == VARIANT
    assert variant(w, least - 1) == variant(nf4(511, 1024), least) == "amx"


def test_the_check_reaches_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_instruction_set", lambda: "amx")
    tokens = selfcheck.MANY_TOKENS[0]
    found = list(selfcheck.cases(token_counts=[tokens]))
    variants = [cpu.BACKEND.plan(SPECS[case.op].read(case.args)).variant for case in found]
    of_dora = f"lora_linear ({VARIANT}), rescaled", f"lora_linear_backward ({VARIANT}), rescaled"
    assert set(variants) == {VARIANT, *of_dora} and variants.count(VARIANT) == 4


def test_a_layer_that_has_run_without_dropout_drops_when_it_trains(products: None) -> None:
    """The layer keeps the plan of its first call, and the products have no dropout."""
    torch.manual_seed(0)
    base = NF4Linear.from_linear(torch.nn.Linear(128, 64, dtype=BF16))
    layer = LoRALinear(base, 4, lora_dropout=0.5, dtype=BF16)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(30, 128).to(BF16)
    for context in (torch.no_grad(), torch.enable_grad()):
        with context:
            layer.eval()
            assert torch.equal(layer(x), layer(x))
            layer.train()
            assert not torch.equal(layer(x), layer(x))


@pytest.mark.parametrize(
    ("row", "col", "size", "message"),
    [
        (0, 32, (4, 64), "must be multiples of the blocksize 64, got 128, 32 and 64"),
        (0, 0, (4, 96), "must be multiples of the blocksize 64, got 128, 0 and 96"),
        (5, 0, (4, 64), r"a part of the weight \[8, 128\], got row 5, col 0 and out \[4, 64\]"),
        (0, 64, (4, 128), r"a part of the weight \[8, 128\], got row 0, col 64"),
        (-1, 0, (4, 64), "got row -1"),
    ],
)
def test_a_panel_outside_the_weight_is_refused(
    row: int, col: int, size: tuple[int, int], message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        extension.nf4_dequantize_panel(nf4(8, 128).record, row, col, torch.empty(size))


def test_a_panel_that_is_not_contiguous_is_refused() -> None:
    with pytest.raises(RuntimeError, match="out must be contiguous"):
        extension.nf4_dequantize_panel(nf4(8, 128).record, 0, 0, torch.empty(4, 128)[:, :64])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16])
@pytest.mark.parametrize("double_quant", [False, True])
def test_a_panel_is_a_part_of_the_dense_weight(dtype: torch.dtype, double_quant: bool) -> None:
    w = nf4(9, 256, 64, double_quant)
    for isa in extension.load()[0].cpu_isas():
        panel = torch.empty(5, 128, dtype=dtype)
        with cpu_isa(isa):
            extension.nf4_dequantize_panel(w.record, 3, 64, panel)
        assert torch.equal(panel, w.dequantize(dtype)[3:8, 64:192])
