"""The CUDA kernels run on the CPU under sanitizers: see host_cuda/README.md."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from flat_calls import reference_op
from host_cuda import BACKWARD_KERNELS, DTYPES, SEEDS, SMALL_M_KERNELS, run
from host_cuda.linear import ADAPTERS, check_linear, check_linear_backward
from torch import Tensor

from pylora import nf4
from pylora.reference.activation import ACTIVATIONS

DEQUANTIZE_CTA = 8 * 1024  # elements
QUANTIZE_TILE = 4096


# nf4_dequantize


@pytest.fixture(scope="module")
def nf4_dequantize(compiled) -> Path:
    return compiled("nf4_dequantize", "nf4/nf4_dequantize")


@pytest.mark.parametrize(
    ("shape", "blocksize", "gap", "misalign"),
    [
        ((1, DEQUANTIZE_CTA + 3 * 1024), 64, 0, 0),  # the last CTA is not full
        ((1, 1024 + 8), 32, 0, 0),  # whole tiles and a remainder
        ((1, 2 * 1024 + 333), 64, 0, 0),  # an odd count
        ((2, 4 * 1024), 4096, 0, 0),  # a block that covers several tiles
        ((7, 11), 32, 0, 0),  # less than a tile
        ((1, 1024 + 64), 64, 0, 1),  # 16-byte loads are impossible
        ((3, 1024), 64, 16, 0),  # each tile is one row
        ((5, 1024 + 128 + 8), 64, 8, 0),  # tiles of two rows, blocks of two rows, a remainder
        ((2, 3 * 1024 + 320), 128, 40, 0),
        ((5, 1024 + 128), 64, 2, 0),  # 16-byte stores are impossible
        ((5, 1024 + 129), 64, 7, 0),
        ((9, 320), 32, 16, 0),  # a tile would cover more than two rows
    ],
)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_equals_the_reference_bit_for_bit(
    nf4_dequantize, dtype, nested, shape, blocksize, gap, misalign
):
    """The memory between the rows stays as it was."""
    rows, cols = shape
    stride, numel = cols + gap, rows * cols
    generator = torch.Generator().manual_seed(numel + blocksize)
    blocks = -(-numel // blocksize)
    nested_blocksize = 4
    qweight = torch.randint(0, 256, (-(-numel // 2),), dtype=torch.uint8, generator=generator)
    absmax = torch.randn(blocks, generator=generator).abs()
    nested_absmax = nested_code = offset = None
    arrays = [absmax]
    if nested:
        absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=generator)
        nested_absmax = torch.rand(-(-blocks // nested_blocksize), generator=generator)
        nested_code = torch.linspace(-1, 1, 256)
        offset = torch.tensor(0.3)
        arrays = [absmax, nested_absmax, nested_code, offset]
    header = [rows, cols, stride, blocksize, nested_blocksize, nested, DTYPES.index(dtype)]

    arguments = (nested_absmax, nested_code, offset, blocksize, nested_blocksize, shape, dtype)
    expected = reference_op("nf4_dequantize")(qweight, absmax, *arguments)
    for seed in SEEDS:
        tensors = [torch.tensor([*header, misalign]), qweight, *arrays]
        stdout, _ = run(nf4_dequantize, tensors, seed)
        got = torch.frombuffer(stdout + bytearray(b"\xff" * gap * dtype.itemsize), dtype=dtype)
        got = got.view(rows, stride)
        assert torch.equal(got[:, :cols], expected)
        assert got[:, cols:].isnan().all()


# nf4_quantize


@pytest.fixture(scope="module")
def nf4_quantize(compiled) -> Path:
    return compiled("nf4_quantize", "nf4/nf4_quantize")


def assert_quantizes(program: Path, weight: Tensor, blocksize: int, misalign: int = 0) -> None:
    """Compares with the reference, which test_nf4_quantize.py compares with bitsandbytes."""
    header = [weight.numel(), blocksize, DTYPES.index(weight.dtype), misalign]
    codes, absmax = reference_op("nf4_quantize")(weight, blocksize)
    for seed in SEEDS:
        stdout, _ = run(program, [torch.tensor(header), weight], seed)
        assert torch.equal(torch.frombuffer(stdout[: codes.numel()], dtype=torch.uint8), codes)
        got = torch.frombuffer(stdout[codes.numel() :], dtype=torch.int32)
        assert torch.equal(got, absmax.view(torch.int32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocksize", nf4.BLOCKSIZES)
def test_quantize_equals_the_reference_bit_for_bit(
    nf4_quantize, blocksize: int, dtype: torch.dtype
):
    remainder = blocksize + blocksize // 2 + 1  # a whole block, and an odd part of a block
    assert_quantizes(nf4_quantize, torch.randn(2 * QUANTIZE_TILE + remainder).to(dtype), blocksize)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("numel", "misalign"), [(1, 0), (62, 0), (96, 0), (QUANTIZE_TILE + 7, 1)])
def test_quantize_takes_short_and_unaligned_weights(
    nf4_quantize, numel: int, misalign: int, dtype: torch.dtype
):
    assert_quantizes(nf4_quantize, torch.randn(numel).to(dtype), 64, misalign)


@pytest.mark.parametrize("short", [False, True])
def test_quantize_rounds_ties_down_and_keeps_denormals(nf4_quantize, short: bool):
    """The weights are every midpoint and its neighbours, in whole tiles and short last blocks."""
    midpoints = nf4.nf4_midpoints(torch.device("cpu"))
    up, down = (torch.nextafter(midpoints, torch.tensor(x)) for x in (2.0, -2.0))
    around = torch.cat(
        [torch.ones(1), midpoints, up, down, torch.zeros(18)]
    )  # a block whose absmax is 1
    scales = torch.exp2(torch.linspace(-149, 124, QUANTIZE_TILE // 64).round())[:, None]
    weight = torch.cat([around * scales, -around * scales, torch.randn(64, 64) * scales])
    weight = torch.cat([weight, torch.zeros(64, 64), torch.full((64, 64), 1e-39)])
    if short:
        for row in weight[::7]:
            assert_quantizes(nf4_quantize, row[:63].clone(), 64)
    else:
        assert_quantizes(nf4_quantize, weight, 64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_equals_the_reference_on_every_16_bit_value(nf4_quantize, dtype: torch.dtype):
    """Blocks with absmax 1 hold every fp16 or bf16 value up to 1; for fp32, every fp16 value."""
    half = torch.arange(2**16).to(torch.int16)
    values = half.view(torch.float16 if dtype == torch.float32 else dtype).to(dtype)
    values = values[values.abs() <= 1]
    values = torch.nn.functional.pad(values, (0, -values.numel() % 63)).view(-1, 63)
    assert_quantizes(
        nf4_quantize, torch.nn.functional.pad(values, (1, 0), value=1.0).contiguous(), 64
    )


# nf4_linear and lora_linear


@pytest.fixture(scope="module")
def lora_linear(compiled) -> Path:
    return compiled("lora_linear", *SMALL_M_KERNELS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 70, 576), (3, 1, 64), (8, 70, 576), (16, 33, 320)])
def test_linear_obeys_the_numerics_rule(lora_linear, shape, dtype: torch.dtype):
    check_linear(lora_linear, shape, dtype)


@pytest.mark.parametrize("M", [17, 24, 25, 33, 45, 56, 63, 64])
def test_linear_takes_every_number_of_token_tiles(lora_linear, M: int):
    dtype = (torch.float16, torch.bfloat16)[M % 2]
    check_linear(lora_linear, (M, 70, 576), dtype, nested=M > 32, rank=12 if M < 50 else 8)


@pytest.mark.parametrize(
    ("blocksize", "nested", "K"),
    [
        (32, False, 352),
        (32, True, 96),
        (64, True, 576),
        (128, False, 384),
        (256, True, 512),
        (4096, False, 4096),
    ],
)
def test_linear_takes_every_kind_of_block(lora_linear, blocksize: int, nested: bool, K: int):
    for M in (2, 9):
        check_linear(lora_linear, (M, 40, K), blocksize=blocksize, nested=nested, biases=False)


@pytest.mark.parametrize(("M", "rank"), [(1, 16), (2, 37), (5, 1), (16, 16)])
@pytest.mark.parametrize("lora_dtype", [torch.float32, torch.float16])
def test_lora_linear_obeys_the_numerics_rule(
    lora_linear, lora_dtype: torch.dtype, M: int, rank: int
):
    check_linear(lora_linear, (M, 70, 576), torch.float16, rank=rank, lora_dtype=lora_dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_dropout_and_activation_obey_the_numerics_rule(lora_linear, activation: str):
    check_linear(
        lora_linear, (3, 50, 192), rank=8, activation=activation, dropout_p=0.3, nested=True
    )


@pytest.mark.parametrize(("M", "rank"), [(1, 16), (3, 37), (7, 8), (21, 16), (33, 5)])
@pytest.mark.parametrize("lora_dtype", [torch.float32, torch.bfloat16])
def test_each_token_gets_its_adapter(lora_linear, lora_dtype: torch.dtype, M: int, rank: int):
    """The ids are in any order. Some select no adapter, and some are out of bounds."""
    ids = torch.tensor([2, 0, 1, -1, 2, ADAPTERS, 0, -(2**40), 1, 2**40]).repeat(4)[:M]
    options = {"rank": rank, "lora_dtype": lora_dtype, "adapter_ids": ids}
    check_linear(lora_linear, (M, 70, 576), **options)


@pytest.mark.parametrize(
    ("M", "plan"),
    [
        (3, (4, 1, 1)),  # one CTA does all the work
        (3, (1, 5, 25)),  # each CTA has a chunk of K and 16 rows of W
        (3, (2, 3, 1)),  # one CTA takes all splits; the last split has one chunk less
        (64, (1, 5, 7)),
        (64, (4, 2, 3)),
    ],
)
def test_a_chosen_plan_gives_the_right_result(lora_linear, M: int, plan: tuple[int, int, int]):
    """These plans are the extremes that a sweep measures. K has 5 chunks."""
    results = []
    for seed in SEEDS:
        y, ran = check_linear(lora_linear, (M, 70, 576), rank=8, plan=plan, seed=seed)
        assert (ran["warps"], ran["splits"], ran["grid"]) == plan
        results.append(y)
    assert torch.equal(results[0], results[1])


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ((3, 1, 1), "output_warps must be 1, 2 or 4"),
        ((8, 1, 1), "output_warps must be"),
        ((4, 0, 1), "splits must be 1 to the chunks"),
        ((4, 17, 1), "splits must be 1 to the chunks"),
        ((4, 9, 1), "splits must not leave one empty"),
        ((4, 1, 1), "the x of one split fits shared memory"),
        ((4, 4, 0), "grid must be 1 to the tiles"),
        ((4, 4, 9), "grid must be 1 to the tiles"),
    ],
)
def test_a_plan_that_cannot_run_is_refused(lora_linear, plan, message: str):
    """Shared memory cannot hold 64 tokens of 16 chunks. The 70 rows of W are 2 tiles of 64."""
    with pytest.raises(AssertionError, match=message):
        check_linear(lora_linear, (64, 70, 2048), plan=plan)


@pytest.mark.parametrize(
    ("shape", "gpu", "processors", "splits"),
    [
        ((1, 16, 4096), "H200", 8, 4),  # fewer tiles than CTAs
        ((2, 144, 1152), "H200", 2, 1),  # several tiles for each CTA
        ((4, 32, 4096), "A100", 1, 4),  # x does not fit into shared memory beside the table
        ((16, 80, 2048), "L4", 1, 4),  # one CTA, which goes on from one split to the next
        ((12, 70, 1024), "A100", 30, 4),
        ((33, 130, 512), "A100", 2, 1),  # several tiles for each CTA, in passes over the tokens
        ((64, 70, 384), "L4", 1, 3),  # only one chunk of x fits into shared memory
        ((48, 16, 768), "L4", 4, 3),
    ],
)
def test_linear_does_not_depend_on_the_order_of_threads(
    lora_linear, shape, gpu: str, processors: int, splits: int
):
    """The plans cut the work in different ways."""
    results = []
    for seed in SEEDS:
        options = {"rank": 4, "processors": processors, "gpu": gpu, "seed": seed}
        y, plan = check_linear(lora_linear, shape, **options)
        assert plan["splits"] == splits
        results.append(y)
    assert all(torch.equal(y, results[0]) for y in results)


# nf4_linear_backward


@pytest.fixture(scope="module")
def nf4_linear_backward(compiled) -> Path:
    return compiled("nf4_linear_backward", *BACKWARD_KERNELS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(1, 70, 576), (3, 1, 64), (8, 96, 320), (16, 104, 192), (17, 33, 320)]
)
def test_linear_backward_obeys_the_numerics_rule(nf4_linear_backward, shape, dtype: torch.dtype):
    check_linear_backward(nf4_linear_backward, shape, dtype)


@pytest.mark.parametrize("M", [25, 33, 45, 49, 56, 63, 64])
def test_linear_backward_takes_every_number_of_token_tiles(nf4_linear_backward, M: int):
    dtype = (torch.float16, torch.bfloat16)[M % 2]
    check_linear_backward(nf4_linear_backward, (M, 136, 320), dtype, nested=M > 50)


@pytest.mark.parametrize(
    ("blocksize", "nested", "K"),
    [(64, True, 576), (128, False, 384), (256, True, 512), (4096, False, 4096)],
)
def test_linear_backward_takes_every_kind_of_block(
    nf4_linear_backward, blocksize: int, nested: bool, K: int
):
    options = {"blocksize": blocksize, "nested": nested, "misalign": 1}
    check_linear_backward(nf4_linear_backward, (9, 40, K), **options)


def test_linear_backward_keeps_small_gradients(nf4_linear_backward):
    """These gradients are so small that fp16 could not hold them after a product with absmax."""
    for M in (5, 24):
        check_linear_backward(nf4_linear_backward, (M, 520, 512), torch.float16, scale=1e-5)


@pytest.mark.parametrize(
    ("shape", "gpu", "processors", "splits"),
    [
        ((1, 2048, 192), "H200", 8, 16),  # fewer tiles than CTAs
        ((2, 136, 1152), "H200", 1, 1),  # several tiles for each CTA
        ((20, 1024, 320), "L4", 1, 2),  # grad does not fit into shared memory beside the table
        ((64, 520, 256), "L4", 1, 3),
        ((12, 1000, 576), "A100", 6, 4),
    ],
)
def test_linear_backward_does_not_depend_on_the_order_of_threads(
    nf4_linear_backward, shape, gpu: str, processors: int, splits: int
):
    """The plans cut the work in different ways."""
    results = []
    for seed in SEEDS:
        options = {"processors": processors, "gpu": gpu, "seed": seed}
        dx, got = check_linear_backward(nf4_linear_backward, shape, **options)
        assert got == splits
        results.append(dx)
    assert all(torch.equal(dx, results[0]) for dx in results)
