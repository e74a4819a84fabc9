"""What may be done with a model that a library has wrapped or split over several processes.

FSDP1 and ZeRO-3 leave each process a part of a parameter, which only their own context managers
gather. Several libraries keep the parameters that they found, and do not notice new ones.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from pylora.models.wrappers import classes_of, plain_name, wrappers_around
from pylora.sharding import is_sharded

_ORDER = (
    "the order is pylora.quantize_model, pylora.add_lora or pylora.load_adapter, and then the "
    "wrapper or the sharding"
)
# The class of a wrapper -> what it does with the parameters that it finds when it is made.
_KEEPS_PARAMETERS = {
    "DistributedDataParallel": "wrapped in DistributedDataParallel, which reduces the gradients of "
    "the parameters that it found when it was made, and of no others",
    "FullyShardedDataParallel": "wrapped in FullyShardedDataParallel, which has taken over its "
    "parameters",
    "FSDPModule": "sharded by fully_shard, which has taken over its parameters",
    "DeepSpeedEngine": "wrapped in a DeepSpeed engine, which has taken over its parameters",
    "AveragedModel": "an AveragedModel, which averages the parameters that it found when it was "
    "made",
}


def refuse_to_change(
    model: nn.Module, call: str, parameters: Collection[nn.Parameter] | None = None
) -> None:
    """Raises ValueError if layers of the model cannot be replaced because of its wrappers.

    call          the name of the function that would replace them
    parameters    those that it replaces, or whose requires_grad it changes; None for a function
                  that may replace any. Fewer are checked sooner
    """
    reason = why_unchangeable(model, call, parameters)
    if reason is not None:
        raise ValueError(reason)


def why_unchangeable(
    model: nn.Module, call: str, parameters: Collection[nn.Parameter] | None = None
) -> str | None:
    """Why `call` cannot replace layers of the model because of its wrappers; None if it can."""
    for module in model.modules() if parameters is None else wrappers_around(model):
        for name in classes_of(module) & _KEEPS_PARAMETERS.keys():
            return (
                f"model is {_KEEPS_PARAMETERS[name]}; {call} replaces parameters and must be "
                f"called before: {_ORDER}"
            )
    for parameter in model.parameters() if parameters is None else parameters:
        kind = None
        if is_sharded(parameter):
            return (
                f"{_name(model, parameter)} is a DTensor, which {call} cannot replace. Tensor "
                "parallelism cannot split pylora's layers either: call it before the model is "
                "parallelized, leave its layers out of the plan, and shard them with fully_shard"
            )
        if hasattr(parameter, "ds_id"):
            kind = "partitioned by DeepSpeed's ZeRO-3"
        elif hasattr(parameter, "_hp_mapping"):
            kind = "held by an optimizer of DeepSpeed"
        elif getattr(parameter, "_fsdp_flattened", False):
            kind = "part of a FlatParameter of FullyShardedDataParallel"
        if kind is not None:
            return (
                f"{_name(model, parameter)} is {kind}; {call} replaces parameters and needs plain, "
                f"whole parameters: {_ORDER}"
            )
    return None


def _name(model: nn.Module, parameter: nn.Parameter) -> str:
    name = next(name for name, held in model.named_parameters() if held is parameter)
    return plain_name(model, name)


def refuse_to_write(model: nn.Module, call: str) -> None:
    """Raises ValueError if what `call` writes into parameters would be lost or overwritten."""
    for module in model.modules():
        if "DeepSpeedEngine" in classes_of(module):
            raise _lost("wrapped in a DeepSpeed engine, whose optimizer has copies", call)
    for parameter in model.parameters():
        if hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id"):
            raise _lost("held by DeepSpeed, whose optimizer has copies", call)


def _lost(state: str, call: str) -> ValueError:
    return ValueError(
        f"model is {state} of the parameters; {call} must be called before deepspeed.initialize"
    )


def refuse_flat(model: nn.Module, call: str) -> None:
    """Raises ValueError if FSDP1 would undo what `call` does with the parameters."""
    for module in model.modules():
        if "FullyShardedDataParallel" in classes_of(module):
            raise ValueError(
                "model is wrapped in FullyShardedDataParallel, which puts its own parameters back; "
                f"{call} must be called before the model is wrapped"
            )


def refuse_parts(model: nn.Module, call: str) -> None:
    """Raises ValueError if FSDP1 or ZeRO-3 has left this process a part of a parameter only."""
    for module in model.modules():
        if "FullyShardedDataParallel" not in classes_of(module):
            continue
        state: Any = getattr(module, "training_state", None)
        if getattr(state, "name", None) != "SUMMON_FULL_PARAMS":
            raise ValueError(
                "model is wrapped in FullyShardedDataParallel, so that each process has a part of "
                f"the parameters; {call} must be called inside "
                "`with FullyShardedDataParallel.summon_full_params(model):` on every process"
            )
    for name, parameter in model.named_parameters():
        whole = getattr(parameter, "ds_numel", parameter.numel())
        if parameter.requires_grad and whole != parameter.numel():
            raise ValueError(
                f"{plain_name(model, name)} is partitioned by DeepSpeed's ZeRO-3, and this process "
                f"has {parameter.numel()} of its {whole} elements; {call} must be called inside "
                "`with deepspeed.zero.GatheredParameters([p for p in model.parameters() if "
                "p.requires_grad]):` on every process"
            )


def settle(model: nn.Module) -> None:
    """Frees the whole parameters that fully_shard keeps after a forward, so that parts are left."""
    for module in model.modules():
        if "FSDPModule" in classes_of(module):
            module.reshard()  # type: ignore[operator]
