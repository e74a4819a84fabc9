"""PEFT's LoRA layers over pylora's kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pylora import functional
from pylora.calls import Dropout
from pylora.integrations.bitsandbytes_layers import BitsandbytesWeight, compute_dtype, why_not_nf4
from pylora.integrations.swaps import Swap, has_hooks, is_swapped, why_not_replaceable
from pylora.nf4_weight import NF4Weight
from pylora.nn import NF4Linear, dora
from pylora.nn.conv1d import dense_weight, is_conv1d
from pylora.nn.kept import Kept, Place
from pylora.ops import run

# Subclasses of nn.Linear with a forward of their own that computes the same.
_LIKE_LINEAR = ("FalconLinear",)


class _Parts(NamedTuple):
    """The modules that one adapter of a LoRA layer of PEFT computes with."""

    base: Any
    A: Any
    B: Any
    dropout: Any

    @classmethod
    def of(cls, module: nn.Module, adapter: str) -> _Parts:
        """The parts of the adapter with this name."""
        held: Any = module._modules
        by_adapter = (held[name]._modules for name in ("lora_A", "lora_B", "lora_dropout"))
        return cls(held["base_layer"], *(modules[adapter] for modules in by_adapter))


class PeftLoraSwap(Swap):
    """PEFT's LoRA over an nn.Linear, a Linear4bit or an NF4Linear: base and adapter in one op."""

    def __init__(self, name: str, verify: int) -> None:
        super().__init__(name, verify)
        self._weight = BitsandbytesWeight()
        self._kept: Kept | None = None
        self._kept_for: tuple[Any, ...] = ()
        self._norm: Tensor | None = None  # of the rows of the base, for DoRA
        self._norm_of: tuple[Any, Any] = (None, None)
        self._norm_memory: tuple[int, int] = (0, 0)

    def why_not(self, module: Any) -> str | None:
        reason = why_not_replaceable(module)
        if reason is not None:
            return reason
        base = module.get_base_layer()
        if isinstance(base, NF4Linear):
            return why_not_replaceable(base)
        if type(base).__name__ == "Linear4bit":
            return why_not_replaceable(base) or why_not_nf4(base)
        like_linear = type(base).__name__ in _LIKE_LINEAR or is_conv1d(base)
        if not like_linear and getattr(type(base), "forward", None) is not nn.Linear.forward:
            return f"its base layer is a {type(base).__name__}"
        return why_not_replaceable(base)

    def forward(self, module: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            why = f"it was called with {', '.join(kwargs) or 'more arguments'}"
            return self.as_before(module, why, x, *args, **kwargs)
        if module.disable_adapters or module.merged:
            return self.as_before(module, "its adapters are disabled or merged", x)
        active = [name for name in module.active_adapters if name in module.lora_A]
        if not active:
            return self.as_before(module, "no adapter of it is active", x)
        parts = _Parts.of(module, active[0])
        why_not = self._why_not_fused(module, parts, active, x)
        if why_not is not None:
            return self.as_before(module, why_not, x)
        if active[0] in module.lora_variant:
            return self._dora(module, active[0], parts, x)
        y = self._fused(parts, module.scaling[active[0]], x)
        for name in active[1:]:
            A, B = module.lora_A[name], module.lora_B[name]
            dropped = module.lora_dropout[name](x.to(A.weight.dtype))
            y = y + (B(A(dropped)) * module.scaling[name]).to(y.dtype)
        return y

    def _why_not_fused(self, module: Any, parts: _Parts, active: list[str], x: Any) -> str | None:
        for name in active if module.lora_variant else ():
            variant = type(module.lora_variant.get(name)).__name__
            if variant not in ("NoneType", "DoraLinearVariant"):
                return f"adapter {name} is {variant}"
            if variant != "NoneType" and len(active) > 1:
                return f"adapter {name} is {variant}, and others are active as well"
        base, A, B, dropout = parts
        for part in parts:
            if has_hooks(part):
                return "a hook must see the calls of its parts"
            if "forward" in part.__dict__ and not is_swapped(part):
                return "another library has replaced the forward of one of its parts"
        if type(A) is not nn.Linear or type(B) is not nn.Linear or A.bias is not None:
            return f"its lora_A and lora_B are {type(A).__name__} and {type(B).__name__}"
        if type(dropout) not in (nn.Dropout, nn.Identity):
            return f"its dropout is a {type(dropout).__name__}"
        if not isinstance(x, Tensor):
            return f"its input is a {type(x).__name__}"
        if hasattr(base, "compute_dtype"):
            wanted = compute_dtype(base, x)
        elif isinstance(base, NF4Linear):
            wanted = x.dtype
        else:
            wanted = base.weight.dtype
        if x.dtype != wanted and not torch.is_autocast_enabled(x.device.type):
            return f"its input is {x.dtype} and it computes in {wanted}"
        return None

    def _fused(self, parts: _Parts, scaling: float, x: Tensor) -> Tensor:
        base, A, B, dropout = parts
        p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        state = getattr(stored_weight(base), "quant_state", None)
        kept_for = (base, A, B, state)
        must_verify = self.must_verify()
        compiling = torch.compiler.is_compiling()
        seed = functional.dropout_seed(None, x.device) if p else None
        if self._kept is not None and not compiling and not must_verify:
            same = all(now is then for now, then in zip(kept_for, self._kept_for, strict=True))
            call = self._kept.call_with(x) if same else None
            if call is not None:
                return call.run(x, scaling, None if seed is None else Dropout(p, seed))
        weight = self._weight_of(base)
        given = x
        if state is not None and torch.is_autocast_enabled(x.device.type):
            given = x.to(compute_dtype(base, x))
        arguments = {
            "lora_A": A.weight,
            "lora_B": B.weight,
            "scaling": scaling,
            "bias": base.bias,
            "dropout_p": p,
            "seed": seed,
            "lora_B_bias": B.bias,
        }
        call_record = functional.CALLS["lora_linear"](given, weight, **arguments)
        if not compiling:
            self._kept = Kept.of(_places(base, A, B), x, call_record)
            self._kept_for = kept_for
        y, _ = run(call_record)
        if must_verify:
            self.verify(y, functional.lora_linear, weight, call_record.x, **arguments)
        return y if state is None else y.to(x.dtype)

    def _dora(self, module: Any, name: str, parts: _Parts, x: Tensor) -> Tensor:
        base, A, B, dropout = parts
        scaling, magnitude = module.scaling[name], module.lora_magnitude_vector[name].weight
        packed = getattr(stored_weight(base), "quant_state", None) is not None
        weight = self._weight_of(base)
        given = x.to(compute_dtype(base, x)) if packed else x
        factors = (A.weight, B.weight, scaling)
        norm = dora.adapted_norm(weight, self._base_norm(base, weight), *factors)
        dropped = dropout(given) if isinstance(dropout, nn.Dropout) and dropout.training else None
        rescale = magnitude / norm
        y = dora.dora_linear(given, weight, *factors, rescale, base.bias, dropped)
        if self.must_verify():
            names = ("lora_A", "lora_B", "scaling", "magnitude", "bias", "dropped")
            values = (*factors, magnitude, base.bias, dropped)
            rest = dict(zip(names, values, strict=True))
            self.verify(y, dora_in_torch, weight, given.to(y.dtype), **rest)
        return y.to(x.dtype) if packed else y

    def _weight_of(self, base: Any) -> Tensor | NF4Weight:
        if isinstance(base, NF4Linear):
            return base.nf4_weight
        packed = getattr(base.weight, "quant_state", None) is not None
        return self._weight.of(base) if packed else dense_weight(base)

    def _base_norm(self, base: Any, weight: Tensor | NF4Weight) -> Tensor:
        """The row norms of the base, computed again if its weight has changed."""
        if torch.compiler.is_compiling():
            return dora.base_norm(weight)
        stored = stored_weight(base)
        held = (stored, getattr(stored, "quant_state", None))
        memory = (stored.data_ptr(), stored._version)
        same = memory == self._norm_memory and held[0] is self._norm_of[0]
        if self._norm is None or not same or held[1] is not self._norm_of[1]:
            self._norm, self._norm_of, self._norm_memory = dora.base_norm(weight), held, memory
        return self._norm


def stored_weight(base: Any) -> Tensor:
    """The tensor that holds the weight of a base layer, packed or not."""
    return base.packed_weight if isinstance(base, NF4Linear) else base.weight


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


def _places(base: nn.Module, *factors: nn.Module) -> tuple[Place, ...] | None:
    if is_conv1d(base):  # a call reads a view of its weight, which must be taken each time
        return None
    if isinstance(base, NF4Linear):
        of_base = base.places()
        if of_base is None:
            return None
        places = list(of_base)
    else:
        is_packed = hasattr(base.weight, "quant_state")
        places = [Place(base._parameters, "weight", is_packed), Place(base._parameters, "bias")]
    for layer in factors:
        places += [Place(layer._parameters, name) for name in ("weight", "bias")]
    return tuple(places)
