"""Contenders for a linear layer from other packages: bitsandbytes, PEFT, torchao.

bitsandbytes' Linear4bit has two ways on a CPU. In train mode it dequantizes the whole weight and
calls a dense matmul. In eval mode, where the CPU has AVX512-BF16 and x needs no gradient, the first
call repacks the weight in place and from then on a fused kernel reads the packed bytes. The repack
is done here while the layer is built, once for a shape, and copied; it is never timed.
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

from benchmarks.contender import Contender, Layer
from benchmarks.operands import Operands
from benchmarks.shapes import FORWARD, Cell

# A kernel of bitsandbytes that a run downloads would not be the installed wheel's.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def _linear4bit(operands: Operands, training: bool) -> Any:
    """A `Linear4bit` over the same NF4 bytes as ours, in memory of its own."""
    if training:
        return _plain_linear4bit(operands).train()
    packed = operands.remembered("bitsandbytes eval", lambda: _repacked(operands))
    return copy.deepcopy(packed)


def _plain_linear4bit(operands: Operands) -> Any:
    import bitsandbytes

    cell = operands.cell
    module = bitsandbytes.nn.Linear4bit(
        cell.in_features,
        cell.out_features,
        bias=False,
        compute_dtype=operands.dtype,
        quant_type="nf4",
        device="meta",
    )
    module.weight = operands.nf4().to_bitsandbytes()
    return module


def _repacked(operands: Operands) -> Any:
    module = _plain_linear4bit(operands).eval()
    with torch.no_grad():
        module(operands.normal(1, operands.cell.in_features))
    return module


def _path(module: Any) -> str:
    weight = module.weight
    if getattr(weight.quant_state, "packing_format_for_cpu", False):
        return "gemv_4bit on the repacked weight (fused, absmax rounded to bf16)"
    if weight.device.type == "cpu":
        return "gemm_4bit: dequantize the whole weight, then a dense matmul"
    return "gemm_4bit"


def _bare(training: bool) -> Any:
    def build(operands: Operands) -> Layer:
        module = _linear4bit(operands, training)
        return Layer(module, lambda x: _path(module))

    return build


class _OneLinear(torch.nn.Module):
    """The smallest model that PEFT takes, as a 4-bit one if `is_4bit`."""

    def __init__(self, proj: torch.nn.Module, is_4bit: bool = True) -> None:
        super().__init__()
        self.proj, self.is_loaded_in_4bit = proj, is_4bit


def _wrapped_by_peft(model: _OneLinear, operands: Operands) -> Any:
    """PEFT's LoRA layer around the linear layer of `model`, with the LoRA weights of `operands`."""
    from peft import LoraConfig, get_peft_model

    rank = operands.cell.rank
    config = LoraConfig(
        r=rank, lora_alpha=rank * operands.scaling, target_modules=["proj"], lora_dropout=0.0
    )
    # autocast_adapter_dtype=False keeps PEFT's LoRA in bf16, the dtype of ours.
    layer = get_peft_model(model, config, autocast_adapter_dtype=False).base_model.model.proj
    a, b = operands.lora()
    layer.lora_A["default"].weight = torch.nn.Parameter(a.detach())
    layer.lora_B["default"].weight = torch.nn.Parameter(b.detach())
    return layer


def _lora_of(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def _peft(training: bool) -> Any:
    def build(operands: Operands) -> Layer:
        layer = _wrapped_by_peft(_OneLinear(_linear4bit(operands, training)), operands)
        layer.train(training)
        name = f"{type(layer).__module__}.{type(layer).__name__} over "
        return Layer(layer, lambda x: name + _path(layer.base_layer), _lora_of(layer))

    return build


def dense_linear(operands: Operands) -> torch.nn.Linear:
    """A frozen `nn.Linear` over what the NF4 weight stands for."""
    cell = operands.cell
    module = torch.nn.Linear(cell.in_features, cell.out_features, bias=False, device="meta")
    weight = operands.dense(operands.dtype)
    module.weight = torch.nn.Parameter(weight, requires_grad=False)
    return module


def _peft_over_dense(operands: Operands) -> Layer:
    layer = _wrapped_by_peft(_OneLinear(dense_linear(operands), is_4bit=False), operands)
    name = f"{type(layer).__module__}.{type(layer).__name__} over nn.Linear"
    return Layer(layer, lambda x: name, _lora_of(layer))


PEFT_OVER_DENSE = Contender("dense + PEFT", _peft_over_dense, ("torch", "peft"), weights="dense")


def mixed_batch(
    adapters: int, adapter_ids: Callable[[Operands, int], Tensor]
) -> tuple[Contender, ...]:
    """PEFT's `adapter_names`: one adapter a row, for inference alone, over both ways of
    bitsandbytes.

    adapter_ids    (operands, rows) -> the adapter of each row, -1 for none
    """

    def build(operands: Operands, packed: bool) -> Layer:
        from peft import LoraConfig, get_peft_model

        rank = operands.cell.rank
        options = {"r": rank, "lora_alpha": rank * operands.scaling, "target_modules": ["proj"]}
        names = [str(index) for index in range(adapters)]
        config = LoraConfig(**options)
        model = _OneLinear(_linear4bit(operands, training=not packed))
        model = get_peft_model(model, config, adapter_name=names[0], autocast_adapter_dtype=False)
        for name in names[1:]:
            model.add_adapter(name, config, autocast_adapter_dtype=False)
        layer = model.base_model.model.proj.eval()
        layer.base_layer.train(not packed)
        stacks = (t.detach() for t in operands.lora_stacks(adapters))
        for name, A, B in zip(names, *stacks, strict=True):
            layer.lora_A[name].weight = torch.nn.Parameter(A)
            layer.lora_B[name].weight = torch.nn.Parameter(B)

        def forward(x: Tensor) -> Tensor:
            ids = adapter_ids(operands, x.shape[0]).tolist()
            return layer(x, adapter_names=[names[i] if i >= 0 else "__base__" for i in ids])

        return Layer(forward, lambda x: "adapter_names over " + _path(layer.base_layer))

    return tuple(
        replace(
            contender,
            build=partial(build, packed=contender.unavailable is _eval_why_not),
            modes=(FORWARD,),
        )
        for contender in LORA[:2]
    )


def _eval_why_not(cell: Cell, device: torch.device) -> str | None:
    """Where eval mode would take the path of train mode, measuring it again says nothing."""
    if device.type != "cpu":
        return "same path as train mode: there is no repacking on a GPU"
    from bitsandbytes.functional import has_avx512bf16

    if not has_avx512bf16():
        return "same path as train mode: the CPU has no AVX512-BF16"
    if cell.out_features % 32 or cell.in_features % 64:
        return "its repacking needs out_features % 32 == 0 and in_features % 64 == 0"
    return None


def _torchao_nf4(weight: Tensor) -> tuple[Any, Any]:
    """(NF4Tensor, linear_nf4); 0.18 has them under quantization, older releases under dtypes."""
    try:
        from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import linear_nf4, to_nf4
    except ImportError:
        from torchao.dtypes.nf4tensor import linear_nf4, to_nf4
    return to_nf4(weight, 64, 256), linear_nf4


def _torchao_base(operands: Operands) -> Layer:
    weight, linear_nf4 = _torchao_nf4(operands.source())
    return Layer(
        lambda x: linear_nf4(x, weight),
        lambda x: "linear_nf4, its own double quantization",
        weight=weight.get_original_weight(),
    )


def _torchao_lora(operands: Operands) -> Layer:
    layer, (a, b) = _torchao_base(operands), operands.lora()
    base = layer.forward
    layer.forward = lambda x: base(x) + operands.scaling * linear(linear(x, a), b)
    layer.path = lambda x: "linear_nf4 and LoRA as torchtune adds it; its own double quantization"
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
