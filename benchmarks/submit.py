"""Puts the JSON of a run where the repository keeps results, ready for a pull request.

python -m benchmarks submit build/benchmarks --name amd-epyc-9554
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT
from benchmarks.models import results as models
from benchmarks.results import MODELS_FILES, OTHER_FILES, InvalidResults, load, write_atomically

RESULTS = ROOT / "benchmarks" / "results"
# The facts that must not differ between the files of one machine.
_SAME = ("cpu", "cores", "gpu")


def submit(paths: Iterable[Path], name: str, results: Path = RESULTS) -> list[Path]:
    """Copies these files, and the files of these folders, to `results`/`name`; returns the copies.

    Nothing is copied unless every file is a valid run of code that everyone can have: its commit is
    in the history of this checkout, without changes. All files, and those that are there already,
    must be of one machine.

    Raises InvalidResults, which names the file and what is wrong with it, and ValueError for a name
    that is no name of a folder.
    """
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(
            f"--name is {name!r}; it must be the name of a folder, such as amd-epyc-9554"
        )
    files = [file for path in paths for file in _files(path)]
    if not files:
        raise InvalidResults("there is no JSON of a run to submit")
    runs = {file: _load(file) for file in files}
    for file, run in runs.items():
        _check_commit(file, run["commit"])
    folder = results / name
    there = (
        {file: _load(file) for file in _files(folder) if file.exists()} if folder.is_dir() else {}
    )
    _check_machine({**there, **runs})
    copies = []
    for file in files:
        copies.append(folder / file.name)
        write_atomically(copies[-1], file.read_text("utf-8"))
    return copies


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    others = tuple(name for name in OTHER_FILES if name != MODELS_FILES)
    return [file for file in sorted(path.glob("*.json")) if not file.name.startswith(others)]


def _load(file: Path) -> Mapping[str, Any]:
    return models.load(file) if file.name.startswith(MODELS_FILES) else load(file)


def _check_commit(file: Path, commit: Mapping[str, Any] | None) -> None:
    if commit is None:
        raise InvalidResults(
            f"{file} names no commit; run the benchmark in a clone of the repository"
        )
    if commit["dirty"]:
        raise InvalidResults(
            f"{file} measured changes that were not committed; commit and run again"
        )
    if not is_ancestor(commit["hash"]):
        raise InvalidResults(
            f"{file} measured commit {commit['hash']}, which is not in the history of this checkout"
        )


def is_ancestor(commit: str) -> bool:
    """Returns True if the commit is in the history of the checkout."""
    command = ["git", "merge-base", "--is-ancestor", commit, "HEAD"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 0


def _check_machine(runs: Mapping[Path, Mapping[str, Any]]) -> None:
    first, *others = runs
    for file in others:
        for fact in _SAME:
            expected, found = (runs[f]["machine"][fact] for f in (first, file))
            if found != expected:
                raise InvalidResults(
                    f"{file} is of a machine with {fact} {found!r}, and {first} of one with "
                    f"{expected!r}; choose another --name for it"
                )
