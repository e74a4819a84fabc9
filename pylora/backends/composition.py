"""Builds the ops of several layers or adapters from a backend's ops of one.

A backend that has no kernel of its own for these ops still runs every NF4 weight on its kernels.
Dense weights run in torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from pylora import reference
from pylora.backends.backend import DENSE, Plan, Planner, Refusal, in_python
from pylora.calls import (
    Bottleneck,
    BottleneckAdapterBackward,
    BottleneckAdapterCall,
    BottleneckWanted,
    Layer,
    LayerGradients,
    LoraLinearBackward,
    LoraLinearCall,
    LoraMlpBackward,
    LoraMlpCall,
    LoraQkvBackward,
    LoraQkvCall,
    MultiBottleneckBackward,
    MultiBottleneckCall,
    Nf4LinearBackward,
    Nf4LinearCall,
    Wanted,
)
from pylora.reference.lora_linear import LayerFunctions, layer_backward, layer_forward
from pylora.reference.multi_bottleneck_adapter import AdapterFunctions

# A step of a composed op: its name, and the answer to its call; None if torch runs the step.
Step = tuple[str, Plan | Refusal | None]


def composed(planners: Mapping[Any, Planner]) -> dict[Any, Planner]:
    """The planners of the composed ops, made of those of a backend's single ops.

    They hold only ops of which the backend has all parts.
    """
    layers = _Layers(planners)
    composed_planners: dict[Any, Planner] = {LoraQkvCall: layers.qkv, LoraMlpCall: layers.mlp}
    if {Nf4LinearBackward, LoraLinearBackward} <= planners.keys():
        composed_planners |= {
            LoraQkvBackward: layers.qkv_backward,
            LoraMlpBackward: layers.mlp_backward,
        }
    if {BottleneckAdapterCall, BottleneckAdapterBackward} <= planners.keys():
        adapters = _Adapters(planners)
        composed_planners |= {
            MultiBottleneckCall: adapters.multi,
            MultiBottleneckBackward: adapters.multi_backward,
        }
    return composed_planners


class _Adapters:
    """Plans and runs the adapters of multi_bottleneck_adapter one by one, each on its tokens."""

    def __init__(self, planners: Mapping[Any, Planner]) -> None:
        self._planners = planners
        self.functions = AdapterFunctions(self._run, self._run)

    def multi(self, call: MultiBottleneckCall) -> Plan | Refusal:
        return self._joined(
            call.adapters,
            lambda adapter: BottleneckAdapterCall(
                call.x, call.residual, call.add_residual, adapter
            ),
            reference.multi_bottleneck_adapter,
        )

    def multi_backward(self, call: MultiBottleneckBackward) -> Plan | Refusal:
        want = BottleneckWanted(True, True, True, True, True)
        return self._joined(
            call.adapters,
            lambda adapter: BottleneckAdapterBackward(
                call.grad, call.x, call.adds_x, adapter, want
            ),
            reference.multi_bottleneck_adapter_backward,
        )

    def _joined(
        self,
        adapters: Sequence[Bottleneck],
        call_of: Callable[[Bottleneck], Any],
        function: Callable[..., Any],
    ) -> Plan | Refusal:
        """One plan that runs `function` with this backend's adapters, or the first refusal."""
        variants: dict[str, None] = {}
        for adapter in adapters:
            call = call_of(adapter)
            plan = self._planners[type(call)](call)
            if isinstance(plan, Refusal):
                return plan
            variants[plan.variant] = None
        functions = self.functions
        run = in_python(lambda call: function(call, functions))
        return Plan(f"{len(adapters)} x bottleneck_adapter ({', '.join(variants)})", run)

    def _run(self, call: Any, out: Tensor | None) -> Any:
        plan = self._planners[type(call)](call)
        assert isinstance(plan, Plan)  # it was planned before, and tokens do not change that
        return plan.run(call) if out is None or plan.into is None else plan.into(call, out)


class _Layers:
    """Plans and runs layers one by one with a backend's own planners."""

    def __init__(self, planners: Mapping[Any, Planner]) -> None:
        self._planners = planners
        self.functions = LayerFunctions(self._forward, self._backward)

    def qkv(self, call: LoraQkvCall) -> Plan | Refusal:
        plans = [self._plan_forward(call.x, layer) for layer in call.layers]
        return self._joined(plans, reference.lora_qkv)

    def qkv_backward(self, call: LoraQkvBackward) -> Plan | Refusal:
        plans = [
            self._plan_backward(grad, call.x, h, layer, wanted)
            for grad, h, layer, wanted in zip(
                call.grads, call.hs, call.layers, call.wanted, strict=True
            )
        ]
        return self._joined(plans, reference.lora_qkv_backward)

    def mlp(self, call: LoraMlpCall) -> Plan | Refusal:
        gate, up, down = call.layers
        hidden = _activation_like(call.x, gate.weight.out_features)
        inputs = (call.x, gate), (call.x, up), (hidden, down)
        steps = [self._plan_forward(x, layer) for x, layer in inputs]
        return self._joined(steps, reference.lora_mlp, "the activation in torch")

    def mlp_backward(self, call: LoraMlpBackward) -> Plan | Refusal:
        # The gradients of gate and up, and the input of down, have the shapes of gate and up.
        grads, inputs = (call.gate, call.up, call.grad), (call.x, call.x, call.gate)
        plans = [
            self._plan_backward(*layer_arguments)
            for layer_arguments in zip(
                grads, inputs, call.hs, call.layers, call.wanted, strict=True
            )
        ]
        return self._joined(plans, reference.lora_mlp_backward, "the activation in torch")

    def _joined(
        self, steps: Sequence[Step], function: Callable[..., Any], in_torch: str = ""
    ) -> Plan | Refusal:
        """One plan that runs all steps, or the first refusal among them.

        function   the reference of the op, which takes `LayerFunctions`
        in_torch   what else the op runs in torch, in words
        """
        words: list[str] = []
        for name, plan in steps:
            if isinstance(plan, Refusal):
                return plan
            words.append(f"{name} in torch" if plan is None else f"{name} ({plan.variant})")
        if all(plan is None for _, plan in steps):
            return Refusal(DENSE)
        counts = Counter(words)
        parts = [f"{count} x {word}" if count > 1 else word for word, count in counts.items()]
        functions = self.functions
        run = in_python(lambda call: function(call, functions))
        return Plan("composed of " + ", ".join([*parts, *[in_torch] * bool(in_torch)]), run)

    def _plan_forward(self, x: Tensor, layer: Layer) -> Step:
        call = self._forward_call(x, layer)
        if call is None:
            return "a dense layer", None
        return call.op, self._planners[type(call)](call)

    def _forward_call(self, x: Tensor, layer: Layer) -> Nf4LinearCall | LoraLinearCall | None:
        """The record of the single-layer op that runs a layer; None if torch runs it."""
        if layer.low_rank is None:
            return Nf4LinearCall(x, layer) if layer.weight.is_nf4 else None
        call = LoraLinearCall(x, layer)
        if layer.weight.is_nf4 or isinstance(self._planners[LoraLinearCall](call), Plan):
            return call
        return None

    def _plan_backward(
        self, grad: Tensor, x: Tensor, h: Tensor, layer: Layer, wanted: Wanted
    ) -> Step:
        call = self._backward_call(grad, x, h, layer, wanted)
        if call is None:
            return "a dense layer", None
        return call.op, self._planners[type(call)](call)

    def _forward(self, x: Tensor, layer: Layer) -> tuple[Tensor, Tensor]:
        call = self._forward_call(x, layer)
        if call is None:
            return layer_forward(x, layer)
        result = self._planned(call).run(call)
        return result if layer.low_rank is not None else (result, x.new_empty(0))

    def _backward(
        self, grad: Tensor, x: Tensor, h: Tensor, layer: Layer, wanted: Wanted
    ) -> LayerGradients:
        call = self._backward_call(grad, x, h, layer, wanted)
        if call is None:
            return layer_backward(grad, x, h, layer, wanted)
        if isinstance(call, LoraLinearBackward):
            return self._planned(call).run(call)
        # A frozen NF4 weight without LoRA has gradients of x and of the bias alone.
        rest = layer_backward(grad, x, h, layer, Wanted(bias=wanted.bias))
        return rest.with_x(self._planned(call).run(call) if wanted.x else None)

    def _backward_call(
        self, grad: Tensor, x: Tensor, h: Tensor, layer: Layer, wanted: Wanted
    ) -> Nf4LinearBackward | LoraLinearBackward | None:
        """The record of the single-layer op that runs a backward; None if torch runs it."""
        low = layer.low_rank
        if low is None:
            return Nf4LinearBackward(grad, layer.weight) if layer.weight.is_nf4 else None
        call = LoraLinearBackward(grad, x, h, layer, wanted)
        if layer.weight.is_nf4:
            return call
        with_dropout = low.dropout is not None
        takes = with_dropout and isinstance(self._planners[LoraLinearBackward](call), Plan)
        return call if takes else None

    def _planned(self, call: Any) -> Plan:
        plan = self._planners[type(call)](call)
        if isinstance(plan, Refusal):
            # The input of a layer in the middle of an op may have other strides than planned.
            raise RuntimeError(f"{call.op} was planned and then refused: {plan.reason}")
        return plan


def _activation_like(x: Tensor, features: int) -> Tensor:
    """A tensor without memory that stands for an activation [..., features] still to come."""
    return x.new_empty(()).expand(*x.shape[:-1], features)
