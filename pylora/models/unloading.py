"""`unload` turns a model with LoRA layers back into a plain one."""

from __future__ import annotations

import logging
from typing import TypeVar

from torch import nn

from pylora.models.changes import changed
from pylora.models.distributed import refuse_to_change
from pylora.models.lora_switching import lora_names
from pylora.models.module_tree import (
    lora_layers,
    mark_added_bias,
    refuse_peft_model,
    sites,
)
from pylora.models.slots import bottleneck_names, remove_adapters
from pylora.models.trained_in_full import all_full_modules, forget_full
from pylora.models.wrappers import unwrapped
from pylora.nn import LoRALinear

logger = logging.getLogger(__name__)

_Model = TypeVar("_Model", bound=nn.Module)


def unload(model: _Model) -> _Model:
    """Puts the base layer of every LoRALinear back in its place, and returns the model.

    model    changed in place; if it is a LoRALinear itself, its base layer is returned

    The model is then the one before `pylora.add_lora`, with layers of the same class and state dict
    keys. A merged layer leaves its merged weight; one that is not merged leaves the base weight,
    and its LoRA parameters are dropped (`pylora.save_adapter` keeps them in a file). Hooks and the
    training mode stay. Modules that were trained in full keep their trained weights. Parameters
    that `add_lora` froze stay frozen. Inactive adapters are dropped, and the log names them.

    Raises ValueError if the model has no LoRA, or is sharded or in a wrapper that keeps its layers.
    """
    root = unwrapped(model)
    refuse_peft_model(root)
    if not lora_layers(root):
        raise ValueError("model has no LoRALinear; pylora.add_lora must have been called on it")
    if isinstance(root, LoRALinear):
        base = root.base_layer
        return base.train(root.training)
    refuse_to_change(model, "pylora.unload")
    others = (*lora_names(root)[1:], *bottleneck_names(root))
    if others:
        logger.warning("the inactive adapters %s are dropped", ", ".join(map(repr, others)))
    for module in {id(m): m for m in all_full_modules(root).values()}.values():
        forget_full(module)
    for site in list(sites(root)):
        layer = site.module
        if isinstance(layer, LoRALinear):
            if layer.merge_added_bias:
                mark_added_bias(layer.base_layer)
            site.replace(layer.base_layer)
    remove_adapters(root, set(bottleneck_names(root)))
    changed(root)
    return model
