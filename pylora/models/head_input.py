"""Lays out the input of a frozen dense output head, whose weight torch would copy otherwise.

Models compute logits of the last token of each sequence, `head(hidden[:, -1:])`. On a CPU torch
runs such an input, whose rows lie far apart, as a batch of products, and copies a frozen weight for
each sequence. A weight that is trained is not copied, and so this meets those who train with LoRA.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pylora.models.targets import output_head


def _laid_out(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """A forward pre-hook: the first argument with rows that follow each other in memory."""
    x, *others = args or (None,)
    if type(x) is not Tensor or x.device.type != "cpu":
        return None
    # `contiguous` would leave the strides of a batch of one as they are.
    return x.reshape(-1).view(x.shape), *others


def lay_out_head_input(model: nn.Module) -> None:
    """Has the input of the model's output head laid out in each call, if it is an nn.Linear."""
    head = output_head(model)
    if type(head) is nn.Linear and _laid_out not in head._forward_pre_hooks.values():
        head.register_forward_pre_hook(_laid_out)


def forget_head_input(model: nn.Module) -> None:
    """Undoes `lay_out_head_input`."""
    for module in model.modules():
        hooks = module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is _laid_out]:
            del hooks[key]
