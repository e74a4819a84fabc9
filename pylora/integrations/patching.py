"""`patch` lets every layer of PEFT and bitsandbytes compute through pylora, in models yet to come.

It exchanges the forward of their classes, for scripts in which a trainer builds the model. Each
module is judged by the rules of `pylora.accelerate` when it is called for the first time.
"""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass
from functools import wraps
from typing import Any

from torch import nn

from pylora import checks
from pylora.integrations import peft_rows
from pylora.integrations.swapped_classes import CLASSES
from pylora.integrations.swaps import OWN_FORWARD, Swap

logger = logging.getLogger(__name__)

_SWAP = "_pylora_class_swap"


@dataclass(frozen=True)
class PatchReport:
    """What `pylora.patch` did.

    patched    the classes whose layers compute through pylora from now on
    left       class or library -> why it computes as before
    """

    patched: tuple[str, ...]
    left: dict[str, str]

    def __str__(self) -> str:
        lines = [f"patched  {name}" for name in self.patched]
        return "\n".join([*lines, *(f"left     {name}: {why}" for name, why in self.left.items())])


class _Left(Swap):
    """A layer that pylora cannot compute, for `reason`."""

    def __init__(self, name: str, verify: int, reason: str = "it was left before") -> None:
        super().__init__(name, verify)
        self._reason = reason

    def forward(self, module: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        return self.as_before(module, self._reason, x, *args, **kwargs)


def patch(*, bitsandbytes: bool = True, peft: bool = True, verify: int = 0) -> PatchReport:
    """Lets the layers of bitsandbytes and PEFT compute through pylora, in every model.

    bitsandbytes    true for Linear4bit (nf4)
    peft            true for LoRA and AdaLoRA over nn.Linear and over Linear4bit
    verify          the first `verify` calls of each layer are compared with float64 by the numerics
                    rule; AssertionError names the class of the layer that fails

    A layer that pylora cannot compute goes on as before, and the log
    (`pylora.integrations.swaps`) says why. Calling it again changes `verify` alone; `unpatch`
    undoes it.
    """
    checks.integer("verify", verify, least=0)
    asked_for = {"bitsandbytes": bitsandbytes, "peft": peft}
    patched, left = [], {}
    for library, module_name, class_name, swap in CLASSES:
        full_name = f"{module_name}.{class_name}"
        if not asked_for[library]:
            left[full_name] = f"{library} is False"
            continue
        try:
            cls = getattr(importlib.import_module(module_name), class_name)
        except (ImportError, AttributeError) as error:
            left[full_name] = f"it could not be imported: {error}"
            continue
        _patch_class(cls, swap, verify)
        patched.append(full_name)
    if peft and "peft.tuners.lora.layer.Linear" in patched:
        peft_rows.allow_training_everywhere()
    return PatchReport(tuple(patched), left)


def unpatch() -> None:
    """Gives every class that `patch` changed its own forward back."""
    for cls, own_forward in OWN_FORWARD.items():
        cls.forward = own_forward  # type: ignore[attr-defined]
    OWN_FORWARD.clear()
    peft_rows.forbid_training_everywhere()


def _patch_class(cls: Any, kind: type[Swap], verify: int) -> None:
    own_forward = OWN_FORWARD.setdefault(cls, cls.forward)
    this_patch = object()  # a module forgets the swap that an earlier patch gave it

    @wraps(own_forward)
    def forward(module: nn.Module, x: Any, *args: Any, **kwargs: Any) -> Any:
        if type(module) is not cls:  # a subclass may compute something else
            return own_forward(module, x, *args, **kwargs)
        patch, swap = module.__dict__.get(_SWAP, (None, None))
        if swap is None or patch is not this_patch:
            swap = kind(f"a {cls.__name__}", verify)
            reason = swap.why_not(module)
            if reason is not None:
                swap = _Left(swap.name, 0, reason)
            module.__dict__[_SWAP] = (this_patch, swap)
        return swap.forward(module, x, *args, **kwargs)

    cls.forward = forward
