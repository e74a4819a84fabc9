"""Loads the compiled extension `pylora._C` once and calls its ops with the fields of a record.

The ops `torch.ops.pylora_C.*` serve both the cpu and the cuda backend: torch picks the device's
kernels by the tensors. They take tensors with any strides and any leading sizes, and their results
are new tensors. A package built without the extension runs all the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import astuple, replace
from functools import cache, lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from pylora.backends.backend import PreparedForward
from pylora.calls import (
    Adapters,
    Bottleneck,
    BottleneckAdapterBackward,
    BottleneckAdapterCall,
    BottleneckGradients,
    DequantizeCall,
    Dropout,
    LayerGradients,
    LoraLinearBackward,
    LoraLinearCall,
    LowRank,
    MultiLoraBackward,
    MultiLoraCall,
    Nf4LinearBackward,
    Nf4LinearCall,
    Norm,
    QuantizeCall,
    Weight,
    token_count,
)

# The numbers by which the ops name an activation; csrc/common/activation.h has the same.
ACTIVATION_CODES = {
    "identity": 0,
    "relu": 1,
    "gelu": 2,
    "gelu_tanh": 3,
    "silu": 4,
    "tanh": 5,
    "sigmoid": 6,
}
# The same for norms; csrc/cpu/norm_rows.h has them. The op of an adapter without a norm is given 0.
NORM_CODES = {"none": 0, "layer_norm": 1, "rms_norm": 2}


@lru_cache(maxsize=1)
def load() -> tuple[ModuleType | None, str | None]:
    """(the module, None), or (None, why it could not be imported); a failure also warns once."""
    try:
        from pylora import _C
    except ImportError as error:
        reason = f"the compiled extension pylora._C could not be imported: {error}"
        warnings.warn(f"{reason}; pylora runs on its PyTorch reference", stacklevel=2)
        return None, reason
    return _C, None


@cache
def hard_limits(backend: str) -> dict[str, int]:
    """The limits beyond which no kernel of "cpu" or "cuda" works at all.

    cpu    max_rank, max_bottleneck, max_dense_m (the tokens over a dense weight)
    cuda   max_rank, max_elements (the weight has fewer), max_small_m, max_small_m_of_block_32,
           max_m, many_rows_columns and hopper_columns (in_features is a multiple),
           alignment (bytes)

    Raises RuntimeError if the extension could not be loaded.
    """
    module, reason = load()
    if module is None:
        raise RuntimeError(reason)
    return module.build_info()["limits"][backend]


@cache
def _op(name: str) -> Any:
    """An op of the loaded extension; torch would look its name up for 1 us in each call."""
    return getattr(torch.ops.pylora_C, name).default


def _lora_options(low: LowRank) -> tuple[Any, ...]:
    drop, code = low.dropout, ACTIVATION_CODES[low.activation]
    if drop is None:
        return (low.scaling, 0.0, None, code)
    return (low.scaling, drop.p, drop.layer_seed, code)


def nf4_quantize(call: QuantizeCall) -> tuple[Tensor, Tensor]:
    return _op("nf4_quantize")(call.weight, call.blocksize)


def nf4_dequantize(call: DequantizeCall) -> Tensor:
    return _op("nf4_dequantize")(*call.weight.arguments, call.shape, call.dtype)


def nf4_dequantize_into(weight: Weight, out: Tensor) -> None:
    """Writes the dense weight to `out` [out_features, in_features], whose rows may lie apart."""
    _op("nf4_dequantize_into")(*weight.arguments, out)


def nf4_dequantize_panel(weight: Weight, row: int, col: int, out: Tensor) -> None:
    """Writes a part of the dense weight that begins at (row, col), in the size of `out`, to it."""
    shape = weight.out_features, weight.in_features
    _op("nf4_dequantize_panel")(*weight.arguments, *shape, row, col, out)


def _nf4_linear(op: str, call: Nf4LinearCall) -> Tensor:
    weight, bias = call.layer.weight, call.layer.bias
    return _op(op)(call.x, *weight.arguments, weight.out_features, bias)


def nf4_linear(call: Nf4LinearCall) -> Tensor:
    return _nf4_linear("nf4_linear", call)


def nf4_linear_hopper(call: Nf4LinearCall) -> Tensor:
    return _nf4_linear("nf4_linear_hopper", call)


def nf4_linear_backward(call: Nf4LinearBackward) -> Tensor:
    return _op("nf4_linear_backward")(call.grad, *call.weight.arguments, call.weight.in_features)


def fingerprint(tensor: Tensor) -> float:
    """A number that tells if the elements of a CPU tensor have changed, whoever changed them."""
    module, _ = load()
    if module is not None and tensor.is_contiguous():
        return module.fingerprint(tensor.data_ptr(), tensor.nbytes)
    return tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32)).item()


def _lora_arguments(call: LoraLinearCall) -> tuple[Any, ...]:
    layer, low = call.layer, call.layer.low_rank
    assert low is not None
    weight = layer.weight
    base = (*weight.arguments, weight.out_features) if weight.is_nf4 else (weight.data,)
    factors = (low.A, low.B, layer.bias, low.A_bias, low.B_bias)
    return (call.x, *base, *factors, *_lora_options(low))


def _lora_linear(op: str, call: LoraLinearCall) -> tuple[Tensor, Tensor]:
    return _op(op)(*_lora_arguments(call))


def _prepared(op: str, *arguments: Any) -> Any:
    """The function that runs a layer whose tensors the extension keeps (csrc/common/prepared.h)."""
    module, _ = load()
    assert module is not None
    return module.PreparedLayer(_op(f"prepare_{op}")(*arguments)).run


def prepare_nf4_linear(
    call: Nf4LinearCall, op: str = "nf4_linear", alignment: int = 1
) -> PreparedForward:
    """For layers that are called many times.

    op         nf4_linear or its Hopper variant
    alignment  of x, in bytes, that the kernel needs; another x is copied
    """
    weight = call.layer.weight
    base = (call.x, *weight.arguments, weight.out_features, call.layer.bias)
    run = _prepared(op, *base)
    sizes = (*call.x.shape[:-1], weight.out_features)
    tokens = token_count(call.x)

    def forward(x: Tensor, scaling: float, dropout: Dropout | None, wants_h: bool) -> Any:
        if x.data_ptr() % alignment:
            x = x.clone()
        y = x.new_empty(*sizes)
        run(x.data_ptr(), tokens, y.data_ptr())
        return (y,)

    return forward


def prepare_lora_linear(
    call: LoraLinearCall, op: str = "lora_linear", alignment: int = 1
) -> PreparedForward:
    """For layers that are called many times; the arguments are those of `prepare_nf4_linear`."""
    layer, low = call.layer, call.layer.low_rank
    assert low is not None
    run = _prepared(op, *_lora_arguments(call))
    leading = call.x.shape[:-1]
    sizes, h_sizes = (*leading, layer.weight.out_features), (*leading, low.rank)
    tokens = token_count(call.x)

    def forward(x: Tensor, scaling: float, dropout: Dropout | None, wants_h: bool) -> Any:
        if x.data_ptr() % alignment:
            x = x.clone()
        y = x.new_empty(*sizes)
        h = x.new_empty(*h_sizes, dtype=torch.float32) if wants_h else None
        h_data = 0 if h is None else h.data_ptr()
        if dropout is None:
            run(x.data_ptr(), tokens, y.data_ptr(), h_data, scaling)
        else:
            seed = dropout.layer_seed
            run(x.data_ptr(), tokens, y.data_ptr(), h_data, scaling, dropout.p, seed.data_ptr())
        return y, h

    return forward


def lora_linear(call: LoraLinearCall) -> tuple[Tensor, Tensor]:
    return _lora_linear("lora_linear", call)


def lora_linear_dense(call: LoraLinearCall) -> tuple[Tensor, Tensor]:
    return _lora_linear("lora_linear_dense", call)


def lora_linear_hopper(call: LoraLinearCall) -> tuple[Tensor, Tensor]:
    return _lora_linear("lora_linear_hopper", call)


def lora_extend(x: Tensor, low: LowRank) -> tuple[Tensor, Tensor]:
    """([x | scaling * act(h)] with padded columns, h in fp32), both with x's leading dimensions."""
    return _op("lora_extend")(x, low.A, low.A_bias, *_lora_options(low))


def lora_linear_backward(call: LoraLinearBackward) -> LayerGradients:
    low, want = call.layer.low_rank, call.wanted
    assert low is not None
    mask = [want.x, want.weight, want.A, want.B, want.bias, want.A_bias, want.B_bias]
    base = (call.grad, call.x, call.h, *call.layer.weight.arguments)
    gradients = _op("lora_linear_backward")(*base, low.A, low.B, *_lora_options(low), mask)
    return LayerGradients(*(t if w else None for t, w in zip(gradients, mask, strict=True)))


def dropout(x: Tensor, record: Dropout | None) -> Tensor:
    """x with dropout, as `pylora.reference.dropout` has it; x itself without dropout."""
    if record is None:
        return x
    return _op("dropout")(x, record.p, record.layer_seed)


def dora_rescale(product: Tensor, magnitude: Tensor, norm: Tensor, bias: Tensor | None) -> Tensor:
    """magnitude / norm * product + bias, in the dtype of the product."""
    return _op("dora_rescale")(product, magnitude, norm, bias)


def prepare_dora_rescale(
    product: Tensor, magnitude: Tensor, norm: Tensor, bias: Tensor | None
) -> Callable[[Tensor, Tensor], None]:
    """The same for vectors that are used many times: a function that writes y, its second argument.

    product    has the dtype and the last size of all products; they are contiguous, and y may be
               the product itself
    """
    run, columns = _prepared("dora_rescale", product, magnitude, norm, bias), product.shape[-1]

    def forward(product: Tensor, y: Tensor) -> None:
        run(product.data_ptr(), product.numel() // columns, y.data_ptr())

    return forward


def dora_rescale_backward(
    grad: Tensor, product: Tensor, magnitude: Tensor, norm: Tensor
) -> tuple[Tensor, Tensor]:
    """(the gradient of the product, that of the magnitude)."""
    return _op("dora_rescale_backward")(grad, product, magnitude, norm)


def _adapters(adapters: Adapters) -> tuple[Tensor, ...]:
    scalings = adapters.scalings
    if scalings.dtype is not torch.float32:
        scalings = scalings.float()
    return adapters.A, adapters.B, adapters.ids, scalings


def multi_lora_linear(call: MultiLoraCall) -> tuple[Tensor, Tensor]:
    weight = call.layer.weight
    base = (call.x, *weight.arguments, weight.out_features)
    return _op("multi_lora_linear")(*base, *_adapters(call.adapters), call.layer.bias)


def multi_lora_add(call: MultiLoraCall, y: Tensor) -> Tensor:
    """Adds the adapters to y [tokens, out_features], which has the base; returns h [..., r]."""
    return _op("multi_lora_add")(call.x, *_adapters(call.adapters), y)


def multi_lora_add_backward(
    call: MultiLoraBackward, dx: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Adds the adapters to dx [tokens, in_features], if it is wanted; returns dlora_A, dlora_B."""
    want, stacks = call.wanted, _adapters(call.adapters)
    dlora_A, dlora_B = _op("multi_lora_add_backward")(
        call.grad, call.x, call.h, *stacks, [want.A, want.B], dx
    )
    return dlora_A if want.A else None, dlora_B if want.B else None


def _norm(norm: Norm | None) -> tuple[Any, ...]:
    if norm is None:
        return (NORM_CODES["none"], None, None, 0.0)
    return (NORM_CODES[norm.kind], norm.weight, norm.bias, norm.eps)


def _bottleneck(adapter: Bottleneck) -> tuple[Any, ...]:
    weights = (adapter.down, adapter.down_bias, adapter.up, adapter.up_bias)
    drop = adapter.dropout
    dropout = (0.0, None) if drop is None else (drop.p, drop.layer_seed)
    norms = (*_norm(adapter.norm_before), *_norm(adapter.norm_after))
    options = (adapter.scaling, ACTIVATION_CODES[adapter.activation], *dropout)
    return (*weights, *options, *norms)


def bottleneck_adapter(call: BottleneckAdapterCall) -> Tensor:
    residual = call.x if call.adds_x else call.residual
    return _op("bottleneck_adapter")(call.x, residual, *_bottleneck(call.adapter))


def bottleneck_adapter_into(call: BottleneckAdapterCall, y: Tensor) -> Tensor:
    residual = call.x if call.adds_x else call.residual
    _op("bottleneck_adapter_into")(call.x, residual, *_bottleneck(call.adapter), y)
    return y


def _bottleneck_gradients(
    op: str, call: BottleneckAdapterBackward, *dx: Tensor
) -> BottleneckGradients:
    mask = list(astuple(call.wanted))
    arguments = (call.grad, call.x, call.adds_x, *_bottleneck(call.adapter), mask)
    gradients = _op(op)(*arguments, *dx)
    return BottleneckGradients(*(t if w else None for t, w in zip(gradients, mask, strict=True)))


def bottleneck_adapter_backward(call: BottleneckAdapterBackward) -> BottleneckGradients:
    return _bottleneck_gradients("bottleneck_adapter_backward", call)


def bottleneck_adapter_backward_into(
    call: BottleneckAdapterBackward, dx: Tensor
) -> BottleneckGradients:
    """The gradient of x is wanted, and is written to dx."""
    return replace(_bottleneck_gradients("bottleneck_adapter_backward_into", call, dx), x=dx)
