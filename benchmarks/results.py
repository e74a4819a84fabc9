"""The JSON file of a run: it is written as a whole, and checked when it is written and read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import heap

SCHEMA = 3
# A file whose name begins so is one of whole models, in another form: benchmarks.models.results.
MODELS_FILES = "models"
# These files of a folder with results hold no runs of ops: whole models, `make methods`, and the
# two of a GPU run.
OTHER_FILES = (MODELS_FILES, "methods", "sweep", "primitives")
# Contenders that every table treats in a way of its own: pylora, pylora timed a second time, its
# reference, and pylora without LoRA, which shows what LoRA costs and is no peer to win against.
OURS, CONTROL = "pylora", "pylora (control)"
REFERENCE, BASE_ONLY = "pylora reference", "pylora, no LoRA"
# The file of a run whose heap was kept is named after its op, with this behind it.
KEPT_STEM = "_heap_kept"
NUMBER = (int, float)
OPTIONAL_NUMBER = (int, float, type(None))

# Field -> the types it may have. Every field must be there.
_RUN: dict[str, Any] = {
    "schema": int,
    "op": str,
    "suite": str,
    "date": str,
    "seed": int,
    "seconds": NUMBER,
    "machine": dict,
    "versions": dict,
    "commit": (dict, type(None)),
    "roofline": dict,
    "cells": list,
}
_MACHINE: dict[str, Any] = {
    "device": str,
    "cpu": str,
    "cores": int,
    "threads": int,
    "caches": dict,
    "flags": list,
    "os": str,
    "load": OPTIONAL_NUMBER,
    "heap": str,
    "gpu": (str, type(None)),
    "driver": (str, type(None)),
}
_ROOFLINE = dict.fromkeys(("read_bytes_per_s", "copy_bytes_per_s", "matmul_flop_per_s"), NUMBER)
_CELL: dict[str, Any] = {
    "mode": str,
    "out_features": int,
    "in_features": int,
    "tokens": int,
    "dtype": str,
    "rank": int,
    "timing": str,
    "flop": NUMBER,
    "bytes": NUMBER,
    "floor_s": NUMBER,
    "control_ratio": OPTIONAL_NUMBER,
    "results": list,
}
_RESULT: dict[str, Any] = {
    "contender": str,
    "version": str,
    "variant": str,
    "has_lora": bool,
    "status": str,
    "note": str,
    "samples": int,
    "rotation_bytes": int,
    "extra_memory_bytes": OPTIONAL_NUMBER,
    # How long the host needs to issue an eager call to a GPU; null for other calls.
    **dict.fromkeys(("host_s", "host_p20_s", "host_p80_s"), OPTIONAL_NUMBER),
    "timing_note": str,  # what a reader of the times must know
    **dict.fromkeys(
        ("median_s", "p20_s", "p80_s", "bytes_per_s", "flop_per_s", "of_roofline"), OPTIONAL_NUMBER
    ),
}
# Names of schema 1 and 2 -> names of schema 3.
_RENAMED = {"rows": "tokens", "path": "variant"}
CELL_KEY = ("mode", "out_features", "in_features", "tokens", "dtype", "rank", "timing")


class InvalidResults(ValueError):
    """A file is not the result of a run. The message names the file, the field and the mistake."""


def save(path: Path, run: Mapping[str, Any]) -> None:
    """Writes the file. Raises InvalidResults if `load` would refuse what it would hold."""
    _check_run(run, str(path))
    write_atomically(path, json.dumps(run, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces the file as a whole: a reader sees the old content or the new one.

    `pylora.files` has the same for the package. It is not used here because `benchmarks.gpu`
    writes its results in a process that must not import torch, before pylora is installed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: Path) -> dict[str, Any]:
    """Returns the run in a file, whatever its schema, with the names of the newest schema.

    Raises InvalidResults, which names the field that is missing or wrong.
    """
    try:
        run = json.loads(path.read_text())
    except OSError as error:
        raise InvalidResults(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InvalidResults(f"{path} is not JSON: {error}") from error
    _upgrade(run, str(path))
    add_heap(run)
    _check_run(run, str(path))
    return run


def file_stem(run: Mapping[str, Any]) -> str:
    """Returns the name of a run's file, without .json. A run with a kept heap is not to replace
    that of the same op with the default one."""
    return f"{run['op']}{KEPT_STEM if run['machine']['heap'] == heap.KEPT else ''}"


def title(run: Mapping[str, Any]) -> str:
    """Returns the op of a run, and what is unusual about its heap."""
    return f"{run['op']}{', heap kept' if run['machine']['heap'] == heap.KEPT else ''}"


def add_heap(run: Any) -> None:
    """Adds the fact of a run's heap, in place, if the run is older than that fact."""
    if isinstance(run, dict) and isinstance(run.get("machine"), dict):
        run["machine"].setdefault("heap", heap.DEFAULT)


def load_all(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Returns the runs of ops in these files and in the *.json files of these folders.

    Raises InvalidResults if a path is missing or a folder holds no such file.
    """
    runs = []
    for path in paths:
        files = sorted(path.glob("*.json")) if path.is_dir() else [path]
        if not files:
            raise InvalidResults(
                f"{path} holds no .json file; run `python -m benchmarks run` first"
            )
        runs += [load(file) for file in files if not file.name.startswith(OTHER_FILES)]
    return runs


def _upgrade(run: Any, where: str) -> None:
    """Changes a run of schema 1 or 2 to the newest schema, in place. No number changes.

    A run of schema 1 on a GPU is refused: its times included the launches, and its calls followed
    writes to the L2 cache.
    """
    if not isinstance(run, dict) or run.get("schema") not in (1, 2):
        return
    check_fields(run, _RUN, where)
    if run["schema"] == 1 and run["machine"].get("device") != "cpu":
        raise InvalidResults(
            f"{where} has schema 1, whose times on a GPU cannot be compared with those of schema "
            f"{SCHEMA}; run the benchmark again"
        )
    run["schema"] = SCHEMA
    run["cells"] = [_upgraded_cell(cell) for cell in run["cells"]]


def _upgraded_cell(cell: Any) -> Any:
    cell = _renamed(cell)
    if isinstance(cell, dict) and isinstance(cell.get("results"), list):
        cell["results"] = [_renamed(result) for result in cell["results"]]
        for result in cell["results"]:
            if isinstance(result, dict):
                for name in ("host_s", "host_p20_s", "host_p80_s"):
                    result.setdefault(name, None)
                result.setdefault("timing_note", "")
    return cell


def _renamed(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {_RENAMED.get(name, name): content for name, content in value.items()}


def _check_run(run: Any, where: str) -> None:
    if not isinstance(run, Mapping):
        raise InvalidResults(f"{where} holds {type(run).__name__}; it must hold an object")
    if run.get("schema") != SCHEMA:
        raise InvalidResults(f"{where} has schema {run.get('schema')!r}; it must be {SCHEMA}")
    check_fields(run, _RUN, where)
    check_machine(run["machine"], where)
    check_fields(run["roofline"], _ROOFLINE, f"{where}, roofline")
    for i, cell in enumerate(run["cells"]):
        here = f"{where}, cells[{i}]"
        check_fields(cell, _CELL, here)
        for j, result in enumerate(cell["results"]):
            check_fields(result, _RESULT, f"{here}.results[{j}]")


def check_machine(facts: Any, where: str) -> None:
    """Raises InvalidResults unless `facts` are what `benchmarks.machine.machine` returns."""
    check_fields(facts, _MACHINE, f"{where}, machine")
    if facts["heap"] not in (heap.KEPT, heap.DEFAULT):
        raise InvalidResults(
            f"{where}, machine has heap = {facts['heap']!r}; it must be {heap.KEPT!r} or "
            f"{heap.DEFAULT!r}"
        )


def check_fields(value: Any, fields: Mapping[str, Any], where: str) -> None:
    """Raises InvalidResults unless `value` has each of the fields with one of its types."""
    if not isinstance(value, Mapping):
        raise InvalidResults(f"{where} is {type(value).__name__}; it must be an object")
    for name, types in fields.items():
        if name not in value:
            raise InvalidResults(f"{where} has no {name!r}")
        # bool is a subclass of int, but a field for a number must not hold one.
        wrong_bool = isinstance(value[name], bool) and types is not bool
        if not isinstance(value[name], types) or wrong_bool:
            raise InvalidResults(
                f"{where} has {name} = {value[name]!r}; it must be {_words(types)}"
            )


def _words(types: Any) -> str:
    """Returns the names that JSON has for these Python types."""
    words = {int: "an integer", float: "a number", type(None): "null", str: "a string"}
    words |= {dict: "an object", list: "a list", bool: "true or false"}
    allowed = types if isinstance(types, tuple) else (types,)
    return " or ".join(words[allowed_type] for allowed_type in allowed)


def cell_key(cell: Mapping[str, Any]) -> tuple[Any, ...]:
    """Returns what a cell of one run has in common with the same cell of another run."""
    return tuple(cell[name] for name in CELL_KEY)


def result_of(cell: Mapping[str, Any], contender: str) -> Mapping[str, Any] | None:
    """Returns the contender's result in this cell, or None if it was not timed."""
    for result in cell["results"]:
        if result["contender"] == contender and result["median_s"] is not None:
            return result
    return None
