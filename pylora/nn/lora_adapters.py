"""The LoRA parameters of a layer: one set for each named adapter, of which one is active."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pylora import checks
from pylora.nf4_weight import NF4Weight
from pylora.nn import dora
from pylora.nn.changes import note_change
from pylora.nn.conv1d import dense_weight
from pylora.nn.inactive import (
    InactiveAdapter,
    change_places,
    check_adapter_name,
    drop,
    hold,
    inactive_adapters,
    move_tensors,
)
from pylora.nn.kept import Kept
from pylora.nn.nf4_linear import NF4Linear
from pylora.sharding import whole_parameters

DEFAULT_ADAPTER = "default"
LORA_TENSORS = ("lora_A", "lora_B", "lora_B_bias", "lora_magnitude")
# The settings of a layer that no adapter is active in.
_NO_SETTINGS: dict[str, Any] = {
    "r": 0,
    "lora_alpha": 0.0,
    "lora_dropout": 0.0,
    "use_rslora": False,
    "use_dora": False,
    "merge_aware": False,
    "scaling": 0.0,
}


class NamedAdapters(nn.Module):
    """The part of `LoRALinear` that holds its adapters and switches between them.

    The parameters of the active adapter are `lora_A`, `lora_B`, `lora_B_bias` and `lora_magnitude`,
    and its settings are attributes of the layer. Those of the others are in `inactive_adapters`
    (`pylora.nn.inactive`). If no adapter is active, the four are None and r is 0.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_B_bias: nn.Parameter | None
    lora_magnitude: nn.Parameter | None
    base_norm: Tensor
    base_layer: Any
    in_features: int
    out_features: int
    r: int
    lora_alpha: float
    lora_dropout: float
    use_rslora: bool
    use_dora: bool
    merge_aware: bool
    scaling: float
    merged: bool
    _kept: Kept | None

    def __init__(self) -> None:
        super().__init__()
        note_change()
        self.active_adapter: str | None = None
        self.__dict__.update(_NO_SETTINGS)
        for name in LORA_TENSORS:
            self.register_parameter(name, None)
        self.register_load_state_dict_post_hook(_refresh_after_load)

    def __setstate__(self, state: dict[str, Any]) -> None:
        note_change()  # this is a copy, or comes from a file
        super().__setstate__(state)

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """The names of the adapters of this layer, the active one first."""
        active = () if self.active_adapter is None else (self.active_adapter,)
        return (*active, *inactive_adapters(self))

    def adapter(self, name: str) -> Any:
        """What has the parameters and settings of an adapter as attributes.

        It is the layer itself for the active adapter. Raises KeyError if there is no such adapter.
        """
        return self if name == self.active_adapter else inactive_adapters(self)[name]

    def add_adapter(
        self,
        name: str,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        lora_bias: bool = False,
        dtype: torch.dtype = torch.float32,
        merge_aware: bool = False,
    ) -> None:
        """Adds an adapter, which is inactive and frozen until `set_adapter` activates it.

        The arguments are those of `LoRALinear`. Raises ValueError or TypeError that names the
        argument that does not fit, before anything changes.
        """
        check_adapter_name(name)
        if name in self.adapter_names:
            raise ValueError(f"adapter_name is {name!r}; the layer has an adapter of this name")
        checks.integer("r", r, least=1)
        checks.number("lora_alpha", lora_alpha)
        if not math.isfinite(lora_alpha):
            raise ValueError(f"lora_alpha is {lora_alpha}; it must be finite")
        checks.probability("lora_dropout", lora_dropout)
        if use_dora and lora_bias:
            raise ValueError("lora_bias is True; it must be False with use_dora")
        checks.floating_dtype("dtype", dtype)
        if merge_aware:
            self._check_merge_aware(lora_dropout, use_dora, lora_bias)
        if self.merged:
            raise ValueError("the layer is merged; unmerge must be called first")
        before = self.active_adapter
        self.set_adapter(None)
        self._make_adapter(name, r, lora_dropout, use_dora, lora_bias, dtype)
        self.set_scaling(lora_alpha, use_rslora)
        self.merge_aware = merge_aware
        if self.lora_A.is_meta:
            self.refresh_base_norm()  # a forward on the meta device needs its shape
        else:
            self.reset_lora_parameters()
        for parameter in (self.lora_A, self.lora_B, self.lora_B_bias, self.lora_magnitude):
            if parameter is not None:
                parameter.requires_grad_(False)
        self.set_adapter(before)

    def _check_merge_aware(self, dropout: float, use_dora: bool, bias: bool) -> None:
        """Raises ValueError for what a merge-aware adapter cannot be combined with."""
        for name, value, neutral in (
            ("lora_dropout", dropout, 0.0),
            ("use_dora", use_dora, False),
            ("lora_bias", bias, False),
        ):
            if value:
                raise ValueError(
                    f"{name} is {value}; it must be {neutral} with merge_aware, which trains over "
                    "the one weight that a merge writes"
                )
        if not isinstance(self.base_layer, NF4Linear):
            raise ValueError(
                f"base is {type(self.base_layer).__name__}; it must be an NF4Linear with "
                "merge_aware: a merge into a dense weight loses next to nothing"
            )

    def _make_adapter(
        self, name: str, r: int, dropout: float, use_dora: bool, bias: bool, dtype: torch.dtype
    ) -> None:
        """Makes the active adapter, without values, in a layer where none is active."""
        options: dict[str, Any] = {"device": self.base_weight.device, "dtype": dtype}
        self.active_adapter = name
        self.r, self.lora_dropout, self.use_dora = r, dropout, use_dora
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, **options))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, r, **options))
        if bias:
            self.lora_B_bias = nn.Parameter(torch.empty(self.out_features, **options))
        if use_dora:
            self.lora_magnitude = nn.Parameter(torch.empty(self.out_features, **options))

    def set_adapter(self, name: str | None) -> None:
        """Activates an adapter; None leaves the layer with what its base computes.

        Parameters change their places and nothing else; `pylora.set_active_adapters` also says
        which ones are trainable. Raises KeyError if the layer has no such adapter, ValueError if it
        is merged.
        """
        if name == self.active_adapter:
            return
        if self.merged:
            raise ValueError("the layer is merged; unmerge must be called first")
        if name is not None and name not in inactive_adapters(self):
            raise KeyError(name)
        before, attributes = self.active_adapter, self.__dict__
        settings = {key: attributes[key] for key in _NO_SETTINGS}
        new_settings = _NO_SETTINGS
        if before is not None and name is not None:
            new_settings = change_places(self, before, name, LORA_TENSORS, settings)
        elif before is not None:
            away = InactiveAdapter(settings)
            move_tensors(self, away, LORA_TENSORS)
            hold(self, before, away)
        elif name is not None:
            taken = drop(self, name)
            move_tensors(taken, self, LORA_TENSORS)
            new_settings = taken.settings
        # torch's __setattr__ would look for modules and parameters among these values.
        attributes.update(new_settings, active_adapter=name, _kept=None)

    def delete_adapter(self, name: str) -> None:
        """Deletes an adapter; raises KeyError if there is none of this name."""
        if name == self.active_adapter:
            self.set_adapter(None)
        drop(self, name)

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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NamedAdapters:
        super()._apply(fn, recurse)
        if not self.base_layer.weight.is_meta:
            self.refresh_base_norm()  # fn may have cast W, or the norm itself
        return self

    @torch.no_grad()
    def refresh_base_norm(self) -> None:
        """Recomputes the norm of each row of W, which DoRA reads; call it when W has changed.

        If the base is sharded, every process must call this.
        """
        adapters = (self, *inactive_adapters(self).values())
        if not self.merged and any(adapter.use_dora for adapter in adapters):
            with whole_parameters(self.base_layer):
                norm = dora.base_norm(self.base_weight)
            self.register_buffer("base_norm", norm, persistent=False)

    def weight_norm(self) -> Tensor:
        """The row norms |W + scaling B A| [out_features] in lora_A's dtype, without a gradient."""
        factors = (self.lora_A, self.lora_B, self.scaling)
        return dora.adapted_norm(self.base_weight, self.base_norm, *factors)


def _refresh_after_load(layer: nn.Module, _: object) -> None:
    assert isinstance(layer, NamedAdapters)
    layer.refresh_base_norm()
