"""`LoRALinear`: a frozen linear layer, dense or NF4, with a trainable low-rank path."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from pylora import checks, functional
from pylora.calls import Dropout, LowRank
from pylora.dropout import dropout_seed
from pylora.nn import dora
from pylora.nn.conv1d import is_conv1d
from pylora.nn.inactive import rename_for, set_trainable
from pylora.nn.kept import Kept, Place, places_of
from pylora.nn.lora_adapters import DEFAULT_ADAPTER, LORA_TENSORS
from pylora.nn.lora_merging import MergeableLoRA
from pylora.nn.merge_aware import merge_aware_linear, requantized
from pylora.nn.nf4_linear import NF4Linear
from pylora.ops import run_output
from pylora.sharding import refuse_sharded_forward

logger = logging.getLogger(__name__)

_DENSE_TENSORS = ("weight", "bias")
_FLAGS = ("use_rslora", "use_dora", "merge_aware")
_CALL_TENSORS = ("lora_A", "lora_B", "lora_B_bias")
_DORA_TENSORS = (*_CALL_TENSORS, "lora_magnitude", "base_norm")


class LoRALinear(MergeableLoRA):
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
    adapter_name    the name of this adapter; `add_adapter` adds others, which may differ in
                    everything above, and `set_adapter` switches between them
    merge_aware     computes with the weight that a merge into the NF4 base would write, so that the
                    merged model is the trained one (`pylora.nn.merge_aware`); each forward then
                    quantizes the weight. It excludes dropout, DoRA, lora_bias and a dense base

    forward(x [..., in_features]) returns [..., out_features] in x.dtype. lora_A [r, in_features]
    starts Kaiming-uniform and lora_B [out_features, r] at zero, so the layer starts as its base.
    While `lora_enabled` is False the layer is its base; see `pylora.disable_adapter`.

    `state_dict()` describes the unmerged layer, whether it is merged or not, so that LoRA is never
    applied twice; a merged layer is unmerged when one is loaded. A layer that is merged for good
    has no LoRA in its state dict.
    Raises TypeError or ValueError that names the argument that does not fit.
    Source: LoRA, arXiv:2106.09685.
    """

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
        adapter_name: str = DEFAULT_ADAPTER,
        merge_aware: bool = False,
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
        self._kept: Kept | None = None
        self._dora = dora.DoraCalls()
        self.lora_enabled = True
        self.base_layer: Any = base
        self.out_features, self.in_features = self.base_weight.shape
        settings = (r, lora_alpha, lora_dropout, use_rslora, use_dora, lora_bias, dtype)
        self.add_adapter(adapter_name, *settings, merge_aware)
        base.requires_grad_(False)  # now that all arguments have been checked
        self.set_adapter(adapter_name)
        set_trainable(self, LORA_TENSORS, True)

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
            dropout = Dropout(self.lora_dropout, dropout_seed(None, kept.device))
        return call.run(x, self.scaling, dropout)

    def _long_forward(self, x: Tensor) -> Tensor:
        """The forward of a call whose arguments must be checked."""
        if self.merged:
            return self._merged_forward(x)
        if not self.lora_enabled or self.active_adapter is None:
            return self.base_layer(x)
        if self.use_dora:
            return self._dora_forward(x)
        refuse_sharded_forward(self)
        if self.merge_aware:
            merged = requantized(self.base_layer.nf4_weight, self.merged_weight())
            factors = (self.lora_A, self.lora_B, self.scaling)
            return merge_aware_linear(x, merged, self.base_layer.bias, *factors)
        return self._checked_forward(x, self.lora_dropout if self.training else 0.0)

    def _checked_forward(self, x: Tensor, dropout_p: float) -> Tensor:
        factors = (self.lora_A, self.lora_B, self.scaling)
        arguments = (x, self.base_weight, *factors, self.base_layer.bias)
        call = functional.CALLS["lora_linear"](*arguments, dropout_p, lora_B_bias=self.lora_B_bias)
        if not torch.compiler.is_compiling():
            own = LowRank(self.lora_A, self.lora_B, None, self.lora_B_bias)
            self._kept = Kept.of(self._places, x, call, own)
        return run_output(call)

    def _places(self) -> tuple[Place, ...] | None:
        """Where this layer and its base hold the tensors that a call reads."""
        base = self.base_layer
        if is_conv1d(base):  # a call reads a view of its weight, which must be taken each time
            return None
        of_base = base.places() if isinstance(base, NF4Linear) else places_of(base, _DENSE_TENSORS)
        names = _CALL_TENSORS if self.lora_magnitude is None else _DORA_TENSORS
        of_lora = places_of(self, names)
        return None if of_base is None or of_lora is None else (*of_base, *of_lora)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_kept": None, "_dora": dora.DoraCalls()}

    def _dora_forward(self, x: Tensor) -> Tensor:
        drops = self.training and self.lora_dropout
        y = None if drops else self._dora.again(x, self.scaling)
        if y is not None:
            return y
        refuse_sharded_forward(self)
        norm, bias, magnitude = self.base_norm, self.base_layer.bias, self.lora_magnitude
        assert magnitude is not None
        factors = (self.lora_A, self.lora_B, self.scaling)
        dropped = nn.functional.dropout(x, self.lora_dropout) if drops else None
        others = (magnitude, bias, self._places)
        return self._dora.linear(x, self.base_weight, norm, *factors, *others, dropped)

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
            rename_for(self, self.active_adapter, LORA_TENSORS, state_dict, prefix)
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
        if self.active_adapter is None:
            return "no active adapter"
        flags = "".join(f", {name}" for name in _FLAGS if getattr(self, name))
        merged = ", merged" if self.merged else ""
        merged += "" if self.lora_enabled else ", LoRA disabled"
        return (
            f"r={self.r}, lora_alpha={self.lora_alpha}, "
            f"lora_dropout={self.lora_dropout}{flags}{merged}"
        )
