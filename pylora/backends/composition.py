"""Ops of several layers out of a backend's ops of one: lora_qkv, lora_mlp, multi_lora_linear.

A backend that has no kernel of its own for them still runs every NF4 weight on its kernels. What is
dense, and the adapters of multi_lora_linear, run in torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from pylora import reference
from pylora.backends.backend import DENSE, Op, Reason, without_autocast
from pylora.reference.projections import LinearOps, Projections


def composed(ops: Mapping[str, Op]) -> dict[str, Op]:
    """The composed ops over `ops`, which has those of `LinearOps`."""
    linear_ops = LinearOps(*(ops[name].run for name in LinearOps._fields))

    def op(name: str, why_not: Callable[..., Reason]) -> Op:
        run = partial(getattr(reference, name), ops=linear_ops)
        return Op(without_autocast(run), why_not)

    def why_not(x: Tensor, *args: Any) -> Reason:
        return _projections_why_not(ops, x, Projections(*args[: len(Projections._fields)]))

    def base_why_not(x: Tensor, weight: Tensor, absmax: Tensor | None, *args: Any) -> Reason:
        return DENSE if absmax is None else ops["nf4_linear"].why_not(x, weight, absmax, *args)

    return {
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


def _projections_why_not(ops: Mapping[str, Op], x: Tensor, projections: Projections) -> Reason:
    """None where there is an NF4 weight and the backend takes every one of them."""
    if all(absmax is None for absmax in projections.absmax):
        return DENSE
    for index, absmax in enumerate(projections.absmax):
        if absmax is None:
            continue
        one = projections.one(index)
        args = (x, *one.base, one.out_features)
        if one.has_lora:
            last = (one.lora_A, one.lora_B, one.bias, None, None, one.scaling, 0.0, None)
            reason = ops["lora_linear"].why_not(*args, *last, "identity")
        else:
            reason = ops["nf4_linear"].why_not(*args, one.bias)
        if reason is not None:
            return reason
    return None
