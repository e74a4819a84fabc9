"""lora_linear: y = x @ W^T + s (x @ A^T) @ B^T over NF4; the backward gives dx, dA and dB.

LoRA weights are bf16 on every side. Contenders without LoRA (dense, bare bitsandbytes) do less work
than ours and are compared with all the same.
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
