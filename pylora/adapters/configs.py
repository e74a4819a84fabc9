"""The three kinds of bottleneck adapters: where they sit, and what they compute there.

With x the input and h the output of a sub-layer (attention or MLP), r the value that the block adds
h to, and adapter(x) = scaling * up(activation(down(x))):

    HoulsbyConfig     h + adapter(h) takes the place of h
    PfeifferConfig    the stream r + h becomes r + h + adapter(r + h); in a block that normalizes
                      after this sum, the adapter reads the normalized sum
    ParallelConfig    h + adapter(x) takes the place of h
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

from pylora import checks

Where = str  # "attention" or "mlp"
NORMS = (None, "layer_norm", "rms_norm")


@dataclass(frozen=True)
class AdapterConfig:
    """What the three kinds have in common.

    reduction_factor    the bottleneck has hidden_size // reduction_factor features, at least 1
    activation          "relu", "gelu", "gelu_tanh", "silu", "tanh" or "identity"
    where               the sub-layers that get an adapter: "attention", "mlp" or both
    scaling             multiplies what the adapter adds
    dropout             the probability of dropping an element of what it adds, in training
    norm_before         "layer_norm" or "rms_norm" normalizes what the adapter reads
    norm_after          the same for what it adds
    init_weights        how it starts; see `pylora.nn.BottleneckAdapter`

    Raises TypeError or ValueError that names the argument that does not fit.
    """

    reduction_factor: float = 16
    activation: str = "relu"
    where: Collection[Where] = ("mlp",)
    scaling: float = 1.0
    dropout: float = 0.0
    norm_before: str | None = None
    norm_after: str | None = None
    init_weights: str = "houlsby"

    # The sub-layers that this kind of adapter can sit at.
    places: ClassVar[tuple[Where, ...]] = ("attention", "mlp")

    def __post_init__(self) -> None:
        if type(self) is AdapterConfig:
            raise TypeError(
                "AdapterConfig has no place in a block; use HoulsbyConfig, PfeifferConfig or "
                "ParallelConfig"
            )
        for name in ("reduction_factor", "scaling"):
            value = getattr(self, name)
            checks.number(name, value)
            if not math.isfinite(value):
                raise ValueError(f"{name} is {value}; it must be finite")
        if self.reduction_factor <= 0:
            raise ValueError(f"reduction_factor is {self.reduction_factor}; it must be above 0")
        checks.probability("dropout", self.dropout)
        object.__setattr__(self, "activation", checks.activation("activation", self.activation))
        for name in ("norm_before", "norm_after"):
            if getattr(self, name) not in NORMS:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; it must be None, 'layer_norm' or "
                    "'rms_norm'"
                )
        checks.names("where", self.where)
        where = (self.where,) if isinstance(self.where, str) else tuple(self.where)
        for entry in where:
            if entry not in self.places:
                raise ValueError(
                    f"where has {entry!r}; a {type(self).__name__} can have "
                    f"{' and '.join(map(repr, self.places))} only"
                )
        if not where:
            raise ValueError("where is empty; it must name at least one sub-layer")
        object.__setattr__(self, "where", tuple(place for place in self.places if place in where))

    def bottleneck_size(self, hidden_size: int) -> int:
        """The number of features in the bottleneck of a block of this width."""
        return max(1, int(hidden_size // self.reduction_factor))


@dataclass(frozen=True)
class HoulsbyConfig(AdapterConfig):
    """An adapter behind attention and one behind the MLP, each before its residual sum.

    Source: Houlsby et al. 2019, arXiv:1902.00751.
    """

    activation: str = "silu"
    where: Collection[Where] = ("attention", "mlp")


@dataclass(frozen=True)
class PfeifferConfig(AdapterConfig):
    """One adapter a block, behind the MLP's residual sum: half of Houlsby's parameters.

    Source: Pfeiffer et al. 2021, arXiv:2005.00247.
    """

    places: ClassVar[tuple[Where, ...]] = ("mlp",)


@dataclass(frozen=True)
class ParallelConfig(AdapterConfig):
    """An adapter beside the MLP, or attention, that reads the same input.

    Source: He et al. 2022, arXiv:2110.04366.
    """

    reduction_factor: float = 2
    scaling: float = 4.0
    init_weights: str = "mam_adapter"
