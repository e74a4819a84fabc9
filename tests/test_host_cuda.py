"""The CUDA kernels on the CPU, under sanitizers: see host_cuda/README.md."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pylora import nf4, reference

ROOT = Path(__file__).resolve().parents[1]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]  # in the order of the C++ enum
SEEDS = range(3)  # of the order in which threads run
DEQUANTIZE_CTA = 8 * 1024  # elements
QUANTIZE_TILE = 4096

Run = Callable[..., bytes]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Builds a program of host_cuda/ with the kernels it runs."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("host_cuda")

    def compiled(stem: str, *kernels: str) -> Path:
        sources = " ".join(f"csrc/cuda/{kernel}.cu" for kernel in kernels)
        command = f"""{compiler} -std=c++20 -O1 -Wall -Wextra -Werror -ffp-contract=off
            -Wno-unknown-pragmas -Wno-maybe-uninitialized -fsanitize=address,undefined
            -fno-sanitize-recover=all -Itests/host_cuda -Icsrc
            -x c++ {sources} tests/host_cuda/{stem}.cpp -o {folder / stem}"""
        subprocess.run(command.split(), cwd=ROOT, check=True)
        return folder / stem

    return compiled


def run(program: Path, arrays: list[Tensor], seed: int = 0) -> bytes:
    """The standard output of `program`; `seed` decides the order of its threads."""
    stdin = b"".join(bytes(x.contiguous().view(-1).view(torch.uint8).numpy()) for x in arrays)
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0", "HOST_CUDA_SEED": str(seed)}
    ran = subprocess.run([program], input=stdin, capture_output=True, env=environment)
    assert ran.returncode == 0, ran.stderr.decode()
    return ran.stdout


# nf4_dequantize


@pytest.fixture(scope="module")
def nf4_dequantize(compiled) -> Path:
    return compiled("nf4_dequantize", "nf4_dequantize")


@pytest.mark.parametrize(
    ("numel", "blocksize", "misalign"),
    [
        (DEQUANTIZE_CTA + 3 * 1024, 64, 0),  # the last CTA is not full
        (1024 + 8, 32, 0),  # whole tiles and a rest
        (2 * 1024 + 333, 64, 0),  # an odd count
        (8 * 1024, 4096, 0),  # a block over several tiles
        (77, 32, 0),  # less than a tile
        (1024 + 64, 64, 1),  # no 16-byte loads possible
    ],
)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_is_the_reference(nf4_dequantize, dtype, blocksize, nested, numel, misalign):
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
    header = [numel, blocksize, nested_blocksize, nested, DTYPES.index(dtype), misalign]

    arguments = (nested_absmax, nested_code, offset, blocksize, nested_blocksize, (numel,), dtype)
    expected = reference.nf4_dequantize(qweight, absmax, *arguments)
    for seed in SEEDS:
        stdout = run(nf4_dequantize, [torch.tensor(header), qweight, *arrays], seed)
        assert torch.equal(torch.frombuffer(bytearray(stdout), dtype=dtype), expected)


# nf4_quantize


@pytest.fixture(scope="module")
def nf4_quantize(compiled) -> Path:
    return compiled("nf4_quantize", "nf4_quantize")


def assert_quantizes(program: Path, weight: Tensor, blocksize: int, misalign: int = 0) -> None:
    """Bit for bit the reference, which is bit for bit bitsandbytes (tests/test_nf4_quantize.py)."""
    header = [weight.numel(), blocksize, DTYPES.index(weight.dtype), misalign]
    codes, absmax = reference.nf4_quantize(weight, blocksize)
    for seed in SEEDS:
        stdout = bytearray(run(program, [torch.tensor(header), weight], seed))
        assert torch.equal(torch.frombuffer(stdout[: codes.numel()], dtype=torch.uint8), codes)
        got = torch.frombuffer(stdout[codes.numel() :], dtype=torch.int32)
        assert torch.equal(got, absmax.view(torch.int32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocksize", nf4.BLOCKSIZES)
def test_quantize_is_the_reference(nf4_quantize, blocksize: int, dtype: torch.dtype):
    rest = blocksize + blocksize // 2 + 1  # a whole block, and an odd part of one
    assert_quantizes(nf4_quantize, torch.randn(2 * QUANTIZE_TILE + rest).to(dtype), blocksize)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("numel", "misalign"), [(1, 0), (62, 0), (96, 0), (QUANTIZE_TILE + 7, 1)])
def test_quantize_block_by_block(nf4_quantize, numel: int, misalign: int, dtype: torch.dtype):
    assert_quantizes(nf4_quantize, torch.randn(numel).to(dtype), 64, misalign)


@pytest.mark.parametrize("short", [False, True])
def test_quantize_rounds_ties_down_and_keeps_denormals(nf4_quantize, short: bool):
    """Every midpoint and its neighbours, in whole tiles and in a short last block."""
    midpoints = nf4.nf4_midpoints(torch.device("cpu"))
    up, down = (torch.nextafter(midpoints, torch.tensor(x)) for x in (2.0, -2.0))
    around = torch.cat([torch.ones(1), midpoints, up, down, torch.zeros(18)])  # a block, absmax 1
    scales = torch.exp2(torch.linspace(-149, 124, QUANTIZE_TILE // 64).round())[:, None]
    weight = torch.cat([around * scales, -around * scales, torch.randn(64, 64) * scales])
    weight = torch.cat([weight, torch.zeros(64, 64), torch.full((64, 64), 1e-39)])
    if short:
        for row in weight[::7]:
            assert_quantizes(nf4_quantize, row[:63].clone(), 64)
    else:
        assert_quantizes(nf4_quantize, weight, 64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_every_16_bit_value(nf4_quantize, dtype: torch.dtype):
    """All finite fp16 or bf16 values as s, behind an absmax of 1 (fp32: those of fp16)."""
    half = torch.arange(2**16).to(torch.int16)
    values = half.view(torch.float16 if dtype == torch.float32 else dtype).to(dtype)
    values = values[values.abs() <= 1]
    values = torch.nn.functional.pad(values, (0, -values.numel() % 63)).view(-1, 63)
    assert_quantizes(
        nf4_quantize, torch.nn.functional.pad(values, (1, 0), value=1.0).contiguous(), 64
    )


# The executor itself


@pytest.fixture(scope="module")
def mutants(compiled) -> Path:
    return compiled("mutants")


WRONG = "the result is wrong"
OUTSIDE = "heap-buffer-overflow"
BUGS = {
    "missing __syncthreads": WRONG,
    "missing __syncthreads before the next write": WRONG,
    "missing __syncwarp": WRONG,
    "missing cp.async wait": WRONG,
    "cp.async waits for a group too few": WRONG,
    "missing barrier after the cp.async wait": WRONG,
    "step outside shared memory": OUTSIDE,
    "step outside global memory": OUTSIDE,
    "lanes in different shuffles": "threads of one group are in different operations",
    "wrong map of A": WRONG,
    "wrong map of B": WRONG,
    "B not transposed": WRONG,
}


@pytest.mark.parametrize("bug", ["none", *BUGS])
def test_the_executor_sees_a_bug_of_each_kind(mutants: Path, bug: str):
    for seed in SEEDS:
        environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0", "HOST_CUDA_SEED": str(seed)}
        ran = subprocess.run([mutants, bug], capture_output=True, env=environment, text=True)
        assert (ran.returncode == 0) == (bug == "none"), f"seed {seed}: {ran.stderr}"
        assert BUGS.get(bug, "") in ran.stderr
