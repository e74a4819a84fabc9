"""Who trains a model: each contender turns a dense model into one with LoRA."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import torch

import pylora
from benchmarks.models.bitsandbytes_layers import in_4bit
from benchmarks.models.families import DENSE
from benchmarks.models.results import ACCELERATED, DENSE_ACCELERATED, DENSE_PEER, PEER

RANK = 16

Targets = str | list[str]


@dataclass(frozen=True)
class ModelContender:
    """A way to train LoRA.

    build     (dense model, targets of LoRA) -> the model to train, which may be the same, changed
    """

    name: str
    build: Callable[[Any, Targets], Any]


def _with_peft(model: Any, targets: Targets) -> Any:
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets)
    return peft.get_peft_model(model, config)


def _accelerated(model: Any) -> Any:
    pylora.accelerate(model, verify=1)  # the first call of each layer is checked, before the timing
    return model


def _of_pylora(model: Any, targets: Targets) -> Any:
    skipped = [name for name, _ in model.named_modules() if re.match(DENSE, name)]
    pylora.quantize_model(model, skip_modules=skipped, double_quant=True)
    # PEFT casts its factors to float32 over a base in bfloat16; so do we, to compare the same work.
    pylora.add_lora(model, r=RANK, lora_alpha=2 * RANK, target_modules=targets, dtype=torch.float32)
    return model


CONTENDERS = (
    ModelContender(PEER, lambda model, targets: _with_peft(in_4bit(model, DENSE), targets)),
    ModelContender(
        ACCELERATED, lambda model, targets: _accelerated(_with_peft(in_4bit(model, DENSE), targets))
    ),
    ModelContender("pylora", _of_pylora),
    ModelContender(DENSE_PEER, _with_peft),
    ModelContender(
        DENSE_ACCELERATED,
        lambda model, targets: _accelerated(_with_peft(model, targets)),
    ),
)
