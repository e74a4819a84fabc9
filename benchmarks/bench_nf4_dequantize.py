"""nf4_dequantize: turns packed bytes and fp32 absmax, in blocks of 64, into a dense bf16 weight."""

from __future__ import annotations

from typing import Any

import torch

import pylora
from benchmarks.contender import NF4_BITS, Bench, BuiltLayer, Contender, Work
from benchmarks.contenders_torch import explained, on_reference
from benchmarks.layer_tensors import LayerTensors
from benchmarks.shapes import Cell
from pylora.ops.registration import reference_op


def _pylora(tensors: LayerTensors) -> BuiltLayer:
    w = tensors.nf4()
    return BuiltLayer(lambda _: pylora.dequantize_nf4(w), lambda _: explained("dequantize_nf4", w))


def _bitsandbytes(tensors: LayerTensors) -> BuiltLayer:
    from bitsandbytes.functional import dequantize_4bit

    packed = tensors.nf4().to_bitsandbytes()
    return BuiltLayer(
        lambda _: dequantize_4bit(packed.data, packed.quant_state),
        lambda _: "functional.dequantize_4bit",
    )


def _oracle(tensors: LayerTensors, *_: Any) -> tuple[Any, tuple[Any, ...]]:
    w = tensors.nf4()
    return reference_op("nf4_dequantize"), (*w.op_arguments(), list(w.shape), w.dtype)


def _work(cell: Cell, contender: Contender) -> Work:
    """Counts one FLOP for each number, its scale. The weight is read in NF4 and written in the
    dtype of the cell."""
    size = getattr(torch, cell.dtype).itemsize
    return Work(cell.numel, cell.numel * NF4_BITS / 8, size * cell.numel)


BENCH = Bench(
    op="nf4_dequantize",
    contenders=(
        Contender("pylora", _pylora, ("pylora-kernels",), is_ours=True),
        Contender(
            "pylora reference",
            lambda tensors: on_reference(_pylora(tensors)),
            ("pylora-kernels", "torch"),
        ),
        Contender("bitsandbytes", _bitsandbytes, ("bitsandbytes",)),
    ),
    work=_work,
    oracle=_oracle,
    has_tokens=False,
    has_backward=False,
)
