"""The references equal stored results of bitsandbytes and PEFT (tests/data/export_golden.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from flat_calls import reference_op
from safetensors.torch import load_file

from pylora import reference
from pylora.nf4 import dynamic_code

GOLDEN = load_file(Path(__file__).parent / "data" / "golden.safetensors")
NF4 = sorted(
    k.removesuffix("weight") for k in GOLDEN if k.startswith("nf4.") and k.endswith("weight")
)


@pytest.mark.parametrize("prefix", NF4)
def test_nf4_equals_bitsandbytes_bit_for_bit(prefix: str) -> None:
    weight = GOLDEN[prefix + "weight"]
    qweight, absmax = reference_op("nf4_quantize")(weight, 32)
    assert torch.equal(qweight, GOLDEN[prefix + "packed"])
    nested = (None, None, None)
    if "nested" in prefix:
        absmax, nested_absmax, nested_code, offset = reference.quantize_absmax(absmax)
        assert torch.equal(nested_absmax, GOLDEN[prefix + "nested_absmax"])
        assert torch.equal(nested_code, dynamic_code(torch.device("cpu")))
        assert torch.equal(offset, GOLDEN[prefix + "offset"])
        nested = (nested_absmax, nested_code, offset)
    assert torch.equal(absmax, GOLDEN[prefix + "absmax"])
    if prefix + "dequantized" in GOLDEN:
        dense = reference_op("nf4_dequantize")(
            qweight, absmax, *nested, 32, 256, weight.shape, weight.dtype
        )
        assert torch.equal(dense, GOLDEN[prefix + "dequantized"])


@pytest.mark.parametrize("name", ["plain", "rslora", "bias"])
def test_lora_equals_peft(name: str) -> None:
    """The numbers are float64, in which two correct programs agree to a few units of 1e-16."""
    g = {k.removeprefix(f"lora.{name}."): v for k, v in GOLDEN.items() if f"lora.{name}." in k}
    base = (g["weight"], None, None, None, None, 0, 0)
    scaling = g["scaling"].item()
    y, h = reference_op("lora_linear")(
        g["x"],
        *base,
        20,
        g["lora_A"],
        g["lora_B"],
        g["bias"],
        None,
        g.get("lora_B_bias"),
        scaling,
        0.0,
        None,
        "identity",
    )
    mask = [True, False, True, True, False, False, "dlora_B_bias" in g]
    dx, _, dlora_A, dlora_B, _, _, dlora_B_bias = reference_op("lora_linear_backward")(
        g["grad"], g["x"], h, *base, g["lora_A"], g["lora_B"], scaling, 0.0, None, "identity", mask
    )
    actual = {"y": y, "dx": dx, "dlora_A": dlora_A, "dlora_B": dlora_B}
    if "dlora_B_bias" in g:
        actual["dlora_B_bias"] = dlora_B_bias
    for key, value in actual.items():
        error = (value - g[key]).abs().max()
        assert error <= 64 * torch.finfo(torch.float64).eps * g[key].abs().max(), key
