"""Checks every kernel that can run on this machine against the reference (`pylora check`)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pylora import dispatch, functional
from pylora.backends import extension
from pylora.backends.backend import Plan
from pylora.calls import (
    Bottleneck,
    BottleneckAdapterBackward,
    BottleneckAdapterCall,
    BottleneckWanted,
    DequantizeCall,
    DoraLinearBackward,
    DoraLinearCall,
    Dropout,
    Layer,
    LoraLinearBackward,
    LoraLinearCall,
    LoraMlpBackward,
    LoraQkvBackward,
    LowRank,
    MultiBottleneckBackward,
    MultiBottleneckCall,
    MultiLoraBackward,
    Nf4LinearBackward,
    Nf4LinearCall,
    Norm,
    QuantizeCall,
    Wanted,
)
from pylora.ops.registration import on_reference, reference_op
from pylora.ops.spec import SPECS
from pylora.testing import Accuracy, assert_as_accurate_as_torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# (tokens, out_features, in_features, blocksize). Every result has at least some thirty elements: if
# there were fewer, torch's largest error would be a matter of luck. The first six shapes are
# aligned, have blocks that straddle rows, one token, odd sizes, the most tokens for small_m, and no
# tokens. The next three are for hopper (whole tiles, blocks that straddle rows, more than a tile),
# the last is for many_rows.
SHAPES = (
    (32, 96, 256, 64),
    (5, 40, 420, 64),
    (1, 128, 192, 32),
    (9, 37, 45, 32),
    (8, 72, 128, 64),
    (0, 64, 128, 64),
    (128, 128, 64, 64),
    (131, 37, 192, 128),
    (300, 72, 128, 64),
    (513, 40, 64, 64),
)
# The same for the products that AMX leaves to torch, which take bf16 alone.
MANY_TOKENS = (1024, 256, 2048, 64)


@dataclass(frozen=True)
class Case:
    """One op and the flat arguments that its kernels and the reference are run on.

    description    the shapes, dtype and options, in words
    """

    op: str
    description: str
    args: tuple[Any, ...]

    @classmethod
    def of(cls, description: str, call: Any) -> Case:
        """The case of a call record."""
        return cls(call.op, description, SPECS[call.op].flatten(call))

    def expected(self, *args: Any) -> Any:
        """The results of the reference."""
        return reference_op(self.op)(*args)


@dataclass(frozen=True)
class Outcome:
    """The result of one case on one backend.

    compiled_for    the instruction set or GPUs that the kernels are compiled for
    accuracy        None if the result was wrong
    failure         what was wrong; None if nothing was
    """

    backend: str
    compiled_for: str
    case: Case
    accuracy: Accuracy | None
    failure: str | None


def cases(seed: int = 0, token_counts: Collection[int] | None = None) -> Iterator[Case]:
    """Yields the cases of the check, on the CPU, with other random data for each seed.

    token_counts    if given, only shapes with one of these numbers of tokens
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    for tokens, out_features, in_features, blocksize in SHAPES:
        if token_counts is not None and tokens not in token_counts:
            continue
        weight = normal(out_features, in_features) / max(in_features, 1) ** 0.5
        for index, dtype in enumerate(DTYPES):
            double_quant = index == 2
            where = f"{tokens}x{in_features}x{out_features} b{blocksize} {str(dtype)[6:]}"
            where += " nested" if double_quant else ""
            yield Case.of(where, QuantizeCall(weight.to(dtype), blocksize))
            with dispatch.use_backend("reference"):
                w = functional.quantize_nf4(weight.to(dtype), blocksize, double_quant)
            yield Case.of(where, DequantizeCall(w.record, tuple(w.shape), dtype))
            x, grad = (
                normal(tokens, in_features, dtype=dtype),
                normal(tokens, out_features, dtype=dtype),
            )
            bias = normal(out_features, dtype=dtype)
            yield Case.of(where, Nf4LinearCall(x, Layer(w.record, bias)))
            yield Case.of(where, Nf4LinearBackward(grad, w.record))
            for dropout_p, activation, lora_dtype, rank in (
                (0.0, "identity", dtype, 32),
                (0.25, "gelu", torch.float32, 37),
            ):
                yield from _lora_cases(
                    normal, where, x, grad, w, bias, dropout_p, activation, lora_dtype, rank
                )
                yield from _composed_cases(normal, where, x, grad, w, dropout_p, lora_dtype, rank)
                yield from _adapter_cases(normal, where, x, dropout_p, activation, lora_dtype, rank)
    if token_counts is None or MANY_TOKENS[0] in token_counts:
        yield from _many_token_cases(normal)


def _many_token_cases(normal: Callable[..., Tensor]) -> Iterator[Case]:
    """Yields the linear layer and LoRA in bf16 over many tokens, forward and backward."""
    tokens, out_features, in_features, blocksize = MANY_TOKENS
    dtype = torch.bfloat16
    weight = (normal(out_features, in_features) / in_features**0.5).to(dtype)
    with dispatch.use_backend("reference"):
        w = functional.quantize_nf4(weight, blocksize)
    where = f"{tokens}x{in_features}x{out_features} b{blocksize} bfloat16"
    x, grad = (normal(tokens, size, dtype=dtype) for size in (in_features, out_features))
    bias = normal(out_features, dtype=dtype)
    yield Case.of(where, Nf4LinearCall(x, Layer(w.record, bias)))
    yield Case.of(where, Nf4LinearBackward(grad, w.record))
    yield from _lora_cases(normal, where, x, grad, w, bias, 0.0, "identity", dtype, 16)


def _lora_cases(
    normal: Callable[..., Tensor],
    where: str,
    x: Tensor,
    grad: Tensor,
    w: functional.NF4Weight,
    bias: Tensor,
    dropout_p: float,
    activation: str,
    lora_dtype: torch.dtype,
    rank: int,
) -> Iterator[Case]:
    """Yields lora_linear and its backward, with every bias, and without dropout dora_linear."""
    where += f" r{rank} {activation} p{dropout_p}"
    lora_A = normal(rank, w.in_features, dtype=lora_dtype) / max(w.in_features, 1) ** 0.5
    lora_B = normal(w.out_features, rank, dtype=lora_dtype)
    A_bias, B_bias = normal(rank, dtype=lora_dtype), normal(w.out_features, dtype=lora_dtype)
    dropout = Dropout(dropout_p, torch.tensor(1234567890123)) if dropout_p else None
    low_rank = LowRank(lora_A, lora_B, A_bias, B_bias, 0.5, activation, dropout)
    layer = Layer(w.record, bias, low_rank)
    yield Case.of(where, LoraLinearCall(x, layer))
    _, h = on_reference(LoraLinearCall(x, layer))
    everything = Wanted(x=True, A=True, B=True, bias=True, A_bias=True, B_bias=True)
    yield Case.of(where, LoraLinearBackward(grad, x, h, layer, everything))
    if dropout_p:
        return
    layer = Layer(w.record, None, LowRank(lora_A, lora_B, scaling=0.5))
    magnitude, norm = B_bias, torch.linalg.vector_norm(lora_B, dim=1)
    dora = DoraLinearCall(x, layer, bias, magnitude, norm)
    yield Case.of(where, dora)
    _, h, product = on_reference(dora)
    everything = Wanted(x=True, A=True, B=True, bias=True, magnitude=True)
    scaled = (product, layer, magnitude, norm)
    yield Case.of(where, DoraLinearBackward(grad, x, h, *scaled, everything))


def _composed_cases(
    normal: Callable[..., Tensor],
    where: str,
    x: Tensor,
    grad: Tensor,
    w: functional.NF4Weight,
    dropout_p: float,
    lora_dtype: torch.dtype,
    rank: int,
) -> Iterator[Case]:
    """Yields lora_qkv, lora_mlp and multi_lora_linear with their backwards.

    The layers of lora_qkv and lora_mlp are an NF4 weight with LoRA, one without, and a trained
    dense weight with LoRA; lora_qkv comes over NF4 weights alone as well.
    """
    where += f" r{rank} p{dropout_p}"
    out_features, in_features = w.shape
    adapters = 3

    def low_rank(n: int, k: int, *stack: int) -> tuple[Tensor, Tensor]:
        lora_A = normal(*stack, rank, k, dtype=lora_dtype) / max(k, 1) ** 0.5
        return lora_A, normal(*stack, n, rank, dtype=lora_dtype)

    def dense(n: int, k: int) -> functional.Projection:
        weight, bias = normal(n, k, dtype=x.dtype) / max(k, 1) ** 0.5, normal(n, dtype=x.dtype)
        return functional.Projection(weight, *low_rank(n, k), 0.5, bias)

    trained = dense(out_features, in_features)
    nf4 = trained._replace(weight=w)
    plain = functional.Projection(w, bias=trained.bias)
    dropout = (dropout_p, 1234567890123)
    # The gradients that the layers nf4, plain, and trained or down compute.
    wanted = (
        Wanted(x=True, A=True, B=True, bias=True),
        Wanted(x=True, bias=True),
        Wanted(x=True, weight=True, A=True, B=True, bias=True),
    )

    qkv = functional.CALLS["lora_qkv"](x, nf4, plain, trained, *dropout)
    yield Case.of(where, qkv)
    _, hs = on_reference(qkv)
    grads = [grad, normal(*grad.shape, dtype=x.dtype), normal(*grad.shape, dtype=x.dtype)]
    yield Case.of(where, LoraQkvBackward(grads, x, hs, qkv.layers, wanted))
    qkv = functional.CALLS["lora_qkv"](x, nf4, plain, nf4, *dropout)
    yield Case.of(where + " NF4 alone", qkv)

    down = dense(in_features, out_features)
    mlp = functional.CALLS["lora_mlp"](x, nf4, plain, down, "silu", *dropout)
    yield Case.of(where, mlp)
    _, gate, up, hs = on_reference(mlp)
    grad_of_mlp = normal(*x.shape, dtype=x.dtype)
    yield Case.of(where, LoraMlpBackward(grad_of_mlp, x, gate, up, hs, mlp.layers, "silu", wanted))

    stacks = low_rank(out_features, in_features, adapters)
    ids = torch.arange(x.shape[0]) % (adapters + 1) - 1
    scalings = torch.tensor([0.5, 1.0, 2.0])
    multi = functional.CALLS["multi_lora_linear"](x, w, *stacks, ids, scalings, plain.bias)
    yield Case.of(where, multi)
    _, h = on_reference(multi)
    multi_wanted = Wanted(x=True, A=True, B=True, bias=True)
    yield Case.of(where, MultiLoraBackward(grad, x, h, multi.layer, multi.adapters, multi_wanted))


def _adapter_cases(
    normal: Callable[..., Tensor],
    where: str,
    x: Tensor,
    dropout_p: float,
    activation: str,
    dtype: torch.dtype,
    size: int,
) -> Iterator[Case]:
    """Yields bottleneck_adapter and its backward, over x and over another residual.

    With dropout there are norms as well: a LayerNorm before and an RMSNorm after the bottleneck,
    and with the other residual the two in each other's place. Their eps is so large that they do
    not enlarge the errors of small rows, which are luck.
    """
    where += f" bottleneck {size} {activation} p{dropout_p}"
    hidden = x.shape[-1]
    down = normal(size, hidden, dtype=dtype) / max(hidden, 1) ** 0.5
    up = normal(hidden, size, dtype=dtype) / size**0.5
    biases = normal(size, dtype=dtype), normal(hidden, dtype=dtype)
    adapter = swapped = Bottleneck(down, up, *biases, 0.5, activation)
    norms = bool(dropout_p)
    if norms:
        dropout = Dropout(dropout_p, torch.tensor(1234567890123))
        layer = Norm("layer_norm", normal(hidden, dtype=dtype), normal(hidden, dtype=dtype), 1.0)
        rms = Norm("rms_norm", normal(hidden, dtype=dtype), None, 1.0)
        adapter = replace(adapter, dropout=dropout, norm_before=layer, norm_after=rms)
        swapped = replace(adapter, norm_before=rms, norm_after=layer)
    of_adapter = BottleneckWanted(True, True, True, True, True, norms, norms, norms, False)
    grad = normal(*x.shape, dtype=x.dtype)
    yield Case.of(f"{where} residual", BottleneckAdapterCall(x, grad, True, swapped))
    yield Case.of(where, BottleneckAdapterCall(x, None, True, adapter))
    yield Case.of(where, BottleneckAdapterBackward(grad, x, True, adapter, of_adapter))
    if dropout_p:
        return
    narrow = Bottleneck(down[:5], up[:, :5], scaling=2.0)
    ids = torch.arange(x.shape[0]) % 3 - 1
    pair = (adapter, narrow)
    yield Case.of(f"{where} and 5", MultiBottleneckCall(x, None, True, pair, ids))
    wishes = (of_adapter, BottleneckWanted(x=True, down=True, up=True))
    yield Case.of(f"{where} and 5", MultiBottleneckBackward(grad, x, True, pair, ids, wishes))


@contextmanager
def cpu_isa(name: str | None) -> Iterator[None]:
    """A context in which the CPU kernels use the instruction set `name`; None changes nothing."""
    module, _ = extension.load()
    if name is None or module is None:
        yield
        return
    previous = module.cpu_isa()
    module.set_cpu_isa(name)
    try:
        yield
    finally:
        module.set_cpu_isa(previous)


def checked_backends() -> Iterator[tuple[str, str, str | None]]:
    """Yields (backend, what it is compiled for, CPU instruction set to force).

    The cpu backend comes once per instruction set of this machine. The reference is left out, and
    so are backends that cannot run here.
    """
    for backend in dispatch.BACKENDS.values():
        if backend.name == "reference" or backend.unavailable() is not None:
            continue
        if backend.name == "cpu":
            module, _ = extension.load()
            assert module is not None
            yield from (("cpu", isa, isa) for isa in module.cpu_isas())
        else:
            yield backend.name, backend.compiled_for(), None


def run(
    seed: int = 0,
    chosen: Callable[[Case], bool] = lambda case: True,
    backend: str | None = None,
    token_counts: Collection[int] | None = None,
) -> Iterator[Outcome]:
    """Runs the cases on every backend that takes them, and yields the outcomes.

    chosen          case -> true if it is to be run
    backend         the name of the only backend to run; all if None
    token_counts    as in `cases`
    """
    all_cases = [case for case in cases(seed, token_counts) if chosen(case)]
    for name, compiled_for, isa in checked_backends():
        if backend not in (None, name):
            continue
        device = dispatch.BACKENDS[name].device()
        with dispatch.use_backend(name), cpu_isa(isa):
            for case in all_cases:
                args = tuple(_moved(arg, device) for arg in case.args)
                call = SPECS[case.op].read(args)
                if isinstance(dispatch.ask(dispatch.BACKENDS[name], call), Plan):
                    yield _outcome(name, compiled_for, case, args)


def _moved(arg: Any, device: str) -> Any:
    if isinstance(arg, list):
        return [_moved(item, device) for item in arg]
    return arg.to(device) if isinstance(arg, Tensor) else arg


def _outcome(name: str, compiled_for: str, case: Case, args: tuple[Any, ...]) -> Outcome:
    actual = getattr(torch.ops.pylora, case.op)(*args)
    try:
        accuracy = assert_as_accurate_as_torch(actual, case.expected, *args)
    except AssertionError as error:
        return Outcome(name, compiled_for, case, None, str(error))
    return Outcome(name, compiled_for, case, accuracy, None)
