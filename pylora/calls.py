"""Call records: the only form in which a call travels below `pylora.functional`.

A record names every tensor and number of a call. A public function checks its arguments and builds
a record; ops, dispatch, backends and references read its fields by name. Only `pylora.ops.spec`
turns records into the flat arguments that torch's operator schemas need, and back. The values that
records are made of, and the shapes, are described in `pylora.call_parts`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pylora.call_parts import (
    Adapters,
    Bottleneck,
    BottleneckGradients,
    BottleneckWanted,
    Dropout,
    Layer,
    LayerGradients,
    LowRank,
    Norm,
    Wanted,
    Weight,
    token_count,
    token_matrix,
)

__all__ = [
    "Adapters",
    "Bottleneck",
    "BottleneckAdapterBackward",
    "BottleneckAdapterCall",
    "BottleneckGradients",
    "BottleneckWanted",
    "Call",
    "DequantizeCall",
    "DoraLinearBackward",
    "DoraLinearCall",
    "Dropout",
    "Layer",
    "LayerGradients",
    "LoraLinearBackward",
    "LoraLinearCall",
    "LoraMlpBackward",
    "LoraMlpCall",
    "LoraQkvBackward",
    "LoraQkvCall",
    "LowRank",
    "MultiBottleneckBackward",
    "MultiBottleneckCall",
    "MultiLoraBackward",
    "MultiLoraCall",
    "Nf4LinearBackward",
    "Nf4LinearCall",
    "Norm",
    "QuantizeCall",
    "Wanted",
    "Weight",
    "token_count",
    "token_matrix",
]


@dataclass(frozen=True, slots=True, eq=False)
class QuantizeCall:
    """A call that returns (qweight, absmax), both flat; the weight may have any shape."""

    op: ClassVar[str] = "nf4_quantize"
    weight: Tensor
    blocksize: int


@dataclass(frozen=True, slots=True, eq=False)
class DequantizeCall:
    """A call that returns the dense weight in `shape`, which may have any number of dimensions."""

    op: ClassVar[str] = "nf4_dequantize"
    weight: Weight
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True, eq=False)
class Nf4LinearCall:
    """A call that returns y = x @ W^T + bias; the weight is NF4 and there is no low-rank path."""

    op: ClassVar[str] = "nf4_linear"
    x: Tensor
    layer: Layer


@dataclass(frozen=True, slots=True, eq=False)
class Nf4LinearBackward:
    """A call that returns dx = grad @ W; the weight is NF4."""

    op: ClassVar[str] = "nf4_linear_backward"
    grad: Tensor
    weight: Weight


@dataclass(frozen=True, slots=True, eq=False)
class LoraLinearCall:
    """A call that returns (y, h) of one layer with LoRA; the backward needs h [..., r]."""

    op: ClassVar[str] = "lora_linear"
    x: Tensor
    layer: Layer


@dataclass(frozen=True, slots=True, eq=False)
class LoraLinearBackward:
    """A call that returns the LayerGradients of one layer with LoRA."""

    op: ClassVar[str] = "lora_linear_backward"
    grad: Tensor
    x: Tensor
    h: Tensor
    layer: Layer
    wanted: Wanted


@dataclass(frozen=True, slots=True, eq=False)
class DoraLinearCall:
    """A call that returns (y, h, product) of one layer with DoRA; the backward needs h and product.

    product is the y of lora_linear for the layer, and y is magnitude / norm * product + bias.

    layer        has LoRA without biases and without dropout, and no bias of its own, because the
                 bias is not rescaled
    magnitude    [out_features]
    norm         |W + scaling B A| of each row [out_features]; it is a constant to the gradients
    """

    op: ClassVar[str] = "dora_linear"
    x: Tensor
    layer: Layer
    bias: Tensor | None
    magnitude: Tensor
    norm: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class DoraLinearBackward:
    """A call that returns the LayerGradients of one layer with DoRA."""

    op: ClassVar[str] = "dora_linear_backward"
    grad: Tensor
    x: Tensor
    h: Tensor
    product: Tensor
    layer: Layer
    magnitude: Tensor
    norm: Tensor
    wanted: Wanted


@dataclass(frozen=True, slots=True, eq=False)
class LoraQkvCall:
    """A call that returns (ys, hs), two lists with one entry per layer of x.

    The h of a layer without LoRA is an empty tensor [0].
    """

    op: ClassVar[str] = "lora_qkv"
    x: Tensor
    layers: tuple[Layer, ...]


@dataclass(frozen=True, slots=True, eq=False)
class LoraQkvBackward:
    """A call that returns (dx, the LayerGradients of each layer without x)."""

    op: ClassVar[str] = "lora_qkv_backward"
    grads: list[Tensor]
    x: Tensor
    hs: list[Tensor]
    layers: tuple[Layer, ...]
    wanted: tuple[Wanted, ...]


@dataclass(frozen=True, slots=True, eq=False)
class LoraMlpCall:
    """A call that returns (y, gate(x), up(x), hs); the layers are gate, up and down.

    The h of a layer without LoRA is an empty tensor [0].
    """

    op: ClassVar[str] = "lora_mlp"
    x: Tensor
    layers: tuple[Layer, ...]
    activation: str


@dataclass(frozen=True, slots=True, eq=False)
class LoraMlpBackward:
    """A call that returns (dx, the LayerGradients of gate, up and down without x).

    The `wanted` of gate and up say if dx is wanted. The `x` of down's `wanted` is not read: the
    gradient of down's input is computed if gate or up want any gradient.
    """

    op: ClassVar[str] = "lora_mlp_backward"
    grad: Tensor
    x: Tensor
    gate: Tensor
    up: Tensor
    hs: list[Tensor]
    layers: tuple[Layer, ...]
    activation: str
    wanted: tuple[Wanted, ...]


@dataclass(frozen=True, slots=True, eq=False)
class MultiLoraCall:
    """A call that returns (y, h); h [..., r] is zero for tokens without an adapter."""

    op: ClassVar[str] = "multi_lora_linear"
    x: Tensor
    layer: Layer
    adapters: Adapters


@dataclass(frozen=True, slots=True, eq=False)
class MultiLoraBackward:
    """A call that returns LayerGradients; those of A and B are stacks over the adapters."""

    op: ClassVar[str] = "multi_lora_linear_backward"
    grad: Tensor
    x: Tensor
    h: Tensor
    layer: Layer
    adapters: Adapters
    wanted: Wanted


@dataclass(frozen=True, slots=True, eq=False)
class BottleneckAdapterCall:
    """A call that returns y, the path of the adapter plus its residual.

    residual        of x's shape and dtype; None if the residual is x, or if there is none
    add_residual    False if y is the path alone
    """

    op: ClassVar[str] = "bottleneck_adapter"
    x: Tensor
    residual: Tensor | None
    add_residual: bool
    adapter: Bottleneck

    @property
    def adds_x(self) -> bool:
        """True if the residual is x itself."""
        return self.add_residual and self.residual is None


@dataclass(frozen=True, slots=True, eq=False)
class BottleneckAdapterBackward:
    """A call that returns BottleneckGradients; it computes the bottleneck again from x.

    adds_x    True if x was the residual, so that grad is a part of its gradient. The gradient of
              another residual is grad itself
    """

    op: ClassVar[str] = "bottleneck_adapter_backward"
    grad: Tensor
    x: Tensor
    adds_x: bool
    adapter: Bottleneck
    wanted: BottleneckWanted


@dataclass(frozen=True, slots=True, eq=False)
class MultiBottleneckCall:
    """A call that returns y, to which each token's own adapter adds its path.

    adapters        without norms and without dropout; their bottlenecks may differ in size
    ids             int64 [tokens], the place of a token's adapter; an id outside of `adapters`
                    stands for the residual alone
    residual, add_residual
                    as in BottleneckAdapterCall
    """

    op: ClassVar[str] = "multi_bottleneck_adapter"
    x: Tensor
    residual: Tensor | None
    add_residual: bool
    adapters: tuple[Bottleneck, ...]
    ids: Tensor

    @property
    def adds_x(self) -> bool:
        """True if the residual is x itself."""
        return self.add_residual and self.residual is None


@dataclass(frozen=True, slots=True, eq=False)
class MultiBottleneckBackward:
    """A call that returns (dx, the BottleneckGradients of each adapter without x).

    adds_x    as in BottleneckAdapterBackward
    wanted    all adapters say the same about x
    """

    op: ClassVar[str] = "multi_bottleneck_adapter_backward"
    grad: Tensor
    x: Tensor
    adds_x: bool
    adapters: tuple[Bottleneck, ...]
    ids: Tensor
    wanted: tuple[BottleneckWanted, ...]


Call = (
    QuantizeCall
    | DequantizeCall
    | Nf4LinearCall
    | Nf4LinearBackward
    | LoraLinearCall
    | LoraLinearBackward
    | DoraLinearCall
    | DoraLinearBackward
    | LoraQkvCall
    | LoraQkvBackward
    | LoraMlpCall
    | LoraMlpBackward
    | MultiLoraCall
    | MultiLoraBackward
    | BottleneckAdapterCall
    | BottleneckAdapterBackward
    | MultiBottleneckCall
    | MultiBottleneckBackward
)
