"""What the ops of several projections share: their part of the schema, fakes and autograd.

The lists have one entry a projection. lora_A, lora_B and bias are lists of tensors, an absent one
being an empty tensor [0]: autograd passes over a list that holds None.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor

from pylora.reference.projections import Gradients, Projections, has_lora

PROJECTIONS_SCHEMA = (
    "Tensor[] weight, Tensor?[] absmax, Tensor?[] nested_absmax, Tensor?[] nested_code, "
    "Tensor?[] offset, int[] blocksize, int[] nested_blocksize, SymInt[] out_features, "
    "Tensor[] lora_A, Tensor[] lora_B, Tensor[] bias, float[] scaling"
)
GRADIENTS_SCHEMA = (
    "(Tensor dx, Tensor[] dweight, Tensor[] dlora_A, Tensor[] dlora_B, Tensor[] dbias)"
)
_TENSORS = (
    "weight",
    "absmax",
    "nested_absmax",
    "nested_code",
    "offset",
    "lora_A",
    "lora_B",
    "bias",
)
_DIFFERENTIABLE = ("weight", "lora_A", "lora_B", "bias")


def fake_h(x: Tensor, lora_A: list[Tensor]) -> list[Tensor]:
    """h [..., r] of each projection; empty [0] without LoRA."""
    return [
        x.new_empty(*x.shape[:-1], A.shape[0], dtype=torch.promote_types(A.dtype, torch.float32))
        if has_lora(A)
        else x.new_empty(0)
        for A in lora_A
    ]


def fake_gradients(x: Tensor, projections: Projections, output_mask: list[bool]) -> Gradients:
    """Fresh tensors for (dx, dweight, dlora_A, dlora_B, dbias)."""
    wanted = iter(output_mask)

    def like(tensor: Tensor) -> Tensor:
        return tensor.new_empty(tensor.shape) if next(wanted) else x.new_empty(0)

    dx = like(x)
    dweight, dlora_A, dlora_B, dbias = (
        [like(tensor) for tensor in getattr(projections, field)] for field in _DIFFERENTIABLE
    )
    return dx, dweight, dlora_A, dlora_B, dbias


def save(ctx: Any, projections: Projections, *others: Tensor | None) -> None:
    """Keeps the projections and `others` for the backward."""
    lists = [getattr(projections, field) for field in _TENSORS]
    ctx.save_for_backward(*others, *chain(*lists))
    nothing: Any = dict.fromkeys(_TENSORS)
    ctx.projections = projections._replace(**nothing)


def saved(ctx: Any) -> tuple[Projections, list[Any]]:
    """What `save` kept: (projections, others)."""
    tensors = list(ctx.saved_tensors)
    count = len(ctx.projections.scaling)
    begin = len(tensors) - count * len(_TENSORS)
    lists = {
        field: tensors[begin + index * count :][:count] for index, field in enumerate(_TENSORS)
    }
    return ctx.projections._replace(**lists), tensors[:begin]


def output_mask(ctx: Any) -> list[bool]:
    """Which gradients to compute: x, then each weight, lora_A, lora_B and bias."""
    wants_x, *lists = ctx.needs_input_grad
    needs = Projections(*lists[: len(Projections._fields)])
    return [wants_x, *chain(*(getattr(needs, field) for field in _DIFFERENTIABLE))]


def gradients(ctx: Any, results: Gradients) -> tuple[Any, ...]:
    """The op's gradients in the structure of its inputs, None for what needs none."""
    # A list of tensors wants a list back, also one that is never differentiated.
    filled: list[Any] = [
        [None] * len(needs) if isinstance(needs, list) else None for needs in ctx.needs_input_grad
    ]
    filled[0] = results[0] if ctx.needs_input_grad[0] else None
    for field, result in zip(_DIFFERENTIABLE, results[1:], strict=True):
        position = 1 + Projections._fields.index(field)
        filled[position] = [
            gradient if wanted else None
            for gradient, wanted in zip(result, ctx.needs_input_grad[position], strict=True)
        ]
    return tuple(filled)
