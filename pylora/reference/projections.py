"""Linear projections with or without LoRA, which lora_qkv, lora_mlp and multi_lora_linear share.

Ops of several projections take lists with one entry a projection. A projection without LoRA has
empty tensors [0] as lora_A and lora_B, one without bias an empty bias; a dense weight has None for
absmax and what follows it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn.functional import linear

from pylora.reference.lora_linear import lora_linear, lora_linear_backward
from pylora.reference.nf4_linear import nf4_linear, nf4_linear_backward
from pylora.reference.rows import as_rows

# The quantization part of one weight: weight, absmax, ..., nested_blocksize.
Base = tuple[Any, ...]


class OneProjection(NamedTuple):
    """The arguments of one projection; bias is None where it has none."""

    base: Base
    out_features: int
    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor | None
    scaling: float

    @property
    def has_lora(self) -> bool:
        return has_lora(self.lora_A)


class Projections(NamedTuple):
    """The arguments that describe the projections, in schema order; those of lora_linear as
    lists."""

    weight: list[Tensor]
    absmax: list[Tensor | None]
    nested_absmax: list[Tensor | None]
    nested_code: list[Tensor | None]
    offset: list[Tensor | None]
    blocksize: list[int]
    nested_blocksize: list[int]
    out_features: list[int]
    lora_A: list[Tensor]
    lora_B: list[Tensor]
    bias: list[Tensor]
    scaling: list[float]

    def one(self, index: int) -> OneProjection:
        """Projection `index`."""
        parts: list[Any] = [part[index] for part in self]
        *base, out_features, lora_A, lora_B, bias, scaling = parts
        has_bias = bias.numel() > 0
        return OneProjection(
            tuple(base), out_features, lora_A, lora_B, bias if has_bias else None, scaling
        )


class LinearOps(NamedTuple):
    """The single-layer ops over NF4 weights that the others are composed of; a backend may put in
    its own. Dense weights are torch's own business."""

    nf4_linear: Callable[..., Tensor]
    nf4_linear_backward: Callable[..., Tensor]
    lora_linear: Callable[..., tuple[Tensor, Tensor]]
    lora_linear_backward: Callable[..., tuple[Tensor, ...]]

    def of_lora(self, base: Base) -> LinearOps:
        """The ops for a base weight with LoRA."""
        return self if base[1] is not None else REFERENCE_OPS


LINEAR_OPS = LinearOps._fields

REFERENCE_OPS = LinearOps(nf4_linear, nf4_linear_backward, lora_linear, lora_linear_backward)


def has_lora(lora_A: Tensor) -> bool:
    """False for the empty tensor [0] that stands for no LoRA."""
    return lora_A.dim() == 2


def base_linear(
    ops: LinearOps, x: Tensor, base: Base, out_features: int, bias: Tensor | None
) -> Tensor:
    """x @ W^T + bias over a dense or an NF4 weight."""
    if base[1] is None:
        return linear(x, base[0], None if bias is None else bias.to(x.dtype))
    return ops.nf4_linear(x, *base, out_features, bias)


def base_linear_backward(ops: LinearOps, grad: Tensor, base: Base, in_features: int) -> Tensor:
    """grad @ W over a dense or an NF4 weight."""
    if base[1] is None:
        return grad @ base[0]
    return ops.nf4_linear_backward(grad, *base, in_features)


def projection_seed(seed: Tensor | None, index: int) -> Tensor | None:
    """The dropout seed of projection `index`: seed + index, in int64 on the seed's device."""
    return None if seed is None else seed + index


def project(
    ops: LinearOps,
    x: Tensor,
    projections: Projections,
    index: int,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(y, h) of projection `index`; h is empty [0] without LoRA."""
    one = projections.one(index)
    if not one.has_lora:
        return base_linear(ops, x, one.base, one.out_features, one.bias), x.new_empty(0)
    low_rank = (one.lora_A, one.lora_B, one.bias, None, None, one.scaling)
    last = (dropout_p, projection_seed(seed, index), "identity")
    return ops.of_lora(one.base).lora_linear(x, *one.base, one.out_features, *low_rank, *last)


def wanted_of(output_mask: list[bool], index: int, wants_x: bool) -> list[bool]:
    """Which of dx, dweight, dlora_A, dlora_B and dbias to compute for projection `index`.

    output_mask    of the op: dx, then dweight of every projection, dlora_A of every one, and so on
    """
    return [wants_x, *output_mask[1 + index :: len(output_mask) // 4]]


def project_backward(
    ops: LinearOps,
    grad: Tensor,
    x: Tensor,
    h: Tensor,
    projections: Projections,
    index: int,
    dropout_p: float,
    seed: Tensor | None,
    wanted: list[bool],
) -> list[Tensor]:
    """Gradients of (x, weight, lora_A, lora_B, bias) of projection `index`, empty [0] where not
    wanted.

    Only the shape and dtype of x are read where neither dweight nor dlora_A is wanted.
    """
    one = projections.one(index)
    if one.has_lora and any(wanted):
        low_rank = (one.lora_A, one.lora_B, one.scaling)
        last = (dropout_p, projection_seed(seed, index), "identity", [*wanted, False, False])
        run = ops.of_lora(one.base)
        results = list(run.lora_linear_backward(grad, x, h, *one.base, *low_rank, *last)[:5])
    else:
        results = [x.new_empty(0) for _ in wanted]
        rows = as_rows(grad)
        if wanted[0]:
            results[0] = base_linear_backward(ops, grad, one.base, x.shape[-1])
        if wanted[1]:
            results[1] = rows.t() @ as_rows(x)
        if wanted[4]:
            results[4] = rows.sum(0)
    if wanted[4] and one.bias is not None:
        results[4] = results[4].to(one.bias.dtype)
    return results


Gradients = tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor]]


def collected(dx: Tensor, gradients: list[list[Tensor]]) -> Gradients:
    """(dx, dweight, dlora_A, dlora_B, dbias) of the op: lists with one entry a projection."""
    _, dweight, dlora_A, dlora_B, dbias = (list(kind) for kind in zip(*gradients, strict=True))
    return dx, dweight, dlora_A, dlora_B, dbias
