"""Judges every result against plain torch and float64 by the numerics rule of pylora.testing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import linear_oracle
from benchmarks.contender import Bench, BuiltLayer, Contender
from benchmarks.layer_tensors import LayerTensors
from benchmarks.shapes import BACKWARD
from pylora.testing import assert_as_accurate_as_torch

EXACT = "equal to plain torch bit for bit"
# An oracle keeps this many results, to recognize equal ones. The contenders of a cell rarely give
# more than that.
_REMEMBERED = 24


@dataclass(frozen=True)
class Verdict:
    """The verdict on one result. `text` gives its errors, or says what is wrong with it."""

    passes: bool
    text: str


class Oracle:
    """One computation in plain torch and in float64. Each runs once, however many results are
    checked against it.

    skip    how many of the first outputs of the function are not compared
    """

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...], skip: int = 0) -> None:
        self._function, self._args, self._skip = function, args, skip
        self._results: dict[bool, Any] = {}
        self._judged: list[tuple[Any, Verdict]] = []

    def check(self, actual: Any) -> Verdict:
        """Returns the verdict on a result. Results that are equal bit for bit share a verdict."""
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
        """Runs the function, but only once in float64 and once in the dtype of the contenders."""
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
    """The oracles of one cell. Contenders with and without LoRA have different oracles, and so have
    contenders with different dtypes, with a weight of their own or with random numbers."""

    def __init__(self, bench: Bench, tensors: LayerTensors, mode: str) -> None:
        self._bench, self._tensors = bench, tensors
        self._skip = bench.outputs if mode == BACKWARD else 0
        self._known: dict[tuple[Any, ...], Oracle] = {}

    def check(
        self,
        contender: Contender,
        layer: BuiltLayer,
        x: Tensor | None,
        grad: Tensor | None,
        actual: Any,
    ) -> Verdict:
        """Returns the verdict on `actual`, the result for `x` and `grad`. Their values must be the
        same for all contenders and layers of the cell; only their dtype may differ."""
        if x is not None:
            x = x.detach()
        key: tuple[Any, ...] = (contender.has_lora, contender.dtype)
        if layer.weight is not None or layer.oracle is not None:
            key = (contender.name,)
        if key not in self._known:
            if layer.oracle is not None:
                assert x is not None
                oracle = layer.oracle(x, grad)
            elif layer.weight is not None:
                weight, lora = layer.weight, tuple(p.detach() for p in layer.parameters)
                oracle = linear_oracle.over(weight.to, self._tensors.scaling, x, grad, lora)
            else:
                oracle = self._bench.oracle(self._tensors, x, grad, contender.has_lora)
            self._known[key] = Oracle(*oracle, self._skip)
        return self._known[key].check(actual)
