"""Bottleneck adapters whose products the cpu backend leaves to torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bottleneck_calls import RESIDUALS, check, make

import pylora
import pylora.functional as F
from pylora.backends import cpu, limits
from pylora.functional import AdapterTensors

pytestmark = pytest.mark.skipif(
    cpu.BACKEND.unavailable() is not None, reason="the extension was not built"
)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
IN_TORCH = "amx, multiplied in torch"
HIDDEN, WIDE = 512, 64


@pytest.fixture
def amx(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every machine plan as one with AMX does, and a weight [WIDE, HIDDEN] a large one."""
    monkeypatch.setattr(cpu, "_instruction_set", lambda: "amx")
    monkeypatch.setattr(limits, "CPU_AMX_ADAPTER_PRODUCTS_SIZE", WIDE * HIDDEN)


def variants(*shape: int, **options: Any) -> tuple[str, str]:
    """The variants of the forward and of the backward."""
    explanation = pylora.explain("bottleneck_adapter", **make(*shape, **options))
    return explanation.variant, explanation.backward.variant


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_the_products_obey_the_numerics_rule(
    amx: None, residual: str, has_bias: bool, activation: str
) -> None:
    options = {"residual": residual, "has_bias": has_bias, "activation": activation}
    t = make(70, HIDDEN, WIDE, BF16, **options)
    explanation = pylora.explain("bottleneck_adapter", **t)
    assert explanation.variant == explanation.backward.variant == IN_TORCH
    check(t)


def test_a_narrow_bottleneck_stays_on_the_kernels(amx: None) -> None:
    assert variants(70, HIDDEN, WIDE, dtype=BF16) == (IN_TORCH, IN_TORCH)
    assert variants(70, HIDDEN - 1, WIDE, dtype=BF16) == ("amx", IN_TORCH)
    assert variants(70, 2 * HIDDEN, WIDE - 1, dtype=BF16) == (IN_TORCH, "amx")
    assert variants(70, HIDDEN, WIDE - 1, dtype=BF16) == ("amx", "amx")


def test_what_the_products_do_not_do_stays_on_the_kernels(amx: None) -> None:
    def stays(**options: Any) -> bool:
        return variants(70, HIDDEN, WIDE, **({"dtype": BF16} | options)) == ("amx", "amx")

    assert not stays()
    assert stays(before="layer_norm")
    assert stays(after="rms_norm")
    assert stays(dropout_p=0.1)
    assert stays(weight_dtype=FP32)
    assert stays(dtype=FP32)
    assert stays(dtype=FP16)


@pytest.mark.parametrize("isa", ["amx", "avx512_bf16", "avx2"])
def test_few_tokens_over_large_weights_are_left_to_torch(
    monkeypatch: pytest.MonkeyPatch, isa: str
) -> None:
    monkeypatch.setattr(cpu, "_instruction_set", lambda: isa)
    tokens, size = limits.CPU_ADAPTER_PRODUCTS_TO, limits.CPU_ADAPTER_PRODUCTS_SIZE
    shape, in_torch = (size // 32, 32), f"{isa}, multiplied in torch"
    assert variants(tokens, *shape) == (in_torch, in_torch)
    assert variants(tokens + 1, *shape) == (isa, isa)
    assert variants(tokens, size // 32 - 1, 32) == (isa, isa)
    # Without products of bf16 in the processor, torch's are slow.
    of_bf16 = isa if isa == "avx2" else in_torch
    assert variants(tokens, *shape, dtype=BF16) == (of_bf16, of_bf16)


def test_a_batch_of_adapters_runs_each_by_its_own_plan(amx: None) -> None:
    weights = "down_weight", "down_bias", "up_weight", "up_bias"
    adapters = []
    for size in (WIDE, 8):
        t = make(60, HIDDEN, size, BF16)
        adapters.append(AdapterTensors(*(t[name] for name in weights), "relu", 0.5))
    x, ids = t["x"], torch.randint(-1, 2, (60,))
    explanation = pylora.explain("multi_bottleneck_adapter", x, adapters, ids)
    assert explanation.variant == f"2 x bottleneck_adapter ({IN_TORCH}, amx)"
    y = F.multi_bottleneck_adapter(x, adapters, ids)
    for index, adapter in enumerate(adapters):
        own = ids == index
        assert torch.equal(y[own], F.bottleneck_adapter(x[own], *adapter))
    assert torch.equal(y[ids < 0], x[ids < 0])
