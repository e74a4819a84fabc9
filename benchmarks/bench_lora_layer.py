"""lora_layer: `nn.LoRALinear` against PEFT's layer, over an NF4 weight and over a dense one.

Both sides are the modules that a model calls, with LoRA in bf16. Ours over NF4 is compared with
PEFT over bitsandbytes, and ours over a dense weight with PEFT over one.
"""

from __future__ import annotations

from benchmarks.contender import Bench, linear_work
from benchmarks.contenders_layers import LAYERS
from benchmarks.linear_oracle import linear_oracle
from benchmarks.shapes import FORWARD, TRAINING

BENCH = Bench(
    op="lora_layer",
    contenders=LAYERS,
    work=linear_work,
    oracle=linear_oracle,
    rank=16,
    shapes=((576, 576), (1536, 576), (4096, 4096), (4096, 14336)),
    tokens=(1, 2, 4, 8, 9, 12, 16, 32, 64, 512, 2048),
    modes=(FORWARD, TRAINING),
    in_quick=False,
)
