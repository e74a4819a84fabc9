"""Functions of whole models: quantize, add LoRA, save and load adapters, merge, unload."""

from pylora.models.adapter_files import load_adapter, save_adapter
from pylora.models.adapters import (
    active_adapter,
    active_adapters,
    adapter_names,
    delete_adapter,
    set_active_adapters,
)
from pylora.models.bottleneck import add_adapter, train_adapter
from pylora.models.disabling import disable_adapter
from pylora.models.lora import add_lora
from pylora.models.merging import MergedLayer, MergeReport, merge, unmerge
from pylora.models.quantization import quantize_model
from pylora.models.unloading import unload

__all__ = [
    "MergeReport",
    "MergedLayer",
    "active_adapter",
    "active_adapters",
    "adapter_names",
    "add_adapter",
    "add_lora",
    "delete_adapter",
    "disable_adapter",
    "load_adapter",
    "merge",
    "quantize_model",
    "save_adapter",
    "set_active_adapters",
    "train_adapter",
    "unload",
    "unmerge",
]
