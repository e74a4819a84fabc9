"""csrc/cuda/hopper/tensor_map.cu asks cuTensorMapEncodeTiled only for what it allows.

The driver's stand-in, host_cuda/driver.cpp, makes the demands of the documentation of CUDA 13.0.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from host_cuda import DRIVER, HOPPER_KERNELS, start
from host_cuda.linear import check_linear

# The enumerators of cuda.h.
UINT8, UINT16, FLOAT32 = 0, 1, 7
SWIZZLE_32B, SWIZZLE_128B = 1, 3
L2_PROMOTION_128B = 2

ALIGNED = "globalAddress must be aligned to 16 bytes"
SIZES = "globalDim must be from 1 to 2^32"
BOX = "boxDim must be from 1 to 256"
DEMANDS = {  # each wrong matrix of host_cuda/tensor_maps.cpp, and the demand that it does not meet
    "odd address": ALIGNED,
    "no rows": SIZES,
    "no columns": SIZES,
    "too many rows": SIZES,
    "odd pitch": "globalStrides must be multiples of 16",
    "long pitch": "globalStrides must be less than 2^40",
    "short pitch": "globalStrides must be no shorter than a row",
    "no tile": BOX,
    "tall tile": BOX,
}


def encoded(
    dtype: int, swizzle: int, cols: int, rows: int, stride: int, box: list[int]
) -> dict[str, Any]:
    """Returns the arguments for a row-major matrix and tiles of `box` elements, inner size
    first."""
    return {
        "type": dtype,
        "swizzle": swizzle,
        "l2_promotion": L2_PROMOTION_128B,
        "sizes": [cols, rows],
        "stride": stride,
        "box": box,
        "element_strides": [1, 1],
    }


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The file into which the programs of a test write their counts."""
    path = tmp_path / "report.json"
    monkeypatch.setenv("HOST_CUDA_REPORT", str(path))
    return path


def test_only_matrices_that_the_documentation_allows_are_encoded(compiled, report: Path):
    """The rows of a tile are as long as its swizzle: 128 or 32 bytes."""
    ran = start(compiled("tensor_maps", "hopper/tensor_map", twins=DRIVER))
    assert ran.returncode == 0, ran.stderr.decode()
    answers = dict(line.split(": ") for line in ran.stdout.decode().splitlines())
    refused = [name for name, answer in answers.items() if answer == "refused"]
    said = [x for x in ran.stderr.decode().splitlines() if x.startswith("cuTensorMapEncodeTiled")]
    reasons = [line.split(": ")[1] for line in said]
    assert dict(zip(refused, reasons, strict=True)) == DEMANDS
    assert json.loads(report.read_text())["tensor_maps"] == [
        encoded(UINT16, SWIZZLE_128B, 640, 300, 1280, [64, 256]),
        encoded(UINT8, SWIZZLE_32B, 2048, 4096, 2048, [32, 128]),
        encoded(FLOAT32, SWIZZLE_128B, 5, 300, 32, [32, 128]),
        encoded(UINT16, SWIZZLE_128B, 64, 1, 128, [64, 1]),
        encoded(UINT8, SWIZZLE_32B, 32, 2**32, 32, [32, 128]),
        encoded(UINT8, SWIZZLE_32B, 64, 2, 2**40 - 16, [32, 128]),
    ]


@pytest.mark.parametrize(("M", "tile_tokens"), [(250, 256), (120, 128)])
def test_the_hopper_kernel_encodes_its_three_matrices(
    compiled, report: Path, M: int, tile_tokens: int
):
    """x [M, K] and low [M, rank] have tiles of tokens. qweight [N, K / 2] has tiles of 128 rows."""
    N, K, rank = 70, 192, 5
    program = compiled("lora_linear_hopper", *HOPPER_KERNELS, twins=DRIVER)
    _, plan = check_linear(program, (M, N, K), torch.bfloat16, rank=rank, processors=1)
    assert plan["tokens"] == tile_tokens
    assert json.loads(report.read_text())["tensor_maps"] == [
        encoded(UINT16, SWIZZLE_128B, K, M, 2 * K, [64, tile_tokens]),
        encoded(UINT8, SWIZZLE_32B, K // 2, N, K // 2, [32, 128]),
        encoded(FLOAT32, SWIZZLE_128B, rank, M, 4 * 8, [32, tile_tokens]),
    ]
