"""The reference backend: pure PyTorch, which takes every device, dtype and shape."""

from __future__ import annotations

from typing import Any

from pylora import reference
from pylora.backends.backend import Backend, Plan, Planner, in_python
from pylora.calls import (
    BottleneckAdapterBackward,
    BottleneckAdapterCall,
    DequantizeCall,
    LoraLinearBackward,
    LoraLinearCall,
    LoraMlpBackward,
    LoraMlpCall,
    LoraQkvBackward,
    LoraQkvCall,
    MultiLoraBackward,
    MultiLoraCall,
    Nf4LinearBackward,
    Nf4LinearCall,
    QuantizeCall,
)

_VARIANT = "pure PyTorch"


def _always(record: Any) -> Planner:
    plan = Plan(_VARIANT, in_python(getattr(reference, record.op)))
    return lambda call: plan


BACKEND = Backend(
    name="reference",
    planners={
        record: _always(record)
        for record in (
            QuantizeCall,
            DequantizeCall,
            Nf4LinearCall,
            Nf4LinearBackward,
            LoraLinearCall,
            LoraLinearBackward,
            LoraQkvCall,
            LoraQkvBackward,
            LoraMlpCall,
            LoraMlpBackward,
            MultiLoraCall,
            MultiLoraBackward,
            BottleneckAdapterCall,
            BottleneckAdapterBackward,
        )
    },
    unavailable=lambda: None,
    compiled_for=lambda: _VARIANT,
    device=lambda: "cpu",
)
