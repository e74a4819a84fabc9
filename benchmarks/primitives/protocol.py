"""What a program of experiments written in Python prints: the same lines as cuda/experiment.cuh.

An exception ends the program. The runner then takes the last line of the traceback for the error of
the experiment that had begun, and starts the program anew for those that are left.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Measured:
    samples: list[float]
    derived: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Experiment:
    """`run` measures; `ideal` is in the same unit, None if it is not known."""

    name: str
    parameters: dict[str, Any]
    unit: str
    run: Callable[[], Measured]
    note: str = ""
    ideal: float | None = None

    def described(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "parameters": self.parameters,
            "unit": self.unit,
            "ideal": self.ideal,
            "note": self.note,
        }


def serve(experiments: Sequence[Experiment], arguments: Sequence[str]) -> None:
    """`--list` describes the experiments; otherwise `arguments` are the names of those to run."""
    if list(arguments) == ["--list"]:
        for experiment in experiments:
            _say(experiment.described())
        return
    by_name = {experiment.name: experiment for experiment in experiments}
    for name in arguments:
        _say({"begin": name})
        experiment = by_name[name]
        measured = experiment.run()
        outcome = {"samples": measured.samples, "derived": measured.derived}
        _say({**experiment.described(), **outcome})


def _say(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)
