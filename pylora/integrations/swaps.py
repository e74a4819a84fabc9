"""How a module of another library computes through pylora, while it stays the module it was.

A `Swap` lies in the module beside its parameters, and the module's `forward` calls it. The swap
decides call by call: what pylora computes goes through one fused op, and anything else through the
forward of the module's own class.
"""

from __future__ import annotations

import logging
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pylora import functional
from pylora.calls import Dropout
from pylora.dispatch import use_backend
from pylora.nf4_weight import NF4Weight
from pylora.nn.kept import Kept, Place
from pylora.ops import run
from pylora.testing import assert_as_accurate_as_torch

logger = logging.getLogger(__name__)

_SWAP = "_pylora_swap"
# Subclasses of nn.Linear with a forward of their own that computes the same.
_LIKE_LINEAR = ("FalconLinear",)
# The own forward of each class whose forward `pylora.patch` has exchanged.
OWN_FORWARD: dict[type, Any] = {}


class Swap:
    """What the swaps of all kinds of modules share."""

    def __init__(self, name: str, verify: int) -> None:
        """
        name      the name of the module in its model, for messages
        verify    how many calls are compared with the reference
        """
        self.name, self._to_verify, self._verify = name, verify, verify
        self._said: set[str] = set()

    def __deepcopy__(self, memo: object) -> Swap:
        return type(self)(self.name, self._verify)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.name, self._verify)

    def why_not(self, module: nn.Module) -> str | None:
        """Why no call of this module can go through pylora; None if it can."""
        raise NotImplementedError

    def forward(self, module: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        """What `module.forward` returns."""
        raise NotImplementedError

    def as_before(self, module: nn.Module, why: str, *args: Any, **kwargs: Any) -> Any:
        """Calls the forward of the module's own class; the log says why, once for each reason."""
        if why not in self._said and not torch.compiler.is_compiling():
            self._said.add(why)
            logger.info("%s computes as before: %s", self.name, why)
        own_forward = OWN_FORWARD.get(type(module), type(module).forward)
        return own_forward(module, *args, **kwargs)

    def must_verify(self) -> bool:
        """True for the first calls, as many as were asked for."""
        if self._to_verify == 0 or torch.compiler.is_compiling():
            return False
        self._to_verify -= 1
        return True

    def verify(self, y: Tensor, x: Tensor, weight: Any, arguments: dict[str, Any]) -> None:
        """Raises AssertionError that names the layer unless `y` satisfies the numerics rule."""

        def reference(**tensors: Any) -> Tensor:
            with use_backend("reference"):
                if "lora_A" in tensors:
                    return functional.lora_linear(**tensors)
                return nn.functional.linear(tensors["x"], tensors["weight"], tensors["bias"])

        dense = weight.dequantize(x.dtype) if isinstance(weight, NF4Weight) else weight
        if arguments.get("bias") is not None:
            arguments = {**arguments, "bias": arguments["bias"].to(x.dtype)}
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            try:
                assert_as_accurate_as_torch(
                    y.detach(), reference, x=x, weight=dense.to(x.dtype), **arguments
                )
            except AssertionError as error:
                raise AssertionError(f"{self.name} is not as accurate as torch: {error}") from None


def forward(module: nn.Module, x: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward of a swapped module. A pickled model finds its class's forward by this name."""
    return module.__dict__[_SWAP].forward(module, x, *args, **kwargs)


def install(module: nn.Module, swap: Swap) -> None:
    """Makes the module compute through `swap`."""
    module.__dict__[_SWAP] = swap
    module.__dict__["forward"] = MethodType(forward, module)


def remove(module: nn.Module) -> bool:
    """Gives the module its own forward back; false if it was not swapped."""
    if module.__dict__.pop(_SWAP, None) is None:
        return False
    module.__dict__.pop("forward", None)  # a patched class exchanges its forward for all modules
    return True


def is_swapped(module: nn.Module) -> bool:
    """True if the module computes through pylora."""
    return _SWAP in module.__dict__


def has_hooks(module: nn.Module) -> bool:
    """True if a hook must run when the module is called."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def why_not_replaceable(module: nn.Module) -> str | None:
    """Why the forward of a module cannot be exchanged; None if it can."""
    hook = getattr(module, "_hf_hook", None)
    if getattr(hook, "offload", False):
        return "accelerate offloads its weights"
    if "forward" in module.__dict__ and not is_swapped(module):
        return "another library has replaced its forward"
    return None


class _BitsandbytesWeight:
    """The NF4Weight of a Linear4bit, made anew when the layer has another parameter or state."""

    def __init__(self) -> None:
        self._param: Any = None
        self._address, self._state = 0, None
        self._weight: NF4Weight | None = None

    def of(self, layer: Any) -> NF4Weight:
        """The weight, which shares the bytes of the layer; raises ValueError if it has none."""
        param = layer.weight
        state = getattr(param, "quant_state", None) or layer.quant_state
        if torch.compiler.is_compiling():
            return NF4Weight.from_bitsandbytes(layer)
        known = param is self._param and state is self._state
        if self._weight is None or not known or param.data_ptr() != self._address:
            self._weight = NF4Weight.from_bitsandbytes(layer)
            self._param, self._state, self._address = param, state, param.data_ptr()
        return self._weight


def why_not_nf4(layer: Any) -> str | None:
    """Why pylora cannot compute with the weight of a Linear4bit; None if it can."""
    try:
        NF4Weight.from_bitsandbytes(layer)
    except (TypeError, ValueError) as error:
        return str(error)
    return None


class Linear4bitSwap(Swap):
    """bitsandbytes' Linear4bit with NF4: y = x @ W^T + bias in the layer's compute dtype."""

    def __init__(self, name: str, verify: int) -> None:
        super().__init__(name, verify)
        self._weight = _BitsandbytesWeight()

    def why_not(self, module: nn.Module) -> str | None:
        return why_not_replaceable(module) or why_not_nf4(module)

    def forward(self, module: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            weight = self._weight.of(module)
        except ValueError as error:  # it was quantized anew, or repacked, since it was swapped
            return self.as_before(module, str(error), x, *args, **kwargs)
        dtype = compute_dtype(module, x)
        given = x.to(dtype)
        y = functional.nf4_linear(given, weight, module.bias)
        if self.must_verify():
            self.verify(y, given, weight, {"bias": module.bias})
        return y.to(x.dtype)


def compute_dtype(layer: Any, x: Tensor) -> torch.dtype:
    """The dtype in which a Linear4bit computes, which its first input may decide."""
    if not layer.compute_type_is_set:
        layer.set_compute_type(x)
        layer.compute_type_is_set = True
    return x.dtype if layer.compute_dtype is None else layer.compute_dtype


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
    """PEFT's LoRA over an nn.Linear or a Linear4bit: base and adapter in one op."""

    def __init__(self, name: str, verify: int) -> None:
        super().__init__(name, verify)
        self._weight = _BitsandbytesWeight()
        self._kept: Kept | None = None
        self._kept_for: tuple[Any, ...] = ()

    def why_not(self, module: Any) -> str | None:
        reason = why_not_replaceable(module)
        if reason is not None:
            return reason
        base = module.get_base_layer()
        if type(base).__name__ == "Linear4bit":
            return why_not_replaceable(base) or why_not_nf4(base)
        own_forward = getattr(type(base), "forward", None)
        if own_forward is not nn.Linear.forward and type(base).__name__ not in _LIKE_LINEAR:
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
        y = self._fused(parts, module.scaling[active[0]], x)
        for name in active[1:]:
            A, B = module.lora_A[name], module.lora_B[name]
            dropped = module.lora_dropout[name](x.to(A.weight.dtype))
            y = y + (B(A(dropped)) * module.scaling[name]).to(y.dtype)
        return y

    def _why_not_fused(self, module: Any, parts: _Parts, active: list[str], x: Any) -> str | None:
        if module.lora_variant:
            for name in active:
                if name in module.lora_variant:
                    return f"adapter {name} is {type(module.lora_variant[name]).__name__}"
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
        else:
            wanted = base.weight.dtype
        if x.dtype != wanted and not torch.is_autocast_enabled(x.device.type):
            return f"its input is {x.dtype} and it computes in {wanted}"
        return None

    def _fused(self, parts: _Parts, scaling: float, x: Tensor) -> Tensor:
        base, A, B, dropout = parts
        p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        state = getattr(base.weight, "quant_state", None)
        kept_for = (base, A, B, state)
        must_verify = self.must_verify()
        compiling = torch.compiler.is_compiling()
        seed = functional.dropout_seed(None, x.device) if p else None
        if self._kept is not None and not compiling and not must_verify:
            same = all(now is then for now, then in zip(kept_for, self._kept_for, strict=True))
            call = self._kept.call_with(x) if same else None
            if call is not None:
                return call.run(x, scaling, None if seed is None else Dropout(p, seed))
        weight = base.weight if state is None else self._weight.of(base)
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
            self.verify(y, call_record.x, weight, arguments)
        return y if state is None else y.to(x.dtype)


def _places(base: nn.Module, *factors: nn.Module) -> tuple[Place, ...]:
    is_packed = hasattr(base.weight, "quant_state")
    places = [Place(base._parameters, "weight", is_packed), Place(base._parameters, "bias")]
    for layer in factors:
        places += [Place(layer._parameters, name) for name in ("weight", "bias")]
    return tuple(places)
