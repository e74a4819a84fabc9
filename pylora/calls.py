"""Call records: the one way a call is described below `pylora.functional`.

A record names every tensor and number of a call. Public functions check their arguments and build
one; ops, dispatch, backends and references read its fields by name. `pylora.ops.spec` alone turns
records into the flat arguments that torch's operator schemas need, and back.

Shapes follow torch: x [..., in_features], weight [out_features, in_features], A [r, in_features],
B [out_features, r].
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor


def token_count(x: Tensor) -> int:
    """The number of tokens of x [..., features]; kernels call it M."""
    return math.prod(x.shape[:-1])


def token_matrix(x: Tensor) -> Tensor:
    """x [..., features] as a matrix [tokens, features]; it is a view if x can be viewed so.

    The tokens are counted: reshape(-1, ...) cannot tell how many there are if there are no
    features.
    """
    return x.reshape(token_count(x), x.shape[-1])


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """A base weight, NF4 or dense.

    data           uint8 codes for NF4, else the dense weight [out_features, in_features]
    absmax         one value per block: fp32, or uint8 codes under double quantization; None for a
                   dense weight, and so are the next three
    nested_absmax, nested_code, offset
                   the second quantization; None without it
    blocksize, nested_blocksize
                   elements that share one absmax, and absmax values that share one nested_absmax;
                   0 for a dense weight
    shape          (out_features, in_features)
    arguments      the seven values above in the order of every op schema
    """

    data: Tensor
    absmax: Tensor | None
    nested_absmax: Tensor | None
    nested_code: Tensor | None
    offset: Tensor | None
    blocksize: int
    nested_blocksize: int
    shape: tuple[int, int]
    arguments: tuple[Any, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        arguments = (
            self.data,
            self.absmax,
            self.nested_absmax,
            self.nested_code,
            self.offset,
            self.blocksize,
            self.nested_blocksize,
        )
        object.__setattr__(self, "arguments", arguments)

    @classmethod
    def of(cls, arguments: tuple[Any, ...], shape: tuple[int, int]) -> Weight:
        """From the seven arguments of an op."""
        data, absmax, nested_absmax, nested_code, offset, blocksize, nested_blocksize = arguments
        nested = (nested_absmax, nested_code, offset)
        return cls(data, absmax, *nested, blocksize, nested_blocksize, shape)

    @classmethod
    def dense(cls, data: Tensor) -> Weight:
        return cls(data, None, None, None, None, 0, 0, (data.shape[0], data.shape[1]))

    @property
    def is_nf4(self) -> bool:
        return self.absmax is not None

    @property
    def out_features(self) -> int:
        return self.shape[0]

    @property
    def in_features(self) -> int:
        return self.shape[1]

    @property
    def rows_hold_whole_blocks(self) -> bool:
        """True if no block of an NF4 weight spans two rows."""
        return self.blocksize > 0 and self.shape[1] % self.blocksize == 0


@dataclass(frozen=True, slots=True, eq=False)
class Dropout:
    """Dropout whose mask is a function of a seed.

    p         probability of dropping an element, in (0, 1)
    seed      int64 []
    stream    added to the seed: the layers of one call draw independent masks
    """

    p: float
    seed: Tensor
    stream: int = 0

    @property
    def layer_seed(self) -> Tensor:
        """The seed of this layer's own mask, int64 []."""
        return self.seed + self.stream if self.stream else self.seed


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """The low-rank path of a layer: scaling * (act(dropout(x) @ A^T + A_bias) @ B^T + B_bias).

    With the activation "identity" it is LoRA, with another the parallel adapter. A and B have one
    dtype, which may differ from that of x.
    """

    A: Tensor
    B: Tensor
    A_bias: Tensor | None = None
    B_bias: Tensor | None = None
    scaling: float = 1.0
    activation: str = "identity"
    dropout: Dropout | None = None

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def keep_scale(self) -> float:
        """What the kept elements of x are multiplied by: 1 / (1 - p), or 1 without dropout."""
        return 1.0 if self.dropout is None else 1.0 / (1.0 - self.dropout.p)


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """A linear layer; low_rank is None without LoRA, bias [out_features] None without a bias."""

    weight: Weight
    bias: Tensor | None = None
    low_rank: LowRank | None = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which gradients of a layer a backward computes, in the order in which it returns them."""

    x: bool = False
    weight: bool = False
    A: bool = False
    B: bool = False
    bias: bool = False
    A_bias: bool = False
    B_bias: bool = False

    @property
    def any(self) -> bool:
        return self.x or self.weight or self.A or self.B or self.bias or self.A_bias or self.B_bias


@dataclass(frozen=True, slots=True, eq=False)
class LayerGradients:
    """The gradients of a layer; a field is None if its gradient was not requested."""

    x: Tensor | None = None
    weight: Tensor | None = None
    A: Tensor | None = None
    B: Tensor | None = None
    bias: Tensor | None = None
    A_bias: Tensor | None = None
    B_bias: Tensor | None = None

    def with_x(self, x: Tensor | None) -> LayerGradients:
        return replace(self, x=x)


@dataclass(frozen=True, slots=True, eq=False)
class Adapters:
    """A stack of adapters and the one that each row of x has.

    A [n, r, in_features], B [n, out_features, r], scalings [n]; ids int64 [rows of x], where an id
    outside [0, n) stands for the base alone.
    """

    A: Tensor
    B: Tensor
    ids: Tensor
    scalings: Tensor

    @property
    def count(self) -> int:
        return self.A.shape[0]

    @property
    def rank(self) -> int:
        return self.A.shape[1]


@dataclass(frozen=True, slots=True, eq=False)
class QuantizeCall:
    op: ClassVar[str] = "nf4_quantize"
    weight: Tensor
    blocksize: int


@dataclass(frozen=True, slots=True, eq=False)
class DequantizeCall:
    """`shape` is that of the result; the weight may have any number of dimensions."""

    op: ClassVar[str] = "nf4_dequantize"
    weight: Weight
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True, eq=False)
class Nf4LinearCall:
    """y = x @ W^T + bias over an NF4 weight; the layer has no low-rank path."""

    op: ClassVar[str] = "nf4_linear"
    x: Tensor
    layer: Layer


@dataclass(frozen=True, slots=True, eq=False)
class Nf4LinearBackward:
    """dx = grad @ W."""

    op: ClassVar[str] = "nf4_linear_backward"
    grad: Tensor
    weight: Weight


@dataclass(frozen=True, slots=True, eq=False)
class LoraLinearCall:
    """(y, h): h [..., r] is the low-rank projection before the activation, for the backward."""

    op: ClassVar[str] = "lora_linear"
    x: Tensor
    layer: Layer


@dataclass(frozen=True, slots=True, eq=False)
class LoraLinearBackward:
    """LayerGradients."""

    op: ClassVar[str] = "lora_linear_backward"
    grad: Tensor
    x: Tensor
    h: Tensor
    layer: Layer
    wanted: Wanted


@dataclass(frozen=True, slots=True, eq=False)
class LoraQkvCall:
    """(y, h), a list each with one entry a layer; h is empty [0] for a layer without LoRA."""

    op: ClassVar[str] = "lora_qkv"
    x: Tensor
    layers: tuple[Layer, ...]


@dataclass(frozen=True, slots=True, eq=False)
class LoraQkvBackward:
    """(dx, LayerGradients of each layer without x)."""

    op: ClassVar[str] = "lora_qkv_backward"
    grads: list[Tensor]
    x: Tensor
    hs: list[Tensor]
    layers: tuple[Layer, ...]
    wanted: tuple[Wanted, ...]


@dataclass(frozen=True, slots=True, eq=False)
class LoraMlpCall:
    """(y, gate(x), up(x), h of each layer); the layers are gate, up and down."""

    op: ClassVar[str] = "lora_mlp"
    x: Tensor
    layers: tuple[Layer, ...]
    activation: str


@dataclass(frozen=True, slots=True, eq=False)
class LoraMlpBackward:
    """(dx, LayerGradients of gate, up and down without x).

    `wanted` of gate and up says if dx is wanted; the x of down's is the product of the two and
    follows from theirs.
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
    """(y, h): h [..., r] is zero in the rows without an adapter."""

    op: ClassVar[str] = "multi_lora_linear"
    x: Tensor
    layer: Layer
    adapters: Adapters


@dataclass(frozen=True, slots=True, eq=False)
class MultiLoraBackward:
    """LayerGradients; those of A and B are stacks like the adapters'."""

    op: ClassVar[str] = "multi_lora_linear_backward"
    grad: Tensor
    x: Tensor
    h: Tensor
    layer: Layer
    adapters: Adapters
    wanted: Wanted


Call = (
    QuantizeCall
    | DequantizeCall
    | Nf4LinearCall
    | Nf4LinearBackward
    | LoraLinearCall
    | LoraLinearBackward
    | LoraQkvCall
    | LoraQkvBackward
    | LoraMlpCall
    | LoraMlpBackward
    | MultiLoraCall
    | MultiLoraBackward
)
