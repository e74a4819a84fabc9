"""A gated MLP with LoRA on its three projections, in pure PyTorch.

    g, u = gate(x), up(x)                  kept for the backward, with the low-rank h of each
    y    = down(act(g) * u)                act(g) * u is computed again in the backward

SwiGLU and GEGLU (Shazeer, arXiv:2002.05202) with LoRA (arXiv:2106.09685). Each projection is
lora_linear; the dropout seeds of gate, up and down are seed, seed + 1 and seed + 2.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pylora.reference.activation import GATED_ACTIVATIONS
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

GATE, UP, DOWN = 0, 1, 2


def lora_mlp(
    x: Tensor, *args: Any, ops: LinearOps = REFERENCE_OPS
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Returns y [..., out_features], gate(x) and up(x) [..., intermediate], and the h's.

    args    the parts of `Projections` (gate, up, down), then dropout_p, seed and activation
    """
    *parts, dropout_p, seed, activation = args
    projections = Projections(*parts)
    gate, gate_h = project(ops, x, projections, GATE, dropout_p, seed)
    up, up_h = project(ops, x, projections, UP, dropout_p, seed)
    hidden = GATED_ACTIVATIONS[activation].forward(gate).mul_(up)
    y, down_h = project(ops, hidden, projections, DOWN, dropout_p, seed)
    return y, gate, up, [gate_h, up_h, down_h]


def lora_mlp_backward(
    grad: Tensor,
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    h: list[Tensor],
    *args: Any,
    ops: LinearOps = REFERENCE_OPS,
) -> Gradients:
    """(dx, dweight, dlora_A, dlora_B, dbias).

    dhidden = down's dx;  dgate = dhidden * up * act'(gate);  dup = dhidden * act(gate);  dx is the
    sum of gate's and up's.

    args    the parts of `Projections`, then dropout_p, seed, activation and output_mask: x, then
            each weight, each lora_A, each lora_B, each bias. What it leaves out is empty [0].
    """
    *parts, dropout_p, seed, activation, output_mask = args
    projections = Projections(*parts)
    act = GATED_ACTIVATIONS[activation]
    wants_x = output_mask[0]
    wanted = [wanted_of(output_mask, index, wants_x) for index in (GATE, UP)]
    wants_hidden = any(map(any, wanted))

    def backward(index: int, grad: Tensor, x: Tensor, wanted: list[bool]) -> list[Tensor]:
        return project_backward(ops, grad, x, h[index], projections, index, dropout_p, seed, wanted)

    activated = act.forward(gate)
    down = backward(DOWN, grad, activated * up, wanted_of(output_mask, DOWN, wants_hidden))
    if not wants_hidden:
        frozen = [[x.new_empty(0) for _ in down] for _ in (GATE, UP)]
        return collected(x.new_empty(0), [*frozen, down])
    dup = down[0] * activated
    del activated
    dgate = act.backward(down[0].mul_(up), gate)
    down[0] = dgate  # lets go of dhidden, as large
    found = [backward(GATE, dgate, x, wanted[GATE]), backward(UP, dup, x, wanted[UP]), down]
    dx = found[GATE][0].add_(found[UP][0]) if wants_x else x.new_empty(0)
    return collected(dx, found)
