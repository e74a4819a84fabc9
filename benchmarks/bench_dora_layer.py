"""dora_layer: `nn.LoRALinear` with DoRA against itself with plain LoRA, and against PEFT's DoRA.

All are the modules that a model calls, over an NF4 weight and over a dense one, with LoRA in the
dtype of the cell. The least work is that of plain LoRA, because the rescaling reads and writes no
more than a vector beside it.
"""

from __future__ import annotations

from benchmarks.contender import Bench, linear_work
from benchmarks.contenders_dora import DORA, dora_oracle
from benchmarks.shapes import FORWARD, TRAINING

BENCH = Bench(
    op="dora_layer",
    contenders=DORA,
    work=linear_work,
    oracle=dora_oracle,
    rank=16,
    shapes=((576, 576), (4096, 4096)),
    tokens=(1, 16, 512),
    modes=(FORWARD, TRAINING),
    in_quick=False,
)
