"""`save_pretrained` of a transformers model with layers of pylora.

It writes what `from_pretrained` loads as the same function. NF4 layers are stored in the form of
bitsandbytes, and config.json says so. A merged model is stored as the plain one. LoRA that is not
merged is stored as an adapter beside the base model, which `from_pretrained` puts on it through
PEFT; its parameters are in the model's file as well, from which a Trainer resumes.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from pylora.models.adapter_config import CONFIG_NAME
from pylora.models.adapter_files import save_adapter
from pylora.models.lora_switching import lora_names
from pylora.models.module_tree import adapted_layers, is_4bit, merge_added_bias
from pylora.nn import LoRALinear, NF4Linear
from pylora.nn.conv1d import is_plain_linear

logger = logging.getLogger(__name__)


class SavePretrained:
    """Replaces the `save_pretrained` of a model; it has the same arguments."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        push_to_hub: bool = False,
        **options: Any,
    ) -> None:
        """Writes the model to a folder that `from_pretrained` reads.

        state_dict    what to write instead of `model.state_dict()`; it must have its keys

        Raises ValueError, before it writes, if `from_pretrained` would load something else.
        """
        model, folder = self.model, Path(save_directory)
        if options.get("distributed_checkpoint"):
            raise ValueError(
                "distributed_checkpoint is True; it must be False for a model with layers of "
                "pylora: save model.state_dict() by torch.distributed.checkpoint"
            )
        _refuse_added_biases(model)
        has_adapter = any(not layer.merged for layer in adapted_layers(model).values())
        if has_adapter and push_to_hub:
            raise ValueError(
                "push_to_hub is True; it must be False for a model with LoRA that is not merged: "
                "save the folder first, then upload it"
            )
        if not has_adapter and (folder / CONFIG_NAME).exists():
            raise ValueError(
                f"{folder} has an {CONFIG_NAME}, so from_pretrained would put that adapter on this "
                "model, which has none; save_directory must be another folder"
            )
        plain = plain_state(model, state_dict)
        with _saved_config(model), _without_quantizer(model):
            if has_adapter and is_main_process:
                _warn_of_others(model)
                save_adapter(model, folder)
            type(model).save_pretrained(
                model,
                save_directory,
                is_main_process=is_main_process,
                state_dict=plain,
                push_to_hub=push_to_hub,
                **options,
            )


def plain_state(model: nn.Module, state_dict: dict[str, Any] | None = None) -> dict[str, Any]:
    """The state of the model with the keys of a plain model, and NF4 layers as in bitsandbytes.

    state_dict    `model.state_dict()` or one with the same keys, gathered from shards; such a dict
                  describes the unmerged model, so it must not be given for a merged one

    The parameters of LoRA layers that are not merged keep their keys.
    """
    state = dict(model.state_dict() if state_dict is None else state_dict)
    bases: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        if isinstance(module, LoRALinear):
            bases[f"{prefix}base_layer."] = prefix
            if module.merged:
                if state_dict is not None:
                    raise ValueError(f"{name} is merged; state_dict must not be given")
                _store_merged(state, prefix, module)
        elif isinstance(module, NF4Linear):
            _store_as_bitsandbytes(state, prefix, module, gathered=state_dict is not None)
    return {_plain_key(key, bases): value for key, value in state.items()}


def _plain_key(key: str, bases: dict[str, str]) -> str:
    head, found, rest = key.rpartition("base_layer.")
    return bases.get(head + found, head + found) + rest


def _store_merged(state: dict[str, Any], prefix: str, layer: LoRALinear) -> None:
    """Puts the merged base of a layer, without its LoRA, into `state`."""
    for key in layer.state_dict():
        state.pop(prefix + key, None)
    for key, value in layer.base_layer.state_dict().items():
        state[f"{prefix}base_layer.{key}"] = value


def _store_as_bitsandbytes(
    state: dict[str, Any], prefix: str, layer: NF4Linear, gathered: bool
) -> None:
    """Replaces the entries of a layer in `state` by those that bitsandbytes reads.

    gathered    true if the values in `state` may be others than those of the layer
    """
    names = [name for name in layer.state_dict() if prefix + name in state]
    entries = {name: state.pop(prefix + name) for name in names}
    if not entries:
        return
    if any(isinstance(value, DTensor) for value in entries.values()):
        raise ValueError(
            f"{prefix[:-1]} is sharded; pass a gathered state_dict, which "
            "torch.distributed.checkpoint.state_dict.get_model_state_dict makes"
        )
    if gathered:
        layer = NF4Linear(
            layer.in_features,
            layer.out_features,
            layer.bias is not None,
            layer.blocksize,
            layer.double_quant,
            device="meta",
            dtype=layer.weight_dtype,
        )
        layer.load_state_dict(entries, assign=True)
    for key, value in layer.checkpoint_entries().items():
        state[prefix + key] = value


def _warn_of_others(model: nn.Module) -> None:
    active, *others = lora_names(model)
    if others:
        logger.warning(
            "from_pretrained will load the adapter %r alone; pylora.save_adapter(model, path, "
            "adapter_name=name) writes the others: %s",
            active,
            ", ".join(map(repr, others)),
        )


def _refuse_added_biases(model: nn.Module) -> None:
    """Raises ValueError if a merge made a bias that the layer of a plain model does not have."""
    for name, module in model.named_modules():
        if merge_added_bias(module):
            raise ValueError(
                f"merging gave {name} a bias, which the layers of {type(model).__name__} do not "
                "have and from_pretrained would not load; save the adapter by pylora.save_adapter"
            )


@contextmanager
def _without_quantizer(model: Any) -> Iterator[None]:
    """Hides `hf_quantizer`: transformers ignores the `state_dict` that is given if it finds one."""
    quantizer = vars(model).pop("hf_quantizer", None)
    try:
        yield
    finally:
        if quantizer is not None:
            model.hf_quantizer = quantizer


@contextmanager
def _saved_config(model: Any) -> Iterator[None]:
    """Has config.json say that the model is quantized by bitsandbytes, if it has 4-bit layers.

    Afterwards the model's configuration is what it was: `save_pretrained` also leaves a string as
    its dtype, but flash attention needs a torch.dtype.
    """
    marks = vars(model.config)
    before = {name: marks[name] for name in ("quantization_config", "dtype") if name in marks}
    marks.pop("quantization_config", None)
    described = bitsandbytes_config(model)
    if described is not None:
        marks["quantization_config"] = described
    try:
        yield
    finally:
        marks.pop("quantization_config", None)
        marks.update(before)


def bitsandbytes_config(model: Any) -> dict[str, Any] | None:
    """The quantization_config of a model as bitsandbytes describes it; None without 4-bit layers.

    The block size of each layer, and its double quantization, are in the layer's own entries.
    """
    packed, dense = [], []
    for name, module in model.named_modules(remove_duplicate=False):
        name = name.removesuffix(".base_layer")
        if is_4bit(module):
            packed.append((name, module))
        elif is_plain_linear(module) or isinstance(module, Conv1D):
            dense.append(name)
    if not packed:
        return None
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": any(_is_double(module) for _, module in packed),
        "bnb_4bit_compute_dtype": str(model.dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": [_exact(name, packed) for name in dense],
    }


def _is_double(layer: Any) -> bool:
    return layer.double_quant if isinstance(layer, NF4Linear) else layer.weight.quant_state.nested


def _exact(name: str, packed: list[tuple[str, nn.Module]]) -> str:
    """An entry for a dense layer in the modules that bitsandbytes skips.

    An entry stands for every name that ends with it; if one of these is a 4-bit layer, the entry is
    a regular expression for the one name.
    """
    matches = any(other.endswith(name) or re.match(name, other) for other, _ in packed)
    return re.escape(name) + "$" if matches else name
