"""host: what a call costs the host, for each layer of pylora and for its peers.

    python -m benchmarks run --op host --threads 1
    python -m benchmarks run --op host --device cuda

Each layer calls the one below it, so that the difference between two rows is what the upper one
adds:

    nn          nn.LoRALinear, nn.NF4Linear
    F           pylora.functional: checks the arguments
    op          torch.ops.pylora.*: torch's dispatcher and autograd
    plan        pylora.dispatch.choose: which backend takes the call, and with which kernel
    C call      torch.ops.pylora_C.*: the kernels, with arguments that are ready

The op calls both the plan and the C call. A layer does not: if nothing but autograd watches, it
keeps its plan, and the extension keeps its tensors, so that a call hands over little more than x.
Torch's dispatcher, which takes most of the C call, is not passed at all. With a backward, the plan
and the C call are those of the forward and of the backward together. On a CPU the C call includes
the kernel; the weight is so small that the kernel takes a few microseconds at most. On CUDA nothing
waits for the kernels: every time is the time to launch them.

A profiler cannot replace these rows: cProfile adds about as much to each Python call as the call
takes, and so shows the layer with the most calls as the slowest. To see the effect of a change,
keep the JSON of a run and use `python -m benchmarks compare`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from benchmarks import contenders_layers, contenders_peers, contenders_torch
from benchmarks.contender import Bench, BuiltLayer, Contender, NotApplicable, linear_work
from benchmarks.layer_tensors import LayerTensors
from benchmarks.linear_oracle import linear_oracle
from benchmarks.shapes import HOST_MODES, HOST_SHAPES
from pylora import dispatch, functional
from pylora.ops.registration import OPS, run_plan
from pylora.ops.spec import SPECS

Build = Callable[[LayerTensors], BuiltLayer]


class _Recorder(TorchDispatchMode):
    """Records the calls of one namespace of torch.ops: each op with its arguments, detached."""

    def __init__(self, namespace: str) -> None:
        super().__init__()
        self._namespace = namespace
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == self._namespace:
            self.calls.append((func, tree_map_only(Tensor, Tensor.detach, args)))
        return func(*args, **(kwargs or {}))


def _op_calls(layer: BuiltLayer, x: Tensor, grad: Tensor | None) -> list[Any]:
    """Returns the records of the ops that a forward calls, and with `grad` those of a backward."""
    x = x.detach().requires_grad_()
    with _Recorder("pylora") as recorder, torch.enable_grad():
        y = layer.forward(x)
        if grad is not None:
            torch.autograd.grad(y, [x, *layer.parameters], grad)
    names = [op.name().partition("::")[2].partition(".")[0] for op, _ in recorder.calls]
    return [SPECS[name].read(args) for name, (_, args) in zip(names, recorder.calls, strict=True)]


def _results(raw: list[Any]) -> tuple[Tensor, ...]:
    """Returns (y,) from what an op returned. With its backward it is (y, dx), with LoRA also dA and
    dB."""
    first, *others = raw
    y = first if isinstance(first, Tensor) else first[0]
    if not others:
        return (y,)
    (gradients,) = others
    if isinstance(gradients, Tensor):
        return y, gradients
    dx, _, d_a, d_b, *_ = gradients
    return y, dx, d_a, d_b


def _plan(build: Build) -> Build:
    """Builds the choice of a backend alone. Its result comes from the backends that it chose."""

    def planned(tensors: LayerTensors) -> BuiltLayer:
        layer = build(tensors)

        def prepared(x: Tensor, grad: Tensor | None) -> Callable[[], Any]:
            calls = _op_calls(layer, x, grad)
            return lambda: [(call, dispatch.choose(call)) for call in calls]

        def result(raw: Any) -> tuple[Tensor, ...]:
            with torch.no_grad():
                return _results([run_plan(OPS[type(call)], call, plan) for call, (_, plan) in raw])

        return replace(layer, prepared=prepared, result=result)

    return planned


def _c_call(build: Build) -> Build:
    """Builds the ops of the compiled extension alone, with the arguments that the backend gives
    them."""

    def called(tensors: LayerTensors) -> BuiltLayer:
        layer = build(tensors)

        def prepared(x: Tensor, grad: Tensor | None) -> Callable[[], Any]:
            calls = [_only_c_call(call) for call in _op_calls(layer, x, grad)]
            return lambda: [op(*args) for op, args in calls]

        return replace(layer, prepared=prepared, result=_results)

    return called


def _only_c_call(call: Any) -> tuple[Any, tuple[Any, ...]]:
    """Returns the op of the extension that runs `call`, and its arguments. Raises NotApplicable if
    several ops run it."""
    backend, plan = dispatch.choose(call)
    with _Recorder("pylora_C") as recorder, torch.no_grad():
        plan.run(call)
    if len(recorder.calls) != 1:
        raise NotApplicable(
            f"{call.op} runs on the backend {backend.name} with {len(recorder.calls)} calls of the "
            "compiled extension; only a single call can be timed alone"
        )
    return recorder.calls[0]


def _lora_op(tensors: LayerTensors) -> BuiltLayer:
    layer, x = contenders_torch.lora_linear(tensors), tensors.normal(1, tensors.cell.in_features)
    record = functional.CALLS["lora_linear"]
    call = record(x, tensors.nf4(), *layer.parameters, tensors.scaling)
    _, *rest = SPECS["lora_linear"].flatten(call)
    op = torch.ops.pylora.lora_linear.default
    return replace(layer, forward=lambda x: op(x, *rest)[0])


def _nf4_op(tensors: LayerTensors) -> BuiltLayer:
    layer, x = contenders_torch.nf4_linear(tensors), tensors.normal(1, tensors.cell.in_features)
    call = functional.CALLS["nf4_linear"](x, tensors.nf4())
    _, *rest = SPECS["nf4_linear"].flatten(call)
    op = torch.ops.pylora.nf4_linear.default
    return replace(layer, forward=lambda x: op(x, *rest))


def _dense_function(tensors: LayerTensors) -> BuiltLayer:
    linear = partial(torch.nn.functional.linear, weight=tensors.dense(tensors.dtype))
    return BuiltLayer(linear, lambda x: "linear")


def _dense_module(tensors: LayerTensors) -> BuiltLayer:
    return BuiltLayer(contenders_peers.dense_linear(tensors), lambda x: "linear")


def _ours(name: str, build: Build, has_lora: bool) -> Contender:
    packages = ("pylora-kernels", "torch")
    return Contender(name, build, packages, has_lora=has_lora, modes=HOST_MODES, is_ours=True)


def _dense(name: str, build: Build) -> Contender:
    return Contender(name, build, weights="dense", has_lora=False, modes=HOST_MODES)


def _of_peers(contender: Contender) -> Contender:
    """Adds the forward that autograd records, if the contender can be differentiated."""
    modes = HOST_MODES if set(HOST_MODES) & set(contender.modes[1:]) else contender.modes
    return replace(contender, modes=modes)


BENCH = Bench(
    op="host",
    contenders=(
        _ours("pylora", contenders_layers.over_nf4, has_lora=True),
        _ours("pylora F.lora_linear", contenders_torch.lora_linear, has_lora=True),
        _ours("pylora op lora_linear", _lora_op, has_lora=True),
        _ours("pylora plan lora_linear", _plan(contenders_torch.lora_linear), has_lora=True),
        _ours("pylora C call lora_linear", _c_call(contenders_torch.lora_linear), has_lora=True),
        _ours("pylora nn.NF4Linear", contenders_layers.nf4_module, has_lora=False),
        _ours("pylora F.nf4_linear", contenders_torch.nf4_linear, has_lora=False),
        _ours("pylora op nf4_linear", _nf4_op, has_lora=False),
        _ours("pylora plan nf4_linear", _plan(contenders_torch.nf4_linear), has_lora=False),
        _ours("pylora C call nf4_linear", _c_call(contenders_torch.nf4_linear), has_lora=False),
        _dense("F.linear", _dense_function),
        _dense("nn.Linear", _dense_module),
        *map(_of_peers, (contenders_peers.PEFT_OVER_DENSE, *contenders_peers.LORA[:4])),
    ),
    work=linear_work,
    oracle=linear_oracle,
    rank=16,
    quick_modes=HOST_MODES,
    shapes=HOST_SHAPES,
    tokens=(1,),
    modes=HOST_MODES,
    in_quick=False,
    host_time=True,
    budget=10.0,
)
