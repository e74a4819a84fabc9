"""`python -m benchmarks run`: the suite, the progress bar, the tables and the files."""

from __future__ import annotations

import argparse
import os
import random
import time
from dataclasses import replace
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import machine, results
from benchmarks.contender import Bench
from benchmarks.harness import Harness, add_cpu_memory
from benchmarks.registry import bench_of, check_against, ops_of, selected
from benchmarks.report import goals
from benchmarks.report.host_tables import host_tables
from benchmarks.report.tables import cell_table, summary_table
from benchmarks.shapes import QUICK_SHAPES, SUITES, TRAINING, Cell, Suite
from benchmarks.statistics import BUSY


def run(arguments: argparse.Namespace) -> int:
    """Returns 1 where a result of ours was refused or failed, else 0."""
    if "PYTEST_CURRENT_TEST" in os.environ and not arguments.seconds == 0:
        raise ValueError("benchmarks do not time under pytest; --seconds must be 0 there")
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
    # Before our own load, and before our own files make the checkout dirty.
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
                to_measure += [pair for pair in reports if _has_memory(pair[0], suite)]
    if device.type == "cpu" and suite.memory_rows and to_measure:
        print("measuring peak memory, a process for each contender")
        add_cpu_memory(to_measure, seed)
        for finished in runs:
            results.save(arguments.out / f"{finished['op']}.json", finished)
    for finished in runs:
        is_host = bench_of(finished["op"]).host_time
        print("\n" + (host_tables(finished) if is_host else summary_table(finished)))
    print(f"\nwrote {', '.join(str(arguments.out / run['op']) + '.json' for run in runs)}")
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
        print(f"{len(bad)} results of pylora were refused or failed: {bad[0]['note']}")
    return 1 if bad else 0


def _suite(arguments: argparse.Namespace) -> Suite:
    suite = SUITES[arguments.suite, arguments.device]
    if arguments.shape:
        suite = replace(suite, shapes=tuple(arguments.shape))
    if arguments.rows:
        suite = replace(
            suite,
            rows=arguments.rows,
            backward_rows=arguments.rows,
            memory_rows=() if arguments.device == "cuda" else arguments.rows,
        )
    if arguments.seconds is not None:
        suite = replace(suite, seconds=arguments.seconds)
    if arguments.no_memory:
        suite = replace(suite, memory_rows=())
    return suite


def _ours(op: str) -> set[str]:
    return {contender.name for contender in bench_of(op).contenders if contender.is_ours}


def _cells(bench: Bench, suite: Suite, arguments: argparse.Namespace) -> list[Cell]:
    if bench.shapes and not arguments.shape:
        suite = replace(suite, shapes=bench.shapes)
    if bench.rows and not arguments.rows:
        suite = replace(suite, rows=bench.rows, backward_rows=bench.rows)
    if bench.modes:
        suite = replace(suite, modes=bench.modes)
    cells = suite.cells(bench.op, bench.has_rows, bench.has_backward, bench.rank)
    return [c for c in cells if not suite.few_contenders or c.mode in bench.quick_modes]


def _has_memory(cell: Cell, suite: Suite) -> bool:
    if not cell.rows:
        return True
    quick_shape = (cell.out_features, cell.in_features) in QUICK_SHAPES
    given = len(suite.shapes) == 1
    return cell.mode == TRAINING and cell.rows in suite.memory_rows and (quick_shape or given)


def _announce(facts: dict[str, Any], harness: Harness) -> None:
    limits = harness.roofline
    print(f"{facts['gpu'] or facts['cpu']}, {facts['threads']} threads, {facts['caches']}")
    if (facts["load"] or 0) > BUSY:
        print(
            f"load average {facts['load']:.1f}: something else runs here, do not trust these times"
        )
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
    """(the run of one op as JSON, its cells with their reports inside that JSON).

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
        results.save(arguments.out / f"{bench.op}.json", finished)

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
