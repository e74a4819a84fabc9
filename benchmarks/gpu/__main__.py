"""Runs `python -m benchmarks.gpu`, to be started in the root of the repository with the Python that
has torch."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.gpu import stand_ins
from benchmarks.gpu.install import find_cuda_home
from benchmarks.gpu.run import Runner
from benchmarks.gpu.steps import BUDGET_S, CALLS, ROOT, Step, Target, chosen
from benchmarks.results import write_atomically

BUILD = ROOT / "build"


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Runs what needs a GPU. docs/gpu-run.md gives the order of the calls.",
    )
    top.add_argument("--call", help=f"one of {', '.join(CALLS)}; default: all that fit the budget")
    top.add_argument(
        "--steps",
        nargs="*",
        default=[],
        metavar="NAME[=SECONDS]",
        help="run these steps, with a time limit if one is given",
    )
    top.add_argument(
        "--out",
        type=Path,
        default=Path(os.environ.get("OUT") or BUILD / "gpu"),
        help="results.tgz and summary.json go into a folder in this one, named after the call",
    )
    top.add_argument(
        "--work", type=Path, default=BUILD / "gpu-work", help="a folder for all other files"
    )
    top.add_argument(
        "--budget",
        type=float,
        default=BUDGET_S,
        help=f"seconds for the whole call; default: {BUDGET_S}",
    )
    top.add_argument("--wheels", type=Path, help="a folder of wheels to install")
    top.add_argument(
        "--dry", action="store_true", help="run the same steps, small and without a GPU"
    )
    return top


def environment_of(work: Path, site: Path, has_wheels: bool) -> dict[str, str]:
    """Returns the environment of all steps: nvcc on PATH, the folder of the wheels, one cache of
    Triton, and Python's output without buffering."""
    environment = dict(os.environ)
    home = find_cuda_home()
    if shutil.which("nvcc") is None and not environment.get("CUDA_HOME") and home is not None:
        environment["CUDA_HOME"] = str(home)
    if environment.get("CUDA_HOME"):
        # compute-sanitizer is in this folder too.
        environment["PATH"] += f"{os.pathsep}{environment['CUDA_HOME']}/bin"
    if has_wheels:
        others = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join([str(site), *([others] if others else [])])
    environment |= {"PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    return environment | {"TRITON_CACHE_DIR": str(work / "triton-cache")}


def facts_of(environment: dict[str, str]) -> dict[str, Any]:
    """Returns what facts.py prints. Raises ValueError if this Python has no torch."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.facts"],
        cwd=ROOT,
        env=environment | {"PYTHONSAFEPATH": ""},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise ValueError(
            f"{sys.executable} must be a Python with torch (PYTHON=... chooses another): "
            f"{done.stderr.strip().splitlines()[-1]}"
        )
    return json.loads(done.stdout.splitlines()[-1])


@contextmanager
def alone(base: Path) -> Iterator[None]:
    """Locks the folder. Raises ValueError if another run uses it, whose files this run would
    remove."""
    base.mkdir(parents=True, exist_ok=True)
    with (base / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"--work is {base}, which another run is using") from None
        yield


def run(arguments: argparse.Namespace) -> int:
    wheels: tuple[Path, ...] = ()
    if arguments.wheels is not None:
        wheels = tuple(sorted(arguments.wheels.resolve().glob("*.whl")))
        if not wheels:
            raise ValueError(f"--wheels is {arguments.wheels}; it must be a folder with wheels")
    name = f"call-{arguments.call}" if arguments.call else "steps" if arguments.steps else "all"
    base, out = arguments.work.resolve(), arguments.out.resolve() / name
    work, site = base / name, base / "site"
    environment = environment_of(base, site, bool(wheels))
    facts = facts_of(environment)
    if not facts["arch"] and not arguments.dry:
        raise ValueError("torch finds no CUDA device; --dry runs the steps without one")
    arch = "" if arguments.dry else facts["arch"]
    target = Target(sys.executable, arch, work, site, facts["cores"], wheels, arguments.dry)
    steps = chosen(target, arguments.call, arguments.steps)
    with alone(base):
        return run_steps(arguments, target, steps, out, environment, facts | {"call": name})


def run_steps(
    arguments: argparse.Namespace,
    target: Target,
    steps: Sequence[Step],
    out: Path,
    environment: dict[str, str],
    facts: dict[str, Any],
) -> int:
    work = target.work
    # Results of an earlier call of the same name must not be packed with those of this one.
    shutil.rmtree(work, ignore_errors=True)
    (work / "results").mkdir(parents=True)
    write_atomically(work / "machine.json", json.dumps(facts, indent=1) + "\n")
    if arguments.dry:
        folder = stand_ins.write(work.parent / "stand-ins", work)
        environment["PATH"] = f"{folder}{os.pathsep}{environment['PATH']}"
    shown = {key: value for key, value in facts.items() if key != "packages"}
    runner = Runner(steps, out, work, arguments.budget, environment, shown, arguments.dry)
    succeeded = runner.run()
    for entry in runner.entries:
        note = f": {entry['note']}" if "note" in entry else ""
        print(f"{entry['step']:17} {entry['seconds']:>7} s  {entry['status']}{note}")
    print(f"results: {out}")
    return 0 if succeeded else 1


def main() -> int:
    # SystemExit ends the step that runs, and packs what there is.
    for signal_ in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signal_, lambda number, frame: sys.exit(128 + number))
    top = parser()
    try:
        return run(top.parse_args())
    except ValueError as error:
        top.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
