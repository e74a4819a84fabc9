"""`PyloraPlugin` lets the models of Axolotl compute through pylora. Its configuration names it:

plugins:
  - pylora.integrations.axolotl.PyloraPlugin
"""

from __future__ import annotations

import logging
from typing import Any

from axolotl.integrations.base import BasePlugin
from torch import nn

from pylora.integrations.accelerate import accelerate

# Axolotl shows messages of this level only from loggers that have its name.
logger = logging.getLogger("axolotl.pylora")


class PyloraPlugin(BasePlugin):
    """Calls `pylora.accelerate` on the model that Axolotl has loaded, and logs its report."""

    def post_lora_load(self, cfg: Any, model: nn.Module) -> None:
        """Called by Axolotl once the model has its adapter, before it is wrapped or compiled."""
        logger.info("%s", accelerate(model))
