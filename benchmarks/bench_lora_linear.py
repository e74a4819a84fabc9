"""lora_linear: y = x @ W^T + s (x @ A^T) @ B^T over NF4; the backward gives dx, dA and dB.

LoRA weights are bf16 on every side. Contenders without LoRA (dense, bare bitsandbytes) do less work
than ours and are compared with all the same.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from benchmarks import bench_nf4_linear, contenders_peers, contenders_torch
from benchmarks.contender import Bench, linear_work
from benchmarks.operands import Operands
from pylora import reference

RANK = 16


def _oracle(
    operands: Operands, x: Tensor, grad: Tensor | None, has_lora: bool
) -> tuple[Any, tuple[Any, ...]]:
    """(y,) in a forward; (y, dx, dA, dB) where there is a grad."""
    if not has_lora:
        return bench_nf4_linear.oracle(operands, x, grad, has_lora)
    w, (a, b) = operands.nf4(), operands.lora()
    n, scaling = w.out_features, operands.scaling
    wanted = [True, False, True, True, False, False, False]

    def compute(x: Tensor, grad: Tensor | None, a: Tensor, b: Tensor, *q: Any) -> tuple[Any, ...]:
        last = (scaling, 0.0, None, "identity")
        y, h = reference.lora_linear(x, *q, n, a, b, None, None, None, *last)
        if grad is None:
            return (y,)
        grads = reference.lora_linear_backward(grad, x, h, *q, a, b, *last, wanted)
        return (y, grads[0], grads[2], grads[3])

    return compute, (x, grad, a.detach(), b.detach(), *w.op_arguments())


BENCH = Bench(
    op="lora_linear",
    contenders=(*contenders_torch.LORA, *contenders_peers.LORA),
    work=linear_work,
    oracle=_oracle,
    rank=RANK,
)
