"""The one numerics rule of pylora, used by the tests, the benchmarks and `python -m pylora check`.

A result is right if its error against a float64 computation is at most twice the error that the
same computation has in plain torch in the same dtype, plus one rounding unit. Both the largest and
the root-mean-square error must satisfy this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# An error may be this many times as large as torch's own error.
ALLOWED_RATIO = 2.0


@dataclass(frozen=True)
class Accuracy:
    """The errors of the output that uses most of its allowance.

    max_error          our largest error against float64
    torch_max_error    torch's largest error against float64
    used               our error as a share of the allowed error, from 0 to 1
    """

    max_error: float
    torch_max_error: float
    used: float

    def __str__(self) -> str:
        return (
            f"max error {self.max_error:.2e} (torch {self.torch_max_error:.2e}), "
            f"{self.used:.0%} of allowed"
        )


def assert_as_accurate_as_torch(
    actual: Any, function: Callable[..., Any], *args: Any, **kwargs: Any
) -> Accuracy:
    """Raises AssertionError unless `actual` is as accurate as plain torch, by the numerics rule.

    actual          a tensor, or tensors nested in tuples, lists or dicts
    function        the same computation in plain torch; it runs on the arguments as given, and once
                    more with every floating-point tensor and dtype among them replaced by float64
    args, kwargs    the arguments of `function`

    Shapes, dtypes and the positions of non-finite values must agree as well. Returns the errors.
    """
    expected = function(*args, **kwargs)
    exact = function(*_in_float64(args), **_in_float64(kwargs))
    outputs = list(zip(_tensors(actual), _tensors(expected), _tensors(exact), strict=True))
    results = [
        _compare(f"output {index}" if len(outputs) > 1 else "the result", *tensors)
        for index, tensors in enumerate(outputs)
    ]
    return max(results, key=lambda accuracy: accuracy.used)


def _compare(name: str, actual: Tensor, expected: Tensor, exact: Tensor) -> Accuracy:
    if actual.shape != expected.shape:
        raise AssertionError(
            f"{name} has shape {tuple(actual.shape)}; it must be {tuple(expected.shape)}"
        )
    if actual.dtype != expected.dtype:
        raise AssertionError(f"{name} has dtype {actual.dtype}; it must be {expected.dtype}")
    if actual.numel() == 0:
        return Accuracy(0.0, 0.0, 0.0)
    if not actual.dtype.is_floating_point:
        wrong = int((actual != expected).sum())
        if wrong:
            raise AssertionError(f"{name}: {wrong} of {actual.numel()} integers differ")
        return Accuracy(0.0, 0.0, 0.0)
    rounding_unit = torch.finfo(actual.dtype).eps / 2
    actual, expected, exact = (t.detach().double().cpu() for t in (actual, expected, exact))
    finite = expected.isfinite()
    if not torch.equal(finite, actual.isfinite()):
        wrong = int((actual.isfinite() != finite).sum())
        raise AssertionError(
            f"{name}: {wrong} of {actual.numel()} elements are wrongly (non-)finite"
        )
    error, torch_error, exact = (t[finite] for t in (actual - exact, expected - exact, exact))
    if error.numel() == 0:
        return Accuracy(0.0, 0.0, 0.0)
    worst = 0.0
    for norm, size in (("largest", _largest), ("root-mean-square", _root_mean_square)):
        allowed = ALLOWED_RATIO * size(torch_error) + rounding_unit * size(exact)
        if size(error) > allowed:
            raise AssertionError(
                f"{name}: the {norm} error is {size(error):.3e}; it must be at most {allowed:.3e} "
                f"(torch's own is {size(torch_error):.3e}, the {norm} value {size(exact):.3e})"
            )
        worst = max(worst, size(error) / allowed if allowed else 0.0)
    return Accuracy(_largest(error), _largest(torch_error), worst)


def _largest(values: Tensor) -> float:
    return float(values.abs().max())


def _root_mean_square(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for key in sorted(value):
            yield from _tensors(value[key])
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    else:
        raise TypeError(f"a result holds {type(value).__name__}; it must hold tensors")


def _in_float64(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dtype.is_floating_point:
        return value.detach().double()
    if isinstance(value, torch.dtype) and value.is_floating_point:
        return torch.float64
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_in_float64, value))
    if isinstance(value, (tuple, list)):
        return type(value)(map(_in_float64, value))
    if isinstance(value, dict):
        return {key: _in_float64(item) for key, item in value.items()}
    return value
