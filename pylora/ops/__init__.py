"""The registered ops `torch.ops.pylora.*`, one file per op: its fake (meta) function and autograd.

Importing this package registers them all. Each op runs on the backend that `pylora.dispatch`
chooses. `run(call)` runs a call record, through torch's dispatcher only if that is needed;
`run_output(call)` gives its first result alone.
"""

from pylora.ops import (
    bottleneck_adapter,
    dora_linear,
    lora_linear,
    lora_mlp,
    lora_qkv,
    multi_bottleneck_adapter,
    multi_lora_linear,
    nf4_dequantize,
    nf4_linear,
    nf4_quantize,
)
from pylora.ops.registration import run, run_output

__all__ = [
    "bottleneck_adapter",
    "dora_linear",
    "lora_linear",
    "lora_mlp",
    "lora_qkv",
    "multi_bottleneck_adapter",
    "multi_lora_linear",
    "nf4_dequantize",
    "nf4_linear",
    "nf4_quantize",
    "run",
    "run_output",
]
