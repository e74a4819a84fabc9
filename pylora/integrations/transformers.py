"""Sets the marks by which transformers knows what pylora has made of a model.

hf_quantizer                           an `NF4Quantizer`, if the model has NF4Linear layers
config._is_quantized, config.dtype     flash attention asks them for the dtype of the computation
_apply                                 a `FollowCast`, which keeps config.dtype right
save_pretrained                        a `SavePretrained`, if the model has layers of pylora
is_quantized, is_loaded_in_4bit, quantization_method
                                       the marks of bitsandbytes; they are taken off when its layers
                                       are gone. pylora does not set them, because a model that has
                                       them refuses `.half()`, and counts parameters by bitsandbytes

The objects know their model, so that a copy of the model has its own. The circle of references has
a price: a deleted model is freed when Python's garbage collector runs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.quantizers import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from pylora.adapters.slot import AdapterSlot
from pylora.integrations.accelerate import accelerate
from pylora.integrations.checkpoints import SavePretrained, plain_state
from pylora.integrations.report import Report
from pylora.models.dense import make_dense
from pylora.models.module_tree import Site, is_bitsandbytes_4bit, lora_layers
from pylora.models.slots import all_slots
from pylora.nn import LoRALinear, NF4Linear

logger = logging.getLogger(__name__)


def mark(model: nn.Module) -> None:
    """Sets the marks of every transformers model in `model` to what its layers are now."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            _mark(module)


def _mark(model: Any) -> None:
    layers = list(model.modules())
    nf4 = [layer for layer in layers if isinstance(layer, NF4Linear)]
    has_lora = any(isinstance(layer, LoRALinear) for layer in layers)
    has_adapters = has_lora or any(isinstance(layer, AdapterSlot) for layer in layers)
    has_bitsandbytes = any(map(is_bitsandbytes_4bit, layers))
    _mark_bitsandbytes(model, has_adapters, has_bitsandbytes)
    marks = vars(model)
    if nf4 and not has_bitsandbytes:
        if not isinstance(marks.get("hf_quantizer"), NF4Quantizer):
            model.hf_quantizer = NF4Quantizer(model)
    elif isinstance(marks.get("hf_quantizer"), NF4Quantizer):
        del model.hf_quantizer
    if nf4 or has_lora:
        model.save_pretrained = SavePretrained(model)
    else:
        marks.pop("save_pretrained", None)
    config = model.config
    if nf4 and not hasattr(config, "_is_quantized"):
        config._is_quantized = True
        config.dtype = nf4[0].weight_dtype
    elif not nf4 and not has_bitsandbytes and hasattr(config, "_is_quantized"):
        del config._is_quantized
    if nf4 and not has_bitsandbytes:
        model._apply = FollowCast(model)
    else:
        marks.pop("_apply", None)


def _mark_bitsandbytes(model: Any, has_adapters: bool, has_bitsandbytes: bool) -> None:
    """Sets the marks of a model that transformers loaded by bitsandbytes.

    has_adapters    true if pylora has given it LoRA or bottleneck adapters

    transformers' Trainer refuses a model that `is_quantized` without PEFT's adapters. The other
    marks make `.half()` and `.to(dtype)` refuse, which is right while bitsandbytes layers are left.
    """
    marks = vars(model)
    if marks.get("is_loaded_in_4bit"):
        marks["is_quantized"] = has_bitsandbytes and not has_adapters
        if not has_bitsandbytes:
            marks["is_loaded_in_4bit"] = False
            marks.pop("quantization_method", None)


class PyloraCallback(TrainerCallback):
    """Lets a Trainer's model compute through pylora, as `pylora.accelerate` does.

    options    the keyword arguments of `pylora.accelerate`

    trainer = SFTTrainer(..., callbacks=[PyloraCallback()])

    It runs when the trainer has made its model, PEFT's adapters included, and before the model is
    wrapped or compiled. `report` is what `accelerate` returned; it is also logged.
    """

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.report: Report | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the trainer at the end of its `__init__`."""
        self.report = accelerate(kwargs["model"], **self.options)
        logger.info("%s", self.report)


class FollowCast:
    """Replaces the `_apply` of a model, by which it is cast and moved: `config.dtype` follows."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Applies `fn` to every tensor of the model, and returns the model."""
        model = self.model
        type(model)._apply(model, fn, recurse)
        model.config.dtype = fn(torch.empty(0, dtype=model.config.dtype)).dtype
        return model


class NF4Quantizer(HfQuantizer):
    """Answers what transformers asks about a model with NF4Linear layers; its `hf_quantizer`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(QuantizationConfigMixin("pylora"))  # type: ignore[arg-type]
        self.model = model

    @property
    def is_trainable(self) -> bool:
        """True if the model has adapters, or nothing else to train.

        Otherwise it raises ValueError. transformers' Trainer asks this of every model with an
        `hf_quantizer`, but heeds the answer only if the model is marked `is_quantized`.
        """
        model = self.model
        if lora_layers(model) or all_slots(model) or hasattr(model, "peft_config"):
            return True
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                raise ValueError(
                    f"model is quantized and has no adapters, and {name} would be trained; call "
                    "pylora.add_lora, pylora.add_adapter or peft.get_peft_model before the Trainer "
                    "is made, or freeze the model"
                )
        return True

    @property
    def is_compileable(self) -> bool:
        """True: `generate` may compile the forward."""
        return True

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """True: `SavePretrained` writes the form of bitsandbytes."""
        return True

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Any], dict[str, str]]:
        """The state of the model as bitsandbytes stores it."""
        return plain_state(model), {}

    def dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """Turns every NF4Linear into an nn.Linear, in place.

        dtype    that of the new weights; by default `model.config.dtype`, which follows casts

        Raises ValueError for a model with LoRA.
        """
        if lora_layers(model):
            raise ValueError("model has LoRA layers; pylora.unload must be called first")
        make_dense(Site("", model), dtype or model.config.dtype)
        mark(model)
        return model
