"""`python -m benchmarks sweep`: times every plan of a kernel, not the winners, into one JSON.

Whoever has no GPU can tune from that file. The points are ordered from coarse to fine: first the
plan of the rule for each kernel, shape and M, then plans around it, then many; a sweep that is cut
off is of use, and the same command goes on where it ended. Each point is checked by the numerics
rule before it is timed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from tqdm import tqdm

from benchmarks import machine
from benchmarks.sweep.file import STARTED, SweepFile
from benchmarks.sweep.kernels import KERNELS, Kernel, Plan, Refused

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192))
ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
MOST_STARTS = 2  # of one point: a process that ended within it may have been ended for its time


@dataclass(frozen=True)
class Point:
    """One plan to measure; level 0 is the rule's own, the higher the finer."""

    kernel: str
    out_features: int
    in_features: int
    rows: int
    level: int
    plan: tuple[tuple[str, int], ...]

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.kernel, self.out_features, self.in_features, self.rows, self.plan)

    @property
    def chosen(self) -> Plan:
        return dict(self.plan)

    def record(self) -> dict[str, Any]:
        return {
            "kernel": self.kernel,
            "out_features": self.out_features,
            "in_features": self.in_features,
            "rows": self.rows,
            "level": self.level,
            "plan": self.chosen,
        }

    def __str__(self) -> str:
        return f"{self.kernel} {self.out_features}x{self.in_features} M={self.rows}"


class Measurer(Protocol):
    """Checks and times points; raises Refused if the kernel cannot run a plan, and RuntimeError
    for what goes wrong."""

    def __call__(self, point: Point) -> dict[str, Any]:
        """The rest of the point's record."""

    def device_works(self) -> bool:
        """False if an error has left the device useless to this process."""


def coarse_to_fine(items: Sequence[int]) -> list[int]:
    """Both ends, then the middle, then the middles of what is between."""
    order, gaps = [items[0], items[-1]], [(0, len(items) - 1)]
    for first, last in gaps:  # grows while it is walked
        middle = (first + last) // 2
        if middle not in (first, last):
            order.append(items[middle])
            gaps += [(first, middle), (middle, last)]
    return list(dict.fromkeys(order))


def points(
    kernels: Iterable[Kernel],
    shapes: Sequence[tuple[int, int]],
    rows: Sequence[int],
    device: torch.device,
) -> list[Point]:
    """All points, coarse to fine; those of a shape and M of one level stay together."""

    def of(kernel: Kernel, shape: tuple[int, int], M: int) -> Iterator[Point]:
        seen = set()
        x = torch.empty(M, shape[1], dtype=torch.bfloat16, device=device)
        for level, plans in enumerate(kernel.levels(x, shape[0])):
            for plan in plans:
                point = Point(kernel.name, *shape, M, level, tuple(plan.items()))
                if point.key not in seen:
                    seen.add(point.key)
                    yield point

    found = [
        point
        for M in coarse_to_fine(sorted(set(rows)))
        for shape in shapes
        for kernel in kernels
        if kernel.least <= M <= kernel.most
        for point in of(kernel, shape, M)
    ]
    return sorted(found, key=lambda point: point.level)  # stable: the rest stays in order


def sweep(
    to_measure: Sequence[Point],
    measure: Measurer,
    file: SweepFile,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
    say: Callable[[str], None] = print,
) -> bool:
    """Measures the points that the file lacks, for at most so many seconds; each is in the file
    before the next begins. False if a result was wrong or the device was lost."""
    begin, right = clock(), True
    todo = [point for point in to_measure if not _is_done(file.get(point.key), point, file)]
    with tqdm(total=len(todo), unit="plan", smoothing=0.1) as bar:
        for number, point in enumerate(todo):
            if clock() - begin > seconds:
                say(f"time is up: {len(todo) - number} plans are left for the same command")
                break
            bar.set_description(str(point))
            before = file.get(point.key)
            starts = 1 + (before["starts"] if before is not None else 0)
            file.put(point.key, {**point.record(), "status": STARTED, "starts": starts})
            found = _measured(measure, point)
            right = right and found["status"] != "fails the rule"
            file.put(point.key, {**point.record(), "starts": starts, **found})
            bar.update()
            if found["status"] == "error" and not measure.device_works():
                say(f"the device was lost by {point} {point.chosen}: {found['note']}")
                say("the same command goes on behind this plan")
                return False
    return right


def _measured(measure: Measurer, point: Point) -> dict[str, Any]:
    try:
        return measure(point)
    except Refused as error:
        return {"status": "refused", "note": str(error)}
    except RuntimeError as error:
        return {"status": "error", "note": str(error)[:300]}


def _is_done(record: dict[str, Any] | None, point: Point, file: SweepFile) -> bool:
    """A point that a process never came back from is tried once more, and then given up."""
    if record is None:
        return False
    if record["status"] != STARTED:
        return True
    if record["starts"] < MOST_STARTS:
        return False
    note = f"{record['starts']} processes ended while it ran"
    file.put(point.key, {**record, "status": "did not finish", "note": note})
    return True


def run(arguments: argparse.Namespace) -> int:
    """Returns 1 if a result was wrong or the device was lost, else 0."""
    from benchmarks.sweep.measure import SweepMeasurer

    if not torch.cuda.is_available():
        raise ValueError("--device is cuda, but torch finds no CUDA device")
    device = torch.device(arguments.device)
    wanted = arguments.kernels or [kernel.name for kernel in KERNELS]
    unknown = set(wanted) - {kernel.name for kernel in KERNELS}
    if unknown:
        known = ", ".join(kernel.name for kernel in KERNELS)
        raise ValueError(
            f"--kernels has {', '.join(sorted(unknown))}; it must name some of {known}"
        )
    left_out = {kernel.name: kernel.why_not(device) for kernel in KERNELS if kernel.name in wanted}
    left_out = {name: reason for name, reason in left_out.items() if reason is not None}
    for name, reason in left_out.items():
        print(f"{name} is left out: {reason}")
    chosen = [k for k in KERNELS if k.name in wanted and k.name not in left_out]
    if not chosen:
        raise ValueError(f"no kernel of --kernels {','.join(wanted)} can run here")
    to_measure = points(chosen, arguments.shape or SHAPES, arguments.rows or ROWS, device)
    facts = {
        "machine": machine.machine(device),
        "versions": machine.versions(),
        "commit": machine.commit(),
    }
    file = SweepFile(arguments.out, facts, left_out)
    measure = SweepMeasurer(device, arguments.seed, {kernel.name: kernel for kernel in chosen})
    right = sweep(to_measure, measure, file, arguments.seconds)
    print(f"{len(file)} plans of {len(to_measure)} are in {arguments.out}: {file.summary()}")
    return 0 if right else 1
