"""Correct first: every result against plain torch and float64, by the one numerics rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import linear_oracle
from benchmarks.contender import Bench, Contender, Layer
from benchmarks.operands import Operands
from benchmarks.shapes import BACKWARD
from pylora.testing import assert_as_accurate_as_torch

EXACT = "equal to plain torch bit for bit"
# Results that an oracle remembers to recognize their like: contenders of a cell differ in them.
_REMEMBERED = 24


@dataclass(frozen=True)
class Verdict:
    """What the rule says of one result; `text` gives the errors, or what is wrong."""

    passes: bool
    text: str


class Oracle:
    """One computation in plain torch and in float64, each run once however many are checked."""

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...], skip: int = 0) -> None:
        self._function, self._args, self._skip = function, args, skip
        self._results: dict[bool, Any] = {}
        self._judged: list[tuple[Any, Verdict]] = []

    def check(self, actual: Any) -> Verdict:
        """The verdict; one result that equals another bit for bit shares its verdict."""
        if not self._judged:
            self._judged.append((self._run(*self._args), Verdict(True, EXACT)))
        for known, verdict in self._judged:
            if _identical(actual, known):
                return verdict
        try:
            verdict = Verdict(
                True, str(assert_as_accurate_as_torch(actual, self._run, *self._args))
            )
        except AssertionError as error:
            verdict = Verdict(False, str(error))
        if len(self._judged) < _REMEMBERED:
            self._judged.append((actual, verdict))
        return verdict

    def _run(self, *args: Any) -> Any:
        """The rule calls this with float64 arguments too; outputs not asked for are cut off."""
        in_float64 = any(isinstance(a, Tensor) and a.dtype == torch.float64 for a in args)
        if in_float64 not in self._results:
            result = self._function(*args)
            self._results[in_float64] = result[self._skip :] if self._skip else result
        return self._results[in_float64]


def _identical(actual: Any, expected: Any) -> bool:
    if isinstance(expected, Tensor):
        return isinstance(actual, Tensor) and torch.equal(actual, expected)
    return len(actual) == len(expected) and all(map(_identical, actual, expected))


class Oracles:
    """The oracles of one cell: contenders differ in LoRA or not, and in the dtype of x."""

    def __init__(self, bench: Bench, operands: Operands, mode: str) -> None:
        self._bench, self._operands = bench, operands
        self._skip = bench.outputs if mode == BACKWARD else 0
        self._known: dict[tuple[Any, ...], Oracle] = {}

    def check(
        self, contender: Contender, layer: Layer, x: Tensor | None, grad: Tensor | None, actual: Any
    ) -> Verdict:
        """`x` and `grad` are the ones that gave `actual`; they are the same for every contender and
        every layer of its rotation, up to their dtype."""
        if x is not None:
            x = x.detach()
        key: tuple[Any, ...] = (contender.has_lora, contender.dtype)
        if layer.weight is not None:
            key = (contender.name,)
        if key not in self._known:
            if layer.weight is not None:
                weight, lora = layer.weight, tuple(p.detach() for p in layer.parameters)
                oracle = linear_oracle.over(weight.to, self._operands.scaling, x, grad, lora)
            else:
                oracle = self._bench.oracle(self._operands, x, grad, contender.has_lora)
            self._known[key] = Oracle(*oracle, self._skip)
        return self._known[key].check(actual)
