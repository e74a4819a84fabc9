"""The values that call records are made of: weights, layers, adapters and gradients.

`pylora.calls` has the records and hands these out as well; everybody imports from there.

Shapes follow torch: x [..., in_features], weight [out_features, in_features], A [r, in_features], B
[out_features, r]. A token is one vector of x: x [..., in_features] has as many tokens as its
leading dimensions multiply to. h [..., r] is x @ A^T (+ A_bias) before the activation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor


def token_count(x: Tensor) -> int:
    """The number of tokens of x [..., features]; kernels call it M."""
    return math.prod(x.shape[:-1])


def token_matrix(x: Tensor) -> Tensor:
    """x [..., features] as a matrix [tokens, features]; it is a view if x can be viewed so.

    The tokens are counted, because reshape(-1, 0) cannot tell how many there are.
    """
    return x.reshape(token_count(x), x.shape[-1])


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """A base weight, NF4 or dense.

    data                uint8 codes if NF4, else the dense weight [out_features, in_features]
    absmax              one value per NF4 block: fp32, or uint8 codes under double quantization;
                        None if the weight is dense
    nested_absmax, nested_code, offset
                        these decode absmax under double quantization; None without it
    blocksize           the number of elements that share one absmax; 0 if the weight is dense
    nested_blocksize    the number of absmax values that share one nested_absmax; 0 if the weight is
                        dense
    shape               (out_features, in_features)
    arguments           the seven values before `shape`, in the order of every op schema
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
        """The weight of the seven arguments of an op."""
        data, absmax, nested_absmax, nested_code, offset, blocksize, nested_blocksize = arguments
        nested = (nested_absmax, nested_code, offset)
        return cls(data, absmax, *nested, blocksize, nested_blocksize, shape)

    @classmethod
    def dense(cls, data: Tensor) -> Weight:
        """A dense weight [out_features, in_features]."""
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
        """True if the weight is NF4 and none of its blocks straddles rows."""
        return self.blocksize > 0 and self.shape[1] % self.blocksize == 0


@dataclass(frozen=True, slots=True, eq=False)
class Dropout:
    """Dropout whose mask is a function of a seed.

    p         probability of dropping an element, in (0, 1)
    seed      int64 []
    stream    is added to the seed, so that the layers of one call draw independent masks
    """

    p: float
    seed: Tensor
    stream: int = 0

    @property
    def layer_seed(self) -> Tensor:
        """The seed of this layer's mask, int64 []."""
        return self.seed + self.stream if self.stream else self.seed


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """The low-rank path of a layer: scaling * (act(dropout(x) @ A^T + A_bias) @ B^T + B_bias).

    A [r, in_features], B [out_features, r], A_bias [r], B_bias [out_features]. If the activation is
    "identity", this is LoRA; if it is another, this is the parallel adapter. All four tensors have
    the same dtype, which may differ from that of x.
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
        """The factor of the kept elements of x: 1 / (1 - p), or 1 without dropout."""
        return 1.0 if self.dropout is None else 1.0 / (1.0 - self.dropout.p)


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """A linear layer.

    bias        [out_features]; None without a bias
    low_rank    None without LoRA
    """

    weight: Weight
    bias: Tensor | None = None
    low_rank: LowRank | None = None

    def summed_bias(self) -> Tensor | None:
        """The layer's bias plus that of lora_B, which is scaled; None without either."""
        low = self.low_rank
        if low is None or low.B_bias is None:
            return self.bias
        B_bias = low.scaling * low.B_bias.float()
        return B_bias if self.bias is None else B_bias.add_(self.bias)


@dataclass(frozen=True, slots=True)
class Wanted:
    """The gradients of a layer that a backward computes, in the order in which it returns them.

    Only a layer with DoRA has a magnitude.
    """

    x: bool = False
    weight: bool = False
    A: bool = False
    B: bool = False
    bias: bool = False
    A_bias: bool = False
    B_bias: bool = False
    magnitude: bool = False

    @property
    def any(self) -> bool:
        """True if any gradient is wanted."""
        of_layer = self.x or self.weight or self.bias or self.magnitude
        return of_layer or self.A or self.B or self.A_bias or self.B_bias


@dataclass(frozen=True, slots=True, eq=False)
class LayerGradients:
    """The gradients of a layer; a field is None if its gradient is not wanted."""

    x: Tensor | None = None
    weight: Tensor | None = None
    A: Tensor | None = None
    B: Tensor | None = None
    bias: Tensor | None = None
    A_bias: Tensor | None = None
    B_bias: Tensor | None = None
    magnitude: Tensor | None = None

    def with_x(self, x: Tensor | None) -> LayerGradients:
        """The same gradients with `x` in place of the gradient of x."""
        return replace(self, x=x)


@dataclass(frozen=True, slots=True, eq=False)
class Adapters:
    """A stack of n adapters, and the id of each token's adapter.

    A           [n, r, in_features]
    B           [n, out_features, r]
    ids         int64 [tokens]; an id outside [0, n) stands for the base alone
    scalings    [n]
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
class Norm:
    """A normalization over the last dimension.

    kind      "layer_norm" or "rms_norm", which subtracts no mean
    weight    [hidden]
    bias      [hidden]; None without a bias
    eps       is added to the variance, or to the mean square
    """

    kind: str
    weight: Tensor
    bias: Tensor | None = None
    eps: float = 1e-5


@dataclass(frozen=True, slots=True, eq=False)
class Bottleneck:
    """The path of a bottleneck adapter:

        norm_after(dropout(scaling * (act(norm_before(x) @ down^T + down_bias) @ up^T + up_bias)))

    down [bottleneck, hidden], up [hidden, bottleneck], down_bias [bottleneck], up_bias [hidden].
    All tensors have the same dtype, which may differ from that of x.
    """

    down: Tensor
    up: Tensor
    down_bias: Tensor | None = None
    up_bias: Tensor | None = None
    scaling: float = 1.0
    activation: str = "relu"
    dropout: Dropout | None = None
    norm_before: Norm | None = None
    norm_after: Norm | None = None

    @property
    def size(self) -> int:
        """The number of features in the bottleneck."""
        return self.down.shape[0]

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The trainable tensors, in the order of `BottleneckWanted` behind x."""
        before, after = self.norm_before, self.norm_after
        return (
            self.down,
            self.down_bias,
            self.up,
            self.up_bias,
            None if before is None else before.weight,
            None if before is None else before.bias,
            None if after is None else after.weight,
            None if after is None else after.bias,
        )


@dataclass(frozen=True, slots=True)
class BottleneckWanted:
    """The gradients that the backward of an adapter computes, in the order of its results."""

    x: bool = False
    down: bool = False
    down_bias: bool = False
    up: bool = False
    up_bias: bool = False
    before_weight: bool = False
    before_bias: bool = False
    after_weight: bool = False
    after_bias: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class BottleneckGradients:
    """The gradients of an adapter; a field is None if its gradient is not wanted."""

    x: Tensor | None = None
    down: Tensor | None = None
    down_bias: Tensor | None = None
    up: Tensor | None = None
    up_bias: Tensor | None = None
    before_weight: Tensor | None = None
    before_bias: Tensor | None = None
    after_weight: Tensor | None = None
    after_bias: Tensor | None = None
