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
WIDE, FEW = limits.CPU_ADAPTER_PRODUCTS_FROM, limits.CPU_ADAPTER_PRODUCTS_TO


@pytest.fixture
def amx(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every machine plan as one with AMX does."""
    monkeypatch.setattr(cpu, "_instruction_set", lambda: "amx")


def variant(*shape: int, **options: Any) -> str:
    """The variant of the forward, which is that of the backward too."""
    explanation = pylora.explain("bottleneck_adapter", **make(*shape, **options))
    assert explanation.backward.variant == explanation.variant
    return explanation.variant


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_the_products_obey_the_numerics_rule(
    amx: None,
    monkeypatch: pytest.MonkeyPatch,
    residual: str,
    has_bias: bool,
    activation: str,
    dtype: torch.dtype,
) -> None:
    monkeypatch.setattr(limits, "CPU_ADAPTER_PRODUCTS_SIZE", {2: 1, 4: 1})
    options = {"residual": residual, "has_bias": has_bias, "activation": activation}
    t = make(FEW, 96, 40, dtype, **options)
    assert pylora.explain("bottleneck_adapter", **t).variant == IN_TORCH
    check(t)


@pytest.mark.parametrize("isa", ["amx", "avx512_bf16", "avx512", "avx2"])
def test_a_wide_bottleneck_in_fp32_is_left_to_torch(
    monkeypatch: pytest.MonkeyPatch, isa: str
) -> None:
    monkeypatch.setattr(cpu, "_instruction_set", lambda: isa)
    assert variant(FEW + 1, 40, WIDE) == (isa if isa == "avx2" else f"{isa}, multiplied in torch")
    assert variant(FEW + 1, 40, WIDE - 1) == isa
    assert variant(FEW + 1, 40, WIDE, dtype=BF16) == isa


@pytest.mark.parametrize("isa", ["amx", "avx512_bf16", "avx2"])
def test_few_tokens_over_large_weights_are_left_to_torch(
    monkeypatch: pytest.MonkeyPatch, isa: str
) -> None:
    monkeypatch.setattr(cpu, "_instruction_set", lambda: isa)
    in_torch, least = f"{isa}, multiplied in torch", limits.CPU_ADAPTER_PRODUCTS_SIZE
    assert variant(FEW, least[4] // 32, 32) == in_torch
    assert variant(FEW + 1, least[4] // 32, 32) == isa
    assert variant(FEW, least[4] // 32 - 1, 32) == isa
    assert variant(FEW, least[4] // 32, 32, dtype=BF16) == isa
    # Without products of bf16 in the processor, torch's are slow.
    of_bf16 = isa if isa == "avx2" else in_torch
    assert variant(FEW, least[2] // 32, 32, dtype=BF16) == of_bf16
    assert variant(FEW, least[2] // 32, 32, dtype=FP16) == isa


def test_what_the_products_do_not_do_stays_on_the_kernels(amx: None) -> None:
    def stays(**options: Any) -> bool:
        return variant(70, 96, WIDE, **options) == "amx"

    assert not stays()
    assert stays(before="layer_norm")
    assert stays(after="rms_norm")
    assert stays(dropout_p=0.1)
    assert stays(weight_dtype=BF16)


def test_a_batch_of_adapters_runs_each_by_its_own_plan(amx: None) -> None:
    weights = "down_weight", "down_bias", "up_weight", "up_bias"
    adapters = []
    for size in (WIDE, 8):
        t = make(60, 96, size)
        adapters.append(AdapterTensors(*(t[name] for name in weights), "relu", 0.5))
    x, ids = t["x"], torch.randint(-1, 2, (60,))
    explanation = pylora.explain("multi_bottleneck_adapter", x, adapters, ids)
    assert explanation.variant == f"2 x bottleneck_adapter ({IN_TORCH}, amx)"
    y = F.multi_bottleneck_adapter(x, adapters, ids)
    for index, adapter in enumerate(adapters):
        own = ids == index
        assert torch.equal(y[own], F.bottleneck_adapter(x[own], *adapter))
    assert torch.equal(y[ids < 0], x[ids < 0])
