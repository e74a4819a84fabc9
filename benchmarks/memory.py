"""Measures the peak extra memory of one call: its results and everything allocated on the way.

On CUDA the number comes from torch's allocator. On a CPU no allocator sees everything, since
kernels have workspaces of their own, and so the number is the growth of the resident set of a
process.

Each contender gets a child process, which is forked before any thread pool exists. The child makes
the call once, so that libraries have set up what they need: oneDNN compiles a product when it first
sees its shape, which takes some 5 MiB. It then gives free memory back to the system, resets the
peak (`/proc/self/clear_refs`) and makes the call again. Linux counts the pages of each thread a few
at a time, so the numbers are good to about 0.3 MiB.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import heap
from benchmarks.machine import ROOT
from benchmarks.shapes import Cell

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_SECONDS_A_TASK = 60


def cuda_extra(run: Callable[[], Any]) -> int:
    """Returns the peak extra bytes of a call on the current GPU."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    del result
    return peak - before


def cpu_extra(
    tasks: Sequence[tuple[Cell, str]], seed: int, threads: int
) -> dict[tuple[Cell, str], int | None]:
    """Returns the peak extra bytes of each (cell, contender). The number is None if the child
    process failed, or if the system has no /proc."""
    if not tasks or not CLEAR_REFS.exists():
        return dict.fromkeys(tasks)
    request = {"seed": seed, "threads": threads, "tasks": [[asdict(c), n] for c, n in tasks]}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "memory-probe"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={k: v for k, v in heap.default_environment().items() if k != "PYTHONSAFEPATH"},
        timeout=60 + _SECONDS_A_TASK * len(tasks),
    )
    if done.returncode != 0:
        raise RuntimeError(f"the memory probe failed:\n{done.stderr[-2000:]}")
    return dict(zip(tasks, json.loads(done.stdout.splitlines()[-1]), strict=True))


def probe() -> int:
    """Runs in the process that `cpu_extra` starts: reads tasks, then prints their bytes."""
    from benchmarks.registry import bench_of

    request = json.loads(sys.stdin.read())
    answers: list[int | None] = []
    for facts, name in request["tasks"]:
        cell = Cell(**facts)
        contender = next(c for c in bench_of(cell.op).contenders if c.name == name)
        _import(contender.packages)
        answers.append(_in_child(lambda c=contender, at=cell: _measure(at, c, request)))
    print(json.dumps(answers))
    return 0


def _import(packages: Sequence[str]) -> None:
    """Imports before the fork, so that the children share the memory of the imports."""
    for package in packages:
        __import__({"pylora-kernels": "pylora"}.get(package, package))


def _in_child(measure: Callable[[], int]) -> int | None:
    """Returns what `measure` returns in a forked process, or None if that process fails."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.write(write_end, str(measure()).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    return int(text) if status == 0 and text else None


def _measure(cell: Cell, contender: Any, request: dict[str, Any]) -> int:
    from benchmarks.calls import bind
    from benchmarks.layer_tensors import LayerTensors

    torch.set_num_threads(request["threads"])
    tensors = LayerTensors(cell, torch.device("cpu"), request["seed"], real=False)
    call, *_ = bind(cell, contender, contender.build(tensors), tensors)
    call.once()
    before = _settle()
    result = call.once()
    peak = _status_bytes("VmHWM")
    del result
    return max(peak - before, 0)


def _settle() -> int:
    """Gives free memory back to the system, resets the peak, and returns the resident bytes."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl does not have it
    if trim is not None:
        trim(0)
    CLEAR_REFS.write_text("5")
    return _status_bytes("VmRSS")


def _status_bytes(field: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"{STATUS} has no {field}")
