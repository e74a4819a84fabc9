"""`save_adapter` and `load_adapter`: LoRA adapters in PEFT's own file format, both ways.

    adapter_config.json            see `pylora.models.adapter_config`
    adapter_model.safetensors      base_model.model.<module>.lora_A.weight, .lora_B.weight, .lora_B.bias,
                                   .lora_magnitude_vector, and base_model.model.<module>.<key> for every
                                   state-dict key of a module in `modules_to_save`
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pylora.models.adapter_config import CONFIG_NAME, AdapterConfig, config_of, read_config
from pylora.models.lora import install
from pylora.models.module_tree import (
    Site,
    fully_trained_modules,
    is_below,
    lora_layers,
    refuse_peft_model,
    sites,
    unwrapped,
)
from pylora.models.targets import can_carry_lora
from pylora.nn import LoRALinear, NF4Linear

logger = logging.getLogger(__name__)

WEIGHTS_NAME = "adapter_model.safetensors"
_PICKLED_NAME = "adapter_model.bin"
_PREFIX = "base_model.model."
# Parameter of a LoRALinear -> what PEFT's key ends with.
_LORA_KEYS = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "lora_B_bias": "lora_B.bias",
    "lora_magnitude": "lora_magnitude_vector",
}
_Model = TypeVar("_Model", bound=nn.Module)


def save_adapter(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes the LoRA layers and fully trained modules of a model to the folder `path`, as PEFT does.

    Each file is written under a temporary name, synced and renamed, so that a crash leaves the old one.
    Raises ValueError where the model has no LoRA layer, or layers that one PEFT configuration cannot
    describe; ImportError where safetensors is not installed.
    """
    root, folder = unwrapped(model), Path(path)
    safetensors = _safetensors()
    refuse_peft_model(root)
    layers = lora_layers(root)
    if not layers:
        raise ValueError("model has no LoRALinear; pylora.add_lora must have been called on it")
    if "" in layers:
        raise ValueError("model is a LoRALinear itself; it must be a module that contains it")
    trained = fully_trained_modules(root)
    config = config_of(root, layers, list(trained))
    tensors = {}
    for name, layer in layers.items():
        for attribute, ending in _LORA_KEYS.items():
            parameter = getattr(layer, attribute)
            if parameter is not None:
                tensors[f"{_PREFIX}{name}.{ending}"] = parameter
    for name, module in trained.items():
        for key, value in module.state_dict().items():
            tensors[f"{_PREFIX}{name}.{key}"] = value
    _warn_of_unsaved(root, layers.values(), trained.values())
    stored = _for_safetensors(tensors)
    folder.mkdir(parents=True, exist_ok=True)
    _write_all(
        folder,
        {
            WEIGHTS_NAME: lambda temporary: safetensors.torch.save_file(
                stored, temporary, metadata={"format": "pt"}
            ),
            CONFIG_NAME: lambda temporary: temporary.write_text(
                json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8"
            ),
        },
    )


def load_adapter(
    model: _Model, path: str | os.PathLike[str], dtype: torch.dtype = torch.float32
) -> _Model:
    """Loads an adapter that `save_adapter` or PEFT wrote in the folder `path`, in place; returns the model.

    A model without LoRA is wrapped as the adapter asks for, with LoRA parameters of `dtype`, and can be
    trained on; LoRA layers that are there already are filled where all shapes fit, keeping their dtype.
    LoRA of linear layers with every option of `pylora.add_lora`, PEFT's rank_pattern, alpha_pattern,
    layers_to_transform and exclude_modules are read; other methods are refused.

    Raises ValueError naming the file and the key that does not fit, FileNotFoundError for a missing file,
    ImportError where safetensors is not installed. The model is then as it was.
    """
    root, folder = unwrapped(model), Path(path)
    refuse_peft_model(root)
    config = read_config(folder)
    file, tensors = _read_tensors(folder)
    contents = _sort(root, config, file, tensors)
    existing = lora_layers(root)
    _check_lora(root, config, contents, existing)
    _check_saved(root, contents, existing)
    if not existing:
        targeted = [site for site in contents.targets if site.name in contents.lora]
        settings = {}
        for site in targeted:
            wanted = config.settings(site.name, dtype)
            settings[site.name] = wanted
        install(root, targeted, settings, contents.saved)
    elif {s.name for s in contents.saved} - set(fully_trained_modules(root)):
        install(root, [], {}, contents.saved)
    _fill(root, config, contents)
    return model


@dataclass(frozen=True)
class _Contents:
    """An adapter file, its tensors sorted by the module they belong to."""

    file: Path
    targets: list[Site]
    lora: dict[str, dict[str, Tensor]]  # module -> attribute of LoRALinear -> tensor
    saved: list[Site]
    saved_tensors: dict[str, dict[str, Tensor]]  # module -> key of its state dict -> tensor


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "adapter files need the package safetensors: pip install safetensors"
        ) from error
    return safetensors


def _for_safetensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, contiguous, and no storage twice, which safetensors refuses."""
    stored: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        stored[key] = tensor
    return stored


def _write_all(folder: Path, writers: dict[str, Callable[[Path], Any]]) -> None:
    """Writes every file beside its place, and moves them there only when all are on the disk."""
    temporary = {name: folder / f".{name}.{os.getpid()}.tmp" for name in writers}
    try:
        for name, write in writers.items():
            write(temporary[name])
            _sync(temporary[name])
        for name in writers:
            os.replace(temporary[name], folder / name)
    finally:
        for leftover in temporary.values():
            leftover.unlink(missing_ok=True)
    if os.name == "posix":
        _sync(folder)


def _sync(path: Path) -> None:
    # Windows syncs only what is open for writing, and no folder.
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _warn_of_unsaved(
    model: nn.Module, layers: Iterable[LoRALinear], trained: Iterable[nn.Module]
) -> None:
    saved = {id(p) for module in (*layers, *trained) for p in module.parameters()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in saved:
            logger.warning("%s is trainable but not saved: it is in no module to save", name)


def _read_tensors(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    safetensors = _safetensors()
    file = folder / WEIGHTS_NAME
    if not file.is_file():
        if (folder / _PICKLED_NAME).is_file():
            raise ValueError(
                f"{folder / _PICKLED_NAME} is a pickle, which can run any code when it is loaded; "
                f"the weights must be {WEIGHTS_NAME}: save them again with safe_serialization=True"
            )
        raise FileNotFoundError(f"{file} is missing; it must lie beside {CONFIG_NAME}")
    try:
        return file, safetensors.torch.load_file(file)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is damaged or no safetensors file: {error}") from error


def _sort(
    model: nn.Module, config: AdapterConfig, file: Path, tensors: dict[str, Tensor]
) -> _Contents:
    """Finds the module of every key. Raises ValueError for a key that belongs nowhere."""
    by_key = {}
    for key, tensor in tensors.items():
        if not key.startswith(_PREFIX):
            raise ValueError(f"{file}: key {key!r} must start with {_PREFIX!r}")
        by_key[key.removeprefix(_PREFIX)] = tensor
    # PEFT wraps every module whose name ends with an entry, in the middle of a component too.
    ends = tuple(config.modules_to_save)
    named = {s.name for s in sites(model) if ends and s.name.endswith(ends)}
    saved = [
        s for s in sites(model) if s.name in named and not is_below(s.name, named - {s.name})
    ]
    contents = _Contents(
        file,
        config.targets(list(config.modules_to_save)).find(model),
        {},
        saved,
        {site.name: {} for site in saved},
    )
    for key, tensor in by_key.items():
        _place(contents, key, tensor)
    return contents


def _place(contents: _Contents, key: str, tensor: Tensor) -> None:
    for name, entries in contents.saved_tensors.items():
        if key.startswith(f"{name}."):
            entries[key.removeprefix(f"{name}.")] = tensor
            return
    for attribute, ending in _LORA_KEYS.items():
        if key.endswith(f".{ending}"):
            name = key.removesuffix(f".{ending}")
            contents.lora.setdefault(name, {})[attribute] = tensor
            return
    hint = " (LoRA of an embedding)" if "lora_embedding" in key else ""
    raise ValueError(
        f"{contents.file}: key {_PREFIX + key!r} is not supported{hint}; it must be the LoRA of a linear "
        "layer or lie in a module of modules_to_save that the model has"
    )


def _check_lora(
    model: nn.Module,
    config: AdapterConfig,
    contents: _Contents,
    existing: dict[str, LoRALinear],
) -> None:
    file = contents.file
    targets = {site.name: site.module for site in contents.targets}
    for name in contents.lora:
        if name not in targets:
            known = {site.name for site in sites(model)}
            reason = "target_modules does not match it" if name in known else "the model has no such module"
            raise ValueError(f"{file}: there is LoRA for {name!r}, but {reason}")
    if not contents.lora:
        raise ValueError(f"{file} holds no LoRA of a linear layer")
    if existing:
        for name in sorted(set(existing) ^ set(contents.lora)):
            side = "the model only" if name in existing else "the file only"
            raise ValueError(f"{file}: {name!r} has LoRA in {side}; both must have the same layers")
    for name, module in targets.items():
        entries = contents.lora.get(name)
        if entries is None:
            raise ValueError(f"{file}: key {_key(name, 'lora_A')!r} is missing; target_modules needs it")
        if not (can_carry_lora(module) or isinstance(module, LoRALinear)):
            raise ValueError(
                f"{file}: {name} is {type(module).__name__}; LoRA must be for an nn.Linear or an NF4Linear"
            )
        if isinstance(module, LoRALinear) and module.merged:
            raise ValueError(f"{name} is merged; pylora.unmerge must be called before loading")
        _check_layer(file, name, module, config, entries)


def _check_layer(
    file: Path,
    name: str,
    module: nn.Module,
    config: AdapterConfig,
    entries: dict[str, Tensor],
) -> None:
    r = config.settings(name, torch.float32).r
    if isinstance(module, LoRALinear):
        r = module.r
    shapes: dict[str, tuple[int, ...]] = {
        "lora_A": (r, module.in_features),  # type: ignore[dict-item]
        "lora_B": (module.out_features, r),  # type: ignore[dict-item]
    }
    if config.lora_bias:
        shapes["lora_B_bias"] = (module.out_features,)  # type: ignore[assignment]
    if config.use_dora:
        shapes["lora_magnitude"] = (module.out_features,)  # type: ignore[assignment]
    for attribute in _LORA_KEYS:
        key, entry = _key(name, attribute), entries.get(attribute)
        if entry is None and attribute in shapes:
            raise ValueError(f"{file}: key {key!r} is missing")
        if entry is not None and attribute not in shapes:
            raise ValueError(f"{file}: key {key!r} does not go with {CONFIG_NAME}")
        if entry is not None:
            _check_tensor(file, key, entry, shapes[attribute])
        if isinstance(module, LoRALinear) and (getattr(module, attribute) is None) == (
            entry is not None
        ):
            side = "the file only" if entry is not None else "the model only"
            raise ValueError(f"{file}: {key!r} is in {side}; both must have it, or neither")


def _key(name: str, attribute: str) -> str:
    return f"{_PREFIX}{name}.{_LORA_KEYS[attribute]}"


def _check_tensor(file: Path, key: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{file}: {key!r} has shape {tuple(tensor.shape)}; it must be {shape}")
    if not tensor.dtype.is_floating_point:
        raise ValueError(f"{file}: {key!r} has dtype {tensor.dtype}; it must be floating point")
