"""multi_lora_linear of the cpu backend: first the base on all tokens, then every token's adapter.

The base runs as nf4_linear does, by whatever kernels are fastest for so many tokens, or in torch if
it is dense. The kernels of the adapters add to what it gave. Adapters that they do not take run in
torch, on what the base gave as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from pylora.backends import extension
from pylora.backends.backend import DENSE, Plan, Reason, Refusal, in_python
from pylora.calls import (
    Layer,
    LayerGradients,
    MultiLoraBackward,
    MultiLoraCall,
    Nf4LinearBackward,
    Nf4LinearCall,
    Weight,
)
from pylora.reference.multi_lora_linear import (
    add_adapters,
    add_adapters_backward,
    layer_base,
    multi_lora_linear,
    multi_lora_linear_backward,
)
from pylora.reference.nf4_linear import base_linear_backward


class MultiLora:
    """Plans multi_lora_linear and its backward.

    linear, linear_backward    the planners of nf4_linear and of its backward
    reason                     None if the kernels take the adapters of a call, otherwise why not
    instruction_set            the word for the kernels of the adapters
    """

    def __init__(
        self,
        linear: Callable[[Nf4LinearCall], Plan | Refusal],
        linear_backward: Callable[[Nf4LinearBackward], Plan | Refusal],
        reason: Callable[[MultiLoraCall | MultiLoraBackward], Reason],
        instruction_set: Callable[[], str],
    ) -> None:
        self._linear = linear
        self._linear_backward = linear_backward
        self._reason = reason
        self._instruction_set = instruction_set

    def forward(self, call: MultiLoraCall) -> Plan | Refusal:
        planned = None
        if call.layer.weight.is_nf4:
            planned = self._linear(Nf4LinearCall(call.x, call.layer))
        if isinstance(planned, Refusal):
            return planned
        reason = self._reason(call)
        add = extension.multi_lora_add if reason is None else add_adapters
        base = layer_base if planned is None else _forward_of(planned)

        def run(call: MultiLoraCall) -> tuple[Tensor, Tensor]:
            return multi_lora_linear(call, base, add)

        return self._joined(planned, reason, run)

    def backward(self, call: MultiLoraBackward) -> Plan | Refusal:
        planned = None
        if call.layer.weight.is_nf4:
            planned = self._linear_backward(Nf4LinearBackward(call.grad, call.layer.weight))
        if isinstance(planned, Refusal):
            return planned
        reason = self._reason(call)
        add = extension.multi_lora_add_backward if reason is None else add_adapters_backward
        base = base_linear_backward if planned is None else _backward_of(planned)

        def run(call: MultiLoraBackward) -> LayerGradients:
            return multi_lora_linear_backward(call, base, add)

        return self._joined(planned, reason, run)

    def _joined(self, base: Plan | None, reason: Reason, run: Callable[..., Any]) -> Plan | Refusal:
        """The plan of both steps.

        base      None if the base is dense
        reason    why torch runs the adapters; None if the kernels do
        """
        if base is None and reason is not None:
            return Refusal(f"{DENSE}; {reason}")
        of_base = "a dense layer in torch" if base is None else f"nf4_linear ({base.variant})"
        where = "in torch" if reason is not None else f"({self._instruction_set()})"
        variant = f"composed of {of_base}, the adapters {where}"
        return Plan(variant, in_python(run), note=reason or "")


def _forward_of(plan: Plan) -> Callable[[Tensor, Layer], Tensor]:
    return lambda x, layer: plan.run(Nf4LinearCall(x, layer))


def _backward_of(plan: Plan) -> Callable[[Tensor, Weight], Tensor]:
    return lambda grad, weight: plan.run(Nf4LinearBackward(grad, weight))
