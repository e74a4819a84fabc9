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


def register(
    name: str,
    schema: str,
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> None:
    """Defines `pylora::name`: dispatched implementation, fake function and autograd."""
    _LIBRARY.define(f"{name}({schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, partial(dispatch.call, name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"pylora::{name}", fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(
            f"pylora::{name}", backward, setup_context=setup_context, lib=_LIBRARY
        )
