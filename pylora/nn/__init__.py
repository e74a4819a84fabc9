"""Drop-in modules: they hold parameters, have state dicts and call `pylora.functional`."""

from pylora.nn import weight_averaging
from pylora.nn.bottleneck_adapter import BottleneckAdapter
from pylora.nn.lora_linear import LoRALinear
from pylora.nn.multi_lora_linear import MultiLoRALinear
from pylora.nn.nf4_linear import NF4Linear

__all__ = ["BottleneckAdapter", "LoRALinear", "MultiLoRALinear", "NF4Linear"]

weight_averaging.install()
