"""Builds the programs, runs them group by group and writes their results into one JSON file.

    python -m benchmarks.primitives --out FILE.json                  everything, in under 4 minutes
    python -m benchmarks.primitives --out FILE.json --only GROUP     one group (may be repeated)
    python -m benchmarks.primitives --list                           the experiments
    python -m benchmarks.primitives --build --arch 90a               compile only; needs no GPU

If a program does not build, or an experiment fails, hangs or gives a wrong result, the others still
run; the file and the table report it, and the exit code is 1. Cycles are counted by clock64 of an
SM, and a sample has the cycles of the slowest CTA.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import TimeoutExpired
from subprocess import run as run_process
from typing import Any

import torch

from benchmarks import machine
from benchmarks.primitives import build, runner
from benchmarks.primitives.protocol import serve
from benchmarks.primitives.table import results_table
from benchmarks.results import write_atomically

SCHEMA = 1
PYTHON_GROUPS = ("products", "host")
# The most important group comes first, since a run may be cut off.
GROUPS = (*build.PROGRAMS, *PYTHON_GROUPS)
_SECONDS_TO_LIST = 60.0
_SMI_FIELDS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["serve"]:  # `_programs` makes this command for a group in Python
        _serve(arguments[1], arguments[2], arguments[3:])
        return 0
    options = _parser().parse_args(arguments)
    groups = tuple(options.only or GROUPS)
    arch = options.arch or _arch_here()
    if arch is None and options.build:
        print("without a GPU --build needs --arch, such as --arch 90a", file=sys.stderr)
        return 2
    # A program can list its experiments on a machine without a GPU too.
    programs, problems = _programs(
        groups, arch or "90a", options.build or torch.cuda.is_available()
    )
    if options.build:
        for group, problem in problems.items():
            print(f"{group}: {problem}", file=sys.stderr)
        print(f"{len(programs)} programs in {build.FOLDER}")
        return 1 if problems else 0
    experiments = _experiments(programs, problems)
    if options.list:
        for records in experiments.values():
            for record in records:
                print(f"{record['group']:14} {record['name']:44} {record['note']}")
        for group, problem in problems.items():
            print(f"{group:14} {problem}")
        return 1 if problems else 0
    if options.out is None:
        print("--out FILE.json is needed", file=sys.stderr)
        return 2
    return _run(options, programs, problems, experiments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.primitives", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, help="the JSON file")
    parser.add_argument("--only", action="append", choices=GROUPS, metavar="GROUP",
                        help=f"one of {', '.join(GROUPS)}; may be repeated")  # fmt: skip
    parser.add_argument("--list", action="store_true", help="name the experiments")
    parser.add_argument("--build", action="store_true", help="compile the programs, run nothing")
    parser.add_argument("--arch", help="an architecture such as 90a; default: that of the GPU")
    parser.add_argument("--limit", type=float, default=30.0, metavar="SECONDS",
                        help="limit for an experiment; default: 30")  # fmt: skip
    parser.add_argument("--total", type=float, default=230.0, metavar="SECONDS",
                        help="limit for everything after the build; default: 230")  # fmt: skip
    return parser


def _arch_here() -> str | None:
    if not torch.cuda.is_available():
        return None
    arch = "{}{}".format(*torch.cuda.get_device_capability())
    return {"90": "90a"}.get(arch, arch)


def _programs(
    groups: Sequence[str], arch: str, with_library: bool
) -> tuple[dict[str, runner.Program], dict[str, str]]:
    """Returns (the programs by group, the reason for each group that has none)."""
    targets = [build.PROGRAMS[group] for group in groups if group in build.PROGRAMS]
    targets += [build.EMPTY_LAUNCH] if with_library and "host" in groups else []
    paths, problems = {}, {}
    with ThreadPoolExecutor(len(machine.usable_cpus())) as pool:
        jobs = {target.name: pool.submit(build.built, target, arch) for target in targets}
        for name, job in jobs.items():
            try:
                paths[name] = job.result()
            except build.BuildError as error:
                problems[name] = str(error)
    programs = {}
    for group in groups:
        if group in paths:
            programs[group] = runner.Program(group, [str(paths[group])])
        elif group in PYTHON_GROUPS:
            library = str(paths.get(build.EMPTY_LAUNCH.name, ""))
            module = [sys.executable, "-m", "benchmarks.primitives", "serve"]
            # The tensors are tiny: on a CPU a second thread would only make the calls longer.
            environment = {"OMP_NUM_THREADS": "1"} if group == "host" else {}
            programs[group] = runner.Program(group, [*module, group, library], environment)
    return programs, problems


def _experiments(
    programs: dict[str, runner.Program], problems: dict[str, str]
) -> dict[str, list[runner.Record]]:
    """Returns the experiments by group. If a program cannot list them, that becomes a problem."""
    experiments = {}
    for group, program in programs.items():
        try:
            experiments[group] = runner.describe(program, _SECONDS_TO_LIST)
        except RuntimeError as error:
            problems[group] = str(error)
    return experiments


def _run(
    options: argparse.Namespace,
    programs: dict[str, runner.Program],
    problems: dict[str, str],
    experiments: dict[str, list[runner.Record]],
) -> int:
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    begin = time.monotonic()
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "date": machine.now(),
        "complete": False,
        "seconds": 0.0,
        "machine": machine.machine(device),
        "device": _device_facts(programs) if gpu else None,
        "versions": machine.versions(),
        "commit": machine.commit(),
        "problems": problems,
        "experiments": [],
    }
    if not gpu:
        for group in [group for group in experiments if group != "host"]:
            problems[group] = "torch finds no CUDA device"
            del experiments[group]

    def save() -> None:
        document["seconds"] = round(time.monotonic() - begin, 1)
        write_atomically(options.out, json.dumps(document, indent=1) + "\n")

    def finished(record: runner.Record) -> None:
        document["experiments"].append(record)
        save()

    def time_left() -> float:
        return options.total - (time.monotonic() - begin)

    save()
    for group, records in experiments.items():
        print(f"{group}: {len(records)} experiments", flush=True)
        runner.run(programs[group], records, options.limit, finished, time_left)
    document["complete"] = True
    save()
    print("\n" + results_table(document["experiments"]))
    for group, problem in problems.items():
        print(f"{group}: {problem}")
    print(f"wrote {options.out} in {document['seconds']} s")
    failed = any(record["status"] == runner.ERROR for record in document["experiments"])
    return 1 if failed or problems else 0


def _device_facts(programs: dict[str, runner.Program]) -> dict[str, Any] | None:
    """Returns what a compiled program says about the device, and the clocks from nvidia-smi."""
    facts = None
    for group, program in programs.items():
        if group in build.PROGRAMS and facts is None:
            facts = runner.ask([*program.command, "--facts"], _SECONDS_TO_LIST)
    query = ["nvidia-smi", f"--query-gpu={','.join(_SMI_FIELDS)}", "--format=csv,noheader"]
    try:
        done = run_process(query, capture_output=True, text=True, timeout=_SECONDS_TO_LIST)
    except (OSError, TimeoutExpired):
        return facts
    if done.returncode != 0 or not done.stdout.strip():
        return facts
    values = [value.strip() for value in done.stdout.splitlines()[0].split(",")]
    return {**(facts or {}), "nvidia_smi": dict(zip(_SMI_FIELDS, values, strict=False))}


def _serve(group: str, library: str, names: Sequence[str]) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if group == "products":
        from benchmarks.primitives import products

        serve(products.experiments(device), names)
    else:
        from benchmarks.primitives import host_calls

        serve(host_calls.experiments(device, Path(library) if library else None), names)
