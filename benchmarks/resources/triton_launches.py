"""Collects every kernel variant that the Triton backend launches, without a GPU.

The host code runs on meta tensors while a recorder stands in for Triton's launcher. So what is
compiled ahead of time is what a GPU would be asked to run, with the configurations of
`pylora.kernels.configs`, and there is no second list of them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor

import pylora
from pylora.backends import triton_runs
from pylora.calls import (
    Bottleneck,
    BottleneckAdapterBackward,
    BottleneckAdapterCall,
    BottleneckWanted,
    Dropout,
    MultiBottleneckBackward,
    MultiBottleneckCall,
    Norm,
)
from pylora.kernels import launch
from pylora.ops.registration import OPS
from pylora.ops.spec import SPECS
from pylora.reference.normalization import LAYER_NORM, RMS_NORM

_TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}
# Numbers of tokens, one in each bucket of the rules. fp16 has the tiles of bf16, so that one of its
# buckets is enough.
TOKENS = {
    torch.bfloat16: (1, 32, 64, 128, 192, 8192),
    torch.float16: (192,),
    torch.float32: (16, 64, 2048),
}
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}


# The place of an argument: (position,), or (position, index) for an entry of a tuple.
Place = tuple[int, ...]


@dataclass(frozen=True)
class Variant:
    """One compilation of a kernel: its signature, its constants and its options.

    divisible  the places of pointers and integers that are divisible by 16
    """

    kernel: str
    signature: tuple[tuple[str, Any], ...]
    constants: tuple[tuple[Place, Any], ...]
    divisible: tuple[Place, ...]
    options: tuple[tuple[str, int], ...]
    function: Any = field(compare=False, repr=False)

    @property
    def blocks(self) -> dict[str, int]:
        names = [name for name, _ in self.signature if name.startswith("BLOCK")]
        return {name: self.constant(name) for name in names}

    def constant(self, name: str) -> Any:
        names = [name for name, _ in self.signature]
        return dict(self.constants).get((names.index(name),)) if name in names else None

    def __str__(self) -> str:
        """Returns a name made of the kernel, dtype, tile and features. Variants that differ in
        something else have the same name."""
        types = dict(self.signature)
        flat = [
            t for entry in types.values() for t in (entry if type(entry) is tuple else (entry,))
        ]
        floating = [t[1:] for t in flat if t in ("*fp32", "*fp16", "*bf16")]
        layers = max((len(t) for t in types.values() if type(t) is tuple), default=1)
        sizes = [f"{n.removeprefix('BLOCK_').lower()}{v}" for n, v in self.blocks.items()]
        sizes += [f"{name[4]}{value}" for name, value in self.options if name != "maxnreg"]
        flags = [f"x{layers}"] if layers > 1 else []
        flags += [flag for name, flag in _FLAGS.items() if _is_given(types.get(name))]
        flags += ["partial"] if self.constant("PARTIAL") else []
        flags += [self.constant("ACTIVATION")] if self.constant("ACTIVATION") else []
        return " ".join([self.kernel, *floating[:1], *sizes, *flags])


def _is_given(parameter_type: Any) -> bool:
    """Returns True if a parameter of this type is passed at run time; a tuple needs one entry."""
    entries = parameter_type if isinstance(parameter_type, tuple) else (parameter_type,)
    return any(entry not in (None, "constexpr") for entry in entries)


_FLAGS = {
    "nested_absmax_ptr": "nested",
    "nested_absmax_ptrs": "nested",
    "factor_ptrs": "lora",
    "before_weight_ptr": "norm_before",
    "after_weight_ptr": "norm_after",
    "seed_ptrs": "dropout",
    "seed_ptr": "dropout",
    "copy_ptr": "copy",
    "up_ptr": "gated",
    "hidden_bias_ptrs": "biases",
}


def _variant(function: Any, arguments: dict[str, Any]) -> Variant:
    """Finds the types, constants and alignments as Triton's own binder does for these arguments."""
    signature, constants, divisible = [], [], []

    def type_of(value: Any, place: Place, specialized: bool, constant: bool) -> Any:
        if isinstance(value, tuple) and not constant:
            # Triton specializes the entries of a tuple in any case.
            return tuple(type_of(v, (*place, i), True, False) for i, v in enumerate(value))
        if isinstance(value, Tensor):
            if value.storage_offset() * value.element_size() % 16 == 0:
                divisible.append(place)
            return _TYPES[value.dtype]
        if isinstance(value, float) and not constant:
            return "fp32"
        if isinstance(value, int) and not constant and not (specialized and value == 1):
            if specialized and value % 16 == 0:
                divisible.append(place)
            return "i32" if -(2**31) <= value < 2**31 else "i64"
        constants.append((place, value))
        return "constexpr"

    for position, parameter in enumerate(function.params):
        value = arguments.pop(parameter.name)
        specialized = not parameter.do_not_specialize
        found_type = type_of(value, (position,), specialized, parameter.is_constexpr)
        signature.append((parameter.name, found_type))
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


@functools.cache  # it is quantized for real
def _weight(out_features: int, in_features: int, blocksize: int, nested: bool) -> tuple[Any, ...]:
    w = pylora.quantize_nf4(torch.zeros(out_features, in_features), blocksize, nested)
    return w.to("meta").op_arguments()


def _call(op: str, *args: Any) -> Any:
    """Runs an op, given its flat arguments, as the triton backend does."""
    call = SPECS[op].read(args)
    return OPS[type(call)].results(call, getattr(triton_runs, op)(call))


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
    """Runs the forward and backward of lora_linear."""

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, grad = empty(M, K, dtype=dtype), empty(M, N, dtype=dtype)
    A, B = empty(rank, K, dtype=lora_dtype), empty(N, rank, dtype=lora_dtype)
    seed = empty(dtype=torch.int64) if p else None
    options = (0.5, p, seed, activation)
    vectors: tuple[Tensor | None, ...] = (None, None, None)
    if biases:
        vectors = (
            empty(N, dtype=dtype),
            empty(rank, dtype=lora_dtype),
            empty(N, dtype=lora_dtype),
        )
    _, h = _call("lora_linear", x, *q, N, A, B, *vectors, *options)
    mask = [True, False, True, True, biases, biases, biases]
    _call("lora_linear_backward", grad, x, h, *q, A, B, *options, mask)


def _layers(
    sizes: Sequence[tuple[int, int]], nested: bool, rank: int, lora_dtype: torch.dtype
) -> list[Any]:
    """Returns the arguments of several projections with NF4 weights of these sizes, in bf16."""

    def empty(*shape: int, dtype: torch.dtype = lora_dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    layers = [
        (*_weight(N, K, 64, nested), N, empty(rank, K), empty(N, rank), empty(0), 0.5)
        for N, K in sizes
    ]
    return [list(part) for part in zip(*layers, strict=True)]


def _qkv_step(M: int, nested: bool, rank: int, lora_dtype: torch.dtype, p: float) -> None:
    """Runs the forward and backward of lora_qkv for the grouped-query attention of an 8B model."""
    x = torch.empty(M, 4096, dtype=torch.bfloat16, device="meta")
    seed = torch.empty((), dtype=torch.int64, device="meta") if p else None
    layers = _layers([(4096, 4096), (1024, 4096), (1024, 4096)], nested, rank, lora_dtype)
    y, h = _call("lora_qkv", x, *layers, p, seed)
    mask = [True, *[False] * 3, *[True] * 6, *[False] * 3]
    _call("lora_qkv_backward", y, x, h, *layers, p, seed, mask)


def _mlp_step(M: int, nested: bool, rank: int, lora_dtype: torch.dtype, p: float) -> None:
    """Runs the forward and backward of lora_mlp for the gated MLP of an 8B model."""
    x = torch.empty(M, 4096, dtype=torch.bfloat16, device="meta")
    seed = torch.empty((), dtype=torch.int64, device="meta") if p else None
    sizes = [(14336, 4096), (14336, 4096), (4096, 14336)]
    layers = _layers(sizes, nested, rank, lora_dtype)
    y, gate, up, h = _call("lora_mlp", x, *layers, p, seed, "silu")
    mask = [True, *[False] * 3, *[True] * 6, *[False] * 3]
    _call("lora_mlp_backward", y, x, gate, up, h, *layers, p, seed, "silu", mask)


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
    """Runs the forward and backward of multi_lora_linear."""

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, grad, bias = (empty(*shape, dtype=dtype) for shape in ((M, K), (M, N), (N,)))
    A, B = empty(adapters, rank, K, dtype=lora_dtype), empty(adapters, N, rank, dtype=lora_dtype)
    low_rank = (A, B, empty(M, dtype=torch.int64), empty(adapters, dtype=torch.float32))
    _, h = _call("multi_lora_linear", x, *base, N, *low_rank, bias)
    mask = [True, False, True, True, True]
    _call("multi_lora_linear_backward", grad, x, h, *base, *low_rank, mask)


def _multi_bottleneck_step(
    M: int, hidden: int, bottleneck: int, dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    """Runs the forward and backward of multi_bottleneck_adapter for eight adapters."""

    def empty(*shape: int, dtype: torch.dtype = weight_dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def adapter() -> Bottleneck:
        weights = empty(bottleneck, hidden), empty(hidden, bottleneck)
        return Bottleneck(*weights, empty(bottleneck), empty(hidden))

    x, ids = empty(M, hidden, dtype=dtype), empty(M, dtype=torch.int64)
    adapters = tuple(adapter() for _ in range(8))
    wanted = (BottleneckWanted(True, True, True, True, True),) * 8
    y = triton_runs.multi_bottleneck_adapter(MultiBottleneckCall(x, None, True, adapters, ids))
    triton_runs.multi_bottleneck_adapter_backward(
        MultiBottleneckBackward(y, x, True, adapters, ids, wanted)
    )


def _bottleneck_step(
    M: int,
    hidden: int,
    bottleneck: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    before: str | None = None,
    after: str | None = None,
    p: float = 0.0,
) -> None:
    """Runs the forward and backward of bottleneck_adapter.

    before, after    the kinds of the norms
    """

    def empty(*shape: int, dtype: torch.dtype = weight_dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def norm(kind: str | None) -> Norm | None:
        if kind is None:
            return None
        return Norm(kind, empty(hidden), empty(hidden) if kind == LAYER_NORM else None)

    x = empty(M, hidden, dtype=dtype)
    adapter = Bottleneck(
        empty(bottleneck, hidden),
        empty(hidden, bottleneck),
        empty(bottleneck),
        empty(hidden),
        dropout=Dropout(p, empty(dtype=torch.int64)) if p else None,
        norm_before=norm(before),
        norm_after=norm(after),
    )
    biases = (before == LAYER_NORM, after == LAYER_NORM)
    has_norms = (before is not None, biases[0], after is not None, biases[1])
    wanted = BottleneckWanted(True, True, True, True, True, *has_norms)
    y = triton_runs.bottleneck_adapter(BottleneckAdapterCall(x, None, True, adapter))
    triton_runs.bottleneck_adapter_backward(BottleneckAdapterBackward(y, x, True, adapter, wanted))


def launches(capability: int) -> list[Variant]:
    """Returns the variants for one architecture, with every rule of `configs` and every feature."""
    N, K = 14336, 4096
    facts = launch.Facts(capability, MULTIPROCESSORS[capability])
    bf16, fp32 = torch.bfloat16, torch.float32
    with _recorded() as variants, mock.patch.object(launch, "ELSEWHERE", facts):
        for dtype, tokens in TOKENS.items():
            plain = _weight(N, K, 64, False)
            _call("nf4_dequantize", *plain, [N, K], dtype)
            for M in tokens:
                x, grad = (
                    torch.empty(M, columns, dtype=dtype, device="meta") for columns in (K, N)
                )
                _call("nf4_linear", x, *plain, N, None)
                _call("nf4_linear_backward", grad, *plain, K)
                if M not in (32, 64):
                    _lora_step(M, N, K, plain, 16, dtype, dtype, 0.0, "identity", False)
        # A narrow layer has smaller tiles, and so few of them that the sum over K is split.
        for M in (1, 32, 64):
            _lora_step(M, 1024, K, _weight(1024, K, 64, False), 16, bf16, bf16, 0.0, "silu", False)
        nested, short = _weight(N, K, 64, True), _weight(N, K, 32, False)
        base = (torch.empty(N, K, dtype=bf16, device="meta"), None, None, None, None, 0, 0)
        for M in (1, 192, 8192):
            # QLoRA uses double quantization, fp32 LoRA weights and dropout.
            _lora_step(M, N, K, nested, 64, bf16, fp32, 0.1, "identity", False)
        for M in (32, 192):
            _lora_step(M, N, K, short, 8, bf16, bf16, 0.0, "gelu", True)
            _lora_step(M, N, K, base, 16, bf16, bf16, 0.1, "identity", False)
        _lora_step(8192, N, K, base, 16, bf16, bf16, 0.0, "silu", True)
        for step in (_qkv_step, _mlp_step):
            for M in (16, 128, 192, 8192):
                step(M, False, 16, bf16, 0.0)
            for M, p in ((192, 0.1), (192, 0.0), (8192, 0.1)):
                step(M, True, 64, fp32, p)
            step(8192, True, 64, bf16, 0.0)
        # Many adapters, each with few or with many tokens, with and without a split sum.
        for M in (16, 192, 8192):
            _multi_lora_step(M, N, K, nested, 8, 16, bf16, bf16)
            _multi_lora_step(M, N, K, nested, 8, 64, bf16, fp32)
        _multi_lora_step(16, 1024, K, _weight(1024, K, 64, False), 8, 16, bf16, bf16)
        _multi_lora_step(192, N, K, plain, 8, 16, torch.float16, torch.float16)
        for M in (64, 2048):
            _multi_lora_step(M, N, K, plain, 8, 16, fp32, fp32)
        # Adapters that are narrow, usual and as wide as they can be; tiles of every height.
        for M in (16, 4096, 8192):
            for bottleneck in (16, 64, 256):
                _bottleneck_step(M, K, bottleneck, bf16, bf16)
        for bottleneck in (64, 256):
            _bottleneck_step(8192, K, bottleneck, bf16, fp32)
            _bottleneck_step(8192, K, bottleneck, fp32, fp32)
        _bottleneck_step(4096, 768, 48, torch.float16, torch.float16)
        _bottleneck_step(4096, 768, 48, torch.float16, fp32)
        for bottleneck in (16, 64):
            _multi_bottleneck_step(192, K, bottleneck, bf16, bf16)
            _multi_bottleneck_step(4096, K, bottleneck, bf16, fp32)
        _multi_bottleneck_step(4096, 768, 48, fp32, fp32)
        # Adapters with all norms and dropout, and with one of them.
        for M, hidden, bottleneck in ((16, K, 16), (4096, 768, 48), (8192, K, 64), (8192, K, 256)):
            for dtype in (bf16, fp32):
                sizes = (M, hidden, bottleneck, bf16, dtype)
                _bottleneck_step(*sizes, LAYER_NORM, LAYER_NORM, 0.1)
        _bottleneck_step(8192, K, 64, fp32, fp32, LAYER_NORM, LAYER_NORM, 0.1)
        for sizes in ((4096, 768, 48, bf16, bf16), (8192, K, 64, bf16, fp32)):
            for options in ({"before": RMS_NORM}, {"after": RMS_NORM}, {"p": 0.1}):
                _bottleneck_step(*sizes, **options)
        _bottleneck_step(4096, 768, 48, torch.float16, fp32, LAYER_NORM, None, 0.1)
    return list(variants)
