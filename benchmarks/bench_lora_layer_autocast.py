"""lora_layer_autocast: lora_layer with LoRA in fp32, under autocast to the dtype of the cell.

PEFT trains so unless it is told not to: its factors are fp32, and the Trainer of transformers turns
autocast on.
"""

from __future__ import annotations

from dataclasses import replace

from benchmarks import bench_lora_layer
from benchmarks.contenders_layers import LAYERS_UNDER_AUTOCAST

BENCH = replace(bench_lora_layer.BENCH, op="lora_layer_autocast", contenders=LAYERS_UNDER_AUTOCAST)
