"""Runs the steps of a call one after the other, within their limits and the budget of the call."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import archive
from benchmarks.gpu.steps import ROOT, Step

OK, NOT_STARTED, NOT_FOR_THIS_GPU = "ok", "not started", "not for this GPU"
# A process that is told to end has so long to write its results before it is killed.
GRACE_S = 5.0
# This process may be killed at any time, and so packs the results so far at this interval.
SAVE_EVERY_S = 60.0


class Runner:
    """Runs the steps of one call.

    entries  how each step went; from the beginning there is an entry for every step
    facts    what benchmarks/gpu/facts.py printed
    """

    def __init__(
        self,
        steps: Sequence[Step],
        out: Path,
        work: Path,
        budget: float,
        environment: Mapping[str, str],
        facts: Mapping[str, Any],
        is_dry: bool = False,
    ) -> None:
        self.steps, self.out, self.work, self.budget = steps, out, work, budget
        self.environment, self.facts, self.is_dry = dict(environment), facts, is_dry
        self.begin = time.monotonic()
        self.started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.entries: list[dict[str, Any]] = [
            {"step": step.name, "status": NOT_STARTED, "seconds": 0.0, "limit_s": step.seconds}
            for step in steps
        ]

    def run(self) -> bool:
        """Runs the steps. Returns True if every step that is for this GPU ran and succeeded."""
        (self.work / "logs").mkdir(parents=True, exist_ok=True)
        failed: str | None = None
        for step, entry in zip(self.steps, self.entries, strict=True):
            note = f"{failed} did not succeed" if failed else self._why_not(step)
            if note is not None:
                is_other_gpu = not failed and self._is_for_another_gpu(step)
                entry |= {"status": NOT_FOR_THIS_GPU if is_other_gpu else NOT_STARTED, "note": note}
                print(f"== {step.name}: {entry['status']}: {note}", flush=True)
                continue
            self._run_step(step, entry)
            if step.is_vital and entry["status"] != OK:
                failed = step.name
        self.save()
        return all(entry["status"] in (OK, NOT_FOR_THIS_GPU) for entry in self.entries)

    def save(self) -> None:
        summary = {
            "started": self.started,
            "seconds": round(time.monotonic() - self.begin, 1),
            "budget_s": self.budget,
            "dry": self.is_dry,
            **self.facts,
            "steps": self.entries,
        }
        archive.save(self.out, self.work, summary)

    def _is_for_another_gpu(self, step: Step) -> bool:
        return step.arch not in (None, self.facts["arch"]) and not self.is_dry

    def _why_not(self, step: Step) -> str | None:
        """Returns why the step cannot be started, or None if it can."""
        if self._is_for_another_gpu(step):
            return f"it needs sm_{step.arch}, and this GPU is sm_{self.facts['arch']}"
        missing = self._missing(step.needs)
        if missing:
            return f"it needs {missing}, which this Python does not have"
        left = self.budget - (time.monotonic() - self.begin)
        if step.seconds > left:
            return f"its limit is {step.seconds} s, and {left:.0f} s of {self.budget:.0f} are left"
        return None

    def _missing(self, packages: Sequence[str]) -> str:
        """Names the packages that the Python of the steps cannot find. It also looks in the folder
        of the carried wheels."""
        find = "import sys; from importlib.util import find_spec\n"
        find += "print(*[name for name in sys.argv[1:] if find_spec(name) is None])"
        done = subprocess.run(
            [self.facts["python"], "-c", find, *packages],
            env=self.environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return ", ".join(done.stdout.split())

    def _run_step(self, step: Step, entry: dict[str, Any]) -> None:
        print(f"== {step.name}, at most {step.seconds} s", flush=True)
        begin = time.monotonic()
        log = self.work / "logs" / f"{step.name}.log"

        def keep() -> None:
            entry["seconds"] = round(time.monotonic() - begin, 1)
            self.save()

        entry |= {"status": "interrupted", "command": shlex.join(step.command)}
        keep()
        try:
            environment = self.environment | step.environment
            status, code = run_command(step.command, log, step.seconds, environment, keep)
            entry |= {"status": status, "exit_code": code}
        finally:
            lines = archive.tail(log, 1 if entry["status"] == OK else archive.TAIL_LINES)
            entry["last_lines"] = lines
            keep()
            print("\n".join([*lines, f"   {entry['status']}, {entry['seconds']} s"]), flush=True)


def run_command(
    command: Sequence[str],
    log: Path,
    seconds: float,
    environment: Mapping[str, str],
    keep: Callable[[], None] = lambda: None,
) -> tuple[str, int | None]:
    """Runs a command in a process group of its own, and returns (status, exit code).

    Its output goes into `log` as it comes. `keep` is called every minute. When the command ends,
    all processes of the group are ended.
    """
    with log.open("w") as file:
        file.write(f"$ {shlex.join(command)}\n")
        file.flush()
        program = shutil.which(command[0], path=environment.get("PATH"))
        if program is None:
            file.write(f"{command[0]} was not found on PATH\n")
            return "not found", None
        process = subprocess.Popen(
            [program, *command[1:]],
            cwd=ROOT,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    deadline = time.monotonic() + seconds
    try:
        while (left := deadline - time.monotonic()) > 0:
            try:
                code = process.wait(min(left, SAVE_EVERY_S))
                return (OK if code == 0 else "failed"), code
            except subprocess.TimeoutExpired:
                keep()
        return f"over its limit of {seconds:g} s", None
    finally:
        end_group(process)


def end_group(process: subprocess.Popen[Any]) -> None:
    """Ends the process group that `process` leads: first asks its processes to end, then kills
    them."""
    for signal_ in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + GRACE_S
        try:
            os.killpg(process.pid, signal_)
            while time.monotonic() < deadline:
                process.poll()  # otherwise the ended leader stays in its group
                os.killpg(process.pid, 0)
                time.sleep(0.02)
        except ProcessLookupError:
            return
