"""Tensors that are split over several processes: gathers them, and writes into their parts.

FSDP2 (`fully_shard`) and tensor parallelism hold a parameter as a DTensor, of which each process
has a part.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn


def is_sharded(tensor: object) -> TypeGuard[Any]:
    """True for a DTensor, of which each process holds a part."""
    # The import takes long, and nothing can be a DTensor before someone else has done it.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def refuse_sharded_forward(layer: nn.Module) -> None:
    """Raises RuntimeError if a layer is called while this process has only parts of its weights."""
    if torch.compiler.is_compiling():
        return
    for name, parameter in layer.named_parameters():
        if is_sharded(parameter):
            raise RuntimeError(
                f"{name} of this {type(layer).__name__} is sharded while pylora computes with it. "
                "fully_shard gathers the weights of a module when that module is called: it must "
                "be given the layer or a module around it (the base_layer of a LoRALinear is not "
                "called), and the model must be called through that module"
            )


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
    """Copies values into a tensor of the same shape.

    If `target` is sharded, every process has all the values, or its part of them in a DTensor with
    the placements of `target`, and writes its own part.
    """
    if is_sharded(target) and not is_sharded(values):
        from torch.distributed.tensor import distribute_tensor

        # Without a source rank, each process cuts its part out of its own values.
        values = distribute_tensor(
            values.detach().to(target.dtype),
            target.device_mesh,
            target.placements,
            src_data_rank=None,
        ).to(target.device)
    target.copy_(values)


@contextmanager
def whole_parameters(module: nn.Module) -> Iterator[None]:
    """Within the block, every process holds the sharded parameters of a module as whole ones.

    These are copies: what the block writes into them is lost. Every process must enter the block.
    """
    places = [
        (inner._parameters, name, parameter)
        for inner in module.modules()
        for name, parameter in inner._parameters.items()
        if parameter is not None and is_sharded(parameter)
    ]
    whole = [nn.Parameter(gathered(parameter), requires_grad=False) for _, _, parameter in places]
    for (held, name, _), parameter in zip(places, whole, strict=True):
        held[name] = parameter
    try:
        yield
    finally:
        for held, name, parameter in places:
            held[name] = parameter


@torch.no_grad()
def exchange_values(module: nn.Module, other: nn.Module) -> None:
    """Exchanges the parameters and buffers of two modules of one kind.

    A sharded parameter of `module` stays the same object, because `fully_shard` would put it back
    in the place of another: it gets its part of the other's values, and `other` a copy of its own.
    """
    for name, parameter in module._parameters.items():
        given = other._parameters[name]
        if given is not None and is_sharded(parameter):
            other._parameters[name] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
            write(parameter, given)
        else:
            module._parameters[name], other._parameters[name] = given, parameter
    for name, buffer in module._buffers.items():
        module._buffers[name], other._buffers[name] = other._buffers[name], buffer


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
