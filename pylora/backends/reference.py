"""The reference backend: pure PyTorch, which takes every device, dtype and shape."""

from __future__ import annotations

from typing import Any

from pylora import reference
from pylora.backends.backend import Backend, Plan, Planner, in_python
from pylora.calls import (
    BottleneckAdapterBackward,
    BottleneckAdapterCall,
    DequantizeCall,
    DoraLinearBackward,
    DoraLinearCall,
    LoraLinearBackward,
    LoraLinearCall,
    LoraMlpBackward,
    LoraMlpCall,
    LoraQkvBackward,
    LoraQkvCall,
    MultiBottleneckBackward,
    MultiBottleneckCall,
    MultiLoraBackward,
    MultiLoraCall,
    Nf4LinearBackward,
    Nf4LinearCall,
    QuantizeCall,
)
from pylora.reference.lora_linear import native

_VARIANT = "pure PyTorch"


def _always(record: Any) -> Planner:
    plan = Plan(_VARIANT, in_python(getattr(reference, record.op)))
    return lambda call: plan


def _lora_linear(call: LoraLinearCall) -> Plan:
    return Plan(_VARIANT, in_python(reference.lora_linear), native=native(call))


BACKEND = Backend(
    name="reference",
    planners={
        record: _always(record)
        for record in (
            QuantizeCall,
            DequantizeCall,
            Nf4LinearCall,
            Nf4LinearBackward,
            LoraLinearBackward,
            DoraLinearCall,
            DoraLinearBackward,
            LoraQkvCall,
            LoraQkvBackward,
            LoraMlpCall,
            LoraMlpBackward,
            MultiLoraCall,
            MultiLoraBackward,
            BottleneckAdapterCall,
            BottleneckAdapterBackward,
            MultiBottleneckCall,
            MultiBottleneckBackward,
        )
    }
    | {LoraLinearCall: _lora_linear},
    unavailable=lambda: None,
    compiled_for=lambda: _VARIANT,
    device=lambda: "cpu",
)
