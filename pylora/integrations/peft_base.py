"""What the swaps of PEFT's LoRA methods over linear layers share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pylora.integrations.bitsandbytes_layers import (
    OfWeight,
    compute_dtype,
    why_not_nf4,
)
from pylora.integrations.swaps import Swap, has_hooks, is_swapped, why_not_replaceable
from pylora.nf4_weight import NF4Weight
from pylora.nn import NF4Linear
from pylora.nn.conv1d import dense_weight, is_conv1d, is_plain_linear


class Parts(NamedTuple):
    """What one adapter of a layer of PEFT computes with; A and B are modules or parameters."""

    base: Any
    A: Any
    B: Any
    dropout: Any


class PeftSwap(Swap):
    """A layer of PEFT with named adapters over a linear layer.

    The first active adapter and the base are computed in one op, and others are added to it.
    """

    def __init__(self, name: str, verify: int) -> None:
        super().__init__(name, verify)
        self._weight: OfWeight[NF4Weight] = OfWeight()

    def why_not(self, module: Any) -> str | None:
        reason = why_not_replaceable(module)
        if reason is not None:
            return reason
        base = module.base_layer  # of PeftMixedModel it may be a layer with an adapter
        if isinstance(base, NF4Linear):
            return why_not_replaceable(base)
        if type(base).__name__ == "Linear4bit":
            return why_not_replaceable(base) or why_not_nf4(base)
        like_linear = is_plain_linear(base) or is_conv1d(base)
        if not like_linear and getattr(type(base), "forward", None) is not nn.Linear.forward:
            return f"its base layer is a {type(base).__name__}"
        return why_not_replaceable(base)

    def forward(self, module: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            why = f"it was called with {', '.join(kwargs) or 'more arguments'}"
            return self.as_before(module, why, x, *args, **kwargs)
        if module.disable_adapters or module.merged:
            return self.as_before(module, "its adapters are disabled or merged", x)
        active = [name for name in module.active_adapters if name in module.lora_A]
        if not active:
            return self.as_before(module, "no adapter of it is active", x)
        parts = self.parts_of(module, active[0])
        why_not = self.why_not_fused(module, active, parts, x)
        if why_not is not None:
            return self.as_before(module, why_not, x)
        y = self.with_base(module, active[0], parts, x)
        for name in active[1:]:
            y = y + self.without_base(module, name, x).to(y.dtype)
        return y

    def why_not_adapters(self, module: Any, active: Sequence[str]) -> str | None:
        """Why no call with these adapters can go through pylora; None if one can."""
        return None

    def parts_of(self, module: Any, name: str) -> Parts:
        """The parts of this adapter."""
        raise NotImplementedError

    def why_not_fused(self, module: Any, active: Sequence[str], parts: Parts, x: Any) -> str | None:
        """Why this call of these adapters cannot go through pylora; None if it can."""
        raise NotImplementedError

    def with_base(self, module: Any, name: str, parts: Parts, x: Tensor) -> Tensor:
        """What the base and this adapter give together."""
        raise NotImplementedError

    def without_base(self, module: Any, name: str, x: Tensor) -> Tensor:
        """What this adapter adds."""
        raise NotImplementedError

    def weight_of(self, base: Any) -> Tensor | NF4Weight:
        """The weight of the base layer, dense or NF4."""
        if isinstance(base, NF4Linear):
            return base.nf4_weight
        if getattr(base.weight, "quant_state", None) is None:
            return dense_weight(base)
        return self._weight.get(base, NF4Weight.from_bitsandbytes)


def why_not_called(called: Sequence[Any], dropout: Any) -> str | None:
    """Why a layer must call its parts one by one; None if it need not.

    called    the modules that the layer calls, its dropout among them
    """
    for part in called:
        if has_hooks(part):
            return "a hook must see the calls of its parts"
        if "forward" in part.__dict__ and not is_swapped(part):
            return "another library has replaced the forward of one of its parts"
    if type(dropout) not in (nn.Dropout, nn.Identity):
        return f"its dropout is a {type(dropout).__name__}"
    return None


def why_not_input(module: Any, base: Any, x: Any) -> str | None:
    """Why PEFT's forward must cast x or refuse it with its own error; None if x fits."""
    if not isinstance(x, Tensor):
        return f"its input is a {type(x).__name__}"
    if x.shape[-1:] != (module.in_features,):
        return f"its input has shape {tuple(x.shape)}"
    if hasattr(base, "compute_dtype"):
        wanted = compute_dtype(base, x)
    elif isinstance(base, NF4Linear):
        wanted = x.dtype
    else:
        wanted = base.weight.dtype
    if x.dtype != wanted and not torch.is_autocast_enabled(x.device.type):
        return f"its input is {x.dtype} and it computes in {wanted}"
    return None


def in_compute_dtype(base: Any, x: Tensor) -> Tensor:
    """x in the dtype in which the base layer computes, which autocast may not have given it."""
    return x.to(compute_dtype(base, x)) if hasattr(base, "compute_dtype") else x


def in_dtype_of_base(base: Any, y: Tensor, x: Tensor) -> Tensor:
    """y in the dtype that the base layer returns: a Linear4bit gives that of x back."""
    return y.to(x.dtype) if hasattr(base, "compute_dtype") else y


def drop_rate(dropout: nn.Module) -> float:
    """The probability with which this dropout drops an element now."""
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
