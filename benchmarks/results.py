"""The JSON of a run: written whole or not at all, checked when it is read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

SCHEMA = 2
NUMBER = (int, float)
OPTIONAL_NUMBER = (int, float, type(None))

# Field -> the types it may have. Everything listed must be there.
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
    "gpu": (str, type(None)),
    "driver": (str, type(None)),
}
_ROOFLINE = dict.fromkeys(("read_bytes_per_s", "copy_bytes_per_s", "matmul_flop_per_s"), NUMBER)
_CELL: dict[str, Any] = {
    "mode": str,
    "out_features": int,
    "in_features": int,
    "rows": int,
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
    "path": str,
    "has_lora": bool,
    "status": str,
    "note": str,
    "samples": int,
    "rotation_bytes": int,
    "extra_memory_bytes": OPTIONAL_NUMBER,
    "host_s": OPTIONAL_NUMBER,  # to issue an eager call to a GPU; null elsewhere
    "timing_note": str,  # what a reader of the times must know
    **dict.fromkeys(
        ("median_s", "p20_s", "p80_s", "bytes_per_s", "flop_per_s", "of_roofline"), OPTIONAL_NUMBER
    ),
}
CELL_KEY = ("mode", "out_features", "in_features", "rows", "dtype", "rank", "timing")


class InvalidResults(ValueError):
    """A file that is not the result of a run; says which file, which field and what is wrong."""


def save(path: Path, run: Mapping[str, Any]) -> None:
    """Raises InvalidResults rather than write what `load` would refuse."""
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
    """One run. Raises InvalidResults naming the field that is missing or wrong."""
    try:
        run = json.loads(path.read_text())
    except OSError as error:
        raise InvalidResults(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InvalidResults(f"{path} is not JSON: {error}") from error
    _upgrade(run, str(path))
    _check_run(run, str(path))
    return run


def load_all(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """The runs in these files, and in the *.json of these folders, by op.

    Raises InvalidResults where a path is missing or a folder holds none.
    """
    runs = []
    for path in paths:
        files = sorted(path.glob("*.json")) if path.is_dir() else [path]
        if not files:
            raise InvalidResults(
                f"{path} holds no .json file; run `python -m benchmarks run` first"
            )
        runs += [load(file) for file in files]
    return runs


def _upgrade(run: Any, where: str) -> None:
    """Gives a run of schema 1 the fields that came with schema 2, in place.

    Times on a GPU meant something else before: with launches in them, and after writes to the L2.
    """
    if not isinstance(run, dict) or run.get("schema") != 1:
        return
    check_fields(run, _RUN, where)
    if run["machine"].get("device") != "cpu":
        raise InvalidResults(
            f"{where} has schema 1, whose times on a GPU cannot be compared with those of schema "
            f"{SCHEMA}; run the benchmark again"
        )
    run["schema"] = SCHEMA
    for cell in run["cells"]:
        for result in cell.get("results", ()) if isinstance(cell, dict) else ():
            if isinstance(result, dict):
                result.setdefault("host_s", None)
                result.setdefault("timing_note", "")


def _check_run(run: Any, where: str) -> None:
    if not isinstance(run, Mapping):
        raise InvalidResults(f"{where} holds {type(run).__name__}; it must hold an object")
    if run.get("schema") != SCHEMA:
        raise InvalidResults(f"{where} has schema {run.get('schema')!r}; it must be {SCHEMA}")
    check_fields(run, _RUN, where)
    check_fields(run["machine"], _MACHINE, f"{where}, machine")
    check_fields(run["roofline"], _ROOFLINE, f"{where}, roofline")
    for i, cell in enumerate(run["cells"]):
        here = f"{where}, cells[{i}]"
        check_fields(cell, _CELL, here)
        for j, result in enumerate(cell["results"]):
            check_fields(result, _RESULT, f"{here}.results[{j}]")


def check_fields(value: Any, fields: Mapping[str, Any], where: str) -> None:
    """Raises InvalidResults unless `value` has each of the fields, of its type."""
    if not isinstance(value, Mapping):
        raise InvalidResults(f"{where} is {type(value).__name__}; it must be an object")
    for name, types in fields.items():
        if name not in value:
            raise InvalidResults(f"{where} has no {name!r}")
        # bool is an int to Python, and never one here.
        wrong_bool = isinstance(value[name], bool) and types is not bool
        if not isinstance(value[name], types) or wrong_bool:
            raise InvalidResults(
                f"{where} has {name} = {value[name]!r}; it must be {_words(types)}"
            )


def _words(types: Any) -> str:
    names = {int: "an integer", float: "a number", type(None): "null", str: "a string"}
    names |= {dict: "an object", list: "a list", bool: "true or false"}
    each = types if isinstance(types, tuple) else (types,)
    return " or ".join(dict.fromkeys(names[t] for t in each))


def cell_key(cell: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(cell[name] for name in CELL_KEY)


def result_of(cell: Mapping[str, Any], contender: str) -> Mapping[str, Any] | None:
    """The contender's result where it was timed, else None."""
    for result in cell["results"]:
        if result["contender"] == contender and result["median_s"] is not None:
            return result
    return None
