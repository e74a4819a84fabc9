"""`save_adapter` and `load_adapter` write and read the files of adapters.

A bottleneck adapter has the format of AdapterHub (`pylora.models.adapterhub_files`), LoRA that of
PEFT:

adapter_config.json            see `pylora.models.adapter_config`
adapter_model.safetensors      base_model.model.<module>.lora_A.weight, .lora_B.weight,
                               .lora_B.bias, .lora_magnitude_vector, and
                               base_model.model.<module>.<key> for every state-dict key of a module
                               in `modules_to_save`
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pylora.adapters.slot import SLOTS
from pylora.models.adapter_config import CONFIG_NAME, AdapterConfig, config_of, read_config
from pylora.models.adapter_contents import (
    LORA_KEYS,
    PREFIX,
    WEIGHTS_NAME,
    AdapterContents,
    lora_shapes,
    read_contents,
)
from pylora.models.adapter_writing import write_adapter
from pylora.models.adapterhub_files import is_adapterhub, load_bottleneck, save_bottleneck
from pylora.models.adapters import active_adapter, adapter_names
from pylora.models.distributed import refuse_parts, refuse_to_change, refuse_to_write, settle
from pylora.models.lora import LoraSettings, install
from pylora.models.lora_switching import active_lora, check_is_lora, using
from pylora.models.module_tree import adapted_layers, lora_layers, refuse_peft_model
from pylora.models.saved_embeddings import put_embeddings
from pylora.models.slots import bottleneck_names
from pylora.models.trained_in_full import fully_trained_modules, state_in_use
from pylora.models.wrappers import plain_name, refuse_unknown_wrappers, unwrapped
from pylora.nn import LoRALinear
from pylora.nn.inactive import HOLDER, check_adapter_name
from pylora.nn.lora_adapters import DEFAULT_ADAPTER
from pylora.sharding import write

logger = logging.getLogger(__name__)

_Model = TypeVar("_Model", bound=nn.Module)


def save_adapter(
    model: nn.Module, path: str | os.PathLike[str], adapter_name: str | None = None
) -> None:
    """Writes an adapter: LoRA and fully trained modules as PEFT does, others as AdapterHub does.

    model           a module with LoRALinear layers or bottleneck adapters inside
    path            the folder, which is made if it does not exist
    adapter_name    the adapter to write; None for the active one

    Each file is written under a temporary name, synced and renamed, so a crash leaves the old file.
    The names in the file are those of the model without wrappers such as torch.compile's. If the
    model is sharded by `fully_shard`, every process must call this: the tensors are gathered, the
    first process writes them and the others wait for it.

    Raises ValueError if the model has no LoRA layer or no such adapter, has layers that one PEFT
    configuration cannot describe, is in a wrapper that is not known, or if this process has only
    parts of the tensors (FSDP1, ZeRO-3); ImportError if safetensors is not installed. An adapter
    that is not active is refused under the conditions of `pylora.set_active_adapters`.
    """
    if adapter_name is None and active_lora(model) is None and bottleneck_names(model):
        active = active_adapter(model)
        if not isinstance(active, str):
            raise ValueError(
                f"adapter_name is None, but the active composition is {active}; it must be one of "
                f"{', '.join(map(repr, adapter_names(model)))}"
            )
        adapter_name = active
    if adapter_name is None:
        _save_active(model, Path(path))
    elif adapter_name in bottleneck_names(model):
        save_bottleneck(model, Path(path), adapter_name)
    else:
        check_is_lora(model, adapter_name)
        with using(model, adapter_name, "pylora.save_adapter"):
            _save_active(model, Path(path))


def _save_active(model: nn.Module, folder: Path) -> None:
    root = unwrapped(model)
    refuse_peft_model(root)
    layers = adapted_layers(root)
    if not layers:
        raise ValueError("model has no LoRALinear; pylora.add_lora must have been called on it")
    if "" in layers:
        raise ValueError("model is a LoRALinear itself; it must be a module that contains it")
    trained = fully_trained_modules(root)
    refuse_unknown_wrappers(root, (*layers, *trained))
    refuse_parts(model, "pylora.save_adapter")
    config = config_of(root, layers, list(trained))
    settle(root)
    tensors = {}
    for name, layer in layers.items():
        tensors.update(_lora_tensors(name, layer))
    for name, module in trained.items():
        for key, value in state_in_use(module).items():
            tensors[f"{PREFIX}{name}.{key}"] = value
    if any(layer.merge_aware for layer in layers.values()):
        logger.warning(
            "PEFT's format cannot say that the adapter is merge_aware: it has to be loaded into an "
            "adapter that was added with merge_aware=True; any other computes without it"
        )
    _warn_of_unsaved(root, layers.values(), trained.values())
    write_adapter(folder, WEIGHTS_NAME, tensors, CONFIG_NAME, config, metadata={"format": "pt"})


@torch.inference_mode(False)  # the layers can be trained further
def load_adapter(
    model: _Model,
    path: str | os.PathLike[str],
    dtype: torch.dtype = torch.float32,
    adapter_name: str | None = None,
) -> _Model:
    """Loads an adapter that `save_adapter`, PEFT or AdapterHub wrote; returns the model.

    model           changed in place
    path            the folder of the adapter
    dtype           the dtype of its parameters, if the model does not have the adapter yet
    adapter_name    the adapter's name in the model; None for the active one with LoRA, or "default"
                    if there is none, and for the name in the file with a bottleneck adapter

    A model without LoRA gets the layers that the adapter asks for, and can be trained further. If
    the model has other adapters, a new one is added beside them; as in PEFT, it is inactive until
    `pylora.set_active_adapters(model, name)`. If it has one of this name, that is filled and keeps
    its dtype; all shapes must fit, or `pylora.delete_adapter` must make room first. It may be LoRA
    of linear layers with every option of `pylora.add_lora` and PEFT's rank_pattern, alpha_pattern,
    layers_to_transform and exclude_modules; other methods are refused.

    A model that is sharded by `fully_shard` must have the layers already. Every process must call
    this; each reads the file and keeps its own part.

    Raises ValueError that names the file and the key that does not fit, or the wrapper in which a
    model cannot be changed; FileNotFoundError if a file is missing, ImportError if safetensors is
    not installed. The model is then as it was.
    """
    root, folder = unwrapped(model), Path(path)
    refuse_peft_model(root)
    refuse_to_write(model, "pylora.load_adapter")
    refuse_parts(model, "pylora.load_adapter")
    if is_adapterhub(folder):
        load_bottleneck(model, folder, dtype, adapter_name)
        return model
    config = read_config(folder)
    adapter = check_adapter_name(adapter_name or active_lora(root) or DEFAULT_ADAPTER)
    contents = read_contents(folder, config, root, dtype, adapter)
    settings = _settings(folder, config, contents, dtype)
    is_new = not adapted_layers(root, adapter)
    in_full = fully_trained_modules(root, adapter)
    has_new = bool({site.name for site in contents.saved} - set(in_full))
    in_model = {site.name: site.module for site in contents.saved}
    if is_new or has_new or any(_to_untie(in_model, contents)):
        refuse_to_change(model, "pylora.load_adapter of this file")
    if is_new:
        install(root, contents.targets, settings, contents.saved, adapter)
    elif has_new:
        install(root, [], {}, contents.saved, adapter)
    settle(root)
    with using(root, adapter, "pylora.load_adapter"):
        _fill(root, settings, contents)
    return model


def _settings(
    folder: Path, config: AdapterConfig, contents: AdapterContents, dtype: torch.dtype
) -> dict[str, LoraSettings]:
    """The settings of each layer; raises ValueError if LoRALinear does not take them."""
    settings = {name: config.settings(name, dtype) for name in contents.lora}
    for distinct in set(settings.values()):
        try:
            distinct.check()
        except (TypeError, ValueError) as error:
            raise ValueError(f"{folder / CONFIG_NAME}: {error}") from error
    return settings


@torch.no_grad()
def _fill(model: nn.Module, settings: dict[str, LoraSettings], contents: AdapterContents) -> None:
    put_embeddings(model, contents.embeddings)
    layers = lora_layers(model)
    for name, entries in contents.lora.items():
        layer = layers[name]
        layer.set_scaling(settings[name].lora_alpha, settings[name].use_rslora)
        for attribute, tensor in entries.items():
            write(getattr(layer, attribute), tensor)
    trained = fully_trained_modules(model)
    _untie(model, trained, contents)
    for name, values in contents.saved_tensors.items():
        state = state_in_use(trained[name])
        for key, tensor in values.items():
            write(state[key], tensor)


def _untie(model: nn.Module, trained: dict[str, nn.Module], contents: AdapterContents) -> None:
    """Gives fully trained modules that share a parameter one each if the file has two values.

    PEFT trains a copy of each module, so that the tensors of a tied pair may differ in its files.
    """
    for name, key, first in list(_to_untie(trained, contents)):
        owner, _, attribute = key.rpartition(".")
        holder = trained[name].get_submodule(owner)
        parameter = getattr(holder, attribute)
        own = nn.Parameter(parameter.clone(), requires_grad=parameter.requires_grad)
        setattr(holder, attribute, own)
        config: Any = getattr(model, "config", None)
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
        logger.warning(
            "%s.%s and %s were one parameter, but the adapter has different values for them: "
            "they are two parameters now, as in PEFT, and config.tie_word_embeddings is False",
            name,
            plain_name(trained[name], key),
            first,
        )


def _to_untie(
    modules: dict[str, nn.Module], contents: AdapterContents
) -> Iterator[tuple[str, str, str]]:
    """The parameters that need a value of their own: module, key in it, and whose value they share.

    modules    the modules of the model that the adapter has in full
    """
    first_values: dict[int, tuple[str, Tensor]] = {}
    for name, values in contents.saved_tensors.items():
        for key, parameter in modules[name].named_parameters(remove_duplicate=False):
            # A 4-bit layer has parameters that no file has; it becomes a dense one of its own.
            value = values.get(plain_name(modules[name], key))
            if value is not None:
                first, its_value = first_values.setdefault(id(parameter), (f"{name}.{key}", value))
                if not torch.equal(its_value, value):
                    yield name, key, first


def _lora_tensors(name: str, layer: LoRALinear) -> dict[str, Tensor]:
    """The LoRA parameters of a layer under their keys in the file.

    Raises ValueError if one of them has another shape, as a part of a tensor has.
    """
    tensors = {}
    shapes = lora_shapes(layer.r, layer.in_features, layer.out_features)
    for attribute, ending in LORA_KEYS.items():
        parameter = getattr(layer, attribute)
        if parameter is None:
            continue
        if tuple(parameter.shape) != shapes[attribute]:
            raise ValueError(
                f"{name}.{attribute} has shape {tuple(parameter.shape)}; it must be "
                f"{shapes[attribute]}: a library may have left this process a part of it only"
            )
        tensors[f"{PREFIX}{name}.{ending}"] = parameter
    return tensors


def _warn_of_unsaved(
    model: nn.Module, layers: Iterable[LoRALinear], trained: Iterable[nn.Module]
) -> None:
    saved = {id(p) for module in (*layers, *trained) for p in module.parameters()}
    for name, parameter in model.named_parameters():
        inactive = {HOLDER, SLOTS} & set(name.split("."))
        if parameter.requires_grad and id(parameter) not in saved and not inactive:
            logger.warning(
                "%s is trainable but not saved: it is in no module to save", plain_name(model, name)
            )
