"""The command line of `python -m benchmarks`: list, run, models, sweep, compare, report."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.results import InvalidResults, load, load_all

DEFAULT_OUT = Path("build/benchmarks")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


def _shape(text: str) -> tuple[int, int]:
    out_features, _, in_features = text.partition("x")
    return int(out_features), int(in_features)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Benchmarks of pylora and its peers."
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("list", help="print the ops, contenders, suites and shapes")

    run = commands.add_parser(
        "run", help="check, time and measure contenders; write a JSON file for each op"
    )
    run.add_argument(
        "--op", action="append", help="an op (may be repeated); default: all of the suite"
    )
    run.add_argument(
        "--suite",
        choices=("quick", "full"),
        default="quick",
        help="default: quick; `list` shows both",
    )
    run.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    run.add_argument("--against", type=_words, help="only contenders whose name contains A, B, ...")
    run.add_argument(
        "--out",
        type=Path,
        default=DEFAULT_OUT,
        help="the folder for the JSON files; default: build/benchmarks",
    )
    run.add_argument("--threads", type=int, help="number of CPU threads; default: what torch uses")
    run.add_argument(
        "--seed", type=int, help="seed of the random data; default: a new one in each run"
    )
    run.add_argument(
        "--shape",
        type=_shape,
        action="append",
        metavar="OUTxIN",
        help="a shape of the weight, in place of the suite's (may be repeated)",
    )
    run.add_argument(
        "--tokens", type=_numbers, help="numbers of tokens in place of the suite's: 1,16,..."
    )
    run.add_argument(
        "--seconds", type=float, help="time to spend on each cell; 0: check, but time nothing"
    )
    run.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    run.add_argument(
        "--keep-heap",
        action="store_true",
        help="start anew with a heap that keeps freed memory, so that no fresh pages are timed; "
        "needs glibc, and writes OP_heap_kept.json",
    )

    models = commands.add_parser(
        "models", help="time training steps and decoding of whole models, and measure their memory"
    )
    models.add_argument("--model", action="append", help="a model (may be repeated); default: all")
    models.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        help="default: bfloat16, or float32 on a CPU that has no instructions for bfloat16",
    )
    models.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    models.add_argument(
        "--out",
        type=Path,
        default=DEFAULT_OUT,
        help="the folder for models.json; default: build/benchmarks",
    )
    models.add_argument(
        "--threads", type=int, help="number of CPU threads; default: what torch uses"
    )
    models.add_argument("--seed", type=int, help="seed of the random weights; default: a new one")
    models.add_argument(
        "--seconds", type=float, default=10.0, help="time to spend on each model; default: 10"
    )

    sweep = commands.add_parser("sweep", help="time every plan of the GPU kernels")
    sweep.add_argument("--device", choices=("cuda",), default="cuda", help="default: cuda")
    sweep.add_argument(
        "--out",
        type=Path,
        required=True,
        help="the JSON file; if it holds a sweep, that is continued",
    )
    sweep.add_argument(
        "--seconds", type=float, default=300.0, help="time for the whole call; default: 300"
    )
    sweep.add_argument(
        "--kernels", type=_words, help="kernels to time, of small,hopper,triton,product"
    )
    sweep.add_argument(
        "--shape",
        type=_shape,
        action="append",
        metavar="OUTxIN",
        help="a shape of the weight, in place of the four (may be repeated)",
    )
    sweep.add_argument(
        "--tokens", type=_numbers, help="numbers of tokens in place of 1 to 8192: 1,16,..."
    )
    sweep.add_argument("--seed", type=int, default=0, help="seed of the random data; default: 0")

    compare = commands.add_parser("compare", help="show what changed between two runs of one op")
    compare.add_argument("before", type=Path, help="the JSON file of the first run")
    compare.add_argument("after", type=Path, help="the JSON file of the second run")

    report = commands.add_parser("report", help="make an HTML page and PNGs from the JSON of runs")
    report.add_argument(
        "paths", type=Path, nargs="*", help="folders or JSON files; default: build/benchmarks"
    )
    report.add_argument(
        "--out", type=Path, help="the folder for the page; default: the folder of the JSON"
    )

    submit = commands.add_parser(
        "submit", help="copy the JSON of your runs to benchmarks/results, for a pull request"
    )
    submit.add_argument(
        "paths", type=Path, nargs="*", help="folders or JSON files; default: build/benchmarks"
    )
    submit.add_argument("--name", required=True, help="your machine, such as amd-epyc-9554")

    commands.add_parser("memory-probe")  # for `benchmarks.memory`, not for people
    return top


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    arguments.words = sys.argv[1:] if argv is None else argv
    try:
        status = globals()["_" + arguments.command.replace("-", "_")](arguments)
        sys.stdout.flush()  # a reader that has gone away shows here, and not when Python exits
        return status
    except BrokenPipeError:
        # `head` and the like read a part and stop. Python flushes its streams when it exits, so
        # that what is still in them needs a place to go (Python's docs, "Note on SIGPIPE").
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (InvalidResults, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _list(arguments: argparse.Namespace) -> int:
    from benchmarks.contender import installed
    from benchmarks.registry import BENCHES
    from benchmarks.shapes import MODELS, SUITES

    for bench in BENCHES.values():
        print(bench.op)
        for contender in bench.contenders:
            missing = [p for p in contender.packages if not installed(p)]
            state = f"not installed: {', '.join(missing)}" if missing else contender.version()
            print(f"  {contender.name:36} {state}{' (full suite)' if contender.only_full else ''}")
    for (name, device), suite in SUITES.items():
        print(f"suite {name} on {device}: M = {', '.join(map(str, suite.tokens))}")
        print(f"  {', '.join(f'{n}x{k}' for n, k in suite.shapes)}")
    for model, layers in MODELS.items():
        print(f"{model}: " + "; ".join(f"{what} {n}x{k}" for (n, k), what in layers.items()))
    return 0


def _run(arguments: argparse.Namespace) -> int:
    from benchmarks import heap

    if arguments.keep_heap:
        heap.keep(arguments.words)
    from benchmarks.runner import run

    return run(arguments)


def _models(arguments: argparse.Namespace) -> int:
    from benchmarks.models.run import run

    return run(arguments)


def _sweep(arguments: argparse.Namespace) -> int:
    from benchmarks.sweep.run import run

    return run(arguments)


def _compare(arguments: argparse.Namespace) -> int:
    from benchmarks.report.tables import compare_table

    before, after = load(arguments.before), load(arguments.after)
    if before["op"] != after["op"]:
        raise InvalidResults(
            f"{arguments.before} measured {before['op']} and {arguments.after} {after['op']}; "
            "only two runs of one op can be compared"
        )
    for field in ("machine", "versions"):
        for name in before[field].keys() | after[field].keys():
            old, new = before[field].get(name), after[field].get(name)
            if old != new:
                print(f"{field} differ: {name} was {old}, is {new}")
    table, slower = compare_table(before, after)
    print(table)
    return 1 if slower else 0


def _report(arguments: argparse.Namespace) -> int:
    from benchmarks.models.results import load_all as load_models
    from benchmarks.report.page import write_report

    paths = arguments.paths or [DEFAULT_OUT]
    out = arguments.out or (paths[0] if paths[0].is_dir() else paths[0].parent)
    for written in write_report(load_all(paths), load_models(paths), out):
        print(written)
    return 0


def _submit(arguments: argparse.Namespace) -> int:
    from benchmarks.submit import submit

    copies = submit(arguments.paths or [DEFAULT_OUT], arguments.name)
    print(*copies, sep="\n")
    print("These files hold the machine, the versions and the times, and nothing else about you.")
    print(f"Next: git add {copies[0].parent}, commit, and open a pull request.")
    return 0


def _memory_probe(arguments: argparse.Namespace) -> int:
    from benchmarks.memory import probe

    return probe()
