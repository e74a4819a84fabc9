"""Gives TRL's trainers the reference that they compare a model with: the model without its LoRA.

Without a `ref_model`, the trainers load the weights a second time, dense, unless the model is a
`peft.PeftModel`. A model with LoRA of pylora gets `base_of(model)` instead, which shares every
weight. Under FSDP and DeepSpeed, which would split the shared weights twice, a warning names
another way.
"""

from __future__ import annotations

import inspect
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import nn

from pylora.models.disabling import base_of
from pylora.models.module_tree import lora_layers

logger = logging.getLogger(__name__)

_TRAINERS = ("DPOTrainer", "KTOTrainer", "GRPOTrainer", "RLOOTrainer")
_GIVEN = "_pylora_gives_reference"
# The function of a trainer's module that loads the weights again.
_LOAD = "create_model_from_path"


def prepare(model: nn.Module) -> None:
    """Prepares the trainers that have been imported, if `model` has LoRA."""
    if not lora_layers(model):
        return
    for name in _TRAINERS:
        # A script that uses a trainer has imported its module.
        module = sys.modules.get(f"trl.trainer.{name.removesuffix('Trainer').lower()}_trainer")
        if module is not None:
            _give_reference(module, getattr(module, name))


def _give_reference(module: Any, trainer: Any) -> None:
    initialize = trainer.__init__
    if hasattr(initialize, _GIVEN):
        return
    signature = inspect.signature(initialize)

    @wraps(initialize)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        given = signature.bind_partial(self, *args, **kwargs)
        model: Any = given.arguments.get("model")
        is_ours = isinstance(model, nn.Module) and not hasattr(model, "peft_config")
        if not is_ours or given.arguments.get("ref_model") is not None or not lora_layers(model):
            initialize(self, *args, **kwargs)
        elif _is_split():
            logger.warning(
                "%s loads the weights again, without quantization, as reference for a model that "
                "is no peft.PeftModel; give it pylora.integrations.peft.as_peft_model(model)",
                trainer.__name__,
            )
            initialize(self, *args, **kwargs)
        else:
            with _loading(module, model):
                if "ref_model" in signature.parameters:
                    given.arguments["ref_model"] = base_of(model)
                initialize(*given.args, **given.kwargs)

    setattr(__init__, _GIVEN, True)
    trainer.__init__ = __init__


@contextmanager
def _loading(module: Any, model: nn.Module) -> Iterator[None]:
    """Inside the block, the module's function that loads a reference gives the base of `model`."""
    load = getattr(module, _LOAD, None)
    setattr(module, _LOAD, lambda *args, **kwargs: base_of(model))
    try:
        yield
    finally:
        setattr(module, _LOAD, load)


def _is_split() -> bool:
    """True if Accelerate's launcher has chosen FSDP or DeepSpeed for this process."""
    names = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    return any(os.environ.get(name, "").lower() in ("1", "true", "yes") for name in names)
