"""The schema of every op, and the only code that turns call records into flat arguments and back.

torch's operator schemas have tensors, numbers and lists, but no records. A `Spec` holds the schema
of one op, and the two functions that write a record in the schema's order and read it back. Both go
through the schema from left to right, so no argument is ever found by its position.

An op of several layers takes one list per field of a layer, with one entry per layer. Autograd
skips lists that hold None, so an empty tensor [0] stands for an absent one there. The ops of
bottleneck adapters are in `adapter_spec.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from pylora.calls import (
    Adapters,
    DequantizeCall,
    DoraLinearBackward,
    DoraLinearCall,
    Layer,
    LoraLinearBackward,
    LoraLinearCall,
    LoraMlpBackward,
    LoraMlpCall,
    LoraQkvBackward,
    LoraQkvCall,
    LowRank,
    MultiLoraBackward,
    MultiLoraCall,
    Nf4LinearBackward,
    Nf4LinearCall,
    QuantizeCall,
    Wanted,
    Weight,
)
from pylora.ops.adapter_spec import (
    BOTTLENECK_ADAPTER,
    BOTTLENECK_ADAPTER_BACKWARD,
    MULTI_BOTTLENECK_ADAPTER,
    MULTI_BOTTLENECK_ADAPTER_BACKWARD,
)
from pylora.ops.arguments import Arguments, Spec, dropout_arguments, wanted_of_several

_ABSMAX = "Tensor? nested_absmax, Tensor? nested_code, Tensor? offset, "
_ABSMAX += "int blocksize, int nested_blocksize"
_NF4 = f"Tensor qweight, Tensor absmax, {_ABSMAX}"
_WEIGHT = f"Tensor weight, Tensor? absmax, {_ABSMAX}"
_DROPOUT = "float dropout_p, Tensor? seed"
_LAYERS = (
    "Tensor[] weight, Tensor?[] absmax, Tensor?[] nested_absmax, Tensor?[] nested_code, "
    "Tensor?[] offset, int[] blocksize, int[] nested_blocksize, SymInt[] out_features, "
    "Tensor[] lora_A, Tensor[] lora_B, Tensor[] bias, float[] scaling"
)
_LAYER_GRADIENTS = (
    "(Tensor dx, Tensor[] dweight, Tensor[] dlora_A, Tensor[] dlora_B, Tensor[] dbias)"
)


# nf4_quantize and nf4_dequantize

NF4_QUANTIZE = Spec(
    QuantizeCall,
    "(Tensor weight, int blocksize) -> (Tensor, Tensor)",
    lambda call: (call.weight, call.blocksize),
    lambda take: QuantizeCall(*take.several(2)),
)


def _read_dequantize(take: Arguments) -> DequantizeCall:
    arguments = take.several(7)
    shape, dtype = take.several(2)
    columns = shape[-1] if shape else 1
    rows = 1
    for size in shape[:-1]:
        rows = rows * size
    return DequantizeCall(Weight.of(arguments, (rows, columns)), tuple(shape), dtype)


NF4_DEQUANTIZE = Spec(
    DequantizeCall,
    f"({_NF4}, SymInt[] shape, ScalarType dtype) -> Tensor",
    lambda call: (*call.weight.arguments, list(call.shape), call.dtype),
    _read_dequantize,
)


# nf4_linear


def _read_nf4_linear(take: Arguments) -> Nf4LinearCall:
    x = take.next()
    weight = take.weight(None, x.shape[-1])
    return Nf4LinearCall(x, Layer(weight, take.next()))


def _read_nf4_linear_backward(take: Arguments) -> Nf4LinearBackward:
    grad = take.next()
    arguments = take.several(7)
    return Nf4LinearBackward(grad, Weight.of(arguments, (grad.shape[-1], take.next())))


NF4_LINEAR = Spec(
    Nf4LinearCall,
    f"(Tensor x, {_NF4}, SymInt out_features, Tensor? bias) -> Tensor",
    lambda call: (
        call.x,
        *call.layer.weight.arguments,
        call.layer.weight.out_features,
        call.layer.bias,
    ),
    _read_nf4_linear,
)
NF4_LINEAR_BACKWARD = Spec(
    Nf4LinearBackward,
    f"(Tensor grad, {_NF4}, SymInt in_features) -> Tensor",
    lambda call: (call.grad, *call.weight.arguments, call.weight.in_features),
    _read_nf4_linear_backward,
)


# lora_linear


def _write_lora_linear(call: LoraLinearCall) -> tuple[Any, ...]:
    layer, low = call.layer, call.layer.low_rank
    assert low is not None
    return (
        call.x,
        *layer.weight.arguments,
        layer.weight.out_features,
        low.A,
        low.B,
        layer.bias,
        low.A_bias,
        low.B_bias,
        low.scaling,
        *dropout_arguments(low.dropout),
        low.activation,
    )


def _read_lora_linear(take: Arguments) -> LoraLinearCall:
    x = take.next()
    weight = take.weight(None, x.shape[-1])
    A, B, bias, A_bias, B_bias, scaling = take.several(6)
    dropout = take.dropout()
    low_rank = LowRank(A, B, A_bias, B_bias, scaling, take.next(), dropout)
    return LoraLinearCall(x, Layer(weight, bias, low_rank))


def _write_lora_linear_backward(call: LoraLinearBackward) -> tuple[Any, ...]:
    low, wanted = call.layer.low_rank, call.wanted
    assert low is not None
    return (
        call.grad,
        call.x,
        call.h,
        *call.layer.weight.arguments,
        low.A,
        low.B,
        low.scaling,
        *dropout_arguments(low.dropout),
        low.activation,
        [
            wanted.x,
            wanted.weight,
            wanted.A,
            wanted.B,
            wanted.bias,
            wanted.A_bias,
            wanted.B_bias,
        ],
    )


def _read_lora_linear_backward(take: Arguments) -> LoraLinearBackward:
    grad, x, h = take.several(3)
    weight = take.weight(grad.shape[-1], x.shape[-1])
    A, B, scaling = take.several(3)
    dropout = take.dropout()
    low_rank = LowRank(A, B, None, None, scaling, take.next(), dropout)
    return LoraLinearBackward(grad, x, h, Layer(weight, None, low_rank), Wanted(*take.next()))


LORA_LINEAR = Spec(
    LoraLinearCall,
    f"(Tensor x, {_WEIGHT}, SymInt out_features, Tensor lora_A, Tensor lora_B, Tensor? bias, "
    f"Tensor? lora_A_bias, Tensor? lora_B_bias, float scaling, {_DROPOUT}, str activation) "
    "-> (Tensor y, Tensor h)",
    _write_lora_linear,
    _read_lora_linear,
)
LORA_LINEAR_BACKWARD = Spec(
    LoraLinearBackward,
    f"(Tensor grad, Tensor x, Tensor h, {_WEIGHT}, Tensor lora_A, Tensor lora_B, float scaling, "
    f"{_DROPOUT}, str activation, bool[] output_mask) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _write_lora_linear_backward,
    _read_lora_linear_backward,
)


# dora_linear


def _write_dora_linear(call: DoraLinearCall) -> tuple[Any, ...]:
    weight, low = call.layer.weight, call.layer.low_rank
    assert low is not None
    base = (call.x, *weight.arguments, weight.out_features)
    return (*base, low.A, low.B, call.bias, low.scaling, call.magnitude, call.norm)


def _read_dora_linear(take: Arguments) -> DoraLinearCall:
    x = take.next()
    weight = take.weight(None, x.shape[-1])
    A, B, bias, scaling = take.several(4)
    layer = Layer(weight, None, LowRank(A, B, scaling=scaling))
    return DoraLinearCall(x, layer, bias, *take.several(2))


def _write_dora_linear_backward(call: DoraLinearBackward) -> tuple[Any, ...]:
    low, wanted = call.layer.low_rank, call.wanted
    assert low is not None
    activations = (call.grad, call.x, call.h, call.product)
    of_layer = (*call.layer.weight.arguments, low.A, low.B, low.scaling, call.magnitude, call.norm)
    mask = [wanted.x, wanted.weight, wanted.A, wanted.B, wanted.bias, wanted.magnitude]
    return (*activations, *of_layer, mask)


def _read_dora_linear_backward(take: Arguments) -> DoraLinearBackward:
    grad, x, h, product = take.several(4)
    weight = take.weight(grad.shape[-1], x.shape[-1])
    A, B, scaling = take.several(3)
    layer = Layer(weight, None, LowRank(A, B, scaling=scaling))
    magnitude, norm, (of_x, of_weight, of_A, of_B, of_bias, of_magnitude) = take.several(3)
    wanted = Wanted(of_x, of_weight, of_A, of_B, of_bias, magnitude=of_magnitude)
    return DoraLinearBackward(grad, x, h, product, layer, magnitude, norm, wanted)


DORA_LINEAR = Spec(
    DoraLinearCall,
    f"(Tensor x, {_WEIGHT}, SymInt out_features, Tensor lora_A, Tensor lora_B, Tensor? bias, "
    "float scaling, Tensor magnitude, Tensor norm) -> (Tensor y, Tensor h, Tensor product)",
    _write_dora_linear,
    _read_dora_linear,
)
DORA_LINEAR_BACKWARD = Spec(
    DoraLinearBackward,
    f"(Tensor grad, Tensor x, Tensor h, Tensor product, {_WEIGHT}, Tensor lora_A, Tensor lora_B, "
    "float scaling, Tensor magnitude, Tensor norm, bool[] output_mask) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _write_dora_linear_backward,
    _read_dora_linear_backward,
)


# lora_qkv and lora_mlp: several layers


def _write_layers(layers: Sequence[Layer], like: Tensor) -> tuple[list[Any], ...]:
    """One list per field of the layers; `like` gives the dtype and device of the empty tensors."""

    def or_empty(tensor: Tensor | None) -> Tensor:
        return like.new_empty(0) if tensor is None else tensor

    lows = [layer.low_rank for layer in layers]
    weights = zip(*(layer.weight.arguments for layer in layers), strict=True)
    return (
        *map(list, weights),
        [layer.weight.out_features for layer in layers],
        [or_empty(None if low is None else low.A) for low in lows],
        [or_empty(None if low is None else low.B) for low in lows],
        [or_empty(layer.bias) for layer in layers],
        [1.0 if low is None else low.scaling for low in lows],
    )


def _layers_dropout(layers: Sequence[Layer]) -> tuple[float, Tensor | None]:
    """The probability and the seed of the call's dropout; layers differ only by their streams."""
    for layer in layers:
        if layer.low_rank is not None and layer.low_rank.dropout is not None:
            return layer.low_rank.dropout.p, layer.low_rank.dropout.seed
    return 0.0, None


def _read_layers(
    take: Arguments, in_features: int, down_follows: bool = False
) -> tuple[Layer, ...]:
    """The next layers and their dropout.

    in_features     the in_features of every layer, or of the first two if `down_follows`
    down_follows    true for gate, up and down: down's in_features is gate's out_features
    """
    columns = take.several(12)
    dropout = take.dropout()
    layers: list[Layer] = []
    for stream, row in enumerate(zip(*columns, strict=True)):
        fields = Arguments(row)
        if down_follows and stream == 2:
            in_features = layers[0].weight.out_features
        weight = fields.weight(None, in_features)
        A, B, bias, scaling = fields.several(4)
        low_rank = None
        if A.dim() == 2:
            layer_dropout = None if dropout is None else replace(dropout, stream=stream)
            low_rank = LowRank(A, B, None, None, scaling, "identity", layer_dropout)
        layers.append(Layer(weight, bias if bias.numel() else None, low_rank))
    return tuple(layers)


def _write_wanted(wanted: Sequence[Wanted]) -> list[bool]:
    """The mask of a backward of several layers: x, the weights, the A, the B, then the biases."""
    return [
        wanted[0].x,
        *(want.weight for want in wanted),
        *(want.A for want in wanted),
        *(want.B for want in wanted),
        *(want.bias for want in wanted),
    ]


def _read_wanted(mask: list[bool]) -> tuple[Wanted, ...]:
    return wanted_of_several(mask, Wanted)


def _write_qkv(call: LoraQkvCall) -> tuple[Any, ...]:
    return (call.x, *_write_layers(call.layers, call.x), *_layers_dropout(call.layers))


def _read_qkv(take: Arguments) -> LoraQkvCall:
    x = take.next()
    return LoraQkvCall(x, _read_layers(take, x.shape[-1]))


def _write_qkv_backward(call: LoraQkvBackward) -> tuple[Any, ...]:
    layers = (*_write_layers(call.layers, call.x), *_layers_dropout(call.layers))
    return (call.grads, call.x, call.hs, *layers, _write_wanted(call.wanted))


def _read_qkv_backward(take: Arguments) -> LoraQkvBackward:
    grads, x, hs = take.several(3)
    layers = _read_layers(take, x.shape[-1])
    return LoraQkvBackward(grads, x, hs, layers, _read_wanted(take.next()))


def _write_mlp(call: LoraMlpCall) -> tuple[Any, ...]:
    layers = (*_write_layers(call.layers, call.x), *_layers_dropout(call.layers))
    return (call.x, *layers, call.activation)


def _read_mlp(take: Arguments) -> LoraMlpCall:
    x = take.next()
    return LoraMlpCall(x, _read_layers(take, x.shape[-1], down_follows=True), take.next())


def _write_mlp_backward(call: LoraMlpBackward) -> tuple[Any, ...]:
    layers = (*_write_layers(call.layers, call.x), *_layers_dropout(call.layers))
    activations = (call.grad, call.x, call.gate, call.up, call.hs)
    return (*activations, *layers, call.activation, _write_wanted(call.wanted))


def _read_mlp_backward(take: Arguments) -> LoraMlpBackward:
    grad, x, gate, up, hs = take.several(5)
    layers = _read_layers(take, x.shape[-1], down_follows=True)
    activation, mask = take.several(2)
    return LoraMlpBackward(grad, x, gate, up, hs, layers, activation, _read_wanted(mask))


LORA_QKV = Spec(
    LoraQkvCall,
    f"(Tensor x, {_LAYERS}, {_DROPOUT}) -> (Tensor[] y, Tensor[] h)",
    _write_qkv,
    _read_qkv,
)
LORA_QKV_BACKWARD = Spec(
    LoraQkvBackward,
    f"(Tensor[] grad, Tensor x, Tensor[] h, {_LAYERS}, {_DROPOUT}, bool[] output_mask) "
    f"-> {_LAYER_GRADIENTS}",
    _write_qkv_backward,
    _read_qkv_backward,
)
LORA_MLP = Spec(
    LoraMlpCall,
    f"(Tensor x, {_LAYERS}, {_DROPOUT}, str activation) "
    "-> (Tensor y, Tensor gate, Tensor up, Tensor[] h)",
    _write_mlp,
    _read_mlp,
)
LORA_MLP_BACKWARD = Spec(
    LoraMlpBackward,
    f"(Tensor grad, Tensor x, Tensor gate, Tensor up, Tensor[] h, {_LAYERS}, {_DROPOUT}, "
    f"str activation, bool[] output_mask) -> {_LAYER_GRADIENTS}",
    _write_mlp_backward,
    _read_mlp_backward,
)


# multi_lora_linear


def _write_multi_lora(call: MultiLoraCall) -> tuple[Any, ...]:
    weight, adapters = call.layer.weight, call.adapters
    low_rank = (adapters.A, adapters.B, adapters.ids, adapters.scalings)
    return (call.x, *weight.arguments, weight.out_features, *low_rank, call.layer.bias)


def _read_multi_lora(take: Arguments) -> MultiLoraCall:
    x = take.next()
    weight = take.weight(None, x.shape[-1])
    adapters = Adapters(*take.several(4))
    return MultiLoraCall(x, Layer(weight, take.next()), adapters)


def _write_multi_lora_backward(call: MultiLoraBackward) -> tuple[Any, ...]:
    adapters, wanted = call.adapters, call.wanted
    low_rank = (adapters.A, adapters.B, adapters.ids, adapters.scalings)
    mask = [wanted.x, wanted.weight, wanted.A, wanted.B, wanted.bias]
    return (call.grad, call.x, call.h, *call.layer.weight.arguments, *low_rank, mask)


def _read_multi_lora_backward(take: Arguments) -> MultiLoraBackward:
    grad, x, h = take.several(3)
    weight = take.weight(grad.shape[-1], x.shape[-1])
    adapters = Adapters(*take.several(4))
    return MultiLoraBackward(grad, x, h, Layer(weight), adapters, Wanted(*take.next()))


MULTI_LORA_LINEAR = Spec(
    MultiLoraCall,
    f"(Tensor x, {_WEIGHT}, SymInt out_features, Tensor lora_A, Tensor lora_B, "
    "Tensor adapter_ids, Tensor scalings, Tensor? bias) -> (Tensor y, Tensor h)",
    _write_multi_lora,
    _read_multi_lora,
)
MULTI_LORA_LINEAR_BACKWARD = Spec(
    MultiLoraBackward,
    f"(Tensor grad, Tensor x, Tensor h, {_WEIGHT}, Tensor lora_A, Tensor lora_B, "
    "Tensor adapter_ids, Tensor scalings, bool[] output_mask) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _write_multi_lora_backward,
    _read_multi_lora_backward,
)

SPECS: dict[str, Spec] = {
    spec.name: spec
    for spec in (
        NF4_QUANTIZE,
        NF4_DEQUANTIZE,
        NF4_LINEAR_BACKWARD,
        NF4_LINEAR,
        LORA_LINEAR_BACKWARD,
        LORA_LINEAR,
        DORA_LINEAR_BACKWARD,
        DORA_LINEAR,
        LORA_QKV_BACKWARD,
        LORA_QKV,
        LORA_MLP_BACKWARD,
        LORA_MLP,
        MULTI_LORA_LINEAR_BACKWARD,
        MULTI_LORA_LINEAR,
        BOTTLENECK_ADAPTER_BACKWARD,
        BOTTLENECK_ADAPTER,
        MULTI_BOTTLENECK_ADAPTER_BACKWARD,
        MULTI_BOTTLENECK_ADAPTER,
    )
}
