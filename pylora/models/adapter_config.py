"""Reads and writes PEFT's adapter_config.json; it refuses what pylora does not support."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pylora.models.lora import LoraSettings
from pylora.models.module_tree import is_below, sites
from pylora.models.targets import Targets, describe, pattern_value
from pylora.nn import LoRALinear
from pylora.nn.conv1d import is_conv1d

logger = logging.getLogger(__name__)

CONFIG_NAME = "adapter_config.json"

# These keys do not change the meaning of the saved tensors.
_HARMLESS = {
    "auto_mapping",
    "corda_config",
    "base_model_name_or_path",
    "eva_config",
    "fan_in_fan_out",
    "inference_mode",
    "loftq_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
# These keys change the meaning of the tensors only if they have another value than this.
_NEUTRAL: dict[str, Any] = {"bias": "none", "ensure_weight_tying": False}
# These ways to start lora_A and lora_B leave the base weights as they are; others, such as PiSSA
# and OLoRA, do not. MiCA freezes lora_B while PEFT trains.
_PLAIN_INITIALIZATIONS = (True, False, "gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True)
class AdapterConfig:
    """The contents of an adapter_config.json that pylora supports; the names are PEFT's."""

    r: int
    lora_alpha: float
    target_modules: str | Collection[str]
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    modules_to_save: Collection[str] = ()
    exclude_modules: str | Collection[str] = ()
    layers_to_transform: Collection[int] | None = None
    layers_pattern: Collection[str] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def targets(self, fully_trained: Collection[str]) -> Targets:
        """The layers to wrap; nothing inside the modules `fully_trained` is wrapped."""
        return Targets(
            self.target_modules,
            self.exclude_modules,
            self.layers_to_transform,
            tuple(self.layers_pattern),
            fully_trained,
        )

    def settings(self, name: str, dtype: torch.dtype) -> LoraSettings:
        """The settings of the layer `name`, with LoRA parameters of `dtype`."""
        return LoraSettings(
            pattern_value(self.rank_pattern, name, self.r),
            pattern_value(self.alpha_pattern, name, self.lora_alpha),
            self.lora_dropout,
            self.use_rslora,
            self.use_dora,
            self.lora_bias,
            dtype,
        )


@dataclass(frozen=True)
class _Kind:
    """What the value of a JSON key may be.

    types      of the value itself
    items      of the entries of a list, or of the values of an object
    patterns   True if a string, or the entries of a list or the keys of an object, are regular
               expressions
    """

    types: tuple[type, ...]
    items: tuple[type, ...] = ()
    patterns: bool = False

    def check(self, value: Any) -> None:
        """Raises ValueError saying what the value must be."""
        if not _is_one_of(value, self.types):
            raise ValueError(f"is {value!r}; it must be {_names(self.types)}")
        entries = value.values() if isinstance(value, dict) else value
        for entry in entries if isinstance(value, (dict, list)) else ():
            if not _is_one_of(entry, self.items):
                raise ValueError(f"holds {entry!r}; it must hold {_names(self.items)} only")
        if self.patterns:
            for pattern in [value] if isinstance(value, str) else value:
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ValueError(
                        f"holds {pattern!r}, which is no regular expression: {error}"
                    ) from error


def _is_one_of(value: Any, types: tuple[type, ...]) -> bool:
    # bool is a subclass of int, but no number in a configuration.
    return isinstance(value, types) and (bool in types or not isinstance(value, bool))


def _names(types: tuple[type, ...]) -> str:
    return " or ".join(kind.__name__ for kind in types)


_NUMBER = (int, float)
_KINDS = {
    "r": _Kind((int,)),
    "lora_alpha": _Kind(_NUMBER),
    "target_modules": _Kind((str, list), (str,)),
    "lora_dropout": _Kind(_NUMBER),
    "use_rslora": _Kind((bool,)),
    "use_dora": _Kind((bool,)),
    "lora_bias": _Kind((bool,)),
    "modules_to_save": _Kind((list,), (str,)),
    "exclude_modules": _Kind((str, list), (str,)),
    "layers_to_transform": _Kind((int, list), (int,)),
    "layers_pattern": _Kind((str, list), (str,), patterns=True),
    "rank_pattern": _Kind((dict,), (int,), patterns=True),
    "alpha_pattern": _Kind((dict,), _NUMBER, patterns=True),
}
# Their names are regular expressions if they are strings, and plain names if they are lists.
_PATTERN_IF_STRING = ("target_modules", "exclude_modules")
_REQUIRED = ("r", "lora_alpha", "target_modules")


def read_config(folder: Path) -> AdapterConfig:
    """Reads the adapter_config.json in `folder`.

    Raises FileNotFoundError if it is missing, ValueError that names the file and the key if it does
    not fit.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; it must lie beside the adapter's weights")
    try:
        facts = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON that can be read: {error}") from error
    if not isinstance(facts, dict):
        raise ValueError(f"{path} holds a {type(facts).__name__}; it must hold an object")
    _refuse_unsupported(path, facts)
    values: dict[str, Any] = {}
    for key, kind in _KINDS.items():
        value = facts.get(key)
        if value is None:
            if key in _REQUIRED:
                raise ValueError(f"{path}: {key} is missing")
            continue
        if key in _PATTERN_IF_STRING and isinstance(value, str):
            kind = replace(kind, patterns=True)
        try:
            kind.check(value)
        except ValueError as error:
            raise ValueError(f"{path}: {key} {error}") from error
        values[key] = value
    for key in ("layers_to_transform", "layers_pattern"):
        if key in values and not isinstance(values[key], list):
            values[key] = [values[key]]
    return AdapterConfig(**values)


def _refuse_unsupported(path: Path, facts: dict[str, Any]) -> None:
    peft_type = facts.get("peft_type")
    if peft_type != "LORA":
        raise ValueError(f"{path}: peft_type is {peft_type!r}; it must be 'LORA'")
    initialization = facts.get("init_lora_weights", True)
    if isinstance(initialization, str):
        initialization = initialization.lower()
    if initialization == "mica":
        logger.warning("%s: PEFT keeps lora_B frozen under MiCA; pylora trains it as well", path)
    if initialization is not None and initialization not in _PLAIN_INITIALIZATIONS:
        raise ValueError(
            f"{path}: init_lora_weights is {initialization!r}, which changes the base weights; "
            "convert the adapter with PEFT's path_initial_model_for_weight_conversion first"
        )
    for key, value in facts.items():
        if key in _KINDS or key in _HARMLESS or key in ("peft_type", "init_lora_weights"):
            continue
        if key in _NEUTRAL:
            if value is not None and value != _NEUTRAL[key]:
                raise ValueError(
                    f"{path}: {key} is {value!r}, which pylora does not support; "
                    f"it must be {_NEUTRAL[key]!r}"
                )
        elif value:
            raise ValueError(f"{path}: {key} is {value!r}, which pylora does not support")


def config_of(
    model: nn.Module, layers: Mapping[str, LoRALinear], fully_trained: Collection[str]
) -> dict[str, Any]:
    """The contents of adapter_config.json for the LoRA layers of a model.

    fully_trained    the names of the modules that are trained in full

    Raises ValueError if the layers differ in a setting that PEFT has once for the whole adapter.
    """
    first_name, first = next(iter(layers.items()))
    common = {key: _property(first, key) for key in _SAME_EVERYWHERE}
    for name, layer in layers.items():
        for key, value in common.items():
            if _property(layer, key) != value:
                raise ValueError(
                    f"{key} is {_property(layer, key)} in {name} but {value} in {first_name}; "
                    "PEFT's format has one for the whole adapter"
                )
    _check_told_apart(model, fully_trained)
    _warn_of_fused_experts(model, layers)
    (r, lora_alpha), _ = Counter((x.r, x.lora_alpha) for x in layers.values()).most_common(1)[0]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if type(model).__name__.endswith("ForCausalLM") else None,
        "auto_mapping": None,
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "revision": None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": lora_alpha,
        **common,
        "target_modules": describe(layers, fully_trained, model),
        "modules_to_save": sorted(fully_trained) or None,
        "rank_pattern": _pattern({n: x.r for n, x in layers.items()}, r),
        "alpha_pattern": _pattern({n: x.lora_alpha for n, x in layers.items()}, lora_alpha),
        "bias": "none",
        # It says how PEFT finds the base weights stored; lora_A and lora_B have one form only.
        "fan_in_fan_out": any(is_conv1d(layer.base_layer) for layer in layers.values()),
        "init_lora_weights": True,
    }


def _check_told_apart(model: nn.Module, fully_trained: Collection[str]) -> None:
    """Raises ValueError if PEFT would apply modules_to_save to other modules as well."""
    for entry in fully_trained:
        for site in sites(model):
            # PEFT compares the ends of names, even if they begin in the middle of a component.
            if site.name.endswith(entry) and not is_below(site.name, fully_trained):
                raise ValueError(
                    f"{entry!r} is trained in full, but PEFT would take its name for {site.name!r} "
                    "as well; modules_to_save must include both"
                )


def _warn_of_fused_experts(model: nn.Module, layers: Iterable[str]) -> None:
    """Warns of layers whose LoRA PEFT takes for LoRA of experts, because of their names.

    transformers holds the experts of a layer in one tensor. For many models that does this, such as
    DeepSeek-V3, PEFT (0.21.2) reads targets with the names that the experts had before as parts of
    that tensor. The LoRA of a shared expert or of a dense MLP, which have these names too, is left
    out, and PEFT gives no error.
    """
    experts = {
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() == 3 and name.rsplit(".", 1)[-1] in _FUSED_EXPERTS
    }
    taken = [name for name in layers if name.rsplit(".", 1)[-1] in _NAMES_IN_EXPERTS]
    if experts and taken:
        logger.warning(
            "PEFT may not read the LoRA of %s%s from this adapter: it takes these names for parts "
            "of %s. pylora reads it; for PEFT, leave these layers out of target_modules",
            taken[0],
            f" and {len(taken) - 1} more" if len(taken) > 1 else "",
            min(experts),
        )


_FUSED_EXPERTS = ("gate_up_proj", "down_proj")
_NAMES_IN_EXPERTS = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
_SAME_EVERYWHERE = ("lora_dropout", "use_rslora", "use_dora", "lora_bias")


def _property(layer: LoRALinear, key: str) -> Any:
    return layer.lora_B_bias is not None if key == "lora_bias" else getattr(layer, key)


def _pattern(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """The values that differ from the default, each under a regular expression for its layer."""
    return {f"^{re.escape(name)}": value for name, value in values.items() if value != default}
