"""The CUDA kernels for many tokens run on the CPU under sanitizers: see host_cuda/README.md."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from flat_calls import reference_op
from host_cuda import DRIVER, DTYPES, HOPPER_KERNELS, SEEDS, run, start
from host_cuda.linear import check_linear
from torch import Tensor

import pylora
from pylora.reference.activation import ACTIVATIONS
from pylora.testing import assert_as_accurate_as_torch

# lora_linear_hopper


@pytest.fixture(scope="module")
def hopper(compiled) -> Path:
    return compiled("lora_linear_hopper", *HOPPER_KERNELS, twins=DRIVER)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "processors", "tile_tokens", "tiles", "splits"),
    [
        (
            (300, 120, 640),
            1,
            128,
            3,
            1,
        ),  # goes round all stages several times, and ends within a tile
        ((250, 200, 384), 1, 256, 2, 1),
        ((128, 128, 64), 132, 128, 1, 1),  # one block in each row
        ((130, 70, 1088), 5, 128, 2, 2),  # the second split has one K tile less
    ],
)
def test_hopper_does_not_depend_on_the_order_of_threads(
    hopper, shape, processors, tile_tokens, tiles, splits, dtype: torch.dtype
):
    """The result also does not depend on when copies land."""
    results = []
    for seed in SEEDS:
        y, plan = check_linear(hopper, shape, dtype, processors=processors, seed=seed)
        grid = min(tiles * splits, processors)
        expected = {"tokens": tile_tokens, "tiles": tiles, "splits": splits, "grid": grid}
        assert plan == expected
        results.append(y)
    assert torch.equal(results[0], results[1])


def test_hopper_adds_splits_in_any_order_of_threads(hopper):
    """If a split were counted before it is written, half of the orders would show it."""
    for seed in range(8):
        _, plan = check_linear(hopper, (20, 128, 1536), biases=False, processors=3, seed=seed)
        assert (plan["tiles"], plan["splits"]) == (1, 3)


def test_hopper_splits_a_wide_tile(hopper):
    _, plan = check_linear(hopper, (250, 70, 2816), rank=4, processors=3)
    assert (plan["tokens"], plan["tiles"], plan["splits"]) == (256, 1, 3)


@pytest.mark.parametrize("plan", [(128, 17, 34), (128, 1, 1), (256, 9, 4)])
def test_hopper_runs_a_chosen_plan(hopper, plan: tuple[int, int, int]):
    """These plans are the extremes that a sweep measures. K has 17 tiles; x has 2 tiles or 1."""
    for seed in SEEDS:
        _, ran = check_linear(hopper, (130, 70, 1088), rank=4, plan=plan, seed=seed)
        assert (ran["tokens"], ran["splits"], ran["grid"]) == plan


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ((64, 1, 1), "tile_tokens must be 128 or 256"),
        ((128, 0, 1), "splits must be 1 to the K tiles"),
        ((128, 18, 1), "splits must be 1 to the K tiles"),
        ((128, 10, 1), "splits must not leave one empty"),
        ((128, 1, 3), "grid must be 1 to the tiles"),
        ((256, 1, 0), "grid must be 1 to the tiles"),
    ],
)
def test_hopper_refuses_a_plan_it_cannot_run(hopper, plan, message: str):
    with pytest.raises(AssertionError, match=message):
        check_linear(hopper, (130, 70, 1088), plan=plan)


@pytest.mark.parametrize(
    ("blocksize", "nested", "K"), [(64, True, 576), (128, False, 320), (4096, True, 448)]
)
def test_hopper_takes_every_kind_of_block(hopper, blocksize: int, nested: bool, K: int):
    """The last two kinds straddle rows. 133 outputs cannot be stored 16 bytes at a time."""
    shape = (131, 133, K)
    check_linear(hopper, shape, blocksize=blocksize, nested=nested, biases=False)


@pytest.mark.parametrize(
    ("shape", "rank", "dtype", "lora_dtype"),
    [
        ((250, 70, 128), 16, torch.bfloat16, torch.bfloat16),  # a tile of 256 tokens
        ((20, 200, 576), 1, torch.float16, torch.float16),
        ((20, 200, 192), 37, torch.bfloat16, torch.bfloat16),  # low takes two stages
        ((20, 200, 192), 9, torch.bfloat16, torch.float32),
        ((20, 200, 192), 33, torch.float16, torch.float32),
    ],
)
def test_hopper_lora_obeys_the_numerics_rule(
    hopper, shape, rank: int, dtype: torch.dtype, lora_dtype: torch.dtype
):
    """A CTA has two tiles of the 200 outputs. For the second tile, low is there already."""
    for seed in SEEDS:
        options = {"rank": rank, "lora_dtype": lora_dtype, "processors": 1, "seed": seed}
        check_linear(hopper, shape, dtype, **options)


@pytest.mark.parametrize("lora_dtype", [torch.bfloat16, torch.float32])
def test_hopper_dropout_and_activation_obey_the_numerics_rule(hopper, lora_dtype: torch.dtype):
    options = {"rank": 8, "lora_dtype": lora_dtype, "nested": True}
    check_linear(hopper, (35, 50, 192), activation="gelu", dropout_p=0.3, **options)


def test_hopper_maps_cover_everything_once(compiled):
    ran = start(compiled("hopper_maps"))
    assert ran.returncode == 0, ran.stderr.decode()


# lora_extend


@pytest.fixture(scope="module")
def lora_extend(compiled) -> Path:
    return compiled("lora_extend", "many_rows/lora_shrink")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "cols", "rank", "activation", "dropout_p"),
    [
        (16, 64, 8, "identity", 0.0),
        (19, 192, 16, "identity", 0.0),
        (5, 576, 1, "gelu", 0.0),  # 7 columns of zeros
        (33, 128, 37, "silu", 0.0),  # two CTAs share the rank, and one of them copies x
        (17, 320, 24, "identity", 0.3),  # x is copied without dropout
    ],
)
def test_extend_writes_x_low_and_zeros(
    lora_extend, tokens, cols, rank, activation, dropout_p, dtype: torch.dtype
):
    """x and the zeros of [x | scaling * act(h) | 0] are exact; low is judged by its product."""
    generator = torch.Generator().manual_seed(tokens + cols + rank)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    x, lora_A = normal(tokens, cols), normal(rank, cols) / cols**0.5
    A_bias = normal(rank) if rank > 1 else None
    seed = torch.tensor(-1234567890123) if dropout_p else None
    header = [tokens, cols, rank, DTYPES.index(dtype), A_bias is not None]
    header += [list(ACTIVATIONS).index(activation), seed is not None]
    numbers = torch.tensor([0.5, dropout_p], dtype=torch.float64)
    tensors = [torch.tensor(header), numbers, x, lora_A, A_bias, seed]
    w = pylora.quantize_nf4(normal(40, cols).float() / cols**0.5)
    lora_B = normal(40, rank)
    trailing = (None, A_bias, None, 0.5, dropout_p, seed, activation)
    arguments = (x, *w.op_arguments(), 40, lora_A, lora_B, *trailing)
    padded = -(-rank // 8) * 8
    results = []
    for order in SEEDS:
        stdout, _ = run(lora_extend, [t for t in tensors if t is not None], order)
        wide_bytes = 2 * tokens * (cols + padded)
        wide = torch.frombuffer(stdout[:wide_bytes], dtype=dtype).view(tokens, cols + padded)
        h = torch.frombuffer(stdout[wide_bytes:], dtype=torch.float32).view(tokens, rank)
        assert torch.equal(wide[:, :cols], x)
        assert not wide[:, cols + rank :].any()
        right = torch.cat([pylora.dequantize_nf4(w, dtype), lora_B], dim=1)
        y = (wide[:, : cols + rank].float() @ right.float().t()).to(dtype)
        assert_as_accurate_as_torch((y, h), reference_op("lora_linear"), *arguments)
        results.append(wide)
    assert torch.equal(*results)
