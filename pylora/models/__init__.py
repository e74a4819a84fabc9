"""Functions of whole models: quantize, add LoRA, save and load adapters, merge."""

from pylora.models.adapter_files import load_adapter, save_adapter
from pylora.models.lora import add_lora
from pylora.models.merging import MergedLayer, MergeReport, merge, unmerge
from pylora.models.quantization import quantize_model

__all__ = [
    "MergeReport",
    "MergedLayer",
    "add_lora",
    "load_adapter",
    "merge",
    "quantize_model",
    "save_adapter",
    "unmerge",
]
