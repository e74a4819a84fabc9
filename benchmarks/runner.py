"""`python -m benchmarks run`: measures the cells of a suite, writes JSON and prints tables."""

from __future__ import annotations

import argparse
import os
import random
import time
from dataclasses import replace
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import heap, machine, results
from benchmarks.contender import Bench
from benchmarks.harness import Harness, add_cpu_memory
from benchmarks.registry import bench_of, check_against, ops_of, selected
from benchmarks.report import goals
from benchmarks.report.host_tables import host_tables
from benchmarks.report.tables import cell_table, summary_table
from benchmarks.shapes import QUICK_SHAPES, SUITES, TRAINING, Cell, Suite
from benchmarks.statistics import BUSY


def run(arguments: argparse.Namespace) -> int:
    """Returns 1 if a result of ours was wrong or failed, else 0."""
    if "PYTEST_CURRENT_TEST" in os.environ and not arguments.seconds == 0:
        raise ValueError("--seconds must be 0 under pytest, where nothing is timed")
    if arguments.against is not None:
        check_against(arguments.against)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda, but torch finds no CUDA device")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    suite = _suite(arguments)
    benches = [bench_of(op) for op in arguments.op or ops_of(arguments.suite)]
    plan = {bench.op: _cells(bench, suite, arguments) for bench in benches}
    seed = random.SystemRandom().randrange(2**31) if arguments.seed is None else arguments.seed
    device = torch.device(arguments.device)
    begin = time.perf_counter()
    # These facts are taken before this run loads the machine and adds files to the checkout.
    facts = {
        "machine": machine.machine(device),
        "versions": machine.versions(),
        "commit": machine.commit(),
    }
    harness = Harness(device, seed, suite.seconds)
    _announce(facts["machine"], harness)
    runs, to_measure = [], []
    with tqdm(total=sum(map(len, plan.values())), unit="cell", smoothing=0.1) as bar:
        for bench in benches:
            finished, reports = _run_bench(
                harness, bench, plan[bench.op], suite, arguments, facts, bar
            )
            runs.append(finished)
            if not bench.host_time:
                to_measure += [pair for pair in reports if _has_memory(bench, pair[0], suite)]
    if device.type == "cpu" and suite.memory_tokens and to_measure:
        print("measuring the peak memory of each contender in a process of its own")
        add_cpu_memory(to_measure, seed)
        for finished in runs:
            results.save(arguments.out / f"{results.file_stem(finished)}.json", finished)
    for finished in runs:
        is_host = bench_of(finished["op"]).host_time
        print("\n" + (host_tables(finished) if is_host else summary_table(finished)))
    written = (f"{arguments.out / results.file_stem(run)}.json" for run in runs)
    print(f"\nwrote {', '.join(written)}")
    print("\n" + goals.goals_table(runs))
    bad = [
        r
        for finished in runs
        for cell in finished["cells"]
        for r in cell["results"]
        if r["contender"] in _ours(finished["op"]) and r["status"] in ("refused", "error")
    ]
    print(f"\n{time.perf_counter() - begin:.0f} s in all")
    if bad:
        print(f"{len(bad)} results of pylora were wrong or failed; the first: {bad[0]['note']}")
    return 1 if bad else 0


def _suite(arguments: argparse.Namespace) -> Suite:
    """Returns the suite with what the command line replaces in it."""
    suite = SUITES[arguments.suite, arguments.device]
    if arguments.shape:
        suite = replace(suite, shapes=tuple(arguments.shape))
    if arguments.tokens:
        suite = replace(
            suite,
            tokens=arguments.tokens,
            backward_tokens=arguments.tokens,
            memory_tokens=() if arguments.device == "cuda" else arguments.tokens,
        )
    if arguments.seconds is not None:
        suite = replace(suite, seconds=arguments.seconds)
    if arguments.no_memory:
        suite = replace(suite, memory_tokens=())
    return suite


def _ours(op: str) -> set[str]:
    return {contender.name for contender in bench_of(op).contenders if contender.is_ours}


def _cells(bench: Bench, suite: Suite, arguments: argparse.Namespace) -> list[Cell]:
    """Returns the cells of one op in the suite, with what the bench replaces in it."""
    if bench.shapes and not arguments.shape:
        suite = replace(suite, shapes=bench.shapes)
    if bench.tokens and not arguments.tokens:
        suite = replace(suite, tokens=bench.tokens, backward_tokens=bench.tokens)
    if bench.modes:
        suite = replace(suite, modes=bench.modes)
    cells = suite.cells(bench.op, bench.has_tokens, bench.has_backward, bench.rank)
    return [c for c in cells if not suite.few_contenders or c.mode in bench.quick_modes]


def _has_memory(bench: Bench, cell: Cell, suite: Suite) -> bool:
    """Returns True if the peak memory of this cell is measured on a CPU."""
    if not cell.tokens:
        return True
    usual = (cell.out_features, cell.in_features) in (bench.shapes or QUICK_SHAPES)
    given = len(suite.shapes) == 1
    return cell.mode == TRAINING and cell.tokens in suite.memory_tokens and (usual or given)


def _announce(facts: dict[str, Any], harness: Harness) -> None:
    limits = harness.roofline
    print(f"{facts['gpu'] or facts['cpu']}, {facts['threads']} threads, {facts['caches']}")
    if facts["heap"] == heap.KEPT:
        print(heap.NOTE)
    if (facts["load"] or 0) > BUSY:
        print(f"load average {facts['load']:.1f}: other programs run too, these times are in doubt")
    print(
        f"measured limits: read {limits['read_bytes_per_s'] / 1e9:.1f} GB/s, "
        f"copy {limits['copy_bytes_per_s'] / 1e9:.1f} GB/s, "
        f"bf16 matmul {limits['matmul_flop_per_s'] / 1e9:.0f} GFLOP/s"
    )


def _run_bench(
    harness: Harness,
    bench: Bench,
    cells: list[Cell],
    suite: Suite,
    arguments: argparse.Namespace,
    facts: dict[str, Any],
    bar: Any,
) -> tuple[dict[str, Any], list[tuple[Cell, dict[str, Any]]]]:
    """Measures the cells of one op. Returns (the run as JSON, each cell with its part of the JSON).

    The file is replaced after each cell, so that a run that is cut off keeps what it measured.
    """
    begin = time.perf_counter()
    if not bench.host_time:
        harness.measure_limits()
    contenders = selected(bench, arguments.against, suite.few_contenders)
    reports = []
    finished: dict[str, Any] = {
        "schema": results.SCHEMA,
        "op": bench.op,
        "suite": arguments.suite,
        "seed": harness.seed,
        **facts,
        "cells": [],
    }

    def save(cells_left: int) -> None:
        finished["date"] = machine.now()
        finished["seconds"] = round(time.perf_counter() - begin, 1)
        finished["roofline"] = dict(harness.roofline)
        finished["cells_left"] = cells_left
        results.save(arguments.out / f"{results.file_stem(finished)}.json", finished)

    save(len(cells))
    for done, cell in enumerate(cells, 1):
        bar.set_description(str(cell))
        for report in harness.run(bench, contenders, cell):
            reports.append((cell, report))
            finished["cells"].append(report)
            bar.write(cell_table(bench.op, report) + "\n")
        save(len(cells) - done)
        bar.update()
    return finished, reports
