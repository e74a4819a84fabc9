"""The op library `pylora::` and the one way an op is registered in it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from pylora import dispatch

# The arguments that describe an NF4 weight, in every schema that takes one.
NF4_SCHEMA = (
    "Tensor qweight, Tensor absmax, Tensor? nested_absmax, Tensor? nested_code, Tensor? offset, "
    "int blocksize, int nested_blocksize"
)

# The same where the weight may also be dense: absmax is None then.
WEIGHT_SCHEMA = NF4_SCHEMA.replace("Tensor qweight, Tensor absmax", "Tensor weight, Tensor? absmax")

_LIBRARY = torch.library.Library("pylora", "DEF")

_VIEW_TRACKING = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)


def register(
    name: str,
    schema: str,
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> None:
    """Defines `pylora::name`: dispatched implementation, fake function and autograd.

    Without a backward, an op that could be differentiated raises where its gradient is asked for:
    torch alone would warn, and give zeros for what comes through it.
    """
    _LIBRARY.define(f"{name}({schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, partial(_call, name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"pylora::{name}", fake, lib=_LIBRARY)
    if setup_context is None or backward is None:
        setup_context, backward = _save_nothing, partial(_refuse, name)
    if "Tensor[]" in schema:  # torch's own knows how to go through lists of tensors
        torch.library.register_autograd(
            f"pylora::{name}", backward, setup_context=setup_context, lib=_LIBRARY
        )
    else:
        kernel = _autograd_kernel(name, setup_context, backward)
        _LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)


def _call(name: str, *args: Any) -> Any:
    # What a backend returns may be a reshaped tensor of its own. Were it marked as a view, nobody
    # could change a layer's output in place, as nn.ReLU(inplace=True) does.
    with torch._C._ExcludeDispatchKeyGuard(_VIEW_TRACKING):
        return dispatch.call(name, *args)


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _refuse(name: str, ctx: Any, *grads: Any) -> Any:
    hint = ""
    if name.endswith("_backward"):
        hint = ": only nf4_linear can be differentiated twice; create_graph must be False"
    raise NotImplementedError(f"pylora::{name} has no gradient{hint}")


def _autograd_kernel(
    name: str, setup_context: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """What `torch.library.register_autograd` makes, for an op whose schema has no defaults.

    That one looks for defaults left out, argument by argument, in every call that needs gradients:
    80 us for the 18 arguments of lora_linear, more than all else such a call costs on the host.
    """
    op = getattr(torch.ops.pylora, name).default

    def below_autograd(keys: torch._C.DispatchKeySet, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keys & torch._C._after_autograd_keyset, *args)

    def forward(ctx: Any, keys: torch._C.DispatchKeySet, *args: Any) -> Any:
        result = below_autograd(keys, *args)
        setup_context(ctx, args, result)
        return result

    # Behind the op's own arguments, whose positions `backward` knows, come the keys.
    function: Any = type(
        f"{name}_autograd",
        (torch.autograd.Function,),
        {
            "forward": staticmethod(lambda ctx, *args: forward(ctx, args[-1], *args[:-1])),
            "backward": staticmethod(lambda ctx, *grads: (*backward(ctx, *grads), None)),
        },
    )

    def kernel(keys: torch._C.DispatchKeySet, *args: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return function.apply(*args, keys)
        return below_autograd(keys, *args)

    return kernel
