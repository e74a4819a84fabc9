"""What knows PEFT, bitsandbytes and transformers; none of them needs to be installed.

transformers keeps marks on its models. They follow each change that `pylora.models` makes.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

from torch import nn

from pylora.integrations import peft_install, trl
from pylora.models.changes import listen
from pylora.nn.nf4_linear import when_first_made


def _tell_transformers(model: nn.Module) -> None:
    if "transformers" in sys.modules:  # otherwise there is no model of it
        from pylora.integrations import transformers

        transformers.mark(model)


listen(_tell_transformers)
listen(trl.prepare)
when_first_made(peft_install.install_with_peft)


def __getattr__(name: str) -> ModuleType:
    """Imports `transformers` and `peft`, which need these libraries, when they are asked for."""
    if name in ("transformers", "peft"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
