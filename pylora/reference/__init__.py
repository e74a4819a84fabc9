"""Pure-PyTorch references: the oracle of every op, and its implementation if no kernel takes it."""

from pylora.reference.absmax import dequantize_absmax, quantize_absmax
from pylora.reference.bottleneck_adapter import (
    bottleneck_adapter,
    bottleneck_adapter_backward,
)
from pylora.reference.dora_linear import dora_linear, dora_linear_backward
from pylora.reference.lora_linear import lora_linear, lora_linear_backward
from pylora.reference.lora_mlp import lora_mlp, lora_mlp_backward
from pylora.reference.lora_qkv import lora_qkv, lora_qkv_backward
from pylora.reference.multi_bottleneck_adapter import (
    multi_bottleneck_adapter,
    multi_bottleneck_adapter_backward,
)
from pylora.reference.multi_lora_linear import multi_lora_linear, multi_lora_linear_backward
from pylora.reference.nf4_dequantize import dense, nf4_dequantize
from pylora.reference.nf4_linear import nf4_linear, nf4_linear_backward
from pylora.reference.nf4_quantize import nf4_quantize

__all__ = [
    "bottleneck_adapter",
    "bottleneck_adapter_backward",
    "dense",
    "dequantize_absmax",
    "dora_linear",
    "dora_linear_backward",
    "lora_linear",
    "lora_linear_backward",
    "lora_mlp",
    "lora_mlp_backward",
    "lora_qkv",
    "lora_qkv_backward",
    "multi_bottleneck_adapter",
    "multi_bottleneck_adapter_backward",
    "multi_lora_linear",
    "multi_lora_linear_backward",
    "nf4_dequantize",
    "nf4_linear",
    "nf4_linear_backward",
    "nf4_quantize",
    "quantize_absmax",
]
