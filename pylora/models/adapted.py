"""What a switch of adapters changes in a model, looked for once and kept with the model.

A walk through a model takes milliseconds, and a model may switch for each request.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from pylora.adapters.activation_state import ActiveSetup
from pylora.adapters.slot import AdapterSlot
from pylora.models.trained_in_full import is_trained_in_full
from pylora.models.wrappers import unwrapped
from pylora.nn import LoRALinear
from pylora.nn.changes import last_change

# The attribute of a model that keeps its `Adapted`.
_KEPT = "_pylora_adapted"


@dataclass(frozen=True)
class Adapted:
    """The parts of a model that have adapters, each once and in the order of `modules()`.

    lora      the LoRALinears
    full      the modules that an adapter trains in full
    setup     says which bottleneck adapters are active, and has their slots; None without them
    found     the mark of `pylora.nn.changes` when these were looked for
    """

    lora: list[LoRALinear]
    full: list[nn.Module]
    setup: ActiveSetup | None
    found: object


def adapted(model: nn.Module) -> Adapted:
    """The parts of a model, or of the model in a wrapper, that have adapters.

    They are looked for again after a change of the layers of any model, and in a copy.
    """
    root = unwrapped(model)
    kept: Adapted | None = vars(root).get(_KEPT)
    # A copy of a model has a copy of the mark, which is another object.
    if kept is None or kept.found is not last_change():
        found, modules = last_change(), list(root.modules())
        kept = Adapted(
            lora=[m for m in modules if isinstance(m, LoRALinear)],
            full=[m for m in modules if is_trained_in_full(m)],
            setup=next((m.setup for m in modules if isinstance(m, AdapterSlot)), None),
            found=found,
        )
        vars(root)[_KEPT] = kept
    return kept
