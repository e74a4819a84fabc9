"""How a module of another library computes through pylora, while it stays the module it was.

A `Swap` lies in the module beside its parameters, and the module's `forward` calls it. The swap
decides call by call: what pylora computes goes through one fused op, and anything else through the
forward of the module's own class.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from pylora.backends.backend import autocast_off
from pylora.dispatch import use_backend
from pylora.nf4_weight import NF4Weight
from pylora.testing import assert_as_accurate_as_torch

logger = logging.getLogger(__name__)

_SWAP = "_pylora_swap"
_REPLICATE = "_replicate_for_data_parallel"  # the method by which nn.DataParallel copies a module
# The own forward of each class whose forward `pylora.patch` has exchanged.
OWN_FORWARD: dict[type, Any] = {}


class Swap:
    """What the swaps of all kinds of modules share."""

    def __init__(self, name: str, verify: int) -> None:
        """
        name      the name of the module in its model, for messages
        verify    how many calls are compared with the reference
        """
        self.name, self._to_verify, self._verify = name, verify, verify
        self._said: set[str] = set()

    def __deepcopy__(self, memo: object) -> Swap:
        return type(self)(self.name, self._verify)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.name, self._verify)

    def why_not(self, module: nn.Module) -> str | None:
        """Why no call of this module can go through pylora; None if it can."""
        raise NotImplementedError

    def forward(self, module: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        """What `module.forward` returns."""
        raise NotImplementedError

    def as_before(self, module: nn.Module, why: str, *args: Any, **kwargs: Any) -> Any:
        """Calls the forward of the module's own class; the log says why, once for each reason."""
        self.say_why_as_before(why)
        own_forward = OWN_FORWARD.get(type(module), type(module).forward)
        return own_forward(module, *args, **kwargs)

    def say_why_as_before(self, why: str) -> None:
        """Logs why a call does not go through pylora, once for each reason."""
        if why not in self._said and not torch.compiler.is_compiling():
            self._said.add(why)
            logger.info("%s computes as before: %s", self.name, why)

    def must_verify(self) -> bool:
        """True for the first calls, as many as were asked for."""
        if self._to_verify == 0 or torch.compiler.is_compiling():
            return False
        self._to_verify -= 1
        return True

    def verify(
        self, y: Tensor, reference: Callable[..., Tensor], weight: Any, x: Tensor, **rest: Any
    ) -> None:
        """Raises AssertionError that names the layer unless `y` satisfies the numerics rule.

        reference    computes y from x, the dense weight, and the rest
        """
        dense = weight.dequantize(x.dtype) if isinstance(weight, NF4Weight) else weight
        if rest.get("bias") is not None:
            rest["bias"] = rest["bias"].to(x.dtype)
        with torch.no_grad(), autocast_off(x.device.type), use_backend("reference"):
            try:
                assert_as_accurate_as_torch(
                    y.detach(), reference, x=x, weight=dense.to(x.dtype), **rest
                )
            except AssertionError as error:
                raise AssertionError(f"{self.name} is not as accurate as torch: {error}") from None


def forward(module: nn.Module, x: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward of a swapped module. A pickled model finds its class's forward by this name."""
    return module.__dict__[_SWAP].forward(module, x, *args, **kwargs)


def install(module: nn.Module, swap: Swap) -> None:
    """Makes the module compute through `swap`."""
    module.__dict__[_SWAP] = swap
    module.__dict__["forward"] = MethodType(forward, module)
    module.__dict__[_REPLICATE] = MethodType(_replicate, module)


def _replicate(module: nn.Module) -> nn.Module:
    """A copy for one device of nn.DataParallel; it computes by the forward of its own class.

    The copy has the attributes of the module, and a forward among them would be the module's own.
    """
    replica: nn.Module = getattr(type(module), _REPLICATE)(module)
    swap: Swap = replica.__dict__[_SWAP]
    swap.say_why_as_before("nn.DataParallel copies it to each device")
    remove(replica)
    return replica


def remove(module: nn.Module) -> None:
    """Gives the module its own forward back, if it was swapped."""
    if is_swapped(module):
        del module.__dict__[_SWAP], module.__dict__["forward"], module.__dict__[_REPLICATE]


def is_swapped(module: nn.Module) -> bool:
    """True if the module computes through pylora."""
    return _SWAP in module.__dict__


def has_hooks(module: nn.Module) -> bool:
    """True if a hook must run when the module is called."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def why_not_replaceable(module: nn.Module) -> str | None:
    """Why the forward of a module cannot be exchanged; None if it can."""
    hook = getattr(module, "_hf_hook", None)
    if getattr(hook, "offload", False):
        return "accelerate offloads its weights"
    if "forward" in module.__dict__ and not is_swapped(module):
        return "another library has replaced its forward"
    return None
