"""nf4_linear: y = x @ W^T from the 4-bit weight. The backward gives dx = grad @ W."""

from __future__ import annotations

from benchmarks import contenders_peers, contenders_torch
from benchmarks.contender import Bench, linear_work
from benchmarks.linear_oracle import linear_oracle
from benchmarks.shapes import FORWARD

BENCH = Bench(
    op="nf4_linear",
    contenders=(*contenders_torch.LINEAR, *contenders_peers.LINEAR),
    work=linear_work,
    oracle=linear_oracle,
    quick_modes=(FORWARD,),  # the quick suite measures the backward in lora_linear
)
