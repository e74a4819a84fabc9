"""Builds the programs of this folder and runs them under sanitizers."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import kept_objects
import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]  # in the order of the C++ enum
# The .cu files of each program, by their paths below csrc/cuda.
SMALL_M_KERNELS = ("small_m/lora_linear", "small_m/plan", "small_m/lora_shrink")
BACKWARD_KERNELS = ("small_m/nf4_linear_backward", "small_m/plan")
HOPPER_KERNELS = (
    "hopper/lora_linear",
    "hopper/plan",
    "hopper/tensor_map",
    "many_rows/lora_shrink",
)
DRIVER = ("tests/host_cuda/driver.cpp",)  # the driver's stand-in, for programs with tensor maps
SEEDS = range(2)  # each draws another order of threads


FLAGS = """-std=c++20 -O1 -Wall -Wextra -Werror -ffp-contract=off -Wno-unknown-pragmas
    -Wno-maybe-uninitialized -Wno-psabi -fsanitize=address,undefined -fno-sanitize-recover=all
    -Itests/host_cuda -Icsrc""".split()


def compiled(stem: str, *kernels: str, twins: tuple[str, ...] = ()) -> Path:
    """Builds a program of this folder with the kernels that it runs.

    Each file is compiled once for all programs.
    """
    name = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if name is None:
        pytest.skip("no C++ compiler")
    compiler = shlex.split(name)
    files = [*(f"csrc/cuda/{kernel}.cu" for kernel in kernels), *twins]
    files.append(f"tests/host_cuda/{stem}.cpp")

    def object_of(file: str) -> Path:
        command = [*compiler, *FLAGS, "-x", "c++"]
        folders = [ROOT / "tests/host_cuda", ROOT / "csrc"]
        return kept_objects.kept_object(command, ROOT / file, folders, compiler[-1:])[0]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(object_of, files))
    return kept_objects.kept_program([*compiler, *FLAGS], objects)


def start(
    program: Path, *arguments: str, stdin: bytes = b"", seed: int = 0
) -> subprocess.CompletedProcess[bytes]:
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0", "HOST_CUDA_SEED": str(seed)}
    return subprocess.run([program, *arguments], input=stdin, capture_output=True, env=environment)


def run(program: Path, arrays: list[Tensor], seed: int = 0) -> tuple[bytearray, str]:
    """Runs `program` and returns its standard output and error.

    `seed` decides the order of its threads.
    """
    stdin = b"".join(bytes(x.contiguous().view(-1).view(torch.uint8).numpy()) for x in arrays)
    ran = start(program, stdin=stdin, seed=seed)
    assert ran.returncode == 0, ran.stderr.decode()
    return bytearray(ran.stdout), ran.stderr.decode()
