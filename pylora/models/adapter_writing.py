"""Writes the files of an adapter, weights and configuration, and replaces each as a whole."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from pylora.files import replacing
from pylora.models.adapter_contents import import_safetensors
from pylora.sharding import gathered, is_first, mesh_of, others_wait


def write_adapter(
    folder: Path,
    weights_name: str,
    tensors: Mapping[str, Tensor],
    config_name: str,
    config: Mapping[str, Any],
    metadata: dict[str, str] | None,
) -> None:
    """Writes both files into the folder, which is made if it does not exist.

    If the tensors are sharded, every process must call this: they are gathered, the first process
    writes them and the others wait for it.
    """
    safetensors = import_safetensors()
    mesh = mesh_of(tensors.values())
    stored = _for_safetensors(tensors, keep=is_first(mesh))
    with others_wait(mesh):
        if is_first(mesh):
            folder.mkdir(parents=True, exist_ok=True)
            _write_all(
                folder,
                {
                    weights_name: lambda temporary: safetensors.torch.save_file(
                        stored, temporary, metadata=metadata
                    ),
                    config_name: lambda temporary: temporary.write_text(
                        json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8"
                    ),
                },
            )


def _for_safetensors(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """The tensors on the CPU, contiguous, without shared storage, which safetensors refuses.

    keep    false drops each tensor as soon as it is gathered
    """
    stored: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, tensor in tensors.items():
        tensor = gathered(tensor.detach())
        if not keep:
            continue
        tensor = tensor.cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        stored[key] = tensor
    return stored


def _write_all(folder: Path, writers: dict[str, Callable[[Path], Any]]) -> None:
    """Writes every file beside its place, and moves them there only when all are on the disk."""
    with ExitStack() as stack:  # it replaces the files when all of them have been written
        for name, write in writers.items():
            temporary = stack.enter_context(replacing(folder / name))
            write(temporary)
            _sync(temporary)
    if os.name == "posix":
        _sync(folder)


def _sync(path: Path) -> None:
    # Windows syncs only files that are open for writing, and no folders.
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
