"""The Triton kernels of bottleneck_adapter with norms and dropout, in cases where they take other
branches than in the op's tests.

The cases are ragged tiles of tokens and features, several of them, all residuals, gradients that
are wanted alone, and rows far from zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from flat_calls import call_of, flat_of, reference_op
from torch import Tensor

import pylora
import pylora.functional as F
from pylora.backends.triton import BACKEND
from pylora.functional import Norm
from pylora.reference.dropout import dropout_mask
from pylora.testing import assert_as_accurate_as_torch

if BACKEND.unavailable() is not None:
    pytest.skip(f"no Triton kernels here: {BACKEND.unavailable()}", allow_module_level=True)

from pylora.kernels.configs import bottleneck_tile
from pylora.kernels.launch import ELSEWHERE

DEVICE = BACKEND.device()
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LAYER, RMS = "layer_norm", "rms_norm"
SEED = 2**61 + 98765
ops = torch.ops.pylora


@pytest.fixture(autouse=True)
def on_triton(poisoned_buffers: None) -> Iterator[None]:
    with pylora.use_backend("triton"):
        yield


def normal(*shape: int, dtype: torch.dtype = FP32, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).to(DEVICE, dtype)


def norm(kind: str | None, hidden: int, dtype: torch.dtype) -> Norm | None:
    if kind is None:
        return None
    weight = normal(hidden, dtype=dtype)
    return Norm(kind, weight, normal(hidden, dtype=dtype) if kind == LAYER else None, 1e-6)


def arguments(
    x: Tensor,
    bottleneck: int,
    before: str | None = None,
    after: str | None = None,
    p: float = 0.0,
    residual: Tensor | None = None,
    adds: bool = True,
    dtype: torch.dtype | None = None,
    activation: str = "silu",
) -> tuple[Any, ...]:
    """Returns the arguments of the op.

    adds     False if there is no residual
    dtype    of the adapter; that of x if None
    """
    hidden, dtype = x.shape[1], dtype or x.dtype
    call = F.CALLS["bottleneck_adapter"](
        x,
        normal(bottleneck, hidden, dtype=dtype, scale=hidden**-0.5),
        normal(bottleneck, dtype=dtype),
        normal(hidden, bottleneck, dtype=dtype, scale=bottleneck**-0.5),
        normal(hidden, dtype=dtype),
        activation,
        0.7,
        residual,
        adds,
        p,
        SEED if p else None,
        norm(before, hidden, dtype),
        norm(after, hidden, dtype),
    )
    return flat_of(call)


def backward_arguments(forward: tuple[Any, ...], grad: Tensor) -> tuple[Any, ...]:
    """Returns the arguments of the backward, which computes all gradients."""
    x, residual, adds, *adapter = forward
    tensors = call_of("bottleneck_adapter", *forward).adapter.tensors
    wanted = [True, *(tensor is not None for tensor in tensors)]
    return (grad, x, adds and residual is None, *adapter, wanted)


def check(forward: tuple[Any, ...], grad: Tensor) -> None:
    """The result and all gradients must be as accurate as those of the reference."""
    y = ops.bottleneck_adapter(*forward)
    assert_as_accurate_as_torch(y, reference_op("bottleneck_adapter"), *forward)
    backward = backward_arguments(forward, grad)
    assert_as_accurate_as_torch(
        ops.bottleneck_adapter_backward(*backward),
        reference_op("bottleneck_adapter_backward"),
        *backward,
    )


@pytest.mark.parametrize(
    ("before", "after", "p", "dtype", "adapter_dtype"),
    [
        (LAYER, None, 0.0, BF16, FP32),
        (RMS, None, 0.2, FP16, FP16),
        (None, LAYER, 0.0, BF16, FP32),
        (None, RMS, 0.2, BF16, BF16),
        (None, None, 0.2, BF16, FP32),
        (None, None, 0.2, BF16, BF16),
        (LAYER, LAYER, 0.2, FP32, FP32),
        (LAYER, RMS, 0.2, BF16, BF16),
        (RMS, LAYER, 0.0, FP32, BF16),
    ],
)
def test_norms_and_dropout_obey_the_numerics_rule(
    before: str | None,
    after: str | None,
    p: float,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
) -> None:
    """There are several tiles of tokens and of features, and the last of them are not full."""
    is_fp32 = FP32 in (dtype, adapter_dtype)
    tokens, hidden, bottleneck = 23, 150 if is_fp32 else 286, 45
    config = bottleneck_tile(tokens, bottleneck, is_fp32, ELSEWHERE)
    assert tokens > config.block_m and hidden > 2 * config.block_k
    x = normal(tokens, hidden, dtype=dtype)
    forward = arguments(x, bottleneck, before, after, p, dtype=adapter_dtype)
    check(forward, normal(tokens, hidden, dtype=dtype))


@pytest.mark.parametrize(
    ("tokens", "hidden", "bottleneck"), [(17, 64, 150), (9, 1, 3), (1, 160, 8)]
)
@pytest.mark.parametrize("residual", ["x", "another", "none"])
def test_residuals_and_odd_sizes_obey_the_numerics_rule(
    tokens: int, hidden: int, bottleneck: int, residual: str
) -> None:
    """Here x, the residual and the gradient are parts of wider matrices."""
    x, another, grad = (normal(tokens, hidden + 3)[:, :hidden] for _ in range(3))
    given = another if residual == "another" else None
    check(arguments(x, bottleneck, LAYER, RMS, 0.3, given, residual != "none"), grad)


@pytest.mark.parametrize(("before", "after"), [(LAYER, None), (None, LAYER)])
def test_rows_far_from_zero_lose_no_digits(before: str | None, after: str | None) -> None:
    """The rows of x and of what norm_after takes are thousands of deviations away from zero."""
    x = normal(16, 200) + (3000 if before else 0)
    forward = list(arguments(x, 20, before, after))
    up_bias = 6
    forward[up_bias] = forward[up_bias] + (3000 if after else 0)
    check(tuple(forward), normal(16, 200))


@pytest.mark.parametrize("columns", [64, 52, 45])
def test_mask_is_the_references_bit_for_bit(columns: int) -> None:
    """The bottleneck of each token is a row of the identity, so y and dup show the mask."""
    tokens, p = 21, 0.4
    keep = dropout_mask(torch.Size((tokens, columns)), p, torch.tensor(SEED, device=DEVICE))
    eye, ones = torch.eye(tokens, device=DEVICE), torch.ones(tokens, columns, device=DEVICE)
    x = torch.eye(tokens, columns, device=DEVICE)
    down, up = x.clone(), ones.t().contiguous()
    assert torch.equal(x @ down.t(), eye)
    forward = flat_of(
        F.CALLS["bottleneck_adapter"](
            x, down, None, up, None, "identity", 1.0, None, False, p, SEED, None, None
        )
    )
    y = ops.bottleneck_adapter(*forward)
    assert torch.equal(y != 0, keep)
    _, _, _, dup, *_ = ops.bottleneck_adapter_backward(*backward_arguments(forward, ones))
    assert torch.equal(dup.t() != 0, keep)
    torch.testing.assert_close(y, keep / (1 - p))
    torch.testing.assert_close(dup.t(), y)


@pytest.mark.parametrize(("before", "after", "p"), [(LAYER, LAYER, 0.2), (None, None, 0.2)])
def test_only_the_gradients_asked_for_are_computed(
    before: str | None, after: str | None, p: float
) -> None:
    """Each gradient is the same if no other one is wanted."""
    x, grad = normal(12, 48, dtype=BF16), normal(12, 48, dtype=BF16)
    forward = arguments(x, 12, before, after, p, dtype=FP32)
    *backward, mask = backward_arguments(forward, grad)
    expected = ops.bottleneck_adapter_backward(*backward, mask)
    for place, is_wanted in enumerate(mask):
        alone = [is_wanted and other == place for other in range(len(mask))]
        results = ops.bottleneck_adapter_backward(*backward, alone)
        assert [result.numel() > 0 for result in results] == alone
        torch.testing.assert_close(results[place], expected[place])


def test_results_repeat_bit_for_bit() -> None:
    """The sums of the programs are added in order, without float atomics."""
    x, grad = normal(40, 80, dtype=BF16), normal(40, 80, dtype=BF16)
    forward = arguments(x, 24, LAYER, RMS, 0.1, dtype=FP32, activation="gelu")
    backward = backward_arguments(forward, grad)
    for op, call in (
        (ops.bottleneck_adapter, forward),
        (ops.bottleneck_adapter_backward, backward),
    ):
        first, second = op(*call), op(*call)
        for a, b in zip([*first], [*second], strict=True):
            assert torch.equal(a, b)
