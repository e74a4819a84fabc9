"""What a `LoRALinear` does with its base when it is merged: replace it, and put it back."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from pylora.backends.backend import autocast_off
from pylora.nf4_weight import NF4Weight
from pylora.nn.conv1d import set_dense_weight
from pylora.nn.lora_adapters import NamedAdapters
from pylora.nn.nf4_linear import NF4Linear, frozen
from pylora.sharding import exchange_values, is_sharded


class MergeableLoRA(NamedAdapters):
    """The part of `LoRALinear` that merges the active adapter into the base and takes it out.

    `state_dict()` describes the unmerged layer while its base from before the merge is kept.
    """

    def __init__(self) -> None:
        super().__init__()
        self.merged = False
        # The base from before a merge. A tuple hides it from `parameters()`.
        self._unmerged_base: tuple[Any] | None = None
        self.register_state_dict_post_hook(_describe_unmerged)

    def _merged_forward(self, x: Tensor) -> Tensor:
        """The base of a merged layer; in training, a backward through it raises."""
        y = self.base_layer(x)
        if self.training and torch.is_grad_enabled() and self.lora_A.requires_grad:
            y = _RefuseBackward.apply(y, self.lora_A)
        return y

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

        Raises ValueError if the layer is merged already, TypeError for a weight of another kind.
        """
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
        self.set_merged_layer(merged)

    def set_merged_layer(self, merged: nn.Module) -> None:
        """Replaces the base by a merged layer, which may be of another class.

        Raises ValueError if the layer is merged already.
        """
        if self.merged:
            raise ValueError("the layer is merged already; unmerge must be called first")
        self._unmerged_base, self.base_layer = (self.base_layer,), merged
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
        same = type(merged) is type(base)  # a cast of another class says nothing about the base's
        dtypes = [p.dtype for p in merged.parameters() if p.is_floating_point() and same]
        base.to(device=merged.weight.device, dtype=dtypes[0] if dtypes else None)
        base.train(merged.training)
        self._unmerged_base, self.base_layer = None, base
        self._kept, self.merged = None, False
        self.refresh_base_norm()  # a cast while merged may have rounded it, or W

    def forget_base(self) -> None:
        """Frees the base from before the merge, so that the layer stays merged for good."""
        self._unmerged_base = None


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


def _describe_unmerged(
    layer: nn.Module, state_dict: dict[str, Any], prefix: str, _: object
) -> None:
    """Replaces the merged base in a state dict by the one from before the merge."""
    assert isinstance(layer, MergeableLoRA)
    if layer._unmerged_base is None:
        return
    prefix += "base_layer."
    for key in [key for key in state_dict if key.startswith(prefix)]:
        del state_dict[key]
    layer._unmerged_base[0].state_dict(destination=state_dict, prefix=prefix)
