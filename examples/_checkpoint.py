"""A checkpoint: the trained parameters, the optimizer, the random state and where the run was.

checkpoint/
  trained.safetensors     the parameters being trained, under the model's names
  optimizer.safetensors   <parameter>.exp_avg, .exp_avg_sq, .step
  random.safetensors      torch's generator(s), as bytes
  state.json              the options that decide the result, the step, the losses so far
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from _errors import UserError
from _files import replacing_folder, surviving_folder, write_json
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

FOLDER = "checkpoint"
FORMAT = 1


def save_checkpoint(
    out: Path,
    trained: list[tuple[str, nn.Parameter]],
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
) -> Path:
    moments = {
        f"{name}.{key}": torch.as_tensor(value).detach().cpu().contiguous()
        for name, parameter in trained
        for key, value in optimizer.state[parameter].items()
    }
    random = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random["cuda"] = torch.cuda.get_rng_state()
    with replacing_folder(out / FOLDER) as folder:
        parameters = {name: p.detach().cpu().contiguous() for name, p in trained}
        save_file(parameters, folder / "trained.safetensors")
        save_file(moments, folder / "optimizer.safetensors")
        save_file(random, folder / "random.safetensors")
        write_json(folder / "state.json", {"format": FORMAT, **state})
    return out / FOLDER


def read_state(out: Path) -> dict[str, Any]:
    folder = surviving_folder(out / FOLDER)
    path = folder / "state.json"
    if not path.is_file():
        raise UserError(f"--resume: there is no checkpoint in {out} ({path} is missing)")
    try:
        state = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"--resume: {path} is damaged ({error})") from None
    if state.get("format") != FORMAT:
        raise UserError(
            f"--resume: {path} has format {state.get('format')}, this program reads {FORMAT}"
        )
    return state


def restore_checkpoint(
    out: Path, trained: list[tuple[str, nn.Parameter]], optimizer: torch.optim.Optimizer
) -> None:
    """Puts parameters, optimizer and random state back. All is read and checked before any of it
    is changed."""
    folder = surviving_folder(out / FOLDER)
    parameters = _read(folder / "trained.safetensors")
    moments = _read(folder / "optimizer.safetensors")
    random = _read(folder / "random.safetensors")
    _check_names(parameters, dict(trained), folder)
    optimizer_state: dict[int, dict[str, torch.Tensor]] = {}
    for index, (name, parameter) in enumerate(trained):
        entry = {}
        for key in ("step", "exp_avg", "exp_avg_sq"):
            value = moments.get(f"{name}.{key}")
            shape = () if key == "step" else tuple(parameter.shape)
            if value is None or tuple(value.shape) != shape:
                found = "missing" if value is None else f"of shape {tuple(value.shape)}"
                raise UserError(
                    f"--resume: optimizer.safetensors in {folder}: {name}.{key} is {found}, "
                    f"must have shape {shape}"
                )
            entry[key] = value
        optimizer_state[index] = entry

    with torch.no_grad():
        for name, parameter in trained:
            parameter.copy_(parameters[name])
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": optimizer_state, "param_groups": groups})
    torch.set_rng_state(random["cpu"])
    if "cuda" in random and torch.cuda.is_available():
        torch.cuda.set_rng_state(random["cuda"])


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--resume: {path} cannot be read: {error}") from None


def _check_names(
    saved: dict[str, torch.Tensor], wanted: dict[str, nn.Parameter], folder: Path
) -> None:
    for name in sorted(saved.keys() ^ wanted.keys()):
        side = "not trained by this run" if name in saved else "missing from the checkpoint"
        raise UserError(f"--resume: the parameters in {folder} do not match: {name} is {side}")
    for name, parameter in wanted.items():
        if saved[name].shape != parameter.shape:
            raise UserError(
                f"--resume: {name} in {folder} has shape {tuple(saved[name].shape)}, "
                f"must have {tuple(parameter.shape)}"
            )
