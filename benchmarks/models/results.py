"""The file of `python -m benchmarks models`: written as a whole, checked when read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.results import (
    MODELS_FILES,
    NUMBER,
    InvalidResults,
    add_heap,
    check_fields,
    check_machine,
    write_atomically,
)

FILE, SCHEMA = "models.json", 1
# The contender that the others are compared with.
PEER = "PEFT over bitsandbytes"
ACCELERATED = f"{PEER}, accelerated"
DENSE_PEER = "PEFT, dense"
DENSE_ACCELERATED = f"{DENSE_PEER}, accelerated"

_RUN: dict[str, Any] = {
    "schema": int,
    "date": str,
    "seed": int,
    "seconds": NUMBER,
    "rank": int,
    "dtype": str,
    "machine": dict,
    "versions": dict,
    "commit": (dict, type(None)),
    "models": list,
}
_MODEL: dict[str, Any] = {"model": str, "tokens": int, "results": list}
_RESULT: dict[str, Any] = {"contender": str, "note": str}
_MEASURED: dict[str, Any] = {"trainable": int, "model_bytes": int, "peak_bytes": int, "step": dict}
_SUMMARY: dict[str, Any] = {"samples": int, **dict.fromkeys(("median", "p20", "p80"), NUMBER)}


def save(path: Path, run: Mapping[str, Any]) -> None:
    """Writes the file. Raises InvalidResults if `load` would refuse what it would hold."""
    _check(run, str(path))
    write_atomically(path, json.dumps(run, indent=1, allow_nan=False) + "\n")


def load_all(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Returns the runs of whole models in these files and folders."""
    runs = []
    for path in paths:
        files = sorted(path.glob("*.json")) if path.is_dir() else [path]
        runs += [load(file) for file in files if file.name.startswith(MODELS_FILES)]
    return runs


def load(path: Path) -> dict[str, Any]:
    """Returns the run in a file. Raises InvalidResults, which names what is missing or wrong."""
    try:
        run = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InvalidResults(f"{path} cannot be read: {error}") from error
    add_heap(run)
    _check(run, str(path))
    return run


def _check(run: Any, where: str) -> None:
    check_fields(run, _RUN, where)
    if run["schema"] != SCHEMA:
        raise InvalidResults(f"{where} has schema {run['schema']!r}; it must be {SCHEMA}")
    check_machine(run["machine"], where)
    for model in run["models"]:
        check_fields(model, _MODEL, f"{where}, models")
        for result in model["results"]:
            here = f"{where}, {model['model']}"
            check_fields(result, _RESULT, here)
            if not result["note"]:  # it was measured
                here = f"{here}, {result['contender']}"
                check_fields(result, _MEASURED, here)
                for name in {"step", "token"} & result.keys():
                    check_fields(result[name], _SUMMARY, f"{here}, {name}")
