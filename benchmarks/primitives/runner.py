"""Runs the programs of experiments, each in a process group of its own and under a time limit.

A program prints a line when it begins an experiment (protocol.py, cuda/experiment.cuh). If it
prints nothing more for too long, it is killed. If it is killed or ends by itself, the experiment
that had begun gets an error, and the program is started again for the experiments that are left.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import IO, Any

from benchmarks.machine import ROOT

OK, ERROR, SKIPPED = "ok", "error", "skipped"
# A killed program may hang in the driver, and is waited for at most so long.
_SECONDS_TO_DIE = 5.0
_ERROR_LENGTH = 500

Record = dict[str, Any]


@dataclass(frozen=True)
class Program:
    """A program of experiments. Its command is followed by the names of experiments to run, or by
    --list to describe all of them."""

    group: str
    command: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict)


def describe(program: Program, seconds: float) -> list[Record]:
    """Returns the experiments of a program, without results. Raises RuntimeError if the program
    cannot list them."""
    try:
        done = subprocess.run(
            [*program.command, "--list"],
            cwd=ROOT,
            env=_environment(program),
            capture_output=True,
            text=True,
            timeout=seconds,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"{program.group} does not list its experiments: {error}") from error
    if done.returncode != 0:
        reason = _ending(done.returncode, done.stderr)
        raise RuntimeError(f"{program.group} does not list its experiments: {reason}")
    return [{**json.loads(line), "group": program.group} for line in done.stdout.splitlines()]


def run(
    program: Program,
    experiments: Sequence[Record],
    seconds: float,
    finished: Callable[[Record], None],
    time_left: Callable[[], float] = lambda: float("inf"),
) -> None:
    """Runs the experiments in order, and calls `finished` with the record of each when it ends.

    An experiment is ended after `seconds`. If `time_left` is zero, the remaining ones are skipped.
    """
    remaining = list(experiments)
    while remaining and time_left() > 0:
        left = len(remaining)
        _run_once(program, remaining, seconds, finished, time_left)
        assert len(remaining) < left, "every start of a program must settle an experiment"
    for experiment in remaining:
        finished(_record(experiment, skipped="the time for the whole run was over"))


def _run_once(
    program: Program,
    remaining: list[Record],
    seconds: float,
    finished: Callable[[Record], None],
    time_left: Callable[[], float],
) -> None:
    """Starts the program for the remaining experiments, and removes those from the list that then
    have a result or an error. At least one is removed."""
    names = [experiment["name"] for experiment in remaining]
    with tempfile.TemporaryFile("w+") as errors:
        try:
            process = subprocess.Popen(
                [*program.command, *names],
                cwd=ROOT,
                env=_environment(program),
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )
        except OSError as error:
            finished(_record(remaining.pop(0), error=f"the program does not start: {error}"))
            return
        assert process.stdout is not None
        lines = _lines_of(process.stdout)
        ending = ""
        try:
            while remaining:
                limit = min(seconds, max(time_left(), 0.0))
                try:
                    line = lines.get(timeout=limit)
                except queue.Empty:
                    ending = f"killed after {limit:.0f} s without a result"
                    break
                if line is None:
                    break
                result = _parsed(line)
                if result is not None and result.get("name") == remaining[0]["name"]:
                    finished(_record(remaining.pop(0), result=result))
        finally:
            if remaining or process.poll() is None:
                code = _end(process, wait=not ending)
            else:
                code = process.returncode
        settled = len(names) - len(remaining)
        # Code 3 says that the program ended after an experiment whose error it has printed.
        if remaining and not (settled and code == 3 and not ending):
            errors.seek(0)
            reason = ending or _ending(code, errors.read())
            finished(_record(remaining.pop(0), error=reason))


def _environment(program: Program) -> dict[str, str]:
    # The package `benchmarks` is found through the current folder.
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    return {**inherited, **program.environment}


def _lines_of(stream: IO[str]) -> queue.Queue[str | None]:
    """Returns a queue to which a thread adds each line as it comes, and None at the end."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in stream:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    return lines


def _parsed(line: str) -> Record | None:
    """Returns the line as a record, or None if it is another text, such as a library's warning."""
    try:
        parsed = json.loads(line)
    except json.JSONDecodeError:
        return None
    return parsed if isinstance(parsed, dict) else None


def _end(process: subprocess.Popen[str], wait: bool) -> int | None:
    """Ends a process and returns its exit code, or None if even killing it does not end it."""
    try:
        if wait:
            return process.wait(_SECONDS_TO_DIE)
    except subprocess.TimeoutExpired:
        pass
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # it ended by itself
    try:
        return process.wait(_SECONDS_TO_DIE)
    except subprocess.TimeoutExpired:
        return None


def _ending(code: int | None, errors: str) -> str:
    """Says how a program ended that gave no result, with the last line that it printed."""
    lines = errors.strip().splitlines()
    reason = f": {lines[-1][:_ERROR_LENGTH]}" if lines else ""
    if code is not None and code < 0:
        return f"the program was ended by {signal.Signals(-code).name}{reason}"
    return f"the program ended with code {code} without a result{reason}"


def _record(
    experiment: Record,
    *,
    result: Record | None = None,
    error: str | None = None,
    skipped: str | None = None,
) -> Record:
    """Returns the record of an experiment with its result, its error, or why it was skipped."""
    result = result or {}
    error, skipped = result.get("error", error), result.get("skipped", skipped)
    samples = result.get("samples", [])
    return {
        "group": experiment["group"],
        "name": experiment["name"],
        "parameters": result.get("parameters", experiment["parameters"]),
        "unit": result.get("unit", experiment["unit"]),
        "status": ERROR if error else SKIPPED if skipped else OK,
        "reason": error or skipped or "",
        "samples": samples,
        "median": median(samples) if samples else None,
        "ideal": result.get("ideal", experiment["ideal"]),
        "derived": result.get("derived", {}),
        "note": result.get("note", experiment["note"]),
    }


def ask(command: Sequence[str | Path], seconds: float) -> Record | None:
    """Returns the JSON line that a command prints, or None if it prints none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return _parsed(done.stdout.strip())
