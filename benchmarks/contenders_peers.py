"""Contenders for a linear layer from other packages: bitsandbytes, PEFT, torchao.

Linear4bit of bitsandbytes runs on a CPU in one of two ways. In train mode it dequantizes the whole
weight and calls a dense matmul. In eval mode, if the CPU has AVX512-BF16 and x needs no gradient,
the first call repacks the weight in place, and from then on a fused kernel reads the packed bytes.
Here the weight is repacked when the layer is built, once for each shape, and copied. Repacking is
never timed.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.contender import BuiltLayer, Contender
from benchmarks.layer_tensors import LayerTensors
from benchmarks.shapes import FORWARD, Cell

# bitsandbytes may download a kernel, which would then be timed in place of the installed one.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def _linear4bit(tensors: LayerTensors, training: bool) -> Any:
    """Returns a `Linear4bit` over a copy of the NF4 bytes that pylora uses."""
    if training:
        return _plain_linear4bit(tensors).train()
    packed = tensors.remembered("bitsandbytes eval", lambda: _repacked(tensors))
    return copy.deepcopy(packed)


def _plain_linear4bit(tensors: LayerTensors) -> Any:
    import bitsandbytes

    cell = tensors.cell
    module = bitsandbytes.nn.Linear4bit(
        cell.in_features,
        cell.out_features,
        bias=False,
        compute_dtype=tensors.dtype,
        quant_type="nf4",
        device="meta",
    )
    module.weight = tensors.nf4().to_bitsandbytes()
    return module


def _repacked(tensors: LayerTensors) -> Any:
    module = _plain_linear4bit(tensors).eval()
    with torch.no_grad():
        module(tensors.normal(1, tensors.cell.in_features))
    return module


def _variant(module: Any) -> str:
    weight = module.weight
    if getattr(weight.quant_state, "packing_format_for_cpu", False):
        return "gemv_4bit on the repacked weight (fused, absmax rounded to bf16)"
    if weight.device.type == "cpu":
        return "gemm_4bit: dequantize the whole weight, then a dense matmul"
    return "gemm_4bit"


def _bare(training: bool) -> Any:
    def build(tensors: LayerTensors) -> BuiltLayer:
        module = _linear4bit(tensors, training)
        return BuiltLayer(module, lambda x: _variant(module))

    return build


class _OneLinear(torch.nn.Module):
    """The smallest model that PEFT takes. `is_4bit` tells PEFT that it is a 4-bit model."""

    def __init__(self, proj: torch.nn.Module, is_4bit: bool = True) -> None:
        super().__init__()
        self.proj, self.is_loaded_in_4bit = proj, is_4bit


def _wrapped_by_peft(
    model: _OneLinear, tensors: LayerTensors, lora_dtype: torch.dtype | None, **options: Any
) -> Any:
    """Returns PEFT's LoRA layer around that of `model`, with the factors of `tensors`.

    options    go to `LoraConfig`, such as lora_dropout and use_dora
    """
    from peft import LoraConfig, get_peft_model

    rank = tensors.cell.rank
    config = LoraConfig(
        r=rank,
        lora_alpha=rank * tensors.scaling,
        target_modules=["proj"],
        **options,
    )
    # PEFT would make LoRA fp32. Its factors get the dtype that is asked for below.
    layer = get_peft_model(model, config, autocast_adapter_dtype=False).base_model.model.proj
    a, b = tensors.lora(lora_dtype)
    layer.lora_A["default"].weight = torch.nn.Parameter(a.detach())
    layer.lora_B["default"].weight = torch.nn.Parameter(b.detach())
    return layer


def _lora_of(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def _peft(training: bool) -> Any:
    def build(
        tensors: LayerTensors, lora_dtype: torch.dtype | None = None, **options: Any
    ) -> BuiltLayer:
        model = _OneLinear(_linear4bit(tensors, training))
        layer = _wrapped_by_peft(model, tensors, lora_dtype, **options)
        layer.train(training)
        name = f"{type(layer).__module__}.{type(layer).__name__} over "
        return BuiltLayer(layer, lambda x: name + _variant(layer.base_layer), _lora_of(layer))

    return build


def dense_linear(tensors: LayerTensors) -> torch.nn.Linear:
    """Returns a frozen `nn.Linear` with the dequantized NF4 weight."""
    cell = tensors.cell
    module = torch.nn.Linear(cell.in_features, cell.out_features, bias=False, device="meta")
    weight = tensors.dense(tensors.dtype)
    module.weight = torch.nn.Parameter(weight, requires_grad=False)
    return module


def _peft_over_dense(
    tensors: LayerTensors, lora_dtype: torch.dtype | None = None, **options: Any
) -> BuiltLayer:
    model = _OneLinear(dense_linear(tensors), is_4bit=False)
    layer = _wrapped_by_peft(model, tensors, lora_dtype, **options)
    name = f"{type(layer).__module__}.{type(layer).__name__} over nn.Linear"
    return BuiltLayer(layer, lambda x: name, _lora_of(layer))


PEFT_OVER_DENSE = Contender("dense + PEFT", _peft_over_dense, ("torch", "peft"), weights="dense")


def mixed_batch(
    adapters: int, adapter_ids: Callable[[LayerTensors, int], Tensor]
) -> tuple[Contender, ...]:
    """Returns PEFT with an adapter for each token (`adapter_names`), over bitsandbytes in train
    mode and in eval mode. PEFT does this in inference alone.

    adapter_ids    (tensors, number of tokens) -> the adapter of each token, -1 for none
    """

    def build(tensors: LayerTensors, packed: bool) -> BuiltLayer:
        from peft import LoraConfig, get_peft_model

        rank = tensors.cell.rank
        options = {"r": rank, "lora_alpha": rank * tensors.scaling, "target_modules": ["proj"]}
        names = [str(index) for index in range(adapters)]
        config = LoraConfig(**options)
        model = _OneLinear(_linear4bit(tensors, training=not packed))
        model = get_peft_model(model, config, adapter_name=names[0], autocast_adapter_dtype=False)
        for name in names[1:]:
            model.add_adapter(name, config, autocast_adapter_dtype=False)
        layer = model.base_model.model.proj.eval()
        layer.base_layer.train(not packed)
        stacks = (t.detach() for t in tensors.lora_stacks(adapters))
        for name, A, B in zip(names, *stacks, strict=True):
            layer.lora_A[name].weight = torch.nn.Parameter(A)
            layer.lora_B[name].weight = torch.nn.Parameter(B)

        def forward(x: Tensor) -> Tensor:
            ids = adapter_ids(tensors, x.shape[0]).tolist()
            return layer(x, adapter_names=[names[i] if i >= 0 else "__base__" for i in ids])

        return BuiltLayer(forward, lambda x: "adapter_names over " + _variant(layer.base_layer))

    return tuple(
        replace(
            contender,
            build=partial(build, packed=contender.unavailable is _eval_why_not),
            modes=(FORWARD,),
        )
        for contender in LORA[:2]
    )


def _eval_why_not(cell: Cell, device: torch.device) -> str | None:
    """Returns a reason to leave out eval mode if it would run the same kernels as train mode."""
    if device.type != "cpu":
        return "same kernels as in train mode: there is no repacking on a GPU"
    from bitsandbytes.functional import has_avx512bf16

    if not has_avx512bf16():
        return "same kernels as in train mode: the CPU has no AVX512-BF16"
    if cell.out_features % 32 or cell.in_features % 64:
        return "its repacking needs out_features % 32 == 0 and in_features % 64 == 0"
    return None


def _torchao_nf4(weight: Tensor) -> tuple[Any, Any]:
    """Returns (the weight as an NF4Tensor, linear_nf4). torchao 0.18 has them in quantization, and
    older releases in dtypes."""
    try:
        from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import linear_nf4, to_nf4
    except ImportError:
        from torchao.dtypes.nf4tensor import linear_nf4, to_nf4
    return to_nf4(weight, 64, 256), linear_nf4


def _torchao_base(tensors: LayerTensors) -> BuiltLayer:
    weight, linear_nf4 = _torchao_nf4(tensors.source())
    return BuiltLayer(
        lambda x: linear_nf4(x, weight),
        lambda x: "linear_nf4 on its own double quantization",
        weight=weight.get_original_weight(),
    )


def _torchao_lora(tensors: LayerTensors) -> BuiltLayer:
    layer, (a, b) = _torchao_base(tensors), tensors.lora()
    base = layer.forward
    layer.forward = lambda x: base(x) + tensors.scaling * linear(linear(x, a), b)
    layer.variant = lambda x: (
        "linear_nf4 on its own double quantization, LoRA added as in torchtune"
    )
    layer.parameters = (a, b)
    return layer


LINEAR = (
    Contender("bitsandbytes train", _bare(True), ("bitsandbytes",), has_lora=False),
    Contender(
        "bitsandbytes eval",
        _bare(False),
        ("bitsandbytes",),
        has_lora=False,
        modes=(FORWARD,),
        unavailable=_eval_why_not,
    ),
    Contender("torchao NF4", _torchao_base, ("torchao",), has_lora=False),
)

LORA = (
    Contender("bitsandbytes + PEFT train", _peft(True), ("bitsandbytes", "peft")),
    Contender(
        "bitsandbytes + PEFT eval",
        _peft(False),
        ("bitsandbytes", "peft"),
        modes=(FORWARD,),
        unavailable=_eval_why_not,
    ),
    *LINEAR[:2],
    Contender("torchao NF4 + LoRA", _torchao_lora, ("torchao",)),
)
