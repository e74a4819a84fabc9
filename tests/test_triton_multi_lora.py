"""The Triton kernels of multi_lora_linear in cases where they take other branches than in the op's
tests.

The cases are the regimes, split sums, several tiles and pieces of an adapter, and ids that only a
device may hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from flat_calls import chosen, flat_of, reference_op, refusal_of
from torch import Tensor

import pylora
import pylora.functional as F
from pylora.backends.triton import BACKEND
from pylora.testing import assert_as_accurate_as_torch

if BACKEND.unavailable() is not None:
    pytest.skip(f"no Triton kernels here: {BACKEND.unavailable()}", allow_module_level=True)

from pylora.calls import Adapters, Layer, Wanted, Weight
from pylora.kernels import adapter_tokens, configs, launch
from pylora.kernels.multi_lora_linear import multi_lora_linear
from pylora.kernels.multi_lora_linear_backward import multi_lora_linear_backward

DEVICE = BACKEND.device()
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ops = torch.ops.pylora


@pytest.fixture(autouse=True)
def on_triton(poisoned_buffers: None) -> Iterator[None]:
    with pylora.use_backend("triton"):
        yield


def normal(*shape: int, dtype: torch.dtype = FP32, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).to(DEVICE, dtype)


def arguments(
    ids: Tensor,
    out_features: int,
    in_features: int,
    adapters: int,
    rank: int,
    dtype: torch.dtype,
    lora_dtype: torch.dtype | None = None,
    nested: bool = False,
    dense: bool = False,
) -> tuple[Any, ...]:
    """Returns the arguments of the op, with a bias."""
    scale, lora_dtype = in_features**-0.5, lora_dtype or dtype
    weight: Any = normal(out_features, in_features, dtype=dtype, scale=scale)
    if not dense:
        with pylora.use_backend("reference"):
            weight = pylora.quantize_nf4(weight.float().cpu(), 64, nested).to(DEVICE)
    stacks = (
        normal(adapters, rank, in_features, dtype=lora_dtype, scale=scale),
        normal(adapters, out_features, rank, dtype=lora_dtype),
    )
    x, bias = normal(len(ids), in_features, dtype=dtype), normal(out_features, dtype=dtype)
    scalings = (torch.rand(adapters) + 0.5).to(DEVICE)
    ours = (x, weight, *stacks, ids.to(DEVICE), scalings, bias)
    return flat_of(F.CALLS["multi_lora_linear"](*ours))


def backward_arguments(forward: tuple[Any, ...], h: Tensor) -> tuple[Any, ...]:
    x, *base, out_features = forward[:9]
    grad = normal(x.shape[0], out_features, dtype=x.dtype)
    return (grad, x, h, *base, *forward[9:13], [True, False, True, True, True])


def check(forward: tuple[Any, ...]) -> None:
    assert chosen("multi_lora_linear", *forward) == "triton"
    assert_as_accurate_as_torch(
        ops.multi_lora_linear(*forward), reference_op("multi_lora_linear"), *forward
    )
    backward = backward_arguments(forward, reference_op("multi_lora_linear")(*forward)[1])
    assert chosen("multi_lora_linear_backward", *backward) == "triton"
    assert_as_accurate_as_torch(
        ops.multi_lora_linear_backward(*backward),
        reference_op("multi_lora_linear_backward"),
        *backward,
    )


@pytest.mark.parametrize("most_counted", [10**6, 0])
@pytest.mark.parametrize(("tokens", "adapters"), [(1, 1), (5, 40), (300, 3), (130, 60), (33, 300)])
def test_every_token_is_in_one_tile_of_its_adapter(
    tokens: int, adapters: int, most_counted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ids are grouped by counting or by sorting. Python numbers the tiles as `tile_of` does."""
    monkeypatch.setattr(
        adapter_tokens, "ADAPTER_TOKENS", replace(configs.ADAPTER_TOKENS, most_counted=most_counted)
    )
    for low in (-2, adapters - 1):
        ids = torch.randint(low, adapters + 2, (tokens,))
        ids[0] = 2**40
        grouped = adapter_tokens.adapter_tokens(ids.to(DEVICE), adapters)
        group = torch.where((ids >= 0) & (ids < adapters), ids, adapters)
        assert torch.equal(grouped.order.cpu(), group.sort(stable=True).indices)
        sizes = group.bincount(minlength=adapters + 1)
        assert grouped.begin.diff().tolist() == sizes.tolist() and grouped.begin[0] == 0
        for size in (4, 16, 64):
            by_place = grouped.arguments(size)["by_place"]
            taken = [
                (begin if by_place else begin // size + index) + tile
                for index, begin in enumerate(grouped.begin[:-1].tolist())
                for tile in range(-(-int(sizes[index]) // size))
            ]
            assert len(set(taken)) == len(taken) and max(taken) < grouped.tiles(size)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("lora_dtype", [None, FP32])
def test_large_m_obeys_the_numerics_rule(
    dtype: torch.dtype, lora_dtype: torch.dtype | None
) -> None:
    """The dense product is finished in place. Some adapters have several tiles, one has none."""
    tokens = 530 if dtype.itemsize == 2 else 170
    assert configs.is_large(tokens, dtype.itemsize)
    ids = torch.randint(-1, 3, (tokens,))
    ids[ids == 1] = 3
    check(arguments(ids, 40, 128, 5, 20, dtype, lora_dtype, nested=True))


@pytest.mark.parametrize("tokens", [1, 6, 37])
@pytest.mark.parametrize("dtype", [FP16, FP32])
def test_split_sums_obey_the_numerics_rule(tokens: int, dtype: torch.dtype) -> None:
    """A long K or N is split. The parts of the base and of the projection are added in order."""
    facts, long = launch.facts(normal(1)), 1088
    ids = torch.arange(tokens) % 4 - 1
    ids[0] = 2
    assert configs.forward_plan(tokens, [40], long, dtype.itemsize, 64, facts).splits > 1
    assert configs.backward_plan(tokens, [long], 64, dtype.itemsize, 64, facts).splits > 1
    check(arguments(ids, 40, long, 3, 17, dtype, nested=True))
    check(arguments(ids, long, 64, 3, 17, dtype))


@pytest.mark.parametrize("dense", [True, False])
def test_weight_gradients_add_up_the_pieces_of_an_adapter(dense: bool) -> None:
    """Adapters have several pieces, one piece, or none. Blocks of the NF4 weight straddle rows."""
    tokens, columns = 900, 45 if dense else 70
    config = configs.weight_grad_config(tokens, columns, 9, False, launch.facts(normal(1)))
    assert config[1] > 1 and config[2] < 500
    ids = torch.cat([torch.full((700,), 1), torch.full((90,), 0), torch.full((110,), 3)])
    check(arguments(ids[torch.randperm(tokens)], 33, columns, 4, 9, BF16, dense=dense))


def test_more_adapters_than_tokens_and_a_large_rank_are_taken() -> None:
    check(arguments(torch.tensor([69, 3, -1, 69, 0]), 40, 96, 70, 8, BF16, FP32))
    check(arguments(torch.tensor([1, 1, -1, 0] * 5), 24, 128, 2, 512, FP16))


def lora_of(forward: tuple[Any, ...], ids: Tensor) -> Adapters:
    return Adapters(forward[9], forward[10], ids.to(DEVICE), forward[12])


def test_ids_out_of_range_use_only_the_base() -> None:
    """Ids on a device are not checked, so the kernels must read nothing beyond the adapters."""
    wild = torch.tensor([3, -(2**33), 0, 2**32 + 1, -1, 2, 4, 2**62] * 3)
    kept = torch.where((wild >= 0) & (wild < 3), wild, -1)
    forward = arguments(kept, 40, 128, 3, 8, FP32, dense=True)
    x, weight, bias = forward[0], forward[1], forward[13]
    grad = normal(len(kept), 40)
    results = []
    for ids in (wild, kept):
        lora = lora_of(forward, ids)
        layer = Layer(Weight.dense(weight), bias)
        y, h = multi_lora_linear(x, layer, lora)
        assert not h[(kept < 0).to(DEVICE)].any()
        wanted = Wanted(x=True, A=True, B=True)
        gradients = multi_lora_linear_backward(grad, x, h, layer, lora, wanted)
        results.append([y, h, gradients.x, gradients.A, gradients.B])
    assert all(map(torch.equal, *results))
    check(forward)


@pytest.mark.parametrize("tokens", [40, 700])
def test_a_nan_of_an_adapter_reaches_no_other(tokens: int) -> None:
    """The NaN is in an adapter's last token, beside the first token of another adapter."""
    ids = torch.arange(tokens) * 4 // tokens - 1
    forward = arguments(ids, 40, 1088 if tokens < 100 else 96, 3, 17, BF16)
    other_tokens = (ids != 1).to(DEVICE)
    results = []
    for poison in (False, True):
        args = list(forward)
        h = ops.multi_lora_linear(*args)[1]
        backward = list(backward_arguments(tuple(args), h))
        torch.manual_seed(5)
        backward[0] = normal(tokens, 40, dtype=BF16)
        if poison:
            last_token = int((ids == 1).nonzero()[-1])
            for tensors, index in ((args, 0), (backward, 0), (backward, 1), (backward, 2)):
                tensors[index] = tensors[index].clone()
                tensors[index][last_token] = torch.nan
            args[9], args[10] = args[9].clone(), args[10].clone()
            args[9][1], args[10][1] = torch.inf, torch.nan
        y, h = ops.multi_lora_linear(*args)
        dx, _, dlora_A, dlora_B, _ = ops.multi_lora_linear_backward(*backward)
        if poison:
            assert y[~other_tokens].isnan().all() and dlora_A[1].isnan().any()
            assert dlora_B[1].isnan().any()
        results.append(
            [y[other_tokens], h[other_tokens], dx[other_tokens], dlora_A[[0, 2]], dlora_B[[0, 2]]]
        )
    assert all(map(torch.equal, *results))


def test_only_wanted_gradients_are_computed_and_strided_x_is_taken() -> None:
    forward = arguments(torch.randint(-1, 3, (300,)), 40, 128, 3, 8, FP32)
    x = normal(300, 200)[:, 8:136]
    assert not x.is_contiguous()
    forward = (x, *forward[1:])
    check(forward)
    backward = backward_arguments(forward, ops.multi_lora_linear(*forward)[1])
    everything = ops.multi_lora_linear_backward(*backward)
    for wanted in range(5):
        mask = [position == wanted and wanted != 1 for position in range(5)]
        some = ops.multi_lora_linear_backward(*backward[:-1], mask)
        for gradient, expected, is_wanted in zip(some, everything, mask, strict=True):
            assert torch.equal(gradient, expected) if is_wanted else gradient.shape == (0,)


def test_a_refusal_says_why() -> None:
    forward = arguments(torch.tensor([0, 1]), 40, 128, 2, 8, FP32)
    why_not = partial(refusal_of, BACKEND, "multi_lora_linear")
    assert why_not(*forward) is None
    assert "x is torch.float64" in why_not(forward[0].double(), *forward[1:])
    empty = (*forward[:9], forward[9][:0], forward[10][:0], *forward[11:])
    assert why_not(*empty) == "lora_A has no adapters"


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
def test_a_cuda_graph_can_be_replayed_on_other_ids() -> None:
    """The graph is captured once, and then the ids change."""
    forward = arguments(torch.randint(-1, 4, (24,)), 256, 512, 4, 16, BF16, nested=True)
    _, h = ops.multi_lora_linear(*forward)
    grad, x, _, *others = backward_arguments(forward, h)
    ops.multi_lora_linear_backward(grad, x, h, *others)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, h = ops.multi_lora_linear(*forward)
        gradients = ops.multi_lora_linear_backward(grad, x, h, *others)
    forward[11].copy_(torch.randint(-1, 4, (24,)))
    graph.replay()
    assert torch.equal(y, ops.multi_lora_linear(*forward)[0])
    assert all(gradient.isfinite().all() for gradient in gradients)
