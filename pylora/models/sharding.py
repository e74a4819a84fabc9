"""Models that are split over several processes: what may be done with them, and with their tensors.

FSDP2 (`fully_shard`) and tensor parallelism hold a parameter as a DTensor, of which each process
has a part. These parts are gathered and written here. The parts of FSDP1 and ZeRO-3 can be gathered
only by their own context managers, so they are refused outside of these.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from pylora.models.wrappers import classes_of, plain_name

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


def is_sharded(tensor: object) -> TypeGuard[Any]:
    """True for a DTensor, of which each process holds a part."""
    # The import takes long, and nothing can be a DTensor before someone else has done it.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def refuse_to_change(model: nn.Module, call: str) -> None:
    """Raises ValueError if layers of the model cannot be replaced because of its wrappers.

    call    the name of the function that would replace them
    """
    for module in model.modules():
        for name in classes_of(module) & _KEEPS_PARAMETERS.keys():
            raise ValueError(
                f"model is {_KEEPS_PARAMETERS[name]}; {call} replaces layers and must be called "
                f"before: {_ORDER}"
            )
    for name, parameter in model.named_parameters():
        kind = None
        if is_sharded(parameter):
            kind = "a DTensor, as in tensor parallelism"
        elif hasattr(parameter, "ds_id"):
            kind = "partitioned by DeepSpeed's ZeRO-3"
        elif hasattr(parameter, "_hp_mapping"):
            kind = "held by an optimizer of DeepSpeed"
        elif getattr(parameter, "_fsdp_flattened", False):
            kind = "part of a FlatParameter of FullyShardedDataParallel"
        if kind is not None:
            raise ValueError(
                f"{plain_name(model, name)} is {kind}; {call} replaces layers and needs plain, "
                f"whole parameters: {_ORDER}"
            )


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
    """Raises ValueError if FSDP1 holds parameters, from which `call` would be lost."""
    for module in model.modules():
        if "FullyShardedDataParallel" in classes_of(module):
            raise ValueError(
                "model is wrapped in FullyShardedDataParallel, which puts its own parameters back; "
                f"{call} must be called on the model before it is wrapped, or on a new model after "
                "pylora.load_adapter"
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


@torch.no_grad()
def gathered(tensor: Tensor) -> Tensor:
    """The whole tensor; if it is sharded, every process of its mesh must call this.

    What is gathered shares no memory with the parts.
    """
    if not is_sharded(tensor):
        return tensor
    sharded: Any = tensor.detach()
    device = sharded.device_mesh.device_type
    if sharded.device.type != device:  # parts that are kept on the CPU between forwards
        sharded = sharded.to(device)
    whole: Tensor = sharded.full_tensor().to(tensor.device)
    # With one process, or without shards, it is the part itself.
    shared = whole.untyped_storage().data_ptr() == tensor.to_local().untyped_storage().data_ptr()
    return whole.clone() if shared else whole


@torch.no_grad()
def write(target: Tensor, values: Tensor) -> None:
    """Copies whole values into a tensor; of a sharded one, each process writes its own part."""
    if not is_sharded(target):
        target.copy_(values)
        return
    target.copy_(shard_like(values.to(target.device, target.dtype), target).to(target.device))


def shard_like(values: Tensor, model: Any) -> Tensor:
    """This process's part of `values`, which all processes have, as a DTensor.

    model    a DTensor whose mesh and placements the result gets
    """
    from torch.distributed.tensor import distribute_tensor

    # Without a source rank each process cuts its part out of its own values.
    return distribute_tensor(
        values.detach(), model.device_mesh, model.placements, src_data_rank=None
    )


@contextmanager
def whole_parameters(module: nn.Module) -> Iterator[None]:
    """Within the block, every process holds the sharded parameters of a module as whole ones.

    After the block the sharded ones are back. A parameter that the block has replaced is written
    into its shards.
    """
    gathered_ones: list[tuple[dict[str, Any], str, Any, nn.Parameter]] = []
    for inner in module.modules():
        for name, parameter in inner._parameters.items():
            if is_sharded(parameter):
                whole = nn.Parameter(gathered(parameter), requires_grad=False)
                gathered_ones.append((inner._parameters, name, parameter, whole))
    for held, name, _, whole in gathered_ones:
        held[name] = whole
    try:
        yield
    finally:
        for held, name, parameter, whole in gathered_ones:
            if held[name] is not whole:
                write(parameter, held[name])
            held[name] = parameter


def mesh_of(tensors: Iterable[Tensor]) -> Any | None:
    """The mesh of the processes that have parts of these tensors; None if none is sharded."""
    return next((t.device_mesh for t in tensors if is_sharded(t)), None)


def is_first(mesh: Any | None) -> bool:
    """True on the first process of a mesh; without a mesh, every process is the first."""
    return mesh is None or not any(mesh.get_coordinate())


@contextmanager
def others_wait(mesh: Any | None) -> Iterator[None]:
    """Lets the other processes of a mesh wait at the end of the block until the first is there.

    Raises RuntimeError on them if the block of the first process raised.
    """
    done = False
    try:
        yield
        done = True
    finally:
        if mesh is not None:
            flag = torch.tensor([done], dtype=torch.uint8, device=mesh.device_type)
            for dimension in range(mesh.ndim):
                group = mesh.get_group(dimension)
                torch.distributed.broadcast(flag, group=group, group_src=0)
            done = bool(flag)
    if not done:
        raise RuntimeError("the first process failed; its own error says why")
