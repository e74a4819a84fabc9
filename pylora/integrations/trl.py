"""Gives TRL's trainers the reference that they compare a model with: the model without its LoRA.

Without a `ref_model`, DPOTrainer and KTOTrainer load the weights a second time, dense, unless the
model is a `peft.PeftModel`. A model with LoRA of pylora gets `base_of(model)` instead, which shares
every weight. GRPOTrainer and RLOOTrainer take no `ref_model`; a warning names the way.
"""

from __future__ import annotations

import inspect
import logging
import sys
from functools import cache, wraps
from typing import Any

from torch import nn

from pylora.models.disabling import base_of
from pylora.models.module_tree import lora_layers

logger = logging.getLogger(__name__)

_TAKE_A_REFERENCE = ("DPOTrainer", "KTOTrainer")
_TAKE_NONE = ("GRPOTrainer", "RLOOTrainer")
_GIVEN = "_pylora_gives_reference"


def prepare(model: nn.Module) -> None:
    """Prepares the trainers that have been imported, if `model` has LoRA; see above."""
    if not lora_layers(model):
        return
    for name in (*_TAKE_A_REFERENCE, *_TAKE_NONE):
        # A script that uses a trainer has imported its module.
        module = sys.modules.get(f"trl.trainer.{name.removesuffix('Trainer').lower()}_trainer")
        if module is None:
            continue
        if name in _TAKE_NONE:
            _warn(name)
        else:
            _give_reference(getattr(module, name))


def _give_reference(trainer: Any) -> None:
    initialize = trainer.__init__
    if hasattr(initialize, _GIVEN):
        return
    signature = inspect.signature(initialize)

    @wraps(initialize)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        given = signature.bind_partial(self, *args, **kwargs)
        model: Any = given.arguments.get("model")
        is_ours = isinstance(model, nn.Module) and not hasattr(model, "peft_config")
        if is_ours and given.arguments.get("ref_model") is None and lora_layers(model):
            given.arguments["ref_model"] = base_of(model)
        initialize(*given.args, **given.kwargs)

    setattr(__init__, _GIVEN, True)
    trainer.__init__ = __init__


@cache
def _warn(trainer: str) -> None:
    """Says once what pylora cannot change: TRL asks for the class of PEFT, not for its methods."""
    logger.warning(
        "TRL's %s loads the weights again, without quantization, as reference for a model that is "
        "no peft.PeftModel; give it pylora.integrations.peft.as_peft_model(model)",
        trainer,
    )
