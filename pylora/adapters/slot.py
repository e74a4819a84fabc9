"""The place in a transformer block that holds its adapters and computes them.

A slot is a child of its block, so that casts, moves, copies, state dicts, DDP and FSDP find its
parameters. Forward hooks of the modules of the block call it. They are bound methods of the slot:
a deepcopy or a pickle of the model has hooks that are bound to its own slots.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from pylora.adapters.activation_state import ActiveSetup
from pylora.adapters.composition import (
    Average,
    BatchSplit,
    Block,
    Composition,
    Fuse,
    Parallel,
    Stack,
    names_in,
)
from pylora.adapters.configs import AdapterConfig
from pylora.functional import multi_bottleneck_adapter
from pylora.nn.bottleneck_adapter import BottleneckAdapter

# The attribute of a block that holds its slots.
SLOTS = "bottleneck_adapters"

# What slots have read in this thread and will use in the same forward of their block.
_inputs = threading.local()


class AdapterSlot(nn.Module):
    """The adapters at one place of a block, by name, and the attention of their fusions.

    place    the name of the place, for errors
    setup    what is active in the model; all slots share it
    """

    def __init__(self, place: str, hidden_size: int, setup: ActiveSetup) -> None:
        super().__init__()
        self.place, self.hidden_size, self.setup = place, hidden_size, setup
        self.adapters = nn.ModuleDict()
        self.fusions = nn.ModuleDict()
        self.configs: dict[str, AdapterConfig] = {}

    def extra_repr(self) -> str:
        return f"{self.place}, hidden_size={self.hidden_size}"

    def active(self) -> Composition | None:
        """The active composition; None if this slot has none of its adapters."""
        composition = self.setup.current()
        for name in names_in(composition):
            if name in self.adapters:
                return composition
        return None

    # The hooks. Each returns None if it changes nothing.

    def change_output(self, _: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Changes what a module returns, by adapters that read the same."""
        composition = self.active()
        if composition is None:
            return None
        value = _first(output)
        return _with_first(output, self.compute(composition, value, None, None))

    def change_before_norm(self, norm: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Any:
        """Changes what a norm normalizes, by adapters that read the normalized values."""
        composition = self.active()
        if composition is None:
            return None
        value = self.compute(composition, _first_argument(args, kwargs), None, norm)
        return norm.forward(value)

    def read_input(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        """Keeps the input of a module for `add_beside`, in this thread."""
        if self.active() is not None:
            kept = getattr(_inputs, "kept", ())
            _inputs.kept = (*kept, (self, _first_argument(args, kwargs)))

    def add_beside(self, _: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Changes what a module returns, by adapters that read what `read_input` has kept."""
        composition = self.active()
        if composition is None:
            return None
        kept = getattr(_inputs, "kept", ())
        x = next(value for slot, value in reversed(kept) if slot is self)
        _inputs.kept = tuple(entry for entry in kept if entry[0] is not self)
        return _with_first(output, self.compute(composition, _first(output), x, None))

    # The compositions.

    def compute(
        self, composition: Composition, value: Tensor, x: Tensor | None, norm: nn.Module | None
    ) -> Tensor:
        """What a composition makes of `value` [..., hidden_size].

        x       what every adapter reads; None if each reads the value that it changes
        norm    the module that normalizes what an adapter reads; None if there is none

        An adapter that this slot does not have leaves the value as it is.
        """
        if isinstance(composition, str):
            if composition not in self.adapters:
                return value
            reads = self._read(value, x, norm)
            return self.adapters[composition](reads, None if reads is value else value)
        if isinstance(composition, Stack):
            for member in composition.members:
                value = self.compute(member, value, x, norm)
            return value
        if isinstance(composition, Average):
            return self._average(composition, value, x, norm)
        if isinstance(composition, Fuse):
            return self._fuse(composition, value, x, norm)
        return self._split(composition, value, x, norm)

    @staticmethod
    def _read(value: Tensor, x: Tensor | None, norm: nn.Module | None) -> Tensor:
        if x is not None:
            return x
        return value if norm is None else norm.forward(value)

    def _average(
        self, average: Average, value: Tensor, x: Tensor | None, norm: nn.Module | None
    ) -> Tensor:
        mean = None
        for member, weight in zip(average.members, average.weights, strict=True):
            if weight == 0:
                continue
            result = self.compute(member, value, x, norm)
            if weight != 1:
                result = result * weight
            mean = result if mean is None else mean + result
        assert mean is not None  # the weights have the sum 1
        return mean

    def _fuse(self, fuse: Fuse, value: Tensor, x: Tensor | None, norm: nn.Module | None) -> Tensor:
        if fuse.name not in self.fusions:  # the slot has none of its members
            return value
        reads = self._read(value, x, norm)
        changes = [self.adapters[name](reads, add_residual=False) for name in names_in(fuse)]
        return value + self.fusions[fuse.name](reads, changes)

    def _split(self, split: Block, value: Tensor, x: Tensor | None, norm: Any) -> Tensor:
        sizes = self._sizes(split, value)
        adapters = self._members(split)
        if self._runs_in_one_op(split, adapters):
            places = {name: place for place, name in enumerate(adapters)}
            ids = tuple(places.get(str(member), -1) for member in split.members)
            reads = self._read(value, x, norm)
            return multi_bottleneck_adapter(
                reads,
                [adapter.tensors for adapter in adapters.values()],
                _ids_of_rows(ids, tuple(sizes), value.device),
                None if reads is value else value,
            )
        values = value.split(sizes)
        inputs: Iterable[Tensor | None] = [None] * len(sizes) if x is None else x.split(sizes)
        parts = [
            self.compute(member, part, its_input, norm) if len(part) else part
            for member, part, its_input in zip(split.members, values, inputs, strict=True)
        ]
        return torch.cat(parts)

    @staticmethod
    def _runs_in_one_op(split: Block, members: dict[str, Any]) -> bool:
        """True if multi_bottleneck_adapter computes all members of the split.

        A module that is wrapped or has hooks must be called itself.
        """
        adapters = members.values()
        return (
            all(isinstance(member, str) for member in split.members)
            and all(type(adapter) is BottleneckAdapter for adapter in adapters)
            and all(adapter.is_plain for adapter in adapters)
            and not any(adapter._forward_pre_hooks for adapter in adapters)
            and not any(adapter._forward_hooks for adapter in adapters)
            and len({adapter.down_weight.dtype for adapter in adapters}) == 1
        )

    def _members(self, split: Block) -> dict[str, Any]:
        """The adapters of this slot among the members, by their names."""
        return {name: self.adapters[name] for name in names_in(split) if name in self.adapters}

    def _sizes(self, split: Block, value: Tensor) -> list[int]:
        """How many rows of `value` each member takes."""
        rows, members = value.shape[0], split.members
        wanted = split.batch_sizes if isinstance(split, BatchSplit) else (1,) * len(members)
        total = sum(wanted)
        # Parallel has repeated the batch. A block may flatten its batch to [rows * tokens, hidden].
        scalable = isinstance(split, Parallel) or value.dim() == 2
        if rows != total and (not scalable or rows % total):
            raise ValueError(
                f"{split} is for a batch of {total} rows, but {self.place} computes {rows}; the "
                "batch_sizes must have the number of rows as their sum"
            )
        return [size * (rows // total) for size in wanted]


@lru_cache(maxsize=64)
def _ids_of_rows(ids: tuple[int, ...], sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """int64 [rows], each id as often as its size says; kept, so that a GPU gets it once."""
    with torch.inference_mode(False):
        return torch.tensor([i for i, n in zip(ids, sizes, strict=True) for _ in range(n)]).to(
            device
        )


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _with_first(output: Any, value: Tensor) -> Any:
    """The output of a module with another first tensor."""
    return value if isinstance(output, Tensor) else (value, *tuple(output)[1:])


def _first_argument(args: Any, kwargs: Any) -> Tensor:
    return next(iter((*args, *kwargs.values())))
