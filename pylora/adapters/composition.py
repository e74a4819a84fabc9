"""How several adapters compute together: the arguments of `pylora.set_active_adapters`.

A composition has names of adapters and other compositions as its members. It is a plain value, so
it may be made once and activated many times.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Union

from pylora import checks

Composition = Union[str, "Block"]


class Block:
    """The base of the compositions, which holds their members."""

    # The compositions that may be members of this one.
    takes: tuple[type[Block], ...] = ()

    def __init__(self, *members: Composition) -> None:
        kind = type(self).__name__
        if not members:
            raise ValueError(f"{kind}() has no members; it must have at least one")
        for member in members:
            if isinstance(member, Block):
                if not isinstance(member, self.takes):
                    raise ValueError(
                        f"{member} is a member of a {kind}; a {kind} can hold names"
                        + "".join(f", {taken.__name__}" for taken in self.takes)
                    )
            elif not isinstance(member, str):
                raise TypeError(
                    f"{kind} has the member {member!r}; it must be the name of an adapter or a "
                    "composition"
                )
        self.members = members

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.members))})"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(repr(self))

    def __len__(self) -> int:
        return len(self.members)


class Stack(Block):
    """Each member reads what the one before it has made of the hidden states."""


class Average(Block):
    """The weighted mean of what the members make of the hidden states.

    weights    one for each member, with a sum of 1; equal ones by default. A member of weight 0 is
               not computed
    """

    def __init__(self, *members: Composition, weights: Sequence[float] | None = None) -> None:
        super().__init__(*members)
        if weights is None:
            weights = [1 / len(members)] * len(members)
        for weight in weights:
            checks.number("weights", weight)
        if len(weights) != len(members):
            raise ValueError(
                f"weights has {len(weights)} entries; it must have one for each of the "
                f"{len(members)} members"
            )
        if not math.isclose(sum(weights), 1, abs_tol=1e-6):
            raise ValueError(f"weights have the sum {sum(weights)}; it must be 1")
        self.weights = tuple(float(weight) for weight in weights)

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, weights={list(self.weights)})"


class Fuse(Block):
    """AdapterFusion: attention over the members decides, for each token, what each one adds.

    `pylora.train_adapter(model, Fuse(...))` makes the attention and trains it over frozen members.
    Source: Pfeiffer et al. 2021, arXiv:2005.00247.
    """

    @property
    def name(self) -> str:
        """The name of the attention over these members."""
        return ",".join(map(str, self.members))


class BatchSplit(Block):
    """The rows of a batch are divided between the members, in their order.

    batch_sizes    how many rows each member takes; 1 each by default
    """

    def __init__(self, *members: Composition, batch_sizes: Sequence[int] | None = None) -> None:
        super().__init__(*members)
        batch_sizes = [1] * len(members) if batch_sizes is None else batch_sizes
        for size in batch_sizes:
            checks.integer("batch_sizes", size, least=0)
        if len(batch_sizes) != len(members):
            raise ValueError(
                f"batch_sizes has {len(batch_sizes)} entries; it must have one for each of the "
                f"{len(members)} members"
            )
        if sum(batch_sizes) == 0:
            raise ValueError("batch_sizes are all 0; the batch must have rows")
        self.batch_sizes = tuple(batch_sizes)

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, batch_sizes={list(self.batch_sizes)})"


class Parallel(Block):
    """Every member gets the whole batch: the model's output has the rows of the first member, then
    those of the second, and so on.

    The model's inputs are repeated, so every member starts from the same embeddings.
    """


Stack.takes = (Stack, Average, Fuse, BatchSplit)
Average.takes = (Stack, Average, Fuse)
Fuse.takes = ()
BatchSplit.takes = (Stack, Average, Fuse, BatchSplit)
Parallel.takes = (Stack, Average, Fuse)


def names_in(composition: Composition | None) -> Iterator[str]:
    """The names of all adapters of a composition, in its order; some may come twice."""
    if isinstance(composition, str):
        yield composition
    elif composition is not None:
        for member in composition.members:
            yield from names_in(member)


def fusions_in(composition: Composition | None) -> Iterator[Fuse]:
    """The Fuse blocks of a composition."""
    if isinstance(composition, Fuse):
        yield composition
    if isinstance(composition, Block):
        for member in composition.members:
            yield from fusions_in(member)


def without(composition: Composition | None, names: set[str]) -> Composition | None:
    """The composition without these names, which must be members of Stacks or stand alone."""
    if not names & set(names_in(composition)):
        return composition
    if isinstance(composition, str):
        return None
    if not isinstance(composition, Stack):
        raise ValueError(
            f"{composition} has LoRA in it ({', '.join(sorted(map(repr, names)))}); LoRA can be "
            "active by itself or be a member of a Stack"
        )
    members: list[Any] = [without(member, names) for member in composition.members]
    kept = [member for member in members if member is not None]
    return Stack(*kept) if kept else None
