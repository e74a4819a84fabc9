"""The adapter_config.json of AdapterHub: our configurations in its words, and back.

The keys are those of the `adapters` library, 1.3.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from pylora.adapters.configs import (
    AdapterConfig,
    HoulsbyConfig,
    ParallelConfig,
    PfeifferConfig,
)
from pylora.models.adapter_config import CONFIG_NAME

_WRITTEN_BY = "adapters.1.3.0"  # the version whose format this is
# Our name of an activation -> that of the library, where they differ.
_ACTIVATIONS = {"silu": "swish", "gelu_tanh": "gelu_pytorch_tanh", "identity": "linear"}
# These keys have this value, or are missing, in every adapter that pylora computes.
_REQUIRED: dict[str, Any] = {
    "adapter_residual_before_ln": False,
    "cross_adapter": False,
    "inv_adapter": None,
    "leave_out": [],
    "original_ln_after": True,
    "phm_layer": False,
    "residual_before_ln": True,
    "stochastic_depth": 0.0,
    "use_gating": False,
}
# These keys matter only with a value of another key that pylora refuses, or for the start.
_HARMLESS = {
    "factorized_phm_W",
    "factorized_phm_rule",
    "hypercomplex_nonlinearity",
    "init_weights_seed",
    "inv_adapter_reduction_factor",
    "learn_phm",
    "phm_bias",
    "phm_c_init",
    "phm_dim",
    "phm_init_range",
    "phm_rank",
    "shared_W_phm",
    "shared_phm_rule",
}
_READ = {
    "architecture",
    "dropout",
    "init_weights",
    "is_parallel",
    "ln_after",
    "ln_before",
    "mh_adapter",
    "non_linearity",
    "original_ln_before",
    "output_adapter",
    "reduction_factor",
    "scaling",
}


def hub_config(model: nn.Module, name: str, config: AdapterConfig, hidden_size: int) -> Any:
    """The contents of adapter_config.json for an adapter.

    Raises ValueError if the format cannot say what the adapter computes.
    """
    for key in ("norm_before", "norm_after"):
        if getattr(config, key) == "rms_norm":
            raise ValueError(f"{name!r} has {key}='rms_norm', which AdapterHub's format cannot say")
    facts: Any = getattr(model, "config", None)
    return {
        "config": {
            **_REQUIRED,
            "dropout": float(config.dropout),
            "init_weights": config.init_weights,
            "is_parallel": isinstance(config, ParallelConfig),
            "ln_after": config.norm_after is not None,
            "ln_before": config.norm_before is not None,
            "mh_adapter": "attention" in config.where,
            "non_linearity": _ACTIVATIONS.get(config.activation, config.activation),
            "original_ln_before": isinstance(config, PfeifferConfig),
            "output_adapter": "mlp" in config.where,
            "reduction_factor": config.reduction_factor,
            "scaling": float(config.scaling),
        },
        "hidden_size": hidden_size,
        "model_class": type(model).__name__,
        "model_name": getattr(model, "name_or_path", ""),
        "model_type": getattr(facts, "model_type", None),
        "name": name,
        "version": _WRITTEN_BY,
    }


def read_facts(folder: Path) -> dict[str, Any] | None:
    """The JSON object in the folder's adapter_config.json; None if there is none."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        return None
    try:
        facts = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError):
        return None  # the reader of PEFT's files reports it
    return facts if isinstance(facts, dict) else None


def config_from_hub(path: Path, facts: dict[str, Any]) -> AdapterConfig:
    """The configuration of an adapter of AdapterHub.

    Raises ValueError that names the file and the key if pylora does not compute such an adapter.
    """
    values = facts["config"]
    if not isinstance(values, dict):
        raise ValueError(f"{path}: config is {values!r}; it must be an object")
    if values.get("architecture") is not None:
        raise ValueError(
            f"{path}: architecture is {values['architecture']!r}; it must be a bottleneck adapter"
        )
    for key, value in values.items():
        if key in _REQUIRED:
            if value != _REQUIRED[key]:
                raise ValueError(
                    f"{path}: {key} is {value!r}, which pylora does not support; it must be "
                    f"{_REQUIRED[key]!r}"
                )
        elif key not in _HARMLESS | _READ and value:
            raise ValueError(f"{path}: {key} is {value!r}, which pylora does not support")
    ours = {name: name_of_ours for name_of_ours, name in _ACTIVATIONS.items()}
    where = [
        place
        for place, key in (("attention", "mh_adapter"), ("mlp", "output_adapter"))
        if values.get(key)
    ]
    activation: Any = values.get("non_linearity")
    kind: type[AdapterConfig] = HoulsbyConfig
    if values.get("is_parallel"):
        kind = ParallelConfig
    elif values.get("original_ln_before"):
        kind = PfeifferConfig
    try:
        return kind(
            reduction_factor=values.get("reduction_factor"),  # type: ignore[arg-type]
            activation=ours.get(activation, activation),
            where=where,
            scaling=values.get("scaling", 1.0),
            dropout=values.get("dropout", 0.0),
            norm_before="layer_norm" if values.get("ln_before") else None,
            norm_after="layer_norm" if values.get("ln_after") else None,
            init_weights=values.get("init_weights", "bert"),
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
