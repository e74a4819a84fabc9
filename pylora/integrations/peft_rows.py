"""PEFT's `adapter_names`: each row of a batch has its own adapter, in inference and in training.

PEFT takes the names in eval mode only. Its layers could train with them, so what stands in the way
is a check in `LoraModel._enable_peft_forward_hooks`, which hands the names to the layers. Here that
check is passed, and gradient checkpointing gets the names for the second time that it computes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache, wraps
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from pylora.integrations.peft_base import Parts

_HOOKS = "_enable_peft_forward_hooks"
_CHECKPOINT = "_gradient_checkpointing_func"  # transformers' name in its layers


def arguments(module: Any, adapters: list[str], names: Sequence[str], x: Tensor) -> dict[str, Any]:
    """The arguments of `functional.multi_lora_linear` behind x and the weight.

    adapters    the adapters of this layer that are among `names`
    names       for each x[i] its adapter; the base alone if this layer has no such adapter

    Adapters of a lower rank than others are padded with zeros.
    """
    parts = [Parts.of(module, name) for name in adapters]
    rank = max(part.A.weight.shape[0] for part in parts)
    pad = nn.functional.pad
    A = [pad(part.A.weight, (0, 0, 0, rank - part.A.weight.shape[0])) for part in parts]
    B = [pad(part.B.weight, (0, rank - part.B.weight.shape[1])) for part in parts]
    index = {name: place for place, name in enumerate(adapters)}
    scalings = tuple(float(module.scaling[name]) for name in adapters)
    return {
        "lora_A": torch.stack(A),
        "lora_B": torch.stack(B),
        "adapter_ids": _tensor(tuple(index.get(name, -1) for name in names), None, x.device),
        "scalings": _tensor(scalings, torch.promote_types(A[0].dtype, torch.float32), x.device),
        "bias": parts[0].base.bias,
    }


def _tensor(values: tuple[float, ...], dtype: torch.dtype | None, device: torch.device) -> Tensor:
    """The values as a tensor; the layers of a model share it, because copies to a GPU wait."""
    make = _tensor_once.__wrapped__ if torch.compiler.is_compiling() else _tensor_once
    return make(values, dtype, device)


@lru_cache(maxsize=256)
def _tensor_once(
    values: tuple[float, ...], dtype: torch.dtype | None, device: torch.device
) -> Tensor:
    with torch.inference_mode(False):  # a training step may come after inference
        return torch.tensor(values, dtype=dtype, device=device)


def _lora_model() -> Any:
    """PEFT's LoraModel; None if PEFT has not been imported."""
    return getattr(sys.modules.get("peft.tuners.lora.model"), "LoraModel", None)


def allow_training(model: nn.Module) -> None:
    """Lets a LoraModel of PEFT take `adapter_names` in training mode too."""
    if type(model) is _lora_model() and not _allows_training(model):
        model.__dict__[_HOOKS] = MethodType(_forward_hooks, model)


def forbid_training(model: nn.Module) -> None:
    """Undoes `allow_training`."""
    if _allows_training(model):
        del model.__dict__[_HOOKS]


def _allows_training(model: nn.Module) -> bool:
    return getattr(model.__dict__.get(_HOOKS), "__func__", None) is _forward_hooks


def allow_training_everywhere() -> None:
    """Does what `allow_training` does in every LoraModel of PEFT, also in those yet to come."""
    cls = _lora_model()
    own = getattr(cls, _HOOKS)
    if not hasattr(own, "_pylora_own"):

        @wraps(own)
        def hooks(model: Any, *args: Any, **kwargs: Any) -> Any:
            if type(model) is cls:
                return _in_training(own, model, *args, **kwargs)
            return own(model, *args, **kwargs)  # AdaLoRA's layers do not take adapter names

        hooks._pylora_own = own  # type: ignore[attr-defined]
        setattr(cls, _HOOKS, hooks)


def forbid_training_everywhere() -> None:
    """Undoes `allow_training_everywhere`."""
    cls = _lora_model()
    own = getattr(getattr(cls, _HOOKS, None), "_pylora_own", None)
    if own is not None:
        setattr(cls, _HOOKS, own)


def _forward_hooks(model: Any, *args: Any, **kwargs: Any) -> Any:
    return _in_training(getattr(type(model), _HOOKS), model, *args, **kwargs)


@contextmanager
def _in_training(own: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Iterator[None]:
    """`own(model, ...)`, the context in which PEFT's layers get the names of the rows."""
    names = kwargs.get("adapter_names")
    if names is None or not model.training:
        with own(model, *args, **kwargs):
            yield
        return
    with ExitStack() as stack:
        model.training = False  # PEFT's check reads it, and nothing else does until it is set back
        try:
            stack.enter_context(own(model, *args, **kwargs))
        finally:
            model.training = True
        stack.enter_context(_checkpoints_with_names(model, names))
        yield


@contextmanager
def _checkpoints_with_names(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Lets what is checkpointed in this context be computed again with the same names.

    A checkpoint computes again in the backward, when this context and the hooks of PEFT are gone.
    """
    in_context = True
    layers = [m for m in model.modules() if _CHECKPOINT in m.__dict__]
    own = [layer.__dict__[_CHECKPOINT] for layer in layers]

    def with_names(layer: nn.Module, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        def checkpointed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            def again(*inner: Any, **options: Any) -> Any:
                if in_context:
                    return function(*inner, **options)
                with _names_in(layer, names):
                    return function(*inner, **options)

            return checkpoint(again, *args, **kwargs)

        return checkpointed

    for layer, checkpoint in zip(layers, own, strict=True):
        layer.__dict__[_CHECKPOINT] = with_names(layer, checkpoint)
    try:
        yield
    finally:
        in_context = False
        for layer, checkpoint in zip(layers, own, strict=True):
            layer.__dict__[_CHECKPOINT] = checkpoint


@contextmanager
def _names_in(layer: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Hands the names to every layer of PEFT inside `layer` that takes them."""
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    def hand_over(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "adapter_names": names}

    with ExitStack() as stack:
        for module in layer.modules():
            if isinstance(module, (LoraLayer, AuxiliaryTrainingWrapper)):
                handle = module.register_forward_pre_hook(hand_over, with_kwargs=True)
                stack.callback(handle.remove)
        yield
