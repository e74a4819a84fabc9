"""Which composition of adapters is active in a model, seen from the thread that runs its forward.

All slots of a model share one `ActiveSetup`. What `pylora.set_active_adapters` sets holds for every
thread. What a `with` block of `pylora.active_adapters` sets holds for the thread that is inside it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from pylora.adapters.composition import Composition, Parallel

# torch.compile can trace a threading.local, but no contextvars.ContextVar.
_blocks = threading.local()


class ActiveSetup:
    """The composition that the slots of a model compute; None leaves the model as it was."""

    def __init__(self) -> None:
        self.composition: Composition | None = None
        # The slots that share this setup.
        self.slots: list[Any] = []

    def current(self) -> Composition | None:
        """The composition for the forward that runs in this thread."""
        for setup, composition in reversed(getattr(_blocks, "open", ())):
            if setup is self:
                return composition
        return self.composition

    @contextmanager
    def inside(self, composition: Composition | None) -> Iterator[None]:
        """Inside the block, forwards of this thread compute this composition."""
        before = getattr(_blocks, "open", ())
        _blocks.open = (*before, (self, composition))
        try:
            yield
        finally:
            _blocks.open = before

    def repeat_inputs(self, _: nn.Module, args: Any, kwargs: Any) -> Any:
        """A forward hook of the model: repeats its inputs for the members of a Parallel."""
        composition = self.current()
        if not isinstance(composition, Parallel):
            return None
        if kwargs.get("past_key_values") is not None:
            raise ValueError(
                f"{composition} repeats the batch of one call, so it cannot be used with "
                "past_key_values, which generate() passes: repeat the batch yourself and use "
                "BatchSplit"
            )
        tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim()]
        if not tensors:
            raise ValueError(f"{composition} needs a tensor among the inputs of the model")
        rows, count = tensors[0].shape[0], len(composition)

        def repeated(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.dim() or value.shape[0] != rows:
                return value
            return value.repeat(count, *(1 for _ in value.shape[1:]))

        named = {k: v if k == "cache_position" else repeated(v) for k, v in kwargs.items()}
        return tuple(map(repeated, args)), named
