"""pylora: fused NF4 + LoRA kernels behind drop-in modules and autograd functions."""

from pylora import functional, nn
from pylora.dispatch import use_backend
from pylora.explain import Explanation, explain
from pylora.functional import dequantize_nf4, quantize_nf4
from pylora.nf4 import NF4Weight

__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "NF4Weight",
    "dequantize_nf4",
    "explain",
    "functional",
    "nn",
    "quantize_nf4",
    "use_backend",
]
