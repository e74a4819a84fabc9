"""The CUDA kernels on the CPU, under sanitizers: see host_cuda/README.md."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from pylora import reference

ROOT = Path(__file__).resolve().parents[1]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]  # in the order of the C++ enum
CTA = 8 * 1024  # elements


@pytest.fixture(scope="module")
def nf4_dequantize(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path_factory.mktemp("host_cuda") / "nf4_dequantize"
    command = f"""{compiler} -std=c++20 -O1 -pthread -ffp-contract=off -Wno-unknown-pragmas
        -fsanitize=address,undefined -fno-sanitize-recover=all -Itests/host_cuda -Icsrc
        -x c++ csrc/cuda/nf4_dequantize.cu tests/host_cuda/nf4_dequantize.cpp -o {program}"""
    subprocess.run(command.split(), cwd=ROOT, check=True)
    return program


@pytest.mark.parametrize(
    ("numel", "blocksize", "misalign"),
    [
        (CTA + 3 * 1024, 64, 0),  # the last CTA is not full
        (1024 + 8, 32, 0),  # whole tiles and a rest
        (2 * 1024 + 333, 64, 0),  # an odd count
        (8 * 1024, 4096, 0),  # a block over several tiles
        (77, 32, 0),  # less than a tile
        (1024 + 64, 64, 1),  # no 16-byte loads possible
    ],
)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_reference(nf4_dequantize, dtype, blocksize, nested, numel, misalign):
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
    stdin = b"".join(x.numpy().tobytes() for x in [torch.tensor(header), qweight, *arrays])
    no_leak_report = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    ran = subprocess.run([nf4_dequantize], input=stdin, capture_output=True, env=no_leak_report)
    assert ran.returncode == 0, ran.stderr.decode()
    got = torch.frombuffer(bytearray(ran.stdout), dtype=dtype)

    arguments = (nested_absmax, nested_code, offset, blocksize, nested_blocksize, (numel,), dtype)
    expected = reference.nf4_dequantize(qweight, absmax, *arguments)
    assert torch.equal(got, expected)
