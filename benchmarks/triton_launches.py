"""Every kernel variant that the Triton backend launches, collected without a GPU.

The host code runs on meta tensors with Triton's launcher replaced by a recorder: what is compiled
ahead of time is therefore what a GPU would be asked to run, with the configurations of
`pylora.kernels.configs`, not a second list of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor

import pylora
from pylora.backends.triton import BACKEND
from pylora.kernels import launch

_TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}
# Rows of x: each bucket of the rules once; fp16 takes the tiles of bf16, and one stands for them.
ROWS = {
    torch.bfloat16: (1, 32, 64, 128, 512, 8192),
    torch.float16: (512,),
    torch.float32: (16, 64, 2048),
}
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}


@dataclass(frozen=True)
class Variant:
    """One compilation: a kernel, its signature, its constants and options."""

    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[str, ...]
    options: tuple[tuple[str, int], ...]
    function: Any = field(compare=False, repr=False)

    @property
    def blocks(self) -> dict[str, int]:
        return {name: v for name, v in self.constants if name.startswith("BLOCK")}

    def constant(self, name: str) -> Any:
        return dict(self.constants).get(name)

    def __str__(self) -> str:
        """Kernel, dtypes, tile and features; variants that differ otherwise may share it."""
        types = dict(self.signature)
        floating = [t[1:] for t in types.values() if t in ("*fp32", "*fp16", "*bf16")]
        sizes = [f"{n.removeprefix('BLOCK_').lower()}{v}" for n, v in self.blocks.items()]
        sizes += [f"{name[4]}{value}" for name, value in self.options]
        flags = [flag for name, flag in _FLAGS.items() if types.get(name) not in _ABSENT]
        flags += ["partial"] if self.constant("PARTIAL") else []
        flags += [self.constant("ACTIVATION")] if self.constant("ACTIVATION") else []
        return " ".join([self.kernel, *floating[:1], *sizes, *flags])


_ABSENT = (None, "constexpr")
_FLAGS = {
    "nested_absmax_ptr": "nested",
    "factor_ptr": "lora",
    "seed_ptr": "dropout",
    "copy_ptr": "copy",
    "hidden_bias_ptr": "biases",
}


def _variant(function: Any, arguments: dict[str, Any]) -> Variant:
    """What Triton's own binder makes of these arguments: types, constants, alignment."""
    signature, constants, divisible = [], [], []
    for parameter in function.params:
        name, value = parameter.name, arguments.pop(parameter.name)
        kind = "constexpr"
        if isinstance(value, Tensor):
            kind = _TYPES[value.dtype]
            if value.storage_offset() * value.element_size() % 16 == 0:
                divisible.append(name)
        elif isinstance(value, float) and not parameter.is_constexpr:
            kind = "fp32"
        elif isinstance(value, int) and not parameter.is_constexpr:
            specialized = not parameter.do_not_specialize
            if not (specialized and value == 1):
                kind = "i32" if -(2**31) <= value < 2**31 else "i64"
            if specialized and value % 16 == 0:
                divisible.append(name)
        signature.append((name, kind))
        if kind == "constexpr":
            constants.append((name, value))
    return Variant(
        function.fn.__name__.strip("_").removesuffix("_kernel"),
        tuple(signature),
        tuple(constants),
        tuple(divisible),
        tuple(sorted(arguments.items())),
        function,
    )


@contextmanager
def _recorded() -> Iterator[dict[Variant, None]]:
    variants: dict[Variant, None] = {}

    def run(function: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        names = [parameter.name for parameter in function.params]
        arguments = dict(zip(names, args, strict=False)) | kwargs
        variants[_variant(function, arguments)] = None

    with mock.patch.object(triton.runtime.JITFunction, "run", run):
        yield variants


def _weight(out_features: int, in_features: int, blocksize: int, nested: bool) -> tuple[Any, ...]:
    w = pylora.quantize_nf4(torch.zeros(out_features, in_features), blocksize, nested)
    return w.to("meta").op_arguments()


def _call(op: str, *args: Any) -> Any:
    return BACKEND.ops[op].run(*args)


def _lora_step(
    M: int,
    N: int,
    K: int,
    q: tuple[Any, ...],
    rank: int,
    dtype: torch.dtype,
    lora_dtype: torch.dtype,
    p: float,
    activation: str,
    biases: bool,
) -> None:
    """Forward and backward of one layer."""

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, grad = empty(M, K, dtype=dtype), empty(M, N, dtype=dtype)
    A, B = empty(rank, K, dtype=lora_dtype), empty(N, rank, dtype=lora_dtype)
    seed = empty(dtype=torch.int64) if p else None
    last = (0.5, p, seed, activation)
    vectors: tuple[Tensor | None, ...] = (None, None, None)
    if biases:
        vectors = (
            empty(N, dtype=dtype),
            empty(rank, dtype=lora_dtype),
            empty(N, dtype=lora_dtype),
        )
    _, h = _call("lora_linear", x, *q, N, A, B, *vectors, *last)
    mask = [True, False, True, True, biases, biases, biases]
    _call("lora_linear_backward", grad, x, h, *q, A, B, *last, mask)


def _multi_lora_step(
    M: int,
    N: int,
    K: int,
    base: tuple[Any, ...],
    adapters: int,
    rank: int,
    dtype: torch.dtype,
    lora_dtype: torch.dtype,
) -> None:
    """Forward and backward of one layer with an adapter for each row."""

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, grad, bias = (empty(*shape, dtype=dtype) for shape in ((M, K), (M, N), (N,)))
    A, B = empty(adapters, rank, K, dtype=lora_dtype), empty(adapters, N, rank, dtype=lora_dtype)
    low_rank = (A, B, empty(M, dtype=torch.int64), empty(adapters, dtype=torch.float32))
    _, h = _call("multi_lora_linear", x, *base, N, *low_rank, bias)
    mask = [True, False, True, True, True]
    _call("multi_lora_linear_backward", grad, x, h, *base, *low_rank, mask)


def launches(capability: int) -> list[Variant]:
    """The variants of one architecture: every rule of `configs`, every feature at least once."""
    N, K = 14336, 4096
    facts = launch.Facts(capability, MULTIPROCESSORS[capability])
    bf16, fp32 = torch.bfloat16, torch.float32
    with _recorded() as variants, mock.patch.object(launch, "ELSEWHERE", facts):
        for dtype, rows in ROWS.items():
            plain = _weight(N, K, 64, False)
            _call("nf4_dequantize", *plain, [N, K], dtype)
            for M in rows:
                x, grad = (
                    torch.empty(M, columns, dtype=dtype, device="meta") for columns in (K, N)
                )
                _call("nf4_linear", x, *plain, N, None)
                _call("nf4_linear_backward", grad, *plain, K)
                if M not in (32, 64):
                    _lora_step(M, N, K, plain, 16, dtype, dtype, 0.0, "identity", False)
        # A narrow layer: smaller tiles, and so few of them that the sum is split.
        for M in (1, 32, 64):
            _lora_step(M, 1024, K, _weight(1024, K, 64, False), 16, bf16, bf16, 0.0, "silu", False)
        nested, short = _weight(N, K, 64, True), _weight(N, K, 32, False)
        base = (torch.empty(N, K, dtype=bf16, device="meta"), None, None, None, None, 0, 0)
        for M in (1, 512, 8192):
            # What QLoRA uses: double quantization, fp32 LoRA weights, dropout.
            _lora_step(M, N, K, nested, 64, bf16, fp32, 0.1, "identity", False)
        for M in (32, 512):
            _lora_step(M, N, K, short, 8, bf16, bf16, 0.0, "gelu", True)
            _lora_step(M, N, K, base, 16, bf16, bf16, 0.1, "identity", False)
        _lora_step(8192, N, K, base, 16, bf16, bf16, 0.0, "silu", True)
        # Many adapters: few rows each and many, in place and over a split, whole and in pieces.
        for M in (16, 512, 8192):
            _multi_lora_step(M, N, K, nested, 8, 16, bf16, bf16)
            _multi_lora_step(M, N, K, nested, 8, 64, bf16, fp32)
        _multi_lora_step(16, 1024, K, _weight(1024, K, 64, False), 8, 16, bf16, bf16)
        _multi_lora_step(512, N, K, plain, 8, 16, torch.float16, torch.float16)
        for M in (64, 2048):
            _multi_lora_step(M, N, K, plain, 8, 16, fp32, fp32)
    return list(variants)
