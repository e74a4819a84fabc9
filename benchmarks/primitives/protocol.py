"""Runs experiments that are written in Python as a program: it prints the same lines as the
programs that are made with cuda/experiment.cuh.

An exception ends the program. The runner then takes the last line of the traceback as the error of
the experiment that had begun, and starts the program again for the experiments that are left.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Measured:
    """The samples of an experiment, and numbers that follow from them."""

    samples: list[float]
    derived: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Experiment:
    """One thing to measure.

    unit   the unit of the samples
    ideal  the best possible sample, in the same unit; None if it is not known
    """

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
    """Describes the experiments if the arguments are `--list`, otherwise runs the named ones."""
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
