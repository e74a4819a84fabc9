"""lora_linear: y = x @ W^T + s (x @ A^T) @ B^T with W in NF4. The backward gives dx, dA and dB.

All contenders have their LoRA weights in bf16. Those without LoRA (dense, bare bitsandbytes) do
less work than pylora, and are compared with it nevertheless.
"""

from __future__ import annotations

from benchmarks import contenders_peers, contenders_torch
from benchmarks.contender import Bench, linear_work
from benchmarks.linear_oracle import linear_oracle

BENCH = Bench(
    op="lora_linear",
    contenders=(*contenders_torch.LORA, *contenders_peers.LORA),
    work=linear_work,
    oracle=linear_oracle,
    rank=16,
)
