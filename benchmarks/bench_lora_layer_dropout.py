"""lora_layer_dropout: training steps of lora_layer with dropout before the low-rank path.

PEFT's users usually train so. A model in eval mode drops nothing, and `lora_layer` times its
forward. The least work is that without dropout, because a mask needs no memory if the backward
draws it again.
"""

from __future__ import annotations

from dataclasses import replace

from benchmarks import bench_lora_layer
from benchmarks.contenders_dropout import DROPOUT, dropout_oracle
from benchmarks.shapes import TRAINING

BENCH = replace(
    bench_lora_layer.BENCH,
    op="lora_layer_dropout",
    contenders=DROPOUT,
    oracle=dropout_oracle,
    shapes=((576, 576), (1536, 576), (4096, 4096)),
    tokens=(16, 64, 512, 2048),
    modes=(TRAINING,),
    quick_modes=(TRAINING,),
)
