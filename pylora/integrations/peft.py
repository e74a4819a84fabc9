"""PEFT over layers of pylora.

`install` makes PEFT's methods take NF4 layers; `pylora.integrations.peft_install` has it.
`as_peft_model` gives a model with LoRA layers of pylora the interface of PEFT's models.

TRL's DPO, KTO, GRPO and RLOO trainers compare the model with a reference. They disable the adapter
for it only if the model is an instance of `peft.PeftModel`; for any other model they load the
weights a second time, without quantization. transformers' Trainer saves and resumes the adapter
alone if it gets a PeftModel.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType
from torch import nn
from torch.distributed.tensor import DTensor

from pylora.integrations.peft_install import install, merge_report, uninstall
from pylora.models import disable_adapter, load_adapter, merge, save_adapter, unload, unmerge
from pylora.models.adapter_config import config_of
from pylora.models.module_tree import adapted_layers, lora_layers, refuse_peft_model
from pylora.models.trained_in_full import fully_trained_modules
from pylora.models.wrappers import unwrapped
from pylora.nn import LoRALinear

__all__ = ["as_peft_model", "install", "merge_report", "uninstall"]

_DEFAULT = "default"


def as_peft_model(model: nn.Module) -> WrappedModel:
    """A `peft.PeftModel` around the model; both share every layer.

    model    a module with LoRALinear layers inside

    trainer = trl.DPOTrainer(pylora.integrations.peft.as_peft_model(model), ...)

    The reference of TRL is the model as it is when the trainer is made, as with PEFT. Raises
    ValueError if the model has no LoRA, has it on its output head, whose weight TRL reads without
    it, or has layers that one configuration of PEFT cannot describe.
    """
    root = unwrapped(model)
    refuse_peft_model(root)
    layers = adapted_layers(root)
    if not layers or "" in layers:
        raise ValueError("model must be a module with LoRALinear layers inside, by pylora.add_lora")
    get_head: Any = getattr(root, "get_output_embeddings", None)
    if get_head is not None and isinstance(get_head(), LoRALinear):
        raise ValueError(
            "the output head of model has LoRA, which TRL would leave out, because it multiplies "
            "by the head's weight; target_modules must not have it"
        )
    facts = config_of(root, layers, list(fully_trained_modules(root)))
    return WrappedModel(root, PeftConfig.from_peft_type(**facts | {"inference_mode": False}))


class _Tuner(nn.Module):
    """Stands where PEFT has its LoraModel, so that parameters have the names that PEFT gives."""

    prefix = "lora_"

    def __init__(self, model: nn.Module, config: Any) -> None:
        super().__init__()
        self.model, self.peft_config = model, {_DEFAULT: config}

    def forward(self, *inputs: Any, **options: Any) -> Any:
        return self.model(*inputs, **options)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # it is not set yet
                raise
            return getattr(self.model, name)


class WrappedModel(PeftModel):
    """A PeftModel whose LoRA layers are pylora's; `as_peft_model` makes it.

    Its adapter is "default". Further adapters are frozen copies of it, which TRL uses as reference.
    """

    wraps_model_of_pylora = True

    def __init__(self, model: nn.Module, config: Any) -> None:
        nn.Module.__init__(self)
        self.peft_type = PeftType.LORA
        self.active_adapter = _DEFAULT
        self.special_peft_forward_args: set[str] = set()
        self._is_prompt_learning = self._adapters_disabled = False
        self.base_model = _Tuner(model, config)
        # The parameters of each copy, by the names in the model; None if the adapter did nothing
        # when it was copied, so that the copy is the base.
        self._copies: dict[str, dict[str, nn.Parameter] | None] = {}
        self._trained: dict[str, nn.Parameter] = {}

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside the `with` block the model is its base; see `pylora.disable_adapter`."""
        with disable_adapter(self.get_base_model()):
            yield

    def add_adapter(self, adapter_name: str, peft_config: Any, *_: Any, **__: Any) -> None:
        """Adds a frozen copy of the adapter as it is now.

        Raises ValueError if the name is taken, or if the configuration is not that of the model.
        """
        if adapter_name in self.peft_config:
            raise ValueError(f"adapter_name is {adapter_name!r}; the model has an adapter of it")
        if peft_config.to_dict() != self.peft_config[_DEFAULT].to_dict():
            raise ValueError(
                "peft_config differs from that of the model, of which this adds a copy; "
                "pylora.add_lora(model, ..., adapter_name=name) adds an adapter of another kind"
            )
        self._copies[adapter_name] = None if self._does_nothing() else self._copied()
        self.peft_config[adapter_name] = peft_config

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes a copy that is not active."""
        if adapter_name not in self._copies or adapter_name == self.active_adapter:
            raise ValueError(f"adapter_name is {adapter_name!r}; it must be an inactive copy")
        del self._copies[adapter_name], self.peft_config[adapter_name]

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Lets the model compute with this adapter.

        Raises ValueError if there is none of this name, or if the parameters are sharded, which
        would put those of the default adapter back in the forward.
        """
        if adapter_name not in self.peft_config:
            raise ValueError(
                f"adapter_name is {adapter_name!r}; it must be in {[*self.peft_config]}"
            )
        model = self.get_base_model()
        for name, parameter in self._trained.items():
            _set_parameter(model, name, parameter)
        self._trained = {}
        copies = self._copies.get(adapter_name, {})
        for layer in lora_layers(model).values():
            layer.lora_enabled = copies is not None
        for name, copy in (copies or {}).items():
            now = model.get_parameter(name)
            if isinstance(now, DTensor):
                raise ValueError(f"{name} is sharded; the model must not be, to switch adapters")
            self._trained[name] = now
            copy.data = copy.data.to(now.device, now.dtype)
            _set_parameter(model, name, copy)
        self.active_adapter = adapter_name

    def _does_nothing(self) -> bool:
        """True if the model is exactly its base."""
        model = self.get_base_model()
        if fully_trained_modules(model):
            return False
        return not any(
            layer.merged or layer.use_dora or layer.lora_B.any() or layer.lora_B_bias is not None
            for layer in adapted_layers(model).values()
        )

    @torch.no_grad()
    def _copied(self) -> dict[str, nn.Parameter]:
        model = self.get_base_model()
        return {
            name: nn.Parameter(parameter.detach().clone(), requires_grad=False)
            for name, parameter in model.named_parameters(remove_duplicate=False)
            if parameter.requires_grad
        }

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        *_: Any,
        **__: Any,
    ) -> None:
        """Writes the default adapter; see `pylora.save_adapter`."""
        if not safe_serialization:
            raise ValueError("safe_serialization is False; it must be True")
        if selected_adapters is not None and list(selected_adapters) != [_DEFAULT]:
            raise ValueError(f"selected_adapters is {selected_adapters}; it must be [{_DEFAULT!r}]")
        if is_main_process:
            save_adapter(self.get_base_model(), Path(save_directory))

    def load_adapter(
        self, model_id: str | os.PathLike[str], adapter_name: str = _DEFAULT, *_: Any, **__: Any
    ) -> None:
        """Fills the default adapter from a folder; see `pylora.load_adapter`."""
        if adapter_name != _DEFAULT:
            raise ValueError(f"adapter_name is {adapter_name!r}; it must be {_DEFAULT!r}")
        load_adapter(self.get_base_model(), Path(model_id))

    def merge_adapter(self) -> None:
        """See `pylora.merge`."""
        merge(self.get_base_model())

    def unmerge_adapter(self) -> None:
        """See `pylora.unmerge`."""
        unmerge(self.get_base_model())

    def merge_and_unload(self) -> nn.Module:
        """Merges the adapter, and returns the plain model."""
        model = self.get_base_model()
        merge(model, keep_base=False)
        return model

    def unload(self) -> nn.Module:
        """Returns the plain model; see `pylora.unload`."""
        return unload(self.get_base_model())


def _set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, attribute = name.rpartition(".")
    model.get_submodule(owner)._parameters[attribute] = parameter
