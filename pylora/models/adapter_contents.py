"""The contents of an adapter_model.safetensors, sorted by module and checked against a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pylora import checks
from pylora.models.adapter_config import CONFIG_NAME, AdapterConfig
from pylora.models.module_tree import Site, adapted_layers, is_4bit, is_below, sites
from pylora.models.saved_embeddings import take_embeddings
from pylora.models.targets import can_carry_lora, named_by
from pylora.models.trained_in_full import fully_trained_modules, state_in_use
from pylora.nn import LoRALinear, NF4Linear
from pylora.nn.conv1d import linear_shape

WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
# The name of a parameter of LoRALinear -> the end of its key in PEFT's files.
LORA_KEYS = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "lora_B_bias": "lora_B.bias",
    "lora_magnitude": "lora_magnitude_vector",
}
_PICKLED_NAME = "adapter_model.bin"


def lora_shapes(r: int, in_features: int, out_features: int) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter of a LoRALinear."""
    return {
        "lora_A": (r, in_features),
        "lora_B": (out_features, r),
        "lora_B_bias": (out_features,),
        "lora_magnitude": (out_features,),
    }


@dataclass(frozen=True)
class AdapterContents:
    """The tensors of an adapter file by module, and the places of those modules.

    file           the adapter_model.safetensors
    targets        the layers with LoRA
    saved          the modules that are trained in full
    lora           module -> parameter of LoRALinear -> tensor
    saved_tensors  module -> key of its state dict -> tensor
    embeddings     place -> base weight of an embedding: see `take_embeddings`
    """

    file: Path
    targets: list[Site]
    saved: list[Site]
    lora: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    saved_tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    embeddings: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class _Form:
    """Shape and dtype of a tensor of the model, into which a tensor of the file is copied."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def read_contents(
    folder: Path, config: AdapterConfig, model: nn.Module, dtype: torch.dtype, adapter: str
) -> AdapterContents:
    """Reads the weights beside an adapter_config.json and checks that they fit `model`.

    dtype     of the LoRA parameters, if the model does not have the adapter yet
    adapter   the name of the adapter in the model

    Raises ValueError that names the file and the key that does not fit, FileNotFoundError if the
    file is missing, ImportError if safetensors is not installed.
    """
    file, tensors = _read(folder)
    everything = list(sites(model))
    # PEFT saves every module whose name ends with an entry, even if the end begins inside a
    # component. It keeps LoRA only out of the modules whose last components are an entry.
    ends = tuple(config.modules_to_save)
    named = {s.name for s in everything if s.name.endswith(ends)} if ends else set()
    saved = [s for s in everything if s.name in named and not is_below(s.name, named - {s.name})]
    without_lora = [s.name for s in everything if named_by(s.name, ends)]
    contents = AdapterContents(file, config.targets(without_lora).find(model), saved)
    contents.saved_tensors.update({site.name: {} for site in saved})
    in_full = [site.name for site in saved]
    contents.embeddings.update(take_embeddings(file, tensors, model, PREFIX, in_full))
    for key, tensor in tensors.items():
        _place(contents, key, tensor)
    _check_same_modules(contents, model, adapter)
    for site in contents.targets:
        _check_lora(contents, site, config, dtype, adapter)
    for site in saved:
        _check_saved(contents, site)
    return contents


def import_safetensors() -> Any:
    """The package safetensors; raises ImportError if it is not installed."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "adapter files need the package safetensors: pip install safetensors"
        ) from error
    return safetensors


def _read(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    safetensors = import_safetensors()
    file = folder / WEIGHTS_NAME
    if not file.is_file():
        if (folder / _PICKLED_NAME).is_file():
            raise ValueError(
                f"{folder / _PICKLED_NAME} is a pickle, which can run any code when loaded; "
                f"the weights must be in {WEIGHTS_NAME}: save it again with safe_serialization"
            )
        raise FileNotFoundError(f"{file} is missing; it must lie beside {CONFIG_NAME}")
    try:
        return file, safetensors.torch.load_file(file)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is damaged or no safetensors file: {error}") from error


def _place(contents: AdapterContents, key: str, tensor: Tensor) -> None:
    """Files one tensor under its module; raises ValueError for a key of no module."""
    if not key.startswith(PREFIX):
        raise ValueError(f"{contents.file}: key {key!r} must start with {PREFIX!r}")
    path = key.removeprefix(PREFIX)
    for name, entries in contents.saved_tensors.items():
        if path.startswith(f"{name}."):
            entries[path.removeprefix(f"{name}.")] = tensor
            return
    for attribute, ending in LORA_KEYS.items():
        if path.endswith(f".{ending}"):
            name = path.removesuffix(f".{ending}")
            contents.lora.setdefault(name, {})[attribute] = tensor
            return
    hint = " (LoRA of an embedding)" if "lora_embedding" in key else ""
    raise ValueError(
        f"{contents.file}: key {key!r} is not supported{hint}; it must be the LoRA of a linear "
        "layer or lie in a module of modules_to_save that the model has"
    )


def _check_same_modules(contents: AdapterContents, model: nn.Module, adapter: str) -> None:
    """Raises ValueError unless file, configuration and model have LoRA in the same layers."""
    file = contents.file
    if not contents.lora:
        raise ValueError(f"{file} holds no LoRA of a linear layer")
    targets = {site.name for site in contents.targets}
    for name in contents.lora:
        if name not in targets:
            exists = any(site.name == name for site in sites(model))
            reason = (
                f"{CONFIG_NAME} does not target it" if exists else "the model has no such module"
            )
            raise ValueError(f"{file}: there is LoRA for {name!r}, but {reason}")
    for name in targets:
        if name not in contents.lora:
            key = _key(name, "lora_A")
            raise ValueError(f"{file}: key {key!r} is missing; {CONFIG_NAME} targets {name!r}")
    existing = adapted_layers(model, adapter)
    if not existing:
        return
    trained = {site.name for site in contents.saved}
    for content, in_model, in_file in (
        ("LoRA", set(existing), targets),
        ("weights", set(fully_trained_modules(model, adapter)), trained),
    ):
        # The file may have weights for a module that was not trained so far. If the model had such
        # weights and the file had not, old ones would remain.
        differing = in_model ^ in_file if content == "LoRA" else in_model - in_file
        for name in sorted(differing):
            only = "the model" if name in in_model else "the file"
            raise ValueError(
                f"{file}: {name!r} has {content} in {only} only; both must have the same"
                f"{_or_replace(adapter)}"
            )


def _or_replace(adapter: str) -> str:
    """How to load an adapter that does not fit the one of its name, for the end of an error."""
    return (
        f". To load it beside the adapter {adapter!r}, give another adapter_name; to replace that "
        f"one, call pylora.delete_adapter(model, {adapter!r}) first"
    )


def _check_lora(
    contents: AdapterContents,
    site: Site,
    config: AdapterConfig,
    dtype: torch.dtype,
    adapter: str,
) -> None:
    file, module, entries = contents.file, site.module, contents.lora[site.name]
    layer = module if isinstance(module, LoRALinear) else None
    has_it = layer is not None and adapter in layer.adapter_names
    existing: Any = layer.adapter(adapter) if layer is not None and has_it else None
    if layer is None and not can_carry_lora(module):
        class_name = type(module).__name__
        raise ValueError(
            f"{file}: {site.name} is {class_name}; it must be an nn.Linear, an NF4Linear or a "
            "Conv1D"
        )
    base: Any = module if layer is None else layer.base_layer
    if base.weight.is_meta:
        raise ValueError(
            f"{site.name} is on the meta device; it must hold its weights before loading"
        )
    if layer is not None and layer.merged:
        raise ValueError(f"{site.name} is merged; pylora.unmerge must be called before loading")
    r = config.settings(site.name, torch.float32).r if existing is None else existing.r
    out_features, in_features = linear_shape(base)
    shapes = lora_shapes(r, in_features, out_features)
    unwanted = {"lora_B_bias": not config.lora_bias, "lora_magnitude": not config.use_dora}
    for attribute in LORA_KEYS:
        key, entry = _key(site.name, attribute), entries.get(attribute)
        wanted = not unwanted.get(attribute, False)
        if (entry is not None) != wanted:
            state = "missing" if wanted else "there"
            raise ValueError(f"{file}: key {key!r} is {state}, which contradicts {CONFIG_NAME}")
        if existing is not None and (getattr(existing, attribute) is not None) != wanted:
            only = "the file" if wanted else "the model"
            raise ValueError(
                f"{file}: {key!r} is in {only} only; both must have it, or neither"
                f"{_or_replace(adapter)}"
            )
        if entry is not None:
            kept = None if existing is None else getattr(existing, attribute)
            form = _Form(shapes[attribute], dtype if kept is None else kept.dtype)
            _check_tensor(file, key, entry, form, "" if kept is None else _or_replace(adapter))


def _key(name: str, attribute: str) -> str:
    return f"{PREFIX}{name}.{LORA_KEYS[attribute]}"


def _check_saved(contents: AdapterContents, site: Site) -> None:
    forms = _dense_state(site.module)
    entries = contents.saved_tensors[site.name]
    for key in sorted(entries.keys() | forms.keys()):
        full = f"{PREFIX}{site.name}.{key}"
        if key not in entries:
            raise ValueError(f"{contents.file}: key {full!r} is missing; it is in modules_to_save")
        if key not in forms:
            raise ValueError(
                f"{contents.file}: key {full!r} must not be there: {site.name} has no {key}"
            )
        _check_tensor(contents.file, full, entries[key], forms[key])


def _dense_state(module: nn.Module) -> dict[str, _Form]:
    """The form of a module's state dict after its 4-bit layers have become dense."""
    layers = [Site("", module), *sites(module)]
    packed: dict[str, Any] = {site.name: site.module for site in layers if is_4bit(site.module)}
    forms: dict[str, _Form] = {}
    for name, layer in packed.items():
        prefix = f"{name}." if name else ""
        dtype = _dense_dtype(layer)
        out_features, in_features = linear_shape(layer)
        transposed = getattr(layer, "conv1d", None) is not None
        shape = (in_features, out_features) if transposed else (out_features, in_features)
        forms[f"{prefix}weight"] = _Form(shape, dtype)
        if layer.bias is not None:
            forms[f"{prefix}bias"] = _Form((layer.out_features,), layer.bias.dtype)
    for key, value in state_in_use(module).items():
        inside = "" in packed or is_below(key, packed)
        if not inside and isinstance(value, Tensor):
            forms[key] = _Form(tuple(value.shape), value.dtype)
    return forms


def _dense_dtype(layer: Any) -> torch.dtype:
    """The dtype that the weight of a 4-bit layer has once it is dense."""
    if isinstance(layer, NF4Linear):
        return layer.weight_dtype
    state = layer.weight.quant_state
    return layer.weight.dtype if state is None else state.dtype


def _check_tensor(file: Path, key: str, tensor: Tensor, form: _Form, hint: str = "") -> None:
    if tuple(tensor.shape) != form.shape:
        raise ValueError(
            f"{file}: {key!r} has shape {tuple(tensor.shape)}; it must be {form.shape}{hint}"
        )
    if not form.dtype.is_floating_point:
        if tensor.dtype != form.dtype:
            raise ValueError(
                f"{file}: {key!r} has dtype {tensor.dtype}; it must be {form.dtype}, as in the "
                "model"
            )
    else:
        checks.finite_in(f"{file}: {key!r}", tensor, form.dtype)
