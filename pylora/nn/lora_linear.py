"""`LoRALinear`: a frozen linear layer, dense or NF4, with a trainable low-rank path."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pylora import checks, functional
from pylora.backends.backend import autocast_off
from pylora.calls import Dropout
from pylora.nf4_weight import NF4Weight
from pylora.nn import dora
from pylora.nn.conv1d import dense_weight, is_conv1d, set_dense_weight
from pylora.nn.kept import Kept, Place, places_of
from pylora.nn.nf4_linear import NF4Linear, frozen
from pylora.ops import run
from pylora.sharding import (
    exchange_values,
    is_sharded,
    refuse_sharded_forward,
    whole_parameters,
)

logger = logging.getLogger(__name__)

_DENSE_TENSORS = ("weight", "bias")
_LORA_TENSORS = ("lora_A", "lora_B", "lora_B_bias")


class LoRALinear(nn.Module):
    """y = base(x) + scaling * lora_B @ lora_A @ dropout(x), as one fused op.

    base            nn.Linear, NF4Linear, the Conv1D of transformers, or a bitsandbytes Linear4bit
                    (nf4), which becomes an NF4Linear over the same bytes; it is frozen and kept as
                    `base_layer`
    r               rank, >= 1
    lora_alpha      scaling = lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora`
    lora_dropout    probability of dropping an element of the low-rank path's input in training
    use_rslora      rank-stabilized LoRA (arXiv:2312.03732)
    use_dora        weight-decomposed LoRA (arXiv:2402.09353): rows are rescaled to a trained
                    magnitude
    lora_bias       adds a trained bias behind lora_B
    dtype           the dtype of the LoRA parameters: float32 by default, as in PEFT

    forward(x [..., in_features]) returns [..., out_features] in x.dtype. lora_A [r, in_features]
    starts Kaiming-uniform and lora_B [out_features, r] at zero, so the layer starts as its base.
    While `lora_enabled` is False the layer is its base; see `pylora.disable_adapter`.

    `state_dict()` describes the unmerged layer, whether it is merged or not, so that LoRA is never
    applied twice; a merged layer is unmerged when one is loaded. A layer that is merged for good
    has no LoRA in its state dict.
    Raises TypeError or ValueError that names the argument that does not fit.
    Source: LoRA, arXiv:2106.09685.
    """

    lora_B_bias: nn.Parameter | None
    lora_magnitude: nn.Parameter | None
    base_norm: Tensor

    def __init__(
        self,
        base: nn.Module,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        lora_bias: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if isinstance(base, LoRALinear):
            raise ValueError("base is a LoRALinear; it must not be wrapped already")
        if hasattr(getattr(base, "weight", None), "quant_state"):
            base = NF4Linear.from_bitsandbytes(base)
        if not isinstance(base, (nn.Linear, NF4Linear)) and not is_conv1d(base):
            raise TypeError(
                f"base is {type(base).__name__}; it must be an nn.Linear, an NF4Linear or a Conv1D"
            )
        checks.plain_weight("base", base)
        checks.integer("r", r, least=1)
        checks.number("lora_alpha", lora_alpha)
        if not math.isfinite(lora_alpha):
            raise ValueError(f"lora_alpha is {lora_alpha}; it must be finite")
        checks.probability("lora_dropout", lora_dropout)
        if use_dora and lora_bias:
            raise ValueError("lora_bias is True; it must be False with use_dora")
        checks.floating_dtype("dtype", dtype)
        self._kept: Kept | None = None
        self.base_layer: Any = base.requires_grad_(False)
        self.out_features, self.in_features = self.base_weight.shape
        self.r, self.lora_dropout, self.use_dora = r, lora_dropout, use_dora
        self.set_scaling(lora_alpha, use_rslora)
        self.merged, self.lora_enabled = False, True
        # The base from before a merge. A tuple hides it from `parameters()`.
        self._unmerged_base: tuple[Any] | None = None
        self.register_state_dict_post_hook(_describe_unmerged)
        device = self.base_weight.device
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, r, device=device, dtype=dtype))
        self.register_parameter("lora_B_bias", None)
        self.register_parameter("lora_magnitude", None)
        if lora_bias:
            self.lora_B_bias = nn.Parameter(
                torch.empty(self.out_features, device=device, dtype=dtype)
            )
        if use_dora:
            self.lora_magnitude = nn.Parameter(
                torch.empty(self.out_features, device=device, dtype=dtype)
            )
            self.register_load_state_dict_post_hook(_refresh_after_load)
        if device.type != "meta":
            self.reset_lora_parameters()
        else:
            self.refresh_base_norm()  # a forward on the meta device needs its shape

    def set_scaling(self, lora_alpha: float, use_rslora: bool) -> None:
        """Sets scaling = lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora`."""
        self.lora_alpha, self.use_rslora = lora_alpha, use_rslora
        self.scaling = lora_alpha / (math.sqrt(self.r) if use_rslora else self.r)

    @torch.no_grad()
    def reset_lora_parameters(self) -> None:
        """Sets the start of training: the low-rank path is zero, DoRA's magnitude the base's."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)
        if self.lora_B_bias is not None:
            nn.init.zeros_(self.lora_B_bias)
        if self.lora_magnitude is not None:
            self.refresh_base_norm()
            self.lora_magnitude.copy_(self.weight_norm())

    @property
    def base_weight(self) -> Tensor | NF4Weight:
        """The weight of the base, [out_features, in_features], dense or NF4."""
        base = self.base_layer
        return base.nf4_weight if isinstance(base, NF4Linear) else dense_weight(base)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoRALinear:
        super()._apply(fn, recurse)
        if self.lora_magnitude is not None and not self.lora_magnitude.is_meta:
            self.refresh_base_norm()  # fn may have cast W, or the norm itself
        return self

    def forward(self, x: Tensor) -> Tensor:
        kept = self._kept
        plain = self.merged or not self.lora_enabled
        if kept is None or plain or torch.compiler.is_compiling():
            return self._long_forward(x)
        call = kept.call_with(x)
        if call is None:
            return self._long_forward(x)
        dropout = None
        if self.training and self.lora_dropout:
            dropout = Dropout(self.lora_dropout, functional.dropout_seed(None, kept.device))
        return call.run(x, self.scaling, dropout)

    def _long_forward(self, x: Tensor) -> Tensor:
        """The forward of a call whose arguments must be checked."""
        if self.merged:
            return self._merged_forward(x)
        if not self.lora_enabled:
            return self.base_layer(x)
        refuse_sharded_forward(self)
        if self.use_dora and self.lora_magnitude is not None:
            return self._dora_forward(x, self.lora_magnitude)
        return self._checked_forward(x, self.lora_dropout if self.training else 0.0)

    def _merged_forward(self, x: Tensor) -> Tensor:
        """The base of a merged layer; in training, a backward through it raises."""
        y = self.base_layer(x)
        if self.training and torch.is_grad_enabled() and self.lora_A.requires_grad:
            y = _RefuseBackward.apply(y, self.lora_A)
        return y

    def _checked_forward(self, x: Tensor, dropout_p: float) -> Tensor:
        factors = (self.lora_A, self.lora_B, self.scaling)
        arguments = (x, self.base_weight, *factors, self.base_layer.bias)
        call = functional.CALLS["lora_linear"](*arguments, dropout_p, lora_B_bias=self.lora_B_bias)
        if not torch.compiler.is_compiling():
            self._kept = Kept.of(self._places(), x, call)
        y, _ = run(call)
        return y

    def _places(self) -> tuple[Place, ...] | None:
        """Where this layer and its base hold the tensors that a call reads."""
        base = self.base_layer
        if is_conv1d(base):  # a call reads a view of its weight, which must be taken each time
            return None
        of_base = base.places() if isinstance(base, NF4Linear) else places_of(base, _DENSE_TENSORS)
        of_lora = places_of(self, _LORA_TENSORS)
        return None if of_base is None or of_lora is None else (*of_base, *of_lora)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_kept": None}

    def _dora_forward(self, x: Tensor, magnitude: Tensor) -> Tensor:
        p = self.lora_dropout if self.training else 0.0
        dropped = nn.functional.dropout(x, p) if p else None
        rescale = magnitude / self.weight_norm()
        factors = (self.lora_A, self.lora_B, self.scaling)
        bias = self.base_layer.bias
        return dora.dora_linear(x, self.base_weight, *factors, rescale, bias, dropped)

    @torch.no_grad()
    def refresh_base_norm(self) -> None:
        """Recomputes the norm of each row of W, which DoRA reads; call it when W has changed.

        If the base is sharded, every process must call this.
        """
        if self.lora_magnitude is not None and not self.merged:
            with whole_parameters(self.base_layer):
                norm = dora.base_norm(self.base_weight)
            self.register_buffer("base_norm", norm, persistent=False)

    def weight_norm(self) -> Tensor:
        """The row norms |W + scaling B A| [out_features] in lora_A's dtype, without a gradient."""
        factors = (self.lora_A, self.lora_B, self.scaling)
        return dora.adapted_norm(self.base_weight, self.base_norm, *factors)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """The weight that `merge` writes: W + scaling B A in fp32, with rows rescaled by DoRA."""
        weight = self.base_weight
        dense = (
            weight.dequantize(torch.float32) if isinstance(weight, NF4Weight) else weight.float()
        )
        with autocast_off(dense.device.type):
            dense = torch.addmm(dense, self.lora_B.float(), self.lora_A.float(), alpha=self.scaling)
        if self.lora_magnitude is not None:
            dense *= (self.lora_magnitude.float() / self.weight_norm().float())[:, None]
        return dense

    @property
    def can_unmerge(self) -> bool:
        """True while the base weight from before a merge is kept."""
        return self._unmerged_base is not None

    @property
    def merge_added_bias(self) -> bool:
        """True while the layer is merged if its base had no bias before."""
        before = self._unmerged_base
        return before is not None and before[0].bias is None and self.bias is not None

    def set_merged(self, weight: Tensor | NF4Weight, bias: Tensor | None) -> None:
        """Replaces the base's weight and bias by merged ones; `unmerge` puts the old objects back.

        Raises ValueError if the layer is merged already.
        """
        if self.merged:
            raise ValueError("the layer is merged already; unmerge must be called first")
        base = self.base_layer
        merged = copy.copy(base)
        merged._parameters, merged._buffers = dict(base._parameters), dict(base._buffers)
        if isinstance(merged, NF4Linear) and isinstance(weight, NF4Weight):
            merged.set_nf4_weight(weight)
        elif not isinstance(merged, NF4Linear) and isinstance(weight, Tensor):
            set_dense_weight(merged, weight)
        else:
            raise TypeError(f"weight is {type(weight).__name__}; it must be of the base's own kind")
        merged.bias = None if bias is None else frozen(bias)
        self._unmerged_base, self.base_layer = (base,), merged
        self._kept, self.merged = None, True

    def keep_sharded_base(self) -> None:
        """Moves the merged weight into the base from before `set_merged`, if that is sharded.

        `fully_shard` knows the parameters of that base, and would not shard those of another. The
        values from before are kept in the other module. Every process must call this.
        """
        if self._unmerged_base is None:
            return
        (base,), merged = self._unmerged_base, self.base_layer
        if any(map(is_sharded, base.parameters())):
            exchange_values(base, merged)
            self._unmerged_base, self.base_layer = (merged,), base

    def unmerge(self) -> None:
        """Restores the base from before `set_merged`, on its current device.

        A dense base gets its current dtype as well. Raises ValueError if there is nothing to
        restore.
        """
        if self._unmerged_base is None:
            raise ValueError("the layer keeps no base from before a merge; it must be merged")
        (base,), merged = self._unmerged_base, self.base_layer
        if any(map(is_sharded, merged.parameters())):
            exchange_values(merged, base)
            self._unmerged_base, self._kept, self.merged = None, None, False
            self.refresh_base_norm()
            return
        dtypes = [p.dtype for p in merged.parameters() if p.is_floating_point()]
        base.to(device=merged.weight.device, dtype=dtypes[0] if dtypes else None)
        base.train(merged.training)
        self._unmerged_base, self.base_layer = None, base
        self._kept, self.merged = None, False
        self.refresh_base_norm()  # a cast while merged may have rounded it, or W

    def forget_base(self) -> None:
        """Frees the base from before the merge, so that the layer stays merged for good."""
        self._unmerged_base = None

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        if not self.merged or self.can_unmerge:
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        self._take_plain_keys(state_dict, prefix)
        if self.can_unmerge:
            name = prefix.rstrip(".") or type(self).__name__
            logger.warning("%s was merged; it is unmerged now, to load a state dict", name)
            self.unmerge()
        of_lora = [key for key in state_dict if key.startswith(f"{prefix}lora_")]
        if self.merged and of_lora:
            error_msgs.append(f"{of_lora[0]} is of an unmerged layer; this one is merged for good")
            for key in [key for key in state_dict if key.startswith(prefix)]:
                del state_dict[key]
        elif not self.merged:
            super()._load_from_state_dict(
                state_dict,
                prefix,
                local_metadata,
                strict,
                missing_keys,
                unexpected_keys,
                error_msgs,
            )

    def _take_plain_keys(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Gives the entries of a plain layer, which has no base layer, the names they have here."""
        held = {*self.base_layer._parameters, *self.base_layer._buffers}
        for key in [key for key in state_dict if key.startswith(prefix)]:
            name = key[len(prefix) :]
            renamed = f"{prefix}base_layer.{name}"
            if name.split(".")[0] in held and renamed not in state_dict:
                state_dict[renamed] = state_dict.pop(key)

    @property
    def weight(self) -> Tensor:
        """The base's weight as it is stored, for code that asks a linear layer for its device."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return self.base_layer.bias

    def extra_repr(self) -> str:
        flags = "".join(f", {name}" for name in ("use_rslora", "use_dora") if getattr(self, name))
        merged = ", merged" if self.merged else ""
        merged += "" if self.lora_enabled else ", LoRA disabled"
        return (
            f"r={self.r}, lora_alpha={self.lora_alpha}, "
            f"lora_dropout={self.lora_dropout}{flags}{merged}"
        )


class _RefuseBackward(torch.autograd.Function):
    """Returns y; its backward says that a merged layer cannot be trained.

    Without it the LoRA parameters would get no gradient, and training would go on without them. The
    forward does not raise, because a merged model may be evaluated in training mode.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, lora_A: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise RuntimeError(
            "a merged LoRALinear is in training mode, but its LoRA parameters take no part in the "
            "output; call pylora.unmerge(model) to train them, or model.eval() if only other "
            "parameters need gradients"
        )


def _refresh_after_load(layer: nn.Module, _: object) -> None:
    assert isinstance(layer, LoRALinear)
    layer.refresh_base_norm()


def _describe_unmerged(
    layer: nn.Module, state_dict: dict[str, Any], prefix: str, _: object
) -> None:
    """Replaces the merged base in a state dict by the one from before the merge."""
    assert isinstance(layer, LoRALinear)
    if layer._unmerged_base is None:
        return
    prefix += "base_layer."
    for key in [key for key in state_dict if key.startswith(prefix)]:
        del state_dict[key]
    layer._unmerged_base[0].state_dict(destination=state_dict, prefix=prefix)
