"""Writes and reads bottleneck adapters in AdapterHub's file format.

adapter_config.json    see `pylora.models.adapterhub_config`
adapter.safetensors    <block>.<holder>.adapters.<name>.adapter_down.0.weight and .bias,
                       .adapter_up.weight and .bias, and those of norms; the holder is
                       `SubLayer.hub`. pytorch_adapter.bin, which has the same keys, is read as well
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pylora import checks
from pylora.adapters.configs import AdapterConfig, ParallelConfig
from pylora.models.adapter_config import CONFIG_NAME
from pylora.models.adapter_contents import import_safetensors
from pylora.models.adapter_writing import write_adapter
from pylora.models.adapterhub_config import config_from_hub, hub_config, read_facts
from pylora.models.blocks import TransformerBlock, places, transformer_blocks
from pylora.models.bottleneck import add_adapter
from pylora.models.distributed import refuse_parts, settle
from pylora.models.slots import bottleneck_names, slots
from pylora.models.wrappers import unwrapped
from pylora.nn.inactive import check_adapter_name
from pylora.sharding import write

WEIGHTS_NAME = "adapter.safetensors"
_PICKLED_NAME = "pytorch_adapter.bin"
# A parameter of BottleneckAdapter -> the ends of its keys. The library has the norm before the
# bottleneck under two keys, and the projection behind it then has the number 1.
_KEYS = {
    "up_weight": ("adapter_up.weight",),
    "up_bias": ("adapter_up.bias",),
    "norm_before_weight": ("adapter_norm_before.weight", "adapter_down.0.weight"),
    "norm_before_bias": ("adapter_norm_before.bias", "adapter_down.0.bias"),
    "norm_after_weight": ("adapter_norm_after.weight",),
    "norm_after_bias": ("adapter_norm_after.bias",),
}


def is_adapterhub(folder: Path) -> bool:
    """True if the folder has an adapter in AdapterHub's format."""
    facts = read_facts(folder)
    return facts is not None and "peft_type" not in facts and "config" in facts


def save_bottleneck(model: nn.Module, folder: Path, name: str) -> None:
    """Writes an adapter of the model; see `pylora.save_adapter`."""
    root = unwrapped(model)
    refuse_parts(model, "pylora.save_adapter")
    config = next(s.configs[name] for s in slots(root).values() if name in s.configs)
    settle(root)
    tensors = dict(_parameters(root, name, config))
    hidden_size = transformer_blocks(root)[0].hidden_size()
    facts = hub_config(root, name, config, hidden_size)
    write_adapter(folder, WEIGHTS_NAME, tensors, CONFIG_NAME, facts, metadata=None)


def load_bottleneck(
    model: nn.Module, folder: Path, dtype: torch.dtype, adapter_name: str | None
) -> None:
    """Reads an adapter into the model; see `pylora.load_adapter`."""
    root, path = unwrapped(model), folder / CONFIG_NAME
    facts: Any = read_facts(folder)
    config = config_from_hub(path, facts)
    stored_name = str(facts.get("name"))
    name = check_adapter_name(adapter_name or stored_name)
    blocks = transformer_blocks(root)
    _refuse_other_input(blocks, config)
    file, stored = _read(folder)
    exists = name in bottleneck_names(root)
    if exists:
        _check_same(root, name, config, path)
    shapes = _shapes(blocks, stored_name, config)
    tensors = _under_our_keys(root, stored, set(shapes))
    for key in sorted(shapes.keys() | tensors.keys()):
        if key not in tensors:
            raise ValueError(f"{file}: key {key!r} is missing; the model has this place")
        if key not in shapes:
            raise ValueError(f"{file}: key {key!r} is for a place that the model does not have")
        if tuple(tensors[key].shape) != shapes[key]:
            raise ValueError(
                f"{file}: {key!r} has shape {tuple(tensors[key].shape)}; it must be {shapes[key]}"
            )
        checks.finite_in(f"{file}: {key!r}", tensors[key], dtype)
    if not exists:
        add_adapter(model, name, config, dtype)
    settle(root)
    with torch.no_grad():
        for key, parameter in _parameters(root, name, config):
            write(parameter, tensors[key.replace(_part(name), _part(stored_name))])


def _part(name: str) -> str:
    """The part of a key that has the name of the adapter."""
    return f".adapters.{name}."


def _endings(parameter: str, config: AdapterConfig) -> tuple[str, ...]:
    """The ends of the keys of a parameter of BottleneckAdapter."""
    if parameter.startswith("down_"):
        number = 0 if config.norm_before is None else 1
        return (f"adapter_down.{number}.{parameter.removeprefix('down_')}",)
    return _KEYS[parameter]


def _holders(blocks: list[TransformerBlock], config: AdapterConfig) -> list[tuple[str, str]]:
    """Where each adapter is: the name of the slot in our model, and of the library's holder."""
    found = []
    for block in blocks:
        for place, sub_layer in places(block, config):
            default = "attention_adapters" if place.endswith("attention") else "output_adapters"
            found.append((f"{block.name}.{place}", f"{block.name}.{sub_layer.hub or default}"))
    return found


def _parameters(
    model: nn.Module, name: str, config: AdapterConfig
) -> list[tuple[str, nn.Parameter]]:
    """The keys of an adapter of the model, each with its parameter."""
    blocks = transformer_blocks(model)
    _refuse_other_input(blocks, config)
    by_place = {slot.place: slot for slot in slots(model).values()}
    found = []
    for place, holder in _holders(blocks, config):
        for parameter, value in by_place[place].adapters[name].named_parameters():
            for ending in _endings(parameter, config):
                found.append((f"{holder}{_part(name)}{ending}", value))
    return found


def _shapes(
    blocks: list[TransformerBlock], name: str, config: AdapterConfig
) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors that a file must have, by key."""
    shapes = {}
    widths = {block.name: block.hidden_size() for block in blocks}
    for place, holder in _holders(blocks, config):
        hidden = widths[place.rpartition(".")[0]]
        size = config.bottleneck_size(hidden)
        forms: dict[str, tuple[int, ...]] = {
            "down_weight": (size, hidden),
            "down_bias": (size,),
            "up_weight": (hidden, size),
            "up_bias": (hidden,),
        }
        for norm in ("norm_before", "norm_after"):
            if getattr(config, norm) is not None:
                forms |= {f"{norm}_weight": (hidden,), f"{norm}_bias": (hidden,)}
        for parameter, shape in forms.items():
            for ending in _endings(parameter, config):
                shapes[f"{holder}{_part(name)}{ending}"] = shape
    return shapes


def _refuse_other_input(blocks: list[TransformerBlock], config: AdapterConfig) -> None:
    """Raises ValueError for an adapter that reads something else in the library."""
    for block in blocks:
        if isinstance(config, ParallelConfig) and block.norm_after_mlp is None:
            raise ValueError(
                f"{block.name} normalizes before its sub-layers: there a parallel adapter of "
                "AdapterHub reads the values before the norm, and that of pylora those behind it, "
                "as the sub-layer does; such an adapter has no file format"
            )


def _read(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    safetensors = import_safetensors()
    file, pickled = folder / WEIGHTS_NAME, folder / _PICKLED_NAME
    if file.is_file():
        try:
            return file, safetensors.torch.load_file(file)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{file} is damaged or no safetensors file: {error}") from error
    if not pickled.is_file():
        raise FileNotFoundError(f"{file} is missing; it must lie beside {CONFIG_NAME}")
    return pickled, torch.load(pickled, map_location="cpu", weights_only=True)


def _under_our_keys(
    model: nn.Module, tensors: dict[str, Tensor], expected: set[str]
) -> dict[str, Tensor]:
    """The tensors of a file, which may be of a model with another head, or none, under our keys."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    renamed = {}
    for key, tensor in tensors.items():
        forms = (key, prefix + key, key.removeprefix(prefix))
        renamed[next((form for form in forms if form in expected), key)] = tensor
    return renamed


def _check_same(model: nn.Module, name: str, config: AdapterConfig, path: Path) -> None:
    """Raises ValueError if the model's adapter of this name differs from the one in the file."""
    ours = next(s.configs[name] for s in slots(model).values() if name in s.configs)
    if replace(ours, init_weights=config.init_weights) != config:
        raise ValueError(
            f"{path}: the adapter is a {config}, but the model has a {ours} under the name "
            f"{name!r}: give another adapter_name, or call pylora.delete_adapter(model, {name!r}) "
            "first"
        )
