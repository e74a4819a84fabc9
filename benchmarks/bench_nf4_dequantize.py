"""nf4_dequantize: packed bytes and fp32 absmax to a dense bf16 weight, block size 64."""

from __future__ import annotations

from typing import Any

import torch

import pylora
from benchmarks.contender import NF4_BITS, Bench, Contender, Layer, Work
from benchmarks.contenders_torch import explained, on_reference
from benchmarks.operands import Operands
from benchmarks.shapes import Cell
from pylora.ops.registration import reference_op


def _pylora(operands: Operands) -> Layer:
    w = operands.nf4()
    return Layer(lambda _: pylora.dequantize_nf4(w), lambda _: explained("dequantize_nf4", w))


def _bitsandbytes(operands: Operands) -> Layer:
    from bitsandbytes.functional import dequantize_4bit

    packed = operands.nf4().to_bitsandbytes()
    return Layer(
        lambda _: dequantize_4bit(packed.data, packed.quant_state),
        lambda _: "functional.dequantize_4bit",
    )


def _oracle(operands: Operands, *_: Any) -> tuple[Any, tuple[Any, ...]]:
    w = operands.nf4()
    return reference_op("nf4_dequantize"), (*w.op_arguments(), list(w.shape), w.dtype)


def _work(cell: Cell, contender: Contender) -> Work:
    """One FLOP a weight, the scale; read in NF4, written in the cell's dtype."""
    size = getattr(torch, cell.dtype).itemsize
    return Work(cell.numel, cell.numel * NF4_BITS / 8, size * cell.numel)


BENCH = Bench(
    op="nf4_dequantize",
    contenders=(
        Contender("pylora", _pylora, ("pylora-kernels",), is_ours=True),
        Contender(
            "pylora reference",
            lambda operands: on_reference(_pylora(operands)),
            ("pylora-kernels", "torch"),
        ),
        Contender("bitsandbytes", _bitsandbytes, ("bitsandbytes",)),
    ),
    work=_work,
    oracle=_oracle,
    has_rows=False,
    has_backward=False,
)
