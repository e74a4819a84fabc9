"""Ops of several layers out of a backend's ops of one: lora_qkv, lora_mlp, multi_lora_linear.

A backend that has no kernel of its own for them still runs every NF4 weight on its kernels. Dense
ones, and the adapters of multi_lora_linear, run in torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from pylora import reference
from pylora.backends.backend import DENSE, Op, Reason, without_autocast
from pylora.reference.projections import LINEAR_OPS, REFERENCE_OPS, Projections


def composed(ops: Mapping[str, Op]) -> dict[str, Op]:
    """The composed ops over `ops`, which has those of `LinearOps`; the forward ones alone where it
    lacks a backward."""
    own = {name: ops[name].run for name in LINEAR_OPS if name in ops}
    linear_ops = REFERENCE_OPS._replace(**own)

    def op(name: str, why_not: Callable[..., Reason]) -> Op:
        run = partial(getattr(reference, name), ops=linear_ops)
        return Op(without_autocast(run), why_not)

    def why_not(x: Tensor, *args: Any) -> Reason:
        projections = Projections(*args[: len(Projections._fields)])
        return _projections_why_not(ops, x, projections)

    def base_why_not(x: Tensor, weight: Tensor, absmax: Tensor | None, *args: Any) -> Reason:
        return DENSE if absmax is None else ops["nf4_linear"].why_not(x, weight, absmax, *args)

    found = {
        "lora_qkv": op("lora_qkv", why_not),
        "lora_qkv_backward": op("lora_qkv_backward", lambda grad, x, h, *args: why_not(x, *args)),
        "lora_mlp": op("lora_mlp", why_not),
        "lora_mlp_backward": op(
            "lora_mlp_backward", lambda grad, x, gate, up, h, *args: why_not(x, *args)
        ),
        "multi_lora_linear": op("multi_lora_linear", base_why_not),
        "multi_lora_linear_backward": op(
            "multi_lora_linear_backward", lambda grad, x, h, *args: base_why_not(x, *args)
        ),
    }
    complete = len(own) == len(LINEAR_OPS)
    return {name: op for name, op in found.items() if complete or not name.endswith("_backward")}


def _projections_why_not(ops: Mapping[str, Op], x: Tensor, projections: Projections) -> Reason:
    """None where there is an NF4 weight and the backend takes every one."""
    ones = [projections.one(index) for index in range(len(projections.weight))]
    own = [one for one in ones if one.base[1] is not None]
    if not own:
        return DENSE
    for one in own:
        args = (x, *one.base, one.out_features)
        if one.has_lora:
            last = (one.lora_A, one.lora_B, one.bias, None, None, one.scaling, 0.0, None)
            reason = ops["lora_linear"].why_not(*args, *last, "identity")
        else:
            reason = ops["nf4_linear"].why_not(*args, one.bias)
        if reason is not None:
            return reason
    return None
