"""LoRA over a dense weight for a few tokens, which the CPU has a kernel of its own for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

import pylora
import pylora.functional as F
from pylora.backends import cpu, extension
from pylora.nn import LoRALinear
from pylora.selfcheck import cpu_isa
from pylora.testing import assert_as_accurate_as_torch

pytestmark = pytest.mark.skipif(
    cpu.BACKEND.unavailable() is not None, reason="the extension was not built"
)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FP32, BF16 = torch.float32, torch.bfloat16
# out_features, in_features, rank: rows beyond a group of four, columns beyond a vector, many chains
SHAPES = [(37, 45, 3), (64, 576, 16), (131, 4096, 8), (40, 31, 1)]


def make(
    tokens: int,
    out_features: int,
    in_features: int,
    rank: int,
    dtype: torch.dtype = FP32,
    lora_dtype: torch.dtype | None = None,
) -> tuple[Any, ...]:
    """Returns x, the weight, lora_A, lora_B, the scaling and the bias of lora_linear."""
    lora_dtype = lora_dtype or dtype

    def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = lora_dtype) -> Tensor:
        return (torch.randn(*shape) * scale).to(dtype)

    return (
        normal(tokens, in_features, dtype=dtype),
        normal(out_features, in_features, scale=in_features**-0.5, dtype=dtype),
        normal(rank, in_features, scale=in_features**-0.5),
        normal(out_features, rank),
        0.5,
        normal(out_features, dtype=dtype),
    )


def in_torch(
    x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scaling: float, bias: Tensor | None
) -> Tensor:
    delta = linear(linear(x.to(A.dtype), A), B) * scaling
    return (linear(x, weight, bias) + delta).to(x.dtype)


@pytest.fixture(params=extension.load()[0].cpu_isas() if extension.load()[0] else [])
def isa(request: pytest.FixtureRequest) -> Any:
    """Each instruction set of this machine in turn."""
    with cpu_isa(request.param):
        yield request.param


@pytest.mark.parametrize("dtypes", [*((t, t) for t in DTYPES), (BF16, FP32), (torch.float16, FP32)])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_obeys_the_numerics_rule(
    isa: str, shape: tuple[int, int, int], dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    for tokens in (1, 2, 3, 4):
        call = make(tokens, *shape, *dtypes)
        assert pylora.explain("lora_linear", *call).variant == "dense small_m"
        assert_as_accurate_as_torch(F.lora_linear(*call), in_torch, *call)
        *others, _ = call
        assert_as_accurate_as_torch(F.lora_linear(*others), in_torch, *others, None)


def test_the_kernel_has_the_gradients_of_the_reference(isa: str) -> None:
    x, weight, A, B, scaling, bias = make(3, 37, 45, 4)
    leaves = [t.requires_grad_() for t in (x, weight, A, B, bias)]

    def gradients(function: Any) -> tuple[Tensor, ...]:
        y = function(x, weight, A, B, scaling, bias)
        return torch.autograd.grad(y.square().sum(), leaves)

    with pylora.use_backend("reference"):
        expected = gradients(F.lora_linear)
    torch.testing.assert_close(gradients(F.lora_linear), expected)


def test_the_parallel_adapter_and_dropout_run_on_it(isa: str) -> None:
    x, weight, A, B, scaling, bias = make(4, 64, 576, 16)
    options = {"dropout_p": 0.5, "seed": 3, "activation": "gelu", "lora_A_bias": torch.randn(16)}
    y = F.lora_linear(x, weight, A, B, scaling, bias, **options)
    with pylora.use_backend("reference"):
        expected = F.lora_linear(x, weight, A, B, scaling, bias, **options)
    torch.testing.assert_close(y, expected)


def test_threads_do_not_change_a_bit(isa: str) -> None:
    call, threads = make(2, 1300, 200, 8, BF16), torch.get_num_threads()
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(F.lora_linear(*call))
    torch.set_num_threads(threads)
    assert torch.equal(*results)


def test_a_token_has_the_same_bits_in_a_larger_call(isa: str) -> None:
    x, *others = make(4, 64, 576, 16, BF16)
    together = F.lora_linear(x, *others)
    for token in range(4):
        assert torch.equal(F.lora_linear(x[token : token + 1], *others)[0], together[token])


def test_a_layer_over_a_dense_base_uses_it_without_gradients() -> None:
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(96, 80, dtype=BF16), r=4)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(2, 1, 96).to(BF16)
    with torch.no_grad():
        first = layer(x)
        assert torch.equal(layer(x), first)  # now by the kept call
    base = layer.base_layer
    call = (x, base.weight, layer.lora_A, layer.lora_B, layer.scaling, base.bias)
    assert_as_accurate_as_torch(first, in_torch, *call)


def test_what_it_does_not_take_runs_in_torch() -> None:
    x, weight, A, B, scaling, _ = make(4, 64, 576, 16)
    for reason, call in {
        "takes up to 4 tokens, not 5": (torch.randn(5, 576), weight, A, B, scaling),
        "takes contiguous weights": (x, weight.t().contiguous().t(), A, B, scaling),
        "float64": (x.double(), weight.double(), A, B, scaling),
    }.items():
        explanation = pylora.explain("lora_linear", *call)
        assert explanation.backend == "reference" and reason in explanation.rejected["cpu"]
        assert F.lora_linear(*call).shape == (call[0].shape[0], 64)


def test_errors_of_the_op_name_the_argument() -> None:
    x, weight, A, B, scaling, bias = make(4, 64, 576, 16)
    op = torch.ops.pylora_C.lora_linear_dense
    options = (bias, None, None, scaling, 0.0, None, 0)
    for changed, message in (
        ((torch.randn(5, 576), weight, A, B), "x must have 4 rows or fewer over a dense weight"),
        ((x, weight[:, :9], A, B), "weight must have shape"),
        ((x, weight.half(), A, B), "weight must have dtype Float, got Half"),
        ((x, weight, A[:, :9], B), "lora_A must have shape"),
        ((x, weight, A, B[:9]), "lora_B must have shape"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*changed, *options)
