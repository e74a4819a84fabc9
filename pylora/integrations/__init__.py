"""What knows PEFT, bitsandbytes and transformers; none of them needs to be installed.

transformers keeps marks on its models. They follow each change that `pylora.models` makes.
"""

from __future__ import annotations

import sys

from torch import nn

from pylora.models.changes import listen


def _tell_transformers(model: nn.Module) -> None:
    if "transformers" in sys.modules:  # otherwise there is no model of it
        from pylora.integrations import transformers

        transformers.mark(model)


listen(_tell_transformers)
