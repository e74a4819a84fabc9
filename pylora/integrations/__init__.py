"""What knows PEFT, bitsandbytes and transformers; none of them needs to be installed.

transformers keeps marks on its models. They follow each change that `pylora.models` makes.
"""

from __future__ import annotations

import importlib
import logging
import sys
from functools import cache
from types import ModuleType

from torch import nn

from pylora.models.changes import listen
from pylora.models.module_tree import lora_layers

logger = logging.getLogger(__name__)

# The trainers of TRL that compare a model with a reference; a script that uses one has imported its
# module.
_WITH_REFERENCE = ("DPOTrainer", "KTOTrainer", "GRPOTrainer", "RLOOTrainer")


def _tell_transformers(model: nn.Module) -> None:
    if "transformers" in sys.modules:  # otherwise there is no model of it
        from pylora.integrations import transformers

        transformers.mark(model)


def _warn_of_trl(model: nn.Module) -> None:
    for name in _WITH_REFERENCE:
        module = sys.modules.get(f"trl.trainer.{name.removesuffix('Trainer').lower()}_trainer")
        if module is not None and lora_layers(model):
            _warn_of_reference(name)


@cache
def _warn_of_reference(trainer: str) -> None:
    """Says once what pylora cannot change: TRL asks for the class of PEFT, not for its methods."""
    logger.warning(
        "TRL's %s loads the weights again, without quantization, as reference for a model that is "
        "no peft.PeftModel; give it pylora.integrations.peft.as_peft_model(model)",
        trainer,
    )


listen(_tell_transformers)
listen(_warn_of_trl)


def __getattr__(name: str) -> ModuleType:
    """Imports `transformers` and `peft`, which need these libraries, when they are asked for."""
    if name in ("transformers", "peft"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
