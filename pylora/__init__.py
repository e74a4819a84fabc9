"""pylora: fused NF4 + LoRA kernels behind drop-in modules and autograd functions."""

from typing import Any

from pylora import functional, nn
from pylora.adapters import (
    Average,
    BatchSplit,
    Fuse,
    HoulsbyConfig,
    Parallel,
    ParallelConfig,
    PfeifferConfig,
    Stack,
)
from pylora.dispatch import use_backend
from pylora.explain import Explanation, explain
from pylora.functional import dequantize_nf4, quantize_nf4
from pylora.integrations.accelerate import accelerate, restore
from pylora.integrations.patching import PatchReport, patch, unpatch
from pylora.integrations.report import LayerReport, Report
from pylora.models import (
    MergedLayer,
    MergeReport,
    active_adapter,
    active_adapters,
    adapter_names,
    add_adapter,
    add_lora,
    delete_adapter,
    disable_adapter,
    load_adapter,
    merge,
    quantize_model,
    save_adapter,
    set_active_adapters,
    train_adapter,
    unload,
    unmerge,
)
from pylora.models.peft_names import instead_of
from pylora.nf4_weight import NF4Weight
from pylora.settings import refresh

# The same function under the name that it has beside `active_adapters`.
adapters_disabled = disable_adapter

__version__ = "0.1.0"

__all__ = [
    "Average",
    "BatchSplit",
    "Explanation",
    "Fuse",
    "HoulsbyConfig",
    "LayerReport",
    "MergeReport",
    "MergedLayer",
    "NF4Config",
    "NF4Weight",
    "Parallel",
    "ParallelConfig",
    "PatchReport",
    "PfeifferConfig",
    "Report",
    "Stack",
    "accelerate",
    "active_adapter",
    "active_adapters",
    "adapter_names",
    "adapters_disabled",
    "add_adapter",
    "add_lora",
    "delete_adapter",
    "dequantize_nf4",
    "disable_adapter",
    "explain",
    "functional",
    "load_adapter",
    "merge",
    "nn",
    "patch",
    "quantize_model",
    "quantize_nf4",
    "refresh",
    "restore",
    "save_adapter",
    "set_active_adapters",
    "train_adapter",
    "unload",
    "unmerge",
    "unpatch",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    """Imports `NF4Config`, which needs transformers, when it is asked for.

    An error for a name of PEFT says what pylora has in its place.
    """
    if name == "NF4Config":
        from pylora.integrations.loading import NF4Config

        return NF4Config
    instead = instead_of(name)
    hint = "" if instead is None else f", which is PEFT's: {instead}"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}")
