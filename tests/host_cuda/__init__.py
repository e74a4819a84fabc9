"""Builds and runs the programs of this folder, under sanitizers."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]  # in the order of the C++ enum
# The .cu files of a program, by their names below csrc/cuda.
SMALL_M_KERNELS = ("small_m/lora_linear", "small_m/plan", "small_m/lora_shrink")
BACKWARD_KERNELS = ("small_m/nf4_linear_backward", "small_m/plan")
HOPPER_KERNELS = (
    "hopper/lora_linear",
    "hopper/plan",
    "hopper/tensor_map",
    "many_rows/lora_shrink",
)
DRIVER = ("tests/host_cuda/driver.cpp",)  # stands in for it, where there are tensor maps
SEEDS = range(2)  # of the order in which threads run


def compiler(folder: Path) -> Callable[..., Path]:
    """Builds a program into `folder` with the kernels it runs, once."""
    command_name = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if command_name is None:
        pytest.skip("no C++ compiler")

    @functools.cache
    def compiled(stem: str, *kernels: str, twins: tuple[str, ...] = ()) -> Path:
        sources = " ".join([*(f"csrc/cuda/{kernel}.cu" for kernel in kernels), *twins])
        command = f"""{command_name} -std=c++20 -O1 -Wall -Wextra -Werror -ffp-contract=off
            -Wno-unknown-pragmas -Wno-maybe-uninitialized -fsanitize=address,undefined
            -fno-sanitize-recover=all -Itests/host_cuda -Icsrc
            -x c++ {sources} tests/host_cuda/{stem}.cpp -o {folder / stem}"""
        subprocess.run(command.split(), cwd=ROOT, check=True)
        return folder / stem

    return compiled


def start(
    program: Path, *arguments: str, stdin: bytes = b"", seed: int = 0
) -> subprocess.CompletedProcess[bytes]:
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0", "HOST_CUDA_SEED": str(seed)}
    return subprocess.run([program, *arguments], input=stdin, capture_output=True, env=environment)


def run(program: Path, arrays: list[Tensor], seed: int = 0) -> tuple[bytearray, str]:
    """Standard output and error of `program`; `seed` decides the order of its threads."""
    stdin = b"".join(bytes(x.contiguous().view(-1).view(torch.uint8).numpy()) for x in arrays)
    ran = start(program, stdin=stdin, seed=seed)
    assert ran.returncode == 0, ran.stderr.decode()
    return bytearray(ran.stdout), ran.stderr.decode()
