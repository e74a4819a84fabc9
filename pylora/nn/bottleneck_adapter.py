"""`BottleneckAdapter`: a trainable bottleneck with a residual, as one fused op."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pylora import checks, functional
from pylora.bottleneck import AdapterTensors, check_norm_kind
from pylora.calls import Norm
from pylora.reference.normalization import LAYER_NORM

INIT_WEIGHTS = ("houlsby", "bert", "mam_adapter")


class BottleneckAdapter(nn.Module):
    """y = residual + norm_after(dropout(scaling * up(act(down(norm_before(x)))))), as one op.

    hidden_size      features of x and y
    bottleneck_size  features between the two projections, >= 1
    activation       "relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid" or "identity"
    scaling          multiplies the output of `up`
    dropout          probability of dropping an element of that output in training
    norm_before, norm_after
                     "layer_norm" or "rms_norm" over x, or over what the residual is added to; None
                     without one
    norm_eps         is added to the variance, or to the mean square
    bias             gives both projections a bias
    init_weights     how the projections start, by the names of the `adapters` library; biases start
                     at zero: "houlsby" (normal of deviation 0.01, cut off at 0.02), "bert" (normal
                     of deviation 0.02) or "mam_adapter" (`up` is zero, so that the adapter starts
                     as the identity, and `down` is Kaiming-uniform)
    dtype            the dtype of all parameters, which may differ from that of x; torch's default
                     dtype if None

    `forward(x [..., hidden], residual=None, add_residual=True)` returns [..., hidden]. The residual
    is x if it is None, and y has none if `add_residual` is False; see
    `pylora.functional.bottleneck_adapter`.

    The parameters have the names of that function's arguments. In a file of AdapterHub they are:

        down_weight, down_bias                  adapter_down.0.weight, .bias; adapter_down.1 with a
                                                norm_before
        up_weight, up_bias                      adapter_up.weight, .bias
        norm_before_weight, norm_before_bias    adapter_norm_before.weight, .bias, and once more
                                                as adapter_down.0
        norm_after_weight, norm_after_bias      adapter_norm_after.weight, .bias

    Raises TypeError or ValueError that names the argument that does not fit.
    Source: Houlsby et al., arXiv:1902.00751; Pfeiffer et al., arXiv:2005.00247.
    """

    down_weight: nn.Parameter
    down_bias: nn.Parameter | None
    up_weight: nn.Parameter
    up_bias: nn.Parameter | None

    def __init__(
        self,
        hidden_size: int,
        bottleneck_size: int,
        activation: str | None = "relu",
        scaling: float = 1.0,
        dropout: float = 0.0,
        norm_before: str | None = None,
        norm_after: str | None = None,
        norm_eps: float = 1e-5,
        bias: bool = True,
        init_weights: str = "houlsby",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.integer("hidden_size", hidden_size, 1)
        checks.integer("bottleneck_size", bottleneck_size, 1)
        checks.number("scaling", scaling)
        checks.probability("dropout", dropout)
        check_norm_kind("norm_before", norm_before)
        check_norm_kind("norm_after", norm_after)
        checks.number("norm_eps", norm_eps)
        if dtype is not None:
            checks.floating_dtype("dtype", dtype)
        if init_weights not in INIT_WEIGHTS:
            raise ValueError(
                f"init_weights is {init_weights!r}; it must be one of {', '.join(INIT_WEIGHTS)}"
            )
        self.hidden_size, self.bottleneck_size = hidden_size, bottleneck_size
        self.activation = checks.activation("activation", activation)
        self.scaling, self.dropout = float(scaling), float(dropout)
        self.norm_before, self.norm_after, self.norm_eps = norm_before, norm_after, float(norm_eps)
        self.init_weights = init_weights

        def parameter(*shape: int, present: bool = True) -> nn.Parameter | None:
            if not present:
                return None
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        for name, tensor in (
            ("down_weight", parameter(bottleneck_size, hidden_size)),
            ("down_bias", parameter(bottleneck_size, present=bias)),
            ("up_weight", parameter(hidden_size, bottleneck_size)),
            ("up_bias", parameter(hidden_size, present=bias)),
            ("norm_before_weight", parameter(hidden_size, present=norm_before is not None)),
            ("norm_before_bias", parameter(hidden_size, present=norm_before == LAYER_NORM)),
            ("norm_after_weight", parameter(hidden_size, present=norm_after is not None)),
            ("norm_after_bias", parameter(hidden_size, present=norm_after == LAYER_NORM)),
        ):
            self.register_parameter(name, tensor)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the projections anew, as `init_weights` says; norms become neutral."""
        with torch.no_grad():
            for name, parameter in self.named_parameters(recurse=False):
                if name.endswith("bias"):
                    parameter.zero_()
                elif name.startswith("norm"):
                    parameter.fill_(1.0)
                elif self.init_weights == "bert":
                    nn.init.normal_(parameter, std=0.02)
                elif self.init_weights == "houlsby":
                    nn.init.trunc_normal_(parameter, std=0.01, a=-0.02, b=0.02)
                elif name == "up_weight":
                    parameter.zero_()
                else:
                    nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))

    def forward(
        self, x: Tensor, residual: Tensor | None = None, add_residual: bool = True
    ) -> Tensor:
        return functional.bottleneck_adapter(
            x,
            self.down_weight,
            self.down_bias,
            self.up_weight,
            self.up_bias,
            self.activation,
            self.scaling,
            residual,
            add_residual,
            self.dropout if self.training else 0.0,
            norm_before=self._norm("norm_before"),
            norm_after=self._norm("norm_after"),
        )

    @property
    def tensors(self) -> AdapterTensors:
        """The adapter as an argument of `pylora.functional.multi_bottleneck_adapter`.

        Raises ValueError if it has a norm or drops elements, which that function does not do.
        """
        if not self.is_plain:
            raise ValueError(
                f"the adapter is {self}; it must have no norm, and no dropout in training"
            )
        weights = (self.down_weight, self.down_bias, self.up_weight, self.up_bias)
        return AdapterTensors(*weights, self.activation, self.scaling)

    @property
    def is_plain(self) -> bool:
        """True if the adapter has no norm and does not drop elements of its output now."""
        drops = self.training and self.dropout > 0
        return self.norm_before is None and self.norm_after is None and not drops

    def _norm(self, name: str) -> Norm | None:
        kind = getattr(self, name)
        if kind is None:
            return None
        weight, bias = getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias")
        return Norm(kind, weight, bias, self.norm_eps)

    def extra_repr(self) -> str:
        options = {
            "activation": self.activation,
            "scaling": self.scaling,
            "dropout": self.dropout or None,
            "norm_before": self.norm_before,
            "norm_after": self.norm_after,
        }
        shown = "".join(f", {name}={value}" for name, value in options.items() if value is not None)
        biases = "" if self.down_bias is not None else ", bias=False"
        return f"{self.hidden_size}, {self.bottleneck_size}{shown}{biases}"
