"""Norms and dropout in the CPU's kernels of bottleneck_adapter, on each instruction set.

The tests of the op run on every backend; the cases here make these kernels take other branches: odd
sizes, several blocks of tokens, long sums, every mix of norms, dropout, residuals and dtypes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from bottleneck_calls import (
    NORMS,
    RESIDUALS,
    SEED,
    check,
    make,
    run,
    tensors_of,
    with_tensors,
)
from flat_calls import flat_of
from torch import Tensor

import pylora
import pylora.functional as F
from pylora.backends.extension import ACTIVATION_CODES, NORM_CODES
from pylora.reference.dropout import dropout_mask
from pylora.selfcheck import cpu_isa

_C = pytest.importorskip("pylora._C", exc_type=ImportError)
ops = torch.ops.pylora_C

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = [(FP32, FP32), (FP16, FP16), (BF16, BF16), (BF16, FP32), (FP32, BF16)]
BOTH = {"before": "layer_norm", "after": "rms_norm"}
SWAPPED = {"before": "rms_norm", "after": "layer_norm"}
NORM_FIELDS = ("", "_weight", "_bias", "_eps")
DROPOUT = {"dropout_p": 0.2, "seed": SEED}
# tokens, hidden, bottleneck
SHAPES = {
    "several blocks": (203, 96, 20),
    "several chains": (30, 600, 20),
    "a wide bottleneck": (26, 200, 300),
    "a long row": (20, 1100, 33),
    "fewer features than a vector": (40, 3, 33),
    "one token": (1, 70, 33),
}


@pytest.fixture(params=_C.cpu_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with pylora.use_backend("cpu"), cpu_isa(request.param):
        yield request.param


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def runs_on_the_cpu_kernels(t: dict[str, Any]) -> bool:
    explanation = pylora.explain("bottleneck_adapter", **t)
    return explanation.backend == explanation.backward.backend == "cpu"


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: f"{d[0]}-{d[1]}".replace("torch.", ""))
@pytest.mark.parametrize("after", NORMS)
@pytest.mark.parametrize("before", NORMS)
def test_norms_with_dropout_and_residuals(
    isa: str, before: str | None, after: str | None, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    # A ReLU would be another one if rounding changed the sign of a sum.
    options = {"before": before, "after": after, "activation": "gelu"}
    for residual in RESIDUALS:
        for dropout in ({}, DROPOUT):
            # The largest error of the shortest gradients is luck, so there are several draws.
            draws = [
                make(61, 150, 16, *dtypes, residual=residual, **options, **dropout)
                for _ in range(3)
            ]
            assert runs_on_the_cpu_kernels(draws[0])
            check(*draws)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("case", list(SHAPES))
def test_shapes(isa: str, case: str, dtype: torch.dtype) -> None:
    # A norm of three features would enlarge the error of a row whose features are almost the same.
    eps = 1.0 if case == "fewer features than a vector" else 1e-5
    cases = [BOTH, SWAPPED, DROPOUT, BOTH | DROPOUT]
    if case == "a wide bottleneck" and dtype == FP32:
        # Such long sums in fp32 have up to 1.5 times torch's error, and a norm would enlarge it.
        cases = [{"before": "layer_norm"} | DROPOUT]
    for options in cases:
        options = {"activation": "silu", "eps": eps, **options}
        count = 16 if case == "one token" else 6
        check(*(make(*SHAPES[case], dtype, **options) for _ in range(count)))


@pytest.mark.parametrize("norm_has_bias", [True, False])
@pytest.mark.parametrize("options", [BOTH, SWAPPED], ids=["both", "swapped"])
def test_norms_with_and_without_bias(isa: str, options: Any, norm_has_bias: bool) -> None:
    draws = [make(70, 50, 33, norm_has_bias=norm_has_bias, eps=0.3, **options) for _ in range(3)]
    check(*draws)


@pytest.mark.parametrize("options", [BOTH, SWAPPED], ids=["both", "swapped"])
def test_rows_far_from_zero(isa: str, options: dict[str, Any]) -> None:
    draws = [make(40, 200, 33, **options) for _ in range(3)]
    for t in draws:
        t["x"].detach().mul_(3.0).add_(100.0)
    check(*draws)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("seed", [1, SEED, -3])
def test_the_mask_has_the_bits_of_the_reference(isa: str, seed: int, dtype: torch.dtype) -> None:
    """Rows of 37 features begin at any place among the words of a counter."""
    t = make(203, 37, 16, dtype, residual="none", scaling=1.0, dropout_p=0.25, seed=seed)
    z = F.bottleneck_adapter(**t | {"dropout_p": 0.0})
    y = F.bottleneck_adapter(**t)
    mask = dropout_mask(z.shape, 0.25, torch.tensor(seed))
    assert torch.equal(y != 0, mask & (z != 0))
    torch.testing.assert_close(y[mask], z[mask] / 0.75)
    (gradient,) = torch.autograd.grad(y.sum(), t["up_bias"])
    torch.testing.assert_close(gradient, (mask.sum(0) / 0.75).to(dtype))


def test_dropped_infinities_are_zero(isa: str) -> None:
    t = make(20, 40, 8, residual="none", dropout_p=0.5, seed=3)
    t["up_bias"] = torch.full((40,), torch.inf)
    y = F.bottleneck_adapter(**t)
    mask = dropout_mask(y.shape, 0.5, torch.tensor(3))
    assert torch.equal(y == 0, ~mask) and bool((y[mask] == torch.inf).all())


@pytest.mark.parametrize("shape", [(0, 40), (2, 0, 40)])
def test_an_empty_batch_gives_empty_results(isa: str, shape: tuple[int, ...]) -> None:
    t = make(1, 40, 4, **BOTH, **DROPOUT)
    t["x"] = torch.zeros(shape, requires_grad=True)
    y = F.bottleneck_adapter(**t)
    assert y.shape == shape
    for gradient in torch.autograd.grad(y.sum(), list(tensors_of(t).values())):
        assert not gradient.any()


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("options", [BOTH, SWAPPED, {"before": "layer_norm"}, DROPOUT])
def test_only_the_gradients_asked_for_are_computed(
    isa: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    """Each gradient has the same bits if no other one is wanted."""
    t = make(70, 48, 12, dtype, residual="x", **options, **({} if options is DROPOUT else DROPOUT))
    grad, tensors = torch.randn(70, 48).to(dtype), tensors_of(t)
    _, expected = run(F.bottleneck_adapter, t, tensors, grad)
    for (name, tensor), gradient in zip(tensors.items(), expected, strict=True):
        leaf = tensor.detach().requires_grad_()
        others = {other: value.detach() for other, value in tensors.items()}
        y = F.bottleneck_adapter(**with_tensors(t, others | {name: leaf}))
        assert torch.equal(torch.autograd.grad(y, leaf, grad)[0], gradient), name


@pytest.mark.parametrize("dtypes", [(BF16, BF16), (BF16, FP32), (FP32, FP32)])
@pytest.mark.parametrize("options", [BOTH, SWAPPED], ids=["both", "swapped"])
def test_threads_do_not_change_a_bit(
    isa: str, threads: None, options: dict[str, Any], dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    t = make(330, 75, 40, *dtypes, **options, **DROPOUT)
    grad = torch.randn(330, 75).to(dtypes[0])
    results = []
    for count in (1, 2, 3, 2):
        torch.set_num_threads(count)
        results.append(run(F.bottleneck_adapter, t, tensors_of(t), grad))
    (y, grads), *others = results
    for again, more in others:
        assert torch.equal(y, again) and all(map(torch.equal, grads, more))


def arguments(t: dict[str, Any]) -> list[Any]:
    """The arguments of pylora_C.bottleneck_adapter behind x and the residual."""
    _, _, _, *flat = flat_of(F.CALLS["bottleneck_adapter"](**t))
    codes = ACTIVATION_CODES | NORM_CODES | {"": 0}
    values = [codes[value] if isinstance(value, str) else value for value in flat]
    return [value.detach() if isinstance(value, Tensor) else value for value in values]


def test_errors_name_the_argument() -> None:
    t = make(6, 48, 4, **BOTH, **DROPOUT)
    x, flat = t["x"].detach(), arguments(t)
    assert torch.equal(ops.bottleneck_adapter(x, x, *flat), F.bottleneck_adapter(**t))
    names = "down down_bias up up_bias scaling activation dropout_p seed".split()
    names += [f"norm_{place}{what}" for place in ("before", "after") for what in NORM_FIELDS]
    for changed, message in (
        ({"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\), got 1"),
        ({"seed": None}, "seed must be given if dropout_p is not 0, got none"),
        ({"seed": torch.tensor(1.0)}, "seed must have dtype Long, got Float"),
        (
            {"norm_before": 3},
            r"norm_before must be a code from 0 \(none\) to 2 \(rms_norm\), got 3",
        ),
        ({"norm_after": -1}, "norm_after must be a code from 0"),
        (
            {"norm_after_weight": None},
            "norm_after_weight must be given if norm_after is rms_norm, got none",
        ),
        (
            {"norm_before": 0},
            "norm_before_weight must not be given if norm_before is none, got one",
        ),
        (
            {"norm_before": 0, "norm_before_weight": None},
            "norm_before_bias must not be given if norm_before is none, got one",
        ),
        ({"norm_before_bias": torch.ones(7)}, "norm_before_bias must have 48 elements"),
        (
            {"norm_after_weight": torch.ones(48).double()},
            "norm_after_weight must be float32, float16 or bfloat16, got Double",
        ),
    ):
        values = dict(zip(names, flat, strict=True)) | changed
        with pytest.raises(RuntimeError, match=message):
            ops.bottleneck_adapter(x, x, *values.values())
    with pytest.raises(RuntimeError, match="output_mask must have 9 values, got 5"):
        ops.bottleneck_adapter_backward(x, x, True, *flat, [True] * 5)


def test_gradients_of_absent_vectors_are_empty() -> None:
    t = make(6, 48, 4, before="rms_norm")
    x = t["x"].detach()
    gradients = ops.bottleneck_adapter_backward(x, x, True, *arguments(t), [True] * 9)
    assert [g.numel() for g in gradients[5:]] == [48, 0, 0, 0]
