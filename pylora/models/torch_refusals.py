"""Makes torch say what to do when it refuses pylora's layers.

Tensor parallelism splits nn.Linear and nn.Embedding only, FSDP1 flattens parameters of one floating
point dtype, and FSDP2 shards integer parameters from torch 2.12 on. Torch's errors name neither the
layer's library nor a way to do it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from pylora.models.wrappers import inside
from pylora.nn import LoRALinear, NF4Linear

_EXPLAINED = "_pylora_explains"
_FULLY_SHARD = (
    "torch.distributed.fsdp.fully_shard, after pylora.quantize_model and pylora.add_lora, shards "
    "them (it is FSDP2, which Accelerate uses with fsdp_version: 2)"
)


def explain_refusals() -> None:
    """Changes the errors of torch's classes, if this process is one of a group.

    The import of these classes takes seconds, and only a process of a group uses them.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    for style in (ColwiseParallel, RowwiseParallel):
        _change(style, "_apply", _refusing_our_layers)
    _change(FullyShardedDataParallel, "__init__", _explaining_flattening)
    _change(FSDPParam, "__init__", _explaining_integers)


def _change(kind: Any, name: str, explaining: Callable[[Any], Any]) -> None:
    original = getattr(kind, name)
    if not hasattr(original, _EXPLAINED):
        changed = wraps(original)(explaining(original))
        setattr(changed, _EXPLAINED, True)
        setattr(kind, name, changed)


def _refusing_our_layers(apply: Any) -> Any:
    def _apply(self: Any, module: Any, device_mesh: Any) -> Any:
        layer = inside(module)
        if isinstance(layer, (NF4Linear, LoRALinear)):
            raise NotImplementedError(
                f"{type(self).__name__} cannot split a {type(layer).__name__} of pylora: leave the "
                f"layers of pylora out of the plan of tensor parallelism; {_FULLY_SHARD}"
            )
        return apply(self, module, device_mesh)

    return _apply


def _explaining_flattening(initialize: Any) -> Any:
    def __init__(self: Any, module: Any, *args: Any, **options: Any) -> None:
        try:
            initialize(self, module, *args, **options)
        except ValueError as error:
            reason = str(error)
            of_bytes = "flatten" in reason and ("integer" in reason or "uint8" in reason)
            quantized = any(isinstance(inner, NF4Linear) for inner in module.modules())
            if not of_bytes or not quantized or "pylora" in reason:
                raise
            raise ValueError(
                f"{reason}. The NF4 layers of pylora hold their weights as uint8, which "
                "FullyShardedDataParallel cannot flatten. Give it ignored_states=[p for p in "
                "model.parameters() if p.dtype == torch.uint8], and every process holds all of "
                f"them; {_FULLY_SHARD}"
            ) from error

    return __init__


def _explaining_integers(initialize: Any) -> Any:
    def __init__(self: Any, param: Any, *args: Any, **options: Any) -> None:
        try:
            initialize(self, param, *args, **options)
        except RuntimeError as error:
            if param.is_floating_point() or param.requires_grad or "pylora" in str(error):
                raise
            raise RuntimeError(
                f"{error}. fully_shard of torch {torch.__version__} cannot hold integer "
                "parameters, such as the weights of pylora's NF4 layers: it needs torch 2.12, or "
                "ignored_params={p for p in model.parameters() if p.dtype == torch.uint8}, and "
                "every process then holds all of them"
            ) from error

    return __init__
