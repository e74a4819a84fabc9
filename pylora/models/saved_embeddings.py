"""The base weights of embeddings that PEFT saves beside an adapter, and what is done with them.

PEFT writes the weights of the input embedding and of the output head, as they were at that moment,
if one of them has LoRA or if the vocabulary was resized (`save_embedding_layers`). They are in no
module of `modules_to_save`. PEFT copies them into the model that it loads, and so does pylora.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pylora import checks
from pylora.models.module_tree import is_4bit, is_below, sites
from pylora.models.targets import output_head
from pylora.nn import LoRALinear
from pylora.sharding import gathered, write

logger = logging.getLogger(__name__)


def take_embeddings(
    file: Path,
    tensors: dict[str, Tensor],
    model: nn.Module,
    prefix: str,
    fully_trained: Collection[str],
) -> dict[str, Tensor]:
    """Takes the base weights of embeddings out of `tensors`; returns them by their place.

    tensors          by their keys in `file`, which begin with `prefix`
    fully_trained    the names of the modules in modules_to_save, whose weights are left

    A place is the name of a module and of a parameter in it, such as "lm_head.weight". Raises
    ValueError that names the key if a weight does not fit the model.
    """
    taken: dict[str, Tensor] = {}
    values: dict[int, str] = {}
    for name, module in _embeddings(model).items():
        if is_below(name, fully_trained):
            continue
        for parameter in ("weight", "bias"):
            keys = [f"{prefix}{name}.{middle}{parameter}" for middle in ("", "base_layer.")]
            for key in (key for key in keys if key in tensors):
                _check(file, key, name, module, parameter, tensors[key])
                place = f"{name}.{parameter}"
                shared = values.setdefault(id(getattr(module, parameter)), place)
                if shared != place and not torch.equal(taken[shared], tensors[key]):
                    raise ValueError(
                        f"{file}: {key!r} and the value of {shared} differ, but the model has one "
                        "parameter for both; config.tie_word_embeddings must be False"
                    )
                taken[place] = tensors.pop(key)
    return taken


@torch.no_grad()
def put_embeddings(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Copies the weights that `take_embeddings` took into the model; the log names what changed."""
    embeddings = _embeddings(model)
    for place, value in values.items():
        name, _, attribute = place.rpartition(".")
        parameter: Tensor = getattr(embeddings[name], attribute)
        held = gathered(parameter.detach())
        if torch.equal(held, value.to(held)):
            continue
        write(parameter, value)
        logger.warning(
            "%s has the values that were saved beside the adapter. It is not trained, and "
            "pylora.save_adapter does not write it unless modules_to_save names it",
            place,
        )


def _embeddings(model: nn.Module) -> dict[str, nn.Module]:
    """The input embedding and the output head by name, without the LoRA around them."""
    get: Any = getattr(model, "get_input_embeddings", None)
    wanted = [output_head(model)]
    if get is not None:
        wanted.append(get())
    return {
        site.name: site.module.base_layer if isinstance(site.module, LoRALinear) else site.module
        for site in sites(model)
        if any(site.module is module for module in wanted)
    }


def _check(
    file: Path, key: str, name: str, module: nn.Module, attribute: str, value: Tensor
) -> None:
    parameter = getattr(module, attribute, None)
    if is_4bit(module):
        raise ValueError(f"{file}: {key!r} is a dense weight, but {name} is quantized in the model")
    if not isinstance(parameter, Tensor):
        raise ValueError(f"{file}: key {key!r} must not be there: {name} has no {attribute}")
    if value.shape != parameter.shape:
        raise ValueError(
            f"{file}: {key!r} has shape {tuple(value.shape)}; it must be {tuple(parameter.shape)}. "
            "If the vocabulary was resized, call model.resize_token_embeddings first"
        )
    checks.finite_in(f"{file}: {key!r}", value, parameter.dtype)
