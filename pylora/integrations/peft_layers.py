"""PEFT's LoRA layers over pylora's kernels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pylora import functional
from pylora.dropout import dropout_seed
from pylora.integrations import peft_rows
from pylora.integrations.bitsandbytes_layers import OfWeight, stored_weight
from pylora.integrations.peft_base import (
    Parts,
    PeftSwap,
    drop_rate,
    in_compute_dtype,
    in_dtype_of_base,
    why_not_called,
    why_not_input,
)
from pylora.integrations.peft_kept import KeptPeftCall, places_of_parts
from pylora.nn import dora
from pylora.nn.kept import Place, places_of
from pylora.ops import run_output


class PeftLoraSwap(PeftSwap):
    """PEFT's LoRA over an nn.Linear, a Linear4bit or an NF4Linear: base and adapter in one op."""

    def __init__(self, name: str, verify: int) -> None:
        super().__init__(name, verify)
        self._kept: KeptPeftCall | None = None
        self._norm: OfWeight[Tensor] = OfWeight()  # of the rows of the base, for DoRA
        self._dora_weight: Any = None
        self._dora_norm: Tensor | None = None
        self._dora_calls = dora.DoraCalls()
        self._trained_by_row = False

    def forward(self, module: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        kept = self._kept
        if kept is not None and not (args or kwargs or self._trained_by_row):
            y = None if torch.compiler.is_compiling() else kept.result(module, x)
            if y is not None:
                return y
        names = kwargs.get("adapter_names")
        if names is not None or self._trained_by_row:
            self._refuse_other_recomputation(module, names)
        if names is None or args or len(kwargs) > 1:
            return super().forward(module, x, *args, **kwargs)
        module._check_forward_args(x, adapter_names=names)  # raises PEFT's own errors
        adapters = [name for name in dict.fromkeys(names) if name in module.lora_A]
        why_not = self._why_not_by_row(module, adapters, x)
        if why_not is not None:
            return self.as_before(module, why_not, x, adapter_names=names)
        weight = self.weight_of(module.base_layer)
        arguments = peft_rows.arguments(module, adapters, names, x)
        given = in_compute_dtype(module.base_layer, x)
        y = functional.multi_lora_linear(given, weight, **arguments)
        if self.must_verify():
            self.verify(y, functional.multi_lora_linear, weight, given.to(y.dtype), **arguments)
        return in_dtype_of_base(module.base_layer, y, x)

    def _refuse_other_recomputation(self, module: nn.Module, names: Any) -> None:
        """Raises RuntimeError if a backward computes a batch with adapter names again without them.

        Transformers' gradient checkpointing gets the names again (see `peft_rows`). A checkpoint
        that another library makes does not, and its gradients would be those of other adapters.
        """
        if torch.compiler.is_compiling():
            return
        if torch._C._current_graph_task_id() == -1:  # this is no backward
            self._trained_by_row = names is not None and module.training
        elif names is None:
            raise RuntimeError(
                f"{self.name} was called with adapter_names, and a checkpoint computes it again "
                "without them: use the model's gradient_checkpointing_enable()"
            )

    def why_not_adapters(self, module: Any, active: Sequence[str]) -> str | None:
        for name in active if module.lora_variant else ():
            variant = type(module.lora_variant.get(name)).__name__
            if variant not in ("NoneType", "DoraLinearVariant"):
                return f"adapter {name} is {variant}"
            if variant != "NoneType" and len(active) > 1:
                return f"adapter {name} is {variant}, and others are active as well"
        return None

    def parts_of(self, module: Any, name: str) -> Parts:
        return peft_rows.parts_of(module, name)

    def why_not_fused(self, module: Any, active: Sequence[str], parts: Parts, x: Any) -> str | None:
        return self.why_not_adapters(module, active) or _why_not_linear(module, parts, x)

    def _why_not_by_row(self, module: Any, adapters: list[str], x: Any) -> str | None:
        if module.disable_adapters or not adapters:
            return "its adapters are disabled, or no row has one of them"
        for name in adapters:
            if name in module.lora_variant:
                return f"adapter {name} is {type(module.lora_variant[name]).__name__}"
            parts = self.parts_of(module, name)
            if drop_rate(parts.dropout):
                return "rows with adapters of their own are trained with dropout"
            if parts.B.bias is not None:
                return f"the lora_B of adapter {name} has a bias, and each row has its own adapter"
            why_not = _why_not_linear(module, parts, x)
            if why_not is not None:
                return why_not
        if len({module.lora_A[name].weight.dtype for name in adapters}) > 1:
            return "the adapters of its rows have different dtypes"
        return None

    def with_base(self, module: Any, name: str, parts: Parts, x: Tensor) -> Tensor:
        if name in module.lora_variant:
            return self._dora(module, name, parts, x)
        return self._fused(module, name, parts, x)

    def without_base(self, module: Any, name: str, x: Tensor) -> Tensor:
        A, B = module.lora_A[name], module.lora_B[name]
        dropped: Tensor = module.lora_dropout[name](x.to(A.weight.dtype))
        return B(A(dropped)) * module.scaling[name]

    def _fused(self, module: Any, name: str, parts: Parts, x: Tensor) -> Tensor:
        base, A, B, dropout = parts
        p = drop_rate(dropout)
        weight = self.weight_of(base)
        given = in_compute_dtype(base, x)
        arguments = {
            "lora_A": A.weight,
            "lora_B": B.weight,
            "scaling": module.scaling[name],
            "bias": base.bias,
            "dropout_p": p,
            "seed": dropout_seed(None, x.device) if p else None,
            "lora_B_bias": B.bias,
        }
        call_record = functional.CALLS["lora_linear"](given, weight, **arguments)
        y = run_output(call_record)
        if self.must_verify():
            self.verify(y, functional.lora_linear, weight, call_record.x, **arguments)
        elif not torch.compiler.is_compiling():
            self._kept = KeptPeftCall.of(module, name, parts, x, call_record)
        return in_dtype_of_base(base, y, x)

    def _dora(self, module: Any, name: str, parts: Parts, x: Tensor) -> Tensor:
        base, A, B, dropout = parts
        scaling, magnitude = module.scaling[name], module.lora_magnitude_vector[name].weight
        weight = self.weight_of(base)
        given = in_compute_dtype(base, x)
        factors = (A.weight, B.weight, scaling)
        stored = stored_weight(base)
        version = 0 if stored.is_inference() else stored._version
        base_norm = self._norm.get(base, lambda _: dora.base_norm(weight), version)
        if weight is not self._dora_weight or base_norm is not self._dora_norm:
            self._dora_weight, self._dora_norm = weight, base_norm
            self._dora_calls = dora.DoraCalls()
        dropped = dropout(given) if drop_rate(dropout) else None
        y = None if dropped is not None else self._dora_calls.again(given, scaling)
        if y is None:
            places = partial(_dora_places, module, name, parts)
            others = (magnitude, base.bias, places)
            y = self._dora_calls.linear(given, weight, base_norm, *factors, *others, dropped)
        if self.must_verify():
            names = ("lora_A", "lora_B", "scaling", "magnitude", "bias", "dropped")
            values = (*factors, magnitude, base.bias, dropped)
            rest = dict(zip(names, values, strict=True))
            self.verify(y, dora_in_torch, weight, given.to(y.dtype), **rest)
        return in_dtype_of_base(module.base_layer, y, x)


def _dora_places(module: Any, name: str, parts: Parts) -> tuple[Place, ...] | None:
    """The places of the tensors of a call with DoRA; None if they must not be kept."""
    places = places_of_parts(parts)
    of_magnitude = places_of(module.lora_magnitude_vector[name], ("weight",))
    return None if places is None or of_magnitude is None else (*places, *of_magnitude)


def _why_not_linear(module: Any, parts: Parts, x: Any) -> str | None:
    """Why this adapter cannot be computed with the base layer; None if it can."""
    base, A, B, dropout = parts
    why_not = why_not_called(parts, dropout)
    if why_not is not None:
        return why_not
    if type(A) is not nn.Linear or type(B) is not nn.Linear or A.bias is not None:
        return f"its lora_A and lora_B are {type(A).__name__} and {type(B).__name__}"
    return why_not_input(module, base, x)


def dora_in_torch(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    magnitude: Tensor,
    bias: Tensor | None,
    dropped: Tensor | None,
) -> Tensor:
    """DoRA as its paper writes it, with a dense W + scaling B A: the reference of `verify`."""
    linear = nn.functional.linear
    adapted = weight.to(lora_A.dtype) + scaling * (lora_B @ lora_A)
    rescale = magnitude / torch.linalg.vector_norm(adapted, dim=1)
    given = x if dropped is None else dropped
    low_rank = linear(linear(given.to(lora_A.dtype), lora_A), lora_B) * scaling
    delta = (rescale - 1) * linear(given, weight) + rescale * low_rank
    return linear(x, weight, bias) + delta.to(x.dtype)
