"""The query, key and value projections of an attention layer, each with its LoRA, in pure PyTorch.

    q, k, v = lora_linear(x, q..., seed), lora_linear(x, k..., seed + 1), lora_linear(x, v...,
              seed + 2)

LoRA (Hu et al., arXiv:2106.09685) on three projections of one x. Dropout draws a mask of its own
for each: the seed of projection i is seed + i.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pylora.reference.projections import (
    REFERENCE_OPS,
    Gradients,
    LinearOps,
    Projections,
    collected,
    project,
    project_backward,
    wanted_of,
)


def lora_qkv(x: Tensor, *args: Any, ops: LinearOps = REFERENCE_OPS) -> tuple[list[Tensor], ...]:
    """Returns y and h of each projection: y [..., out_features] in x.dtype, h [..., r].

    args    the parts of `Projections`, then dropout_p and seed
    """
    *parts, dropout_p, seed = args
    projections = Projections(*parts)
    results = [
        project(ops, x, projections, index, dropout_p, seed)
        for index in range(len(projections.weight))
    ]
    return [y for y, _ in results], [h for _, h in results]


def lora_qkv_backward(
    grad: list[Tensor], x: Tensor, h: list[Tensor], *args: Any, ops: LinearOps = REFERENCE_OPS
) -> Gradients:
    """(dx, dweight, dlora_A, dlora_B, dbias); dx is the sum over the projections, in their order.

    args    the parts of `Projections`, then dropout_p, seed and output_mask: x, then each weight,
            each lora_A, each lora_B, each bias. What it leaves out is an empty tensor [0].
    """
    *parts, dropout_p, seed, output_mask = args
    projections = Projections(*parts)
    dx = x.new_empty(0)
    gradients = []
    for index in range(len(projections.weight)):
        wanted = wanted_of(output_mask, index, output_mask[0])
        found = project_backward(
            ops, grad[index], x, h[index], projections, index, dropout_p, seed, wanted
        )
        if output_mask[0]:
            dx = found[0] if index == 0 else dx.add_(found[0])
        gradients.append(found)
    return collected(dx, gradients)
