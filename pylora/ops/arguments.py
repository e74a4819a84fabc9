"""What the schemas in `spec.py` are written in: a reader of flat arguments, and `Spec`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

from torch import Tensor

from pylora.calls import Dropout, Norm, Weight


class Arguments:
    """The flat arguments of an op, read from left to right."""

    def __init__(self, flat: Sequence[Any]) -> None:
        self._left: Iterator[Any] = iter(flat)

    def next(self) -> Any:
        """The next argument."""
        return next(self._left)

    def several(self, count: int) -> tuple[Any, ...]:
        """The next `count` arguments."""
        return tuple(islice(self._left, count))

    def weight(self, out_features: int | None, in_features: int) -> Weight:
        """The next weight; if `out_features` is None, it is the argument behind the weight."""
        arguments = self.several(7)
        rows = self.next() if out_features is None else out_features
        return Weight.of(arguments, (rows, in_features))

    def dropout(self) -> Dropout | None:
        """The dropout of the next two arguments."""
        p, seed = self.several(2)
        return None if seed is None or p == 0.0 else Dropout(p, seed)

    def norm(self) -> Norm | None:
        """The normalization of the next four arguments."""
        kind, weight, bias, eps = self.several(4)
        return None if weight is None else Norm(kind, weight, bias, eps)


def dropout_arguments(dropout: Dropout | None) -> tuple[float, Tensor | None]:
    """The two arguments that `Arguments.dropout` reads."""
    return (0.0, None) if dropout is None else (dropout.p, dropout.layer_seed)


def norm_arguments(norm: Norm | None) -> tuple[str, Tensor | None, Tensor | None, float]:
    """The four arguments that `Arguments.norm` reads."""
    return ("", None, None, 0.0) if norm is None else (norm.kind, norm.weight, norm.bias, norm.eps)


def wanted_of_several(mask: list[bool], record: Any) -> tuple[Any, ...]:
    """The `record` of each layer or adapter of a mask: x, then four fields, each of all of them."""
    take = Arguments(mask)
    x, count = take.next(), len(mask) // 4
    columns = (take.several(count) for _ in range(4))
    return tuple(record(x, *row) for row in zip(*columns, strict=True))


@dataclass(frozen=True)
class Spec:
    """The schema of the op of one record type.

    record     the type of the record
    schema     arguments and results, as torch.library takes them
    flatten    record -> arguments in the order of the schema
    unflatten  arguments -> record
    """

    record: Any
    schema: str
    flatten: Callable[[Any], tuple[Any, ...]]
    unflatten: Callable[[Arguments], Any]

    @property
    def name(self) -> str:
        return self.record.op

    @cached_property
    def has_lists(self) -> bool:
        """True if some of the op's results are lists of tensors."""
        _, results = self.schema.split("->")
        return "[]" in results

    def read(self, flat: Sequence[Any]) -> Any:
        """The record of flat arguments."""
        return self.unflatten(Arguments(flat))

    def read_with_gradient(self, grad: Any, flat: Sequence[Any], *mask: list[bool]) -> Any:
        """The record of the arguments of a backward op, with `grad` in place of the first argument.

        mask    takes the place of the last argument, which is the mask in every backward but that
                of nf4_linear
        """
        _, *others = flat
        return self.read((grad, *others[: len(others) - len(mask)], *mask))
