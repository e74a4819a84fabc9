"""Argument checks: every message names the argument, what it was and what it must be."""

from __future__ import annotations

from collections.abc import Collection
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from pylora.backends.backend import under_autocast
from pylora.nf4 import QUANTIZABLE_DTYPES
from pylora.nf4_weight import NF4Weight, check_floating_dtype
from pylora.ops.transforms import transformed
from pylora.reference.activation import ACTIVATIONS, GATED_ACTIVATIONS

# The names of activations in the configurations of transformers and AdapterHub, and our names.
_ALIASES = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "swish": "silu"}

_OptionalTensor = TypeVar("_OptionalTensor", Tensor, Tensor | None)


def tensor(name: str, value: object) -> None:
    """Raises TypeError unless `value` is a Tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {type(value).__name__}; it must be a Tensor")


def quantizable(name: str, value: Tensor) -> None:
    """Raises TypeError unless `value` is a tensor whose dtype can be quantized to NF4."""
    tensor(name, value)
    if value.dtype not in QUANTIZABLE_DTYPES:
        raise TypeError(f"{name} has dtype {value.dtype}; it must be float32, float16 or bfloat16")


def finite_in(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Raises ValueError unless `tensor` has numbers that are finite in the floating-point dtype."""
    if not tensor.dtype.is_floating_point:
        raise ValueError(f"{name} has dtype {tensor.dtype}; it must be floating point")
    if not tensor.to(dtype).isfinite().all():
        raise ValueError(
            f"{name} must hold finite numbers of {dtype}, but holds NaN, inf or a number beyond "
            "them"
        )


def finite(name: str, value: Tensor) -> None:
    """Raises ValueError if elements are not finite; it says how many and where the first one is."""
    if value.device.type == "meta" or isinstance(value, FakeTensor) or transformed():
        return  # there are no elements to read
    # A finite sum has no non-finite term, so one pass settles it unless the sum overflows.
    if torch.isfinite(value.sum()):
        return
    bad = ~torch.isfinite(value)
    if bad.any():
        count = int(bad.sum())
        first = tuple(bad.nonzero()[0].tolist())
        raise ValueError(
            f"{name} has {count} non-finite element{'s' if count > 1 else ''}, the first at index "
            f"{first}; all elements must be finite"
        )


floating_dtype = check_floating_dtype


def nf4_weight(name: str, value: object) -> None:
    """Raises TypeError unless `value` is an NF4Weight."""
    if not isinstance(value, NF4Weight):
        raise TypeError(f"{name} is {type(value).__name__}; it must be an NF4Weight")


def weight(name: str, value: object) -> None:
    """Raises unless `value` is a Tensor or an NF4Weight [out_features, in_features]."""
    if not isinstance(value, (Tensor, NF4Weight)):
        raise TypeError(f"{name} is {type(value).__name__}; it must be a Tensor or an NF4Weight")
    matrix(name, value)


def matrix(name: str, value: Tensor | NF4Weight) -> None:
    """Raises ValueError unless `value` has two dimensions."""
    if len(value.shape) != 2:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}; it must be [out_features, in_features]"
        )


def why_not_plain(linear: nn.Module) -> str | None:
    """Why a linear layer's weight is more than the values of a parameter; None if it is not.

    A computed weight would no longer be computed if another module used it, and a subclass of
    Tensor, such as those of quantization packages, may hold anything in any form.
    """
    for held in (linear._parameters, linear._buffers):
        if "weight" in held:
            kind = type(held["weight"])
            plain = kind in (Tensor, nn.Parameter) or issubclass(kind, FakeTensor)
            return None if plain else f"its weight is a {kind.__name__}, a subclass of Tensor"
    return "its weight is computed in each forward, as weight_norm does"


def plain_weight(name: str, linear: nn.Module) -> None:
    """Raises TypeError unless the weight of `linear` is a plain parameter."""
    reason = why_not_plain(linear)
    if reason is not None:
        raise TypeError(
            f"{name} is {type(linear).__name__}, and {reason}; it must be a plain parameter"
        )


def activations(
    name: str, x: Tensor, in_features: int, device: torch.device, name_of_weight: str
) -> Tensor:
    """Checks x [..., in_features]; returns it, cast if autocast casts the inputs of a matmul."""
    token_vectors(name, x, in_features, device, name_of_weight)
    if x.dtype != torch.float64 and under_autocast(x.device.type):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def token_vectors(
    name: str,
    x: Tensor,
    features: int,
    device: torch.device,
    name_of_weight: str,
    name_of_features: str = "in_features",
) -> None:
    """Raises unless x is a floating-point tensor [..., features] on the weight's device."""
    tensor(name, x)
    if not x.dtype.is_floating_point:
        raise TypeError(f"{name} has dtype {x.dtype}; it must be a floating-point dtype")
    if x.dim() == 0 or x.shape[-1] != features:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}; "
            f"its last dimension must be {name_of_features} = {features}"
        )
    if x.device != device:
        if device.type == "meta":
            raise ValueError(
                f"{name} is on {x.device}, but {name_of_weight} is on the meta device and has no "
                "values; they must be loaded. If accelerate offloads the model, it must load a "
                'LoRA layer as a whole: preload_module_classes=["LoRALinear"]'
            )
        raise ValueError(
            f"{name} is on {x.device}; it must be on {device}, where {name_of_weight} is"
        )


def low_rank(tensor: _OptionalTensor, x: Tensor) -> _OptionalTensor:
    """A tensor of a low-rank path, cast to x's dtype under autocast, which casts the inputs of
    every matmul; otherwise the tensor as it is."""
    if tensor is None or x.dtype == torch.float64 or not under_autocast(x.device.type):
        return tensor
    return tensor.to(x.dtype)


def same_dtype_as_x(name: str, value: Tensor, x: Tensor) -> Tensor:
    """The dense weight in x's dtype, cast under autocast.

    Raises TypeError if the dtypes differ without autocast.
    """
    if value.dtype == x.dtype:
        return value
    if under_autocast(x.device.type):
        return value.to(x.dtype)
    raise TypeError(f"{name} has dtype {value.dtype}; it must be x's dtype, {x.dtype}")


def vector(
    name: str,
    value: Tensor | None,
    size: int,
    device: torch.device,
    dtype: torch.dtype | None = None,
    name_of_other: str = "lora_A",
) -> None:
    """Raises unless `value` is None or a floating-point tensor [size] on x's device.

    dtype            the dtype that it must have; any floating-point dtype if None
    name_of_other    the tensor that `dtype` is the dtype of
    """
    if value is None:
        return
    tensor(name, value)
    if tuple(value.shape) != (size,):
        raise ValueError(f"{name} has shape {tuple(value.shape)}; it must be ({size},)")
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}; it must be on {device}, where x is")
    if dtype is not None and value.dtype != dtype:
        raise TypeError(
            f"{name} has dtype {value.dtype}; it must be {name_of_other}'s dtype, {dtype}"
        )
    if not value.dtype.is_floating_point:
        raise TypeError(f"{name} has dtype {value.dtype}; it must be a floating-point dtype")


def lora_pair(
    lora_A: Tensor,
    lora_B: Tensor,
    out_features: int,
    in_features: int,
    device: torch.device,
    owner: str = "",
) -> None:
    """Raises unless lora_A is [r, in_features] and lora_B [out_features, r] with r >= 1.

    Both must be on `device` and of the same dtype.

    owner    goes before the names in errors, such as "q."
    """
    name_A, name_B = f"{owner}lora_A", f"{owner}lora_B"
    for name, value in ((name_A, lora_A), (name_B, lora_B)):
        adapter_tensor(name, value, device)
    if lora_A.dim() != 2 or lora_A.shape[0] < 1 or lora_A.shape[1] != in_features:
        raise ValueError(
            f"{name_A} has shape {tuple(lora_A.shape)}; it must be [r, {in_features}] with r >= 1"
        )
    if tuple(lora_B.shape) != (out_features, lora_A.shape[0]):
        raise ValueError(
            f"{name_B} has shape {tuple(lora_B.shape)}; "
            f"it must be ({out_features}, {lora_A.shape[0]})"
        )
    same_dtype(name_B, lora_B, name_A, lora_A)


def bottleneck_weight(name: str, value: Tensor) -> None:
    """Raises unless `value` is a floating-point tensor [bottleneck, hidden], bottleneck >= 1."""
    tensor(name, value)
    if not value.dtype.is_floating_point:
        raise TypeError(f"{name} has dtype {value.dtype}; it must be a floating-point dtype")
    if value.dim() != 2 or value.shape[0] < 1:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}; "
            "it must be [bottleneck, hidden] with bottleneck >= 1"
        )


def adapter_tensor(name: str, value: Tensor, device: torch.device) -> None:
    """Raises unless `value` is a floating-point tensor on `device`, where x is."""
    tensor(name, value)
    if not value.dtype.is_floating_point:
        raise TypeError(f"{name} has dtype {value.dtype}; it must be a floating-point dtype")
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}; it must be on {device}, where x is")


def same_dtype(name: str, value: Tensor, name_of_other: str, other: Tensor) -> None:
    """Raises TypeError unless both tensors have the same dtype."""
    if value.dtype != other.dtype:
        raise TypeError(
            f"{name} has dtype {value.dtype}; it must be {name_of_other}'s dtype, {other.dtype}"
        )


def lora_stacks(
    lora_A: Tensor,
    lora_B: Tensor,
    scalings: Tensor,
    out_features: int,
    in_features: int,
    device: torch.device,
) -> None:
    """Raises unless the tensors are a stack of n >= 1 adapters on `device`.

    lora_A is [n, r, in_features], lora_B [n, out_features, r], scalings [n], and r >= 1. Raises
    ValueError if scalings require grad.
    """
    for name, value in (("lora_A", lora_A), ("lora_B", lora_B), ("scalings", scalings)):
        adapter_tensor(name, value, device)
    if lora_A.dim() != 3 or 0 in lora_A.shape[:2] or lora_A.shape[2] != in_features:
        raise ValueError(
            f"lora_A has shape {tuple(lora_A.shape)}; "
            f"it must be [n, r, {in_features}] with n >= 1 and r >= 1"
        )
    adapters, rank, _ = lora_A.shape
    for name, value, shape in (
        ("lora_B", lora_B, (adapters, out_features, rank)),
        ("scalings", scalings, (adapters,)),
    ):
        if tuple(value.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}; it must be {shape}")
    same_dtype("lora_B", lora_B, "lora_A", lora_A)
    if scalings.requires_grad:
        raise ValueError("scalings requires grad; it must not, no gradient is computed for it")


def adapter_ids(name: str, value: Tensor, x: Tensor) -> Tensor:
    """The ids int64 [tokens] of x [..., in_features]; raises for another dtype, device or shape.

    value    int64 with one id per token, flat or in the shape of x without its last dimension; or
             one id per x[i], which holds for all tokens in x[i]

    The op checks the ids themselves.
    """
    tensor(name, value)
    if value.dtype != torch.int64:
        raise TypeError(f"{name} has dtype {value.dtype}; it must be torch.int64")
    if value.device != x.device:
        raise ValueError(f"{name} is on {value.device}; it must be on {x.device}, where x is")
    leading = x.shape[:-1]
    if value.shape in (leading, (leading.numel(),)):
        return value.reshape(-1)
    if len(leading) > 1 and value.shape == leading[:1]:
        return value.view(-1, *[1] * (len(leading) - 1)).expand(leading).reshape(-1)
    allowed = dict.fromkeys([(leading.numel(),), tuple(leading), tuple(leading[:1])])
    raise ValueError(
        f"{name} has shape {tuple(value.shape)}; it must be {' or '.join(map(str, allowed))}"
    )


def number(name: str, value: object) -> None:
    """Raises TypeError unless float() takes `value` and it is no text.

    Numbers of Python and numpy pass, and so does a tensor with one element.
    """
    if not isinstance(value, (int, float)) and not hasattr(value, "__float__"):
        raise TypeError(f"{name} is {value!r}; it must be a number")


def integer(name: str, value: object, least: int) -> None:
    """Raises ValueError unless `value` is an int of at least `least`."""
    # bool is an int subclass; passing one is a mistake.
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        shown = repr(value) if isinstance(value, (int, float, str)) else type(value).__name__
        raise ValueError(f"{name} is {shown}; it must be an integer >= {least}")


def names(name: str, value: object) -> None:
    """Raises TypeError unless `value` is a string or a collection of strings."""
    if isinstance(value, str):
        return
    if not isinstance(value, Collection) or not all(isinstance(entry, str) for entry in value):
        raise TypeError(f"{name} is {value!r}; it must be a string or a collection of strings")


def probability(name: str, value: float) -> None:
    """Raises unless `value` is a number in [0, 1)."""
    number(name, value)
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} is {value}; it must be in [0, 1)")


def gated_activation(name: str, value: str) -> str:
    """The op's name for the activation of a gated MLP; raises ValueError if there is none."""
    value = _ALIASES.get(value, value)
    if value not in GATED_ACTIVATIONS:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(GATED_ACTIVATIONS)}")
    return value


def activation(name: str, value: str | None) -> str:
    """The op's name for an activation; raises ValueError if there is none. None is the identity."""
    if value is None:
        return "identity"
    value = _ALIASES.get(value, value)
    if value not in ACTIVATIONS:
        raise ValueError(f"{name} is {value!r}; it must be None or one of {', '.join(ACTIVATIONS)}")
    return value
