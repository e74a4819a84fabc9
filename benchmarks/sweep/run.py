"""`python -m benchmarks sweep`: times every plan of each kernel and writes one JSON file.

The file has the times of all plans, not only of the best, so that somebody without a GPU can tune
the rules from it. The points go from coarse to fine: for each kernel, shape and M first the plan of
the rule, then plans around it, then many more. A sweep that is cut off is therefore of use, and the
same command continues it. Each point is checked by the numerics rule before it is timed.
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
from benchmarks.sweep.kernels import KERNELS, Kernel, KernelPlan, Refused

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192))
TOKENS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
# A point is started so often. If a process ended while it ran, only its time may have been up.
MOST_STARTS = 2


@dataclass(frozen=True)
class Point:
    """One plan to measure, for a kernel, a shape and a number of tokens.

    level  0 for the plan of the rule; the higher, the finer the plan
    """

    kernel: str
    out_features: int
    in_features: int
    tokens: int
    level: int
    plan: tuple[tuple[str, int], ...]

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.kernel, self.out_features, self.in_features, self.tokens, self.plan)

    @property
    def chosen(self) -> KernelPlan:
        return dict(self.plan)

    def record(self) -> dict[str, Any]:
        return {
            "kernel": self.kernel,
            "out_features": self.out_features,
            "in_features": self.in_features,
            "tokens": self.tokens,
            "level": self.level,
            "plan": self.chosen,
        }

    def __str__(self) -> str:
        return f"{self.kernel} {self.out_features}x{self.in_features} M={self.tokens}"


class Measurer(Protocol):
    """Checks and times points. It raises Refused if the kernel cannot run a plan, and RuntimeError
    if something goes wrong."""

    def __call__(self, point: Point) -> dict[str, Any]:
        """Returns what was measured, which completes the record of the point."""

    def device_works(self) -> bool:
        """Returns False if an error has left the device unusable for this process."""


def coarse_to_fine(items: Sequence[int]) -> list[int]:
    """Orders items: both ends, then the middle, then the middles of the gaps, and so on."""
    order, gaps = [items[0], items[-1]], [(0, len(items) - 1)]
    for low, high in gaps:  # the list grows while the loop runs
        middle = (low + high) // 2
        if middle not in (low, high):
            order.append(items[middle])
            gaps += [(low, middle), (middle, high)]
    return list(dict.fromkeys(order))


def points(
    kernels: Iterable[Kernel],
    shapes: Sequence[tuple[int, int]],
    tokens: Sequence[int],
    device: torch.device,
) -> list[Point]:
    """Returns all points from coarse to fine. Points of one level, M and shape are neighbours."""

    def points_of(kernel: Kernel, shape: tuple[int, int], M: int) -> Iterator[Point]:
        seen = set()
        x = torch.empty(M, shape[1], dtype=torch.bfloat16, device=device)
        for level, plans in enumerate(kernel.levels(x, shape[0])):
            for plan in plans:
                point = Point(kernel.name, *shape, M, level, tuple(plan.items()))
                if point.key not in seen:
                    seen.add(point.key)
                    yield point

    all_points = [
        point
        for M in coarse_to_fine(sorted(set(tokens)))
        for shape in shapes
        for kernel in kernels
        if kernel.least <= M <= kernel.most
        for point in points_of(kernel, shape, M)
    ]
    return sorted(all_points, key=lambda point: point.level)  # keeps the order within a level


def sweep(
    to_measure: Sequence[Point],
    measure: Measurer,
    file: SweepFile,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
    say: Callable[[str], None] = print,
) -> bool:
    """Measures the points that the file lacks, for about `seconds`. Each is in the file before the
    next begins. Returns False if a result was wrong or the device was lost."""
    begin, all_right = clock(), True
    todo = [point for point in to_measure if not _is_done(file.get(point.key), point, file)]
    with tqdm(total=len(todo), unit="plan", smoothing=0.1) as bar:
        for number, point in enumerate(todo):
            if clock() - begin > seconds:
                say(
                    f"time is up: the same command goes on with the {len(todo) - number} plans left"
                )
                break
            bar.set_description(str(point))
            before = file.get(point.key)
            starts = 1 + (before["starts"] if before is not None else 0)
            file.put(point.key, {**point.record(), "status": STARTED, "starts": starts})
            measured = _measured(measure, point)
            all_right = all_right and measured["status"] != "fails the rule"
            file.put(point.key, {**point.record(), "starts": starts, **measured})
            bar.update()
            if measured["status"] == "error" and not measure.device_works():
                say(f"the device was lost by {point} {point.chosen}: {measured['note']}")
                say("the same command goes on with the next plan")
                return False
    return all_right


def _measured(measure: Measurer, point: Point) -> dict[str, Any]:
    try:
        return measure(point)
    except Refused as error:
        return {"status": "refused", "note": str(error)}
    except RuntimeError as error:
        return {"status": "error", "note": str(error)[:300]}


def _is_done(record: dict[str, Any] | None, point: Point, file: SweepFile) -> bool:
    """Returns True if the point needs no measurement. If a process ended while a point ran, it is
    tried once more and then given up."""
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
    names = arguments.kernels or [kernel.name for kernel in KERNELS]
    unknown = set(names) - {kernel.name for kernel in KERNELS}
    if unknown:
        known = ", ".join(kernel.name for kernel in KERNELS)
        raise ValueError(
            f"--kernels has {', '.join(sorted(unknown))}; it must name some of {known}"
        )
    left_out = {kernel.name: kernel.why_not(device) for kernel in KERNELS if kernel.name in names}
    left_out = {name: reason for name, reason in left_out.items() if reason is not None}
    for name, reason in left_out.items():
        print(f"{name} is left out: {reason}")
    chosen = [k for k in KERNELS if k.name in names and k.name not in left_out]
    if not chosen:
        raise ValueError(f"no kernel of --kernels {','.join(names)} can run here")
    to_measure = points(chosen, arguments.shape or SHAPES, arguments.tokens or TOKENS, device)
    facts = {
        "machine": machine.machine(device),
        "versions": machine.versions(),
        "commit": machine.commit(),
    }
    file = SweepFile(arguments.out, facts, left_out)
    measure = SweepMeasurer(device, arguments.seed, {kernel.name: kernel for kernel in chosen})
    all_right = sweep(to_measure, measure, file, arguments.seconds)
    print(f"{len(file)} plans of {len(to_measure)} are in {arguments.out}: {file.summary()}")
    return 0 if all_right else 1
