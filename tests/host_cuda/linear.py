"""Calls the linear kernels and judges them by the numerics rule."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from flat_calls import reference_op
from torch import Tensor

import pylora
from host_cuda import DTYPES, run
from pylora.reference.activation import ACTIVATIONS
from pylora.testing import assert_as_accurate_as_torch

ADAPTERS = 3  # the number of adapters of multi_lora_linear
SHARED = {"H200": 228, "A100": 164, "L4": 100}  # KiB of shared memory of each SM


def check_linear(
    program: Path,
    shape: tuple[int, int, int],
    dtype: torch.dtype = torch.bfloat16,
    *,
    blocksize: int = 64,
    nested: bool = False,
    rank: int = 0,
    lora_dtype: torch.dtype | None = None,
    biases: bool = True,
    activation: str = "identity",
    dropout_p: float = 0.0,
    adapter_ids: Tensor | None = None,
    processors: int = 2,
    gpu: str = "H200",
    plan: tuple[int, int, int] = (0, 0, 0),
    seed: int = 0,
) -> tuple[Tensor, dict[str, int]]:
    """Runs x [M, K] on W [N, K] and judges y, and h if there is LoRA, by the numerics rule.

    adapter_ids    if given, multi_lora_linear runs on three adapters, the second of which is NaN
    plan           if not zeros, it replaces the rule's plan: output warps or tokens of a tile,
                   splits of K, CTAs

    Returns y and the plan that ran.
    """
    M, N, K = shape
    generator = torch.Generator().manual_seed(M + N + K + rank)

    def normal(*size: int, like: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*size, generator=generator).to(like)

    w = pylora.quantize_nf4(normal(N, K) / K**0.5, blocksize, nested)
    x, bias = normal(M, K, like=dtype), normal(N, like=dtype) if biases else None
    lora_dtype = lora_dtype or dtype
    lora: list[Tensor | None] = [None] * 4  # lora_A, lora_B and their biases
    stack = () if adapter_ids is None else (ADAPTERS,)
    adapters: list[Tensor] = []
    if rank:
        lora_A = normal(*stack, rank, K, like=lora_dtype) / K**0.5
        lora[:2] = [lora_A, normal(*stack, N, rank, like=lora_dtype)]
    if adapter_ids is not None:
        lora[0][1] = lora[1][1] = torch.nan
        adapters = [adapter_ids, torch.tensor([0.5, -2.0, 1.0])]
    elif rank and biases:
        lora[2:] = [normal(rank, like=lora_dtype), normal(N, like=lora_dtype)]
    dropout_seed = torch.tensor(-1234567890123) if dropout_p else None
    scaling = 0.5

    header = [
        *(M, N, K, DTYPES.index(dtype), blocksize, w.nested_blocksize, nested),
        *(DTYPES.index(dtype) if biases else -1, rank, DTYPES.index(lora_dtype), biases),
        *(list(ACTIVATIONS).index(activation), dropout_p > 0, processors, SHARED[gpu] << 10),
        len(adapters) and ADAPTERS,
        *plan,
    ]
    tensors = [torch.tensor(header), torch.tensor([scaling, dropout_p], dtype=torch.float64), x]
    tensors += [t.reshape(-1) for t in w.tensors().values()]
    tensors += [t for t in (bias, *lora[:2], *adapters, *lora[2:], dropout_seed) if t is not None]
    stdout, stderr = run(program, tensors, seed)
    y = torch.frombuffer(stdout[: 2 * M * N], dtype=dtype).view(M, N)
    if not rank:
        arguments = (x, *w.op_arguments(), N, bias)
        assert_as_accurate_as_torch(y, reference_op("nf4_linear"), *arguments)
    else:
        h = torch.frombuffer(stdout[2 * M * N :], dtype=torch.float32).view(M, rank)
        arguments = (x, *w.op_arguments(), N, *lora[:2])
        if adapter_ids is not None:
            inside = (adapter_ids >= 0) & (adapter_ids < ADAPTERS)
            arguments += (torch.where(inside, adapter_ids, -1), adapters[1], bias)
            assert_as_accurate_as_torch((y, h), reference_op("multi_lora_linear"), *arguments)
            assert not h[~inside].any()
        else:
            arguments += (bias, *lora[2:], scaling, dropout_p, dropout_seed, activation)
            assert_as_accurate_as_torch((y, h), reference_op("lora_linear"), *arguments)
    return y, {name: int(n) for name, n in re.findall(r"(\w+) (\d+)", stderr.splitlines()[-1])}


def check_linear_backward(
    program: Path,
    shape: tuple[int, int, int],
    dtype: torch.dtype = torch.bfloat16,
    *,
    blocksize: int = 64,
    nested: bool = False,
    misalign: int = 0,
    scale: float = 1.0,
    processors: int = 2,
    gpu: str = "H200",
    seed: int = 0,
) -> tuple[Tensor, int]:
    """Runs grad [M, N] on W [N, K] and judges dx by the numerics rule.

    Returns dx and the number of splits of N.
    """
    M, N, K = shape
    generator = torch.Generator().manual_seed(M + N + K)
    weight = torch.randn(N, K, generator=generator) / K**0.5
    w = pylora.quantize_nf4(weight, blocksize, nested)
    grad = (torch.randn(M, N, generator=generator) * scale).to(dtype)
    header = [M, N, K, DTYPES.index(dtype), blocksize, w.nested_blocksize, nested]
    header += [misalign, processors, SHARED[gpu] << 10]
    weights = [t.reshape(-1) for t in w.tensors().values()]
    stdout, stderr = run(program, [torch.tensor(header), grad, *weights], seed)
    dx = torch.frombuffer(stdout, dtype=dtype).view(M, K)
    arguments = (grad, *w.op_arguments(), K)
    assert_as_accurate_as_torch(dx, reference_op("nf4_linear_backward"), *arguments)
    return dx, int(re.findall(r"splits (\d+)", stderr)[-1])
