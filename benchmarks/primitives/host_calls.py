"""Measures the host's time for calls of many kinds, from torch.empty to nn.LoRALinear with
gradients.

The shapes are tiny. On a GPU nothing waits for the device while the clock runs, and the calls of a
sample are so few that they never fill the queue of the device.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import pylora
import pylora.functional as F
from benchmarks.primitives.protocol import Experiment, Measured
from pylora.backends import extension

_FEATURES, _RANK = 64, 8
_SAMPLES, _CALLS, _WARM_UP = 25, 40, 20
_WITH_GRADIENTS = "lora_linear_grad"  # every other call has none


def host_microseconds(call: Callable[[], object], device: torch.device) -> Measured:
    """Takes samples, each the mean of some calls. The device is idle before a sample."""
    for _ in range(_WARM_UP):
        call()
    samples = []
    for _ in range(_SAMPLES):
        _synchronize(device)
        begin = time.perf_counter()
        for _ in range(_CALLS):
            call()
        samples.append(1e6 * (time.perf_counter() - begin) / _CALLS)
    _synchronize(device)
    return Measured(samples)


def experiments(device: torch.device, empty_launch: Path | None) -> list[Experiment]:
    """Returns the experiments. `empty_launch` is the compiled library of cuda/empty_launch.cu, or
    None without a GPU."""
    makers: list[tuple[str, str, Callable[[], Callable[[], object]]]] = [
        ("python_call", "an empty Python function", lambda: lambda: None),
        ("torch_empty", "torch.empty(64)", lambda: partial(torch.empty, 64, device=device)),
        ("add_", "x.add_(1.0)", lambda: partial(torch.zeros(64, device=device).add_, 1.0)),
        ("linear", "F.linear of torch", partial(_torch_linear, device)),
        ("c_op", "torch.ops.pylora_C.nf4_dequantize", partial(_c_op, device)),
        ("op", "torch.ops.pylora.nf4_linear", partial(_op, device)),
        ("nf4_linear", "pylora.functional.nf4_linear", partial(_nf4_linear, device)),
        ("lora_linear", "nn.LoRALinear", partial(_lora_linear, device)),
        (
            _WITH_GRADIENTS,
            "nn.LoRALinear, a forward that autograd records",
            partial(_lora_linear, device),
        ),
    ]
    if device.type == "cuda":
        makers.append(("triton_launch", "an empty Triton kernel, warm", _triton_launch))
    if empty_launch is not None:
        launch = partial(_ctypes_launch, empty_launch)
        makers.append(("ctypes_launch", "an empty CUDA kernel through ctypes", launch))
    return [
        Experiment(
            f"host_{name}",
            {"device": device.type, "features": _FEATURES, "rank": _RANK},
            "us per call",
            partial(_measure, make, device, name == _WITH_GRADIENTS),
            note,
        )
        for name, note, make in makers
    ]


def _measure(
    make: Callable[[], Callable[[], object]], device: torch.device, gradients: bool
) -> Measured:
    with torch.set_grad_enabled(gradients):
        return host_microseconds(make(), device)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _input(device: torch.device) -> Tensor:
    return torch.randn(1, _FEATURES, device=device, dtype=torch.bfloat16)


def _weight(device: torch.device) -> pylora.NF4Weight:
    dense = torch.randn(_FEATURES, _FEATURES, device=device, dtype=torch.bfloat16)
    return pylora.quantize_nf4(dense)


def _torch_linear(device: torch.device) -> Callable[[], object]:
    weight = torch.randn(_FEATURES, _FEATURES, device=device, dtype=torch.bfloat16)
    return partial(torch.nn.functional.linear, _input(device), weight)


def _c_op(device: torch.device) -> Callable[[], object]:
    module, reason = extension.load()
    if module is None:
        raise RuntimeError(f"pylora's extension cannot be loaded: {reason}")
    weight = _weight(device)
    shape = (_FEATURES, _FEATURES)
    op = torch.ops.pylora_C.nf4_dequantize
    return partial(op, *weight.op_arguments(), shape, torch.bfloat16)


def _op(device: torch.device) -> Callable[[], object]:
    op = torch.ops.pylora.nf4_linear
    arguments = (_input(device), *_weight(device).op_arguments(), _FEATURES, None)
    return partial(op, *arguments)


def _nf4_linear(device: torch.device) -> Callable[[], object]:
    return partial(F.nf4_linear, _input(device), _weight(device))


def _lora_linear(device: torch.device) -> Callable[[], object]:
    linear = torch.nn.Linear(_FEATURES, _FEATURES, bias=False, dtype=torch.bfloat16, device=device)
    layer = pylora.nn.LoRALinear(pylora.nn.NF4Linear.from_linear(linear), r=_RANK)
    return partial(layer, _input(device))


def _triton_launch() -> Callable[[], object]:
    from benchmarks.primitives.triton_empty import empty_kernel

    x = torch.zeros(1, device="cuda")
    return partial(empty_kernel[(1,)], x)


def _ctypes_launch(library: Path) -> Callable[[], object]:
    loaded = ctypes.CDLL(str(library))
    launch, name = loaded.primitives_launch_empty, loaded.primitives_error_name
    launch.argtypes, launch.restype = [ctypes.c_void_p], ctypes.c_int
    name.argtypes, name.restype = [ctypes.c_int], ctypes.c_char_p
    torch.zeros(1, device="cuda")  # makes the context that the library then shares
    stream = torch.cuda.current_stream().cuda_stream

    def call() -> None:
        error = launch(stream)
        if error:
            raise RuntimeError(f"primitives_launch_empty: {name(error).decode()}")

    return call
