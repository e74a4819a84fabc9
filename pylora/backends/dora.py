"""Builds dora_linear and its backward from a backend's lora_linear and a rescaling of its rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pylora import reference
from pylora.backends.backend import (
    DENSE,
    Plan,
    Planner,
    PreparedForward,
    Reason,
    Refusal,
    in_python,
)
from pylora.calls import (
    DoraLinearBackward,
    DoraLinearCall,
    Dropout,
    Layer,
    LayerGradients,
    LoraLinearBackward,
    LoraLinearCall,
    Wanted,
)
from pylora.reference.dora_linear import REFERENCE_RESCALING, Rescaling, layer_wanted
from pylora.reference.lora_linear import REFERENCE_LAYERS, LayerFunctions

# (a product, magnitude, norm, bias) -> a function of a product that writes its second argument.
PrepareRescaling = Callable[
    [Tensor, Tensor, Tensor, Tensor | None], Callable[[Tensor, Tensor], None]
]
# (tensors by name) -> why the rescaling does not take them.
RescalingReason = Callable[..., Reason]


def dora_planners(
    planners: Mapping[Any, Planner],
    rescaling: Rescaling = REFERENCE_RESCALING,
    prepare: PrepareRescaling | None = None,
    why_not: RescalingReason | None = None,
) -> dict[Any, Planner]:
    """The planners of dora_linear and its backward, made of those of a backend's lora_linear.

    rescaling    how the rows are rescaled; by default torch does it
    prepare      prepares `rescaling.forward` for a layer that is called many times
    why_not      the limits of a rescaling that is not torch's. With such a one the backend takes
                 dense weights as well, whose products torch computes
    """
    dora = _Dora(planners, rescaling, prepare, why_not)
    return {DoraLinearCall: dora.forward, DoraLinearBackward: dora.backward}


class _Dora:
    def __init__(
        self,
        planners: Mapping[Any, Planner],
        rescaling: Rescaling,
        prepare: PrepareRescaling | None,
        why_not: RescalingReason | None,
    ) -> None:
        self._planners, self._rescaling = planners, rescaling
        self._prepare_rescaling, self._why_not = prepare, why_not

    def forward(self, call: DoraLinearCall) -> Plan | Refusal:
        plan = self._layer_plan(LoraLinearCall(call.x, call.layer), call, call.x)
        if isinstance(plan, Refusal):
            return plan
        forward = plan.run

        def of_layer(x: Tensor, layer: Layer) -> tuple[Tensor, Tensor]:
            y, h = forward(LoraLinearCall(x, layer))
            return y, h

        functions = LayerFunctions(of_layer, REFERENCE_LAYERS.backward)
        run = in_python(lambda call: reference.dora_linear(call, functions, self._rescaling))
        prepare = None if plan.prepare is None else partial(self._prepare, plan.prepare)
        return Plan(f"lora_linear ({plan.variant}), rescaled", run, prepare=prepare)

    def backward(self, call: DoraLinearBackward) -> Plan | Refusal:
        inputs = (call.grad, call.x, call.h, call.layer)
        layer_call = LoraLinearBackward(*inputs, layer_wanted(call.wanted))
        plan = self._layer_plan(layer_call, call, call.grad)
        if isinstance(plan, Refusal):
            return plan
        backward = plan.run

        def of_layer(
            grad: Tensor, x: Tensor, h: Tensor, layer: Layer, wanted: Wanted
        ) -> LayerGradients:
            gradients: LayerGradients = backward(LoraLinearBackward(grad, x, h, layer, wanted))
            return gradients

        functions = LayerFunctions(REFERENCE_LAYERS.forward, of_layer)
        rescaling = self._rescaling
        run = in_python(lambda call: reference.dora_linear_backward(call, functions, rescaling))
        return Plan(f"lora_linear_backward ({plan.variant}), rescaled", run)

    def _layer_plan(
        self, layer_call: Any, call: DoraLinearCall | DoraLinearBackward, tokens: Tensor
    ) -> Plan | Refusal:
        """How the layer under the rescaling runs, or why the backend does not take the call."""
        if self._why_not is not None:
            reason = self._why_not(tokens=tokens, magnitude=call.magnitude, norm=call.norm)
            if reason is not None:
                return Refusal(reason)
        plan = self._planners[type(layer_call)](layer_call)
        if isinstance(plan, Plan) or call.layer.weight.is_nf4:
            return plan
        if self._why_not is None:
            return Refusal(DENSE)
        return Plan("dense, in torch", getattr(reference, layer_call.op))

    def _prepare(
        self, prepare: Callable[[Any], PreparedForward], call: DoraLinearCall
    ) -> PreparedForward:
        """The prepared forward of a layer with DoRA, made of that of the layer without it."""
        forward = prepare(LoraLinearCall(call.x, call.layer))
        vectors = (call.magnitude, call.norm, call.bias)
        rescaled, rescale = self._rescaling.forward, None
        if self._prepare_rescaling is not None:
            product = call.x.new_empty(0, call.layer.weight.out_features)
            rescale = self._prepare_rescaling(product, *vectors)

        def run(x: Tensor, scaling: float, dropout: Dropout | None, wants_h: bool) -> Any:
            product, h = forward(x, scaling, dropout, wants_h)
            if rescale is None:
                return rescaled(product, *vectors), h, product
            y = torch.empty_like(product) if wants_h else product  # the backward needs the product
            rescale(product, y)
            return y, h, product

        return run
