"""`NF4Config`: transformers quantizes a model to NF4 while it loads the checkpoint.

    model = AutoModelForCausalLM.from_pretrained(name, quantization_config=pylora.NF4Config())

Each weight is quantized when it is read, so that the dense model is never in memory as a whole.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from pylora import checks
from pylora.functional import quantize_nf4
from pylora.integrations.transformers import mark
from pylora.models import quantize_model
from pylora.nf4 import DEFAULT_BLOCKSIZE, check_blocksize
from pylora.nn import NF4Linear
from pylora.nn.nf4_linear import stored_tensors

_METHOD = "pylora"
# What transformers sets on a model that it quantizes; pylora sets marks of its own.
_MARKS = ("is_quantized", "quantization_method")


@register_quantization_config(_METHOD)
class NF4Config(QuantizationConfigMixin):
    """A `quantization_config` of transformers for NF4, which needs no bitsandbytes.

    blocksize, double_quant    as in `pylora.quantize_nf4`
    skip_modules               names, or their last components, of modules that stay dense beside
                               those that `pylora.quantize_model` leaves; None for the output head

    Raises ValueError or TypeError that names the argument that does not fit.
    """

    def __init__(
        self,
        blocksize: int = DEFAULT_BLOCKSIZE,
        double_quant: bool = True,
        skip_modules: str | Collection[str] | None = None,
    ) -> None:
        check_blocksize(blocksize)
        if skip_modules is not None:
            checks.names("skip_modules", skip_modules)
        super().__init__(quant_method=_METHOD)  # type: ignore[arg-type]
        self.blocksize, self.double_quant = blocksize, double_quant
        self.skip_modules = skip_modules


@register_quantizer(_METHOD)
class NF4Loader(HfQuantizer):
    """Quantizes the weights of a checkpoint one by one while transformers reads them."""

    requires_calibration = False
    quantization_config: NF4Config

    @property
    def quantized_element_size(self) -> float:
        """Bytes of a weight, by which transformers plans the devices."""
        return 0.5

    def validate_environment(self, *_: Any, **__: Any) -> None:
        """Raises ValueError for a checkpoint that says it was quantized by this method.

        pylora saves checkpoints under the name of bitsandbytes, whose form they have.
        """
        if self.pre_quantized:
            raise ValueError(
                "the checkpoint has a quantization_config; pylora.NF4Config must be given for a "
                "dense checkpoint: load it without, and call pylora.accelerate on the model"
            )

    def preprocess_model(self, model: Any, dtype: torch.dtype | None = None, **_: Any) -> None:
        """Replaces the linear layers of the model, which is on the meta device, by NF4 layers."""
        config = self.quantization_config
        skip = ("lm_head",) if config.skip_modules is None else config.skip_modules
        quantize_model(model, skip, config.blocksize, config.double_quant)

    def param_needs_quantization(self, model: Any, param_name: str, **options: Any) -> bool:
        """True for the weight of an NF4 layer."""
        layer, _, name = param_name.rpartition(".")
        return name == "weight" and isinstance(model.get_submodule(layer), NF4Linear)

    def get_quantize_ops(self) -> ConversionOps:
        """What turns a dense weight into the tensors of an NF4 layer."""
        return _Quantize()

    def postprocess_model(self, model: Any, **_: Any) -> Any:
        """Gives the loaded model the marks of one that `pylora.quantize_model` has changed."""
        for name in _MARKS:
            vars(model).pop(name, None)
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        mark(model)
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """True; the model's own quantizer takes over when it is loaded."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True; the model's own quantizer takes over when it is loaded."""
        return True


class _Quantize(ConversionOps):
    def convert(self, input_dict: dict[str, Any], *_: Any, **context: Any) -> Any:
        """The tensors of the NF4 layer whose dense weight `input_dict` has."""
        model = context["model"]
        result: dict[str, Tensor] = {}
        for key, value in input_dict.items():
            weight: Tensor = value[0] if isinstance(value, list) else value
            name = key.removesuffix(".weight")
            layer = model.get_submodule(name)
            if layer.conv1d is not None:  # its weight is stored transposed
                weight = weight.mT
            try:
                w = quantize_nf4(weight.contiguous(), layer.blocksize, layer.double_quant)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{key}: {error}") from error
            layer.weight_dtype = w.dtype
            layer._is_hf_initialized = True  # transformers would initialize its bias again
            result |= {f"{name}.{part}": tensor for part, tensor in stored_tensors(w).items()}
        return result
