"""nf4_quantize: turns a bf16 weight into packed bytes and fp32 absmax, in blocks of 64."""

from __future__ import annotations

from typing import Any

import torch

import pylora
from benchmarks.contender import NF4_BITS, Bench, BuiltLayer, Contender, Work
from benchmarks.contenders_torch import explained, on_reference
from benchmarks.layer_tensors import LayerTensors
from benchmarks.shapes import FORWARD, Cell
from pylora.ops.registration import reference_op


def _pylora(tensors: LayerTensors) -> BuiltLayer:
    weight = tensors.source()
    return BuiltLayer(
        lambda _: pylora.quantize_nf4(weight),
        lambda _: explained("quantize_nf4", weight),
        result=lambda w: (w.qweight.view(-1), w.absmax.view(-1)),
    )


def _bitsandbytes(tensors: LayerTensors) -> BuiltLayer:
    from bitsandbytes.functional import quantize_4bit

    weight = tensors.source()
    return BuiltLayer(
        lambda _: quantize_4bit(weight, quant_type="nf4", blocksize=64),
        lambda _: "functional.quantize_4bit",
        result=lambda pair: (pair[0].view(-1), pair[1].absmax.view(-1)),
    )


def _oracle(tensors: LayerTensors, *_: Any) -> tuple[Any, tuple[Any, ...]]:
    def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(t.view(-1) for t in reference_op("nf4_quantize")(weight, 64))

    return quantize, (tensors.source(),)


def _work(cell: Cell, contender: Contender) -> Work:
    """Counts three FLOP for each number: magnitude, scale and code. The weight is read in its dtype
    and written in NF4."""
    size = getattr(torch, cell.dtype).itemsize
    return Work(3 * cell.numel, size * cell.numel, cell.numel * NF4_BITS / 8)


BENCH = Bench(
    op="nf4_quantize",
    contenders=(
        Contender("pylora", _pylora, ("pylora-kernels",), "dense", modes=(FORWARD,), is_ours=True),
        Contender(
            "pylora reference",
            lambda tensors: on_reference(_pylora(tensors)),
            ("pylora-kernels", "torch"),
            "dense",
        ),
        Contender("bitsandbytes", _bitsandbytes, ("bitsandbytes",), "dense"),
    ),
    work=_work,
    oracle=_oracle,
    has_tokens=False,
    has_backward=False,
)
