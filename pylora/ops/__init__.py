"""The registered ops `torch.ops.pylora.*`: schema, fake (meta) function and autograd, one op a
file.

Importing this package registers them all. Each op runs whatever backend `pylora.dispatch` chooses.
`run(call)` runs a call record, with or without a detour through torch's dispatcher.
"""

from pylora.ops import (
    lora_linear,
    lora_mlp,
    lora_qkv,
    multi_lora_linear,
    nf4_dequantize,
    nf4_linear,
    nf4_quantize,
)
from pylora.ops.registration import run

__all__ = [
    "lora_linear",
    "lora_mlp",
    "lora_qkv",
    "multi_lora_linear",
    "nf4_dequantize",
    "nf4_linear",
    "nf4_quantize",
    "run",
]
