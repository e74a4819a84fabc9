"""NF4 dequantization: one fp32 product and one rounding, on every backend and in every layout."""

from __future__ import annotations

import sys

import pytest
import torch
from flat_calls import reference_op

import pylora
from pylora.nf4_weight import NF4Weight
from pylora.reference.nf4_dequantize import row_panels

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(
    ("shape", "blocksize"), [((96, 256), 64), ((33, 70), 32), ((7, 13), 64), ((40, 4096), 4096)]
)
def test_equals_the_reference_bit_for_bit(
    backend: str,
    device: str,
    shape: tuple[int, int],
    blocksize: int,
    double_quant: bool,
    dtype: torch.dtype,
) -> None:
    w = pylora.quantize_nf4(torch.randn(shape), blocksize, double_quant)
    expected = reference_op("nf4_dequantize")(*w.op_arguments(), shape, dtype)
    actual = pylora.dequantize_nf4(w.to(device), dtype)
    assert actual.dtype == dtype and torch.equal(actual.cpu(), expected)


def test_default_dtype_is_that_of_the_weight(backend: str, device: str) -> None:
    w = pylora.quantize_nf4(torch.randn(8, 64).to(torch.float16)).to(device)
    assert pylora.dequantize_nf4(w).dtype == torch.float16


def test_float64_goes_to_the_reference(device: str) -> None:
    w = pylora.quantize_nf4(torch.randn(8, 64))
    dense = pylora.dequantize_nf4(w, torch.float64)
    assert dense.dtype == torch.float64
    assert (dense.float() - w.dequantize()).abs().max() < 1e-6


@pytest.mark.parametrize(("shape", "blocksize"), [((50, 70), 64), ((50, 128), 64), ((9, 13), 32)])
def test_row_panels_cover_the_weight(
    shape: tuple[int, int], blocksize: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules["pylora.reference.nf4_dequantize"]
    monkeypatch.setattr(module, "PANEL_ELEMENTS", 3 * shape[1])
    w = pylora.quantize_nf4(torch.randn(shape), blocksize, double_quant=True)
    panels = list(row_panels(w.record, torch.float32))
    assert all(panel.shape[0] <= 3 for _, panel in panels) and len(panels) > 1
    assert torch.equal(torch.cat([panel for _, panel in panels]), w.dequantize())


def test_to_keeps_shape_and_blocksize(device: str) -> None:
    w = pylora.quantize_nf4(torch.randn(8, 128), double_quant=True)
    moved = w.to("meta")
    assert moved.device.type == "meta" and moved.shape == w.shape and moved.blocksize == 64


def test_weight_checks_its_parts() -> None:
    w = pylora.quantize_nf4(torch.randn(8, 128))
    with pytest.raises(ValueError, match=r"absmax has shape \(8, 1\); it must be \(8, 2\)"):
        NF4Weight(w.qweight, w.absmax[:, :1], w.shape)
    with pytest.raises(TypeError, match=r"qweight has dtype torch.int8; it must be torch.uint8"):
        NF4Weight(w.qweight.to(torch.int8), w.absmax, w.shape)
    with pytest.raises(ValueError, match="must be given together"):
        NF4Weight(w.qweight, w.absmax, w.shape, nested_absmax=torch.zeros(1))


def test_errors_name_the_argument() -> None:
    with pytest.raises(TypeError, match="w is Tensor; it must be an NF4Weight"):
        pylora.dequantize_nf4(torch.zeros(2, 2))  # type: ignore[arg-type]
    w = pylora.quantize_nf4(torch.randn(2, 64))
    with pytest.raises(TypeError, match=r"dtype is torch.int8; it must be float16, bfloat16"):
        pylora.dequantize_nf4(w, torch.int8)


def test_op_passes_opcheck_and_compiles_to_the_same_bits(backend: str, device: str) -> None:
    w = pylora.quantize_nf4(torch.randn(6, 70), double_quant=True).to(device)
    args = (*w.op_arguments(), [6, 70], torch.float32)
    torch.library.opcheck(torch.ops.pylora.nf4_dequantize.default, args)
    compiled = torch.compile(lambda v: pylora.dequantize_nf4(v, torch.float32) * 2, fullgraph=True)
    assert torch.equal(compiled(w), pylora.dequantize_nf4(w, torch.float32) * 2)
