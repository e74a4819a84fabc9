"""Checks, times and measures the contenders of a cell, and returns the numbers as JSON."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from benchmarks import memory, roofline
from benchmarks.accuracy import Oracles, Verdict
from benchmarks.calls import bind, comparable, draw
from benchmarks.contender import Bench, BuiltLayer, Contender, NotApplicable
from benchmarks.cuda_timing import GraphTimer, eager_timer, host_timer
from benchmarks.layer_tensors import LayerTensors
from benchmarks.machine import last_level_cache, memory_bytes
from benchmarks.results import CONTROL
from benchmarks.shapes import BACKWARD, Cell
from benchmarks.statistics import equal_counts, rounds, sample_counts, summarize
from benchmarks.timing import EAGER, GRAPH, HOST, Call, Timer

# A rotation is a number of calls, each on a copy of the layer, that are timed in turn. They move
# CACHES times the bytes of the last-level cache, but at most MOST_MEMORY of the bytes of the
# memory, which must hold the rotations of a dozen contenders. There are at most MOST_LAYERS copies.
CACHES, MOST_MEMORY, MOST_LAYERS = 3, 1 / 64, 256
# A graph holds GRAPH_CALLS calls, or as many as take GRAPH_SECONDS. In either case its launch takes
# a small part of its time.
GRAPH_CALLS, GRAPH_SECONDS = 32, 2e-3
LEAST_SAMPLES, MOST_SAMPLES, MOST_HOST_SAMPLES = 5, 60, 1000
_SHAPES_REMEMBERED = 3
_QUICK_CALL = 0.05  # seconds
# A layer that trains or serves is called thousands of times. In its first calls it may set
# something up: a plan, a compiled kernel, what a backward repeats. So each layer is called
# WARM_CALLS times before it is timed, unless a call takes so long that this would not show.
WARM_CALLS, _SETUP_SHOWS = 4, 5e-3  # seconds
# A contender that takes longer than this for some M is not timed for a larger one.
_SLOW_CALL = 1.0  # seconds

OK, FAILS, REFUSED, ERROR, ABSENT = "ok", "fails the rule", "refused", "error", "absent"


@dataclass
class Entry:
    """One contender in one cell: its layers and calls, its verdict, and its samples."""

    contender: Contender
    calls: list[Call] = field(default_factory=list)  # one for each of the layers
    layers: list[BuiltLayer] = field(default_factory=list)
    judge: Callable[[BuiltLayer, Any], Verdict] | None = None  # (layer, raw result) -> verdict
    variant: str = ""
    status: str = OK
    note: str = ""
    timer: Timer | None = None
    samples: list[float] = field(default_factory=list)
    host_samples: list[float] = field(default_factory=list)

    @property
    def runs(self) -> bool:
        return self.status in (OK, FAILS)


class Harness:
    """Runs cells on one device, and keeps what takes long to make from one cell to the next."""

    def __init__(
        self,
        device: torch.device,
        seed: int,
        seconds: float,
        limits: dict[str, float] | None = None,
    ) -> None:
        """`limits` is what `roofline.measure` returns. If it is None, they are measured here."""
        self.device, self.seed, self.seconds = device, seed, seconds
        if limits is None:  # a dry run needs any numbers, so one call of each is enough
            limits = roofline.measure(device) if seconds else roofline.measure(device, 1)
        self.roofline = limits
        self._tensors: dict[tuple[Any, ...], LayerTensors] = {}
        self._layers: dict[str, list[BuiltLayer]] = {}
        self._layers_of: tuple[Any, ...] | None = None
        self._took: dict[tuple[Any, ...], tuple[int, float]] = {}  # the latest (tokens, seconds)

    def measure_limits(self) -> None:
        """Measures the limits again, except in a dry run, and keeps the best of all measurements,
        since another process may have disturbed one."""
        if not self.seconds:
            return
        again = roofline.measure(self.device)
        self.roofline = {name: max(value, again[name]) for name, value in self.roofline.items()}

    def run(
        self, bench: Bench, contenders: Sequence[Contender], cell: Cell
    ) -> list[dict[str, Any]]:
        """Measures a cell and returns it as JSON, one entry for each way of timing. The ways are
        eager and, on CUDA, in a graph. A bench of host times has only the host's time."""
        ours = contenders[0]
        entries = [
            self._entry(bench, contender, cell)
            for contender in (ours, replace(ours, name=CONTROL), *contenders[1:])
        ]
        self._check(bench, cell, entries)
        reports = []
        for timing in self._timings(bench, cell):
            entries = [_timed_as(timing, entry, self.device) for entry in entries]
            self._time(entries, timing, self.seconds * bench.budget)
            for entry in entries:
                if entry.samples:
                    took = (cell.tokens, min(entry.samples))
                    self._took[_except_tokens(entry.contender, cell)] = took
            reports.append(self._report(bench, cell, timing, entries))
        return reports

    def _timings(self, bench: Bench, cell: Cell) -> list[str]:
        if bench.host_time:
            return [HOST]
        graphs = self.device.type == "cuda" and cell.mode != BACKWARD
        return [EAGER, GRAPH] if graphs else [EAGER]

    def _entry(self, bench: Bench, contender: Contender, cell: Cell) -> Entry:
        entry = Entry(contender)
        reason = contender.why_not(cell, self.device) or self._too_long(contender, cell)
        if reason is not None:
            entry.status, entry.note = ABSENT, reason
            return entry
        with _recorded(entry):
            entry.layers = self._rotation(bench, contender, cell)
        return entry

    def _too_long(self, contender: Contender, cell: Cell) -> str | None:
        """Returns a reason to leave the contender out if it was too slow with fewer tokens."""
        tokens, seconds = self._took.get(_except_tokens(contender, cell), (0, 0.0))
        if tokens >= cell.tokens or seconds <= _SLOW_CALL:
            return None
        return f"left out, since a call with M={tokens} took {seconds:.2g} s"

    def _rotation(self, bench: Bench, contender: Contender, cell: Cell) -> list[BuiltLayer]:
        """Returns so many copies of the contender's layer that a call of each moves several times
        the bytes of the cache."""
        shape = (bench.op, cell.out_features, cell.in_features, cell.dtype)
        if shape != self._layers_of:
            self._layers, self._layers_of = {}, shape
        wanted = min(
            CACHES * last_level_cache(self.device), MOST_MEMORY * memory_bytes(self.device)
        )
        needed = wanted / bench.work(cell, contender).bytes
        # Zero seconds mean a dry run, which checks everything and whose times mean nothing.
        count = max(2, min(MOST_LAYERS, math.ceil(needed))) if self.seconds else 2
        if bench.host_time:
            count = 1
        layers = self._layers.setdefault(contender.name, [])
        layers += [contender.build(self.tensors(cell)) for _ in range(count - len(layers))]
        return layers[:count]

    def tensors(self, cell: Cell) -> LayerTensors:
        """Returns the tensors of a shape. Those of a few shapes are kept for the next op."""
        key = (cell.out_features, cell.in_features, cell.dtype)
        if key not in self._tensors:
            while len(self._tensors) >= _SHAPES_REMEMBERED:
                del self._tensors[next(iter(self._tensors))]
            any_rank = replace(cell, rank=cell.rank or 16)
            self._tensors[key] = LayerTensors(any_rank, self.device, self.seed)
        return self._tensors[key]

    def _check(self, bench: Bench, cell: Cell, entries: list[Entry]) -> None:
        """Makes the calls of every contender and judges the first result of each. If ours is wrong
        it is not timed; a peer that is wrong is timed and marked."""
        tensors = self.tensors(cell)
        inputs = draw(cell, tensors)  # each call gets a copy of its own
        oracles = Oracles(bench, tensors, cell.mode)
        for entry in entries:
            if not entry.runs:
                continue
            with _recorded(entry):
                for index, layer in enumerate(entry.layers):
                    call, x, grad = bind(cell, entry.contender, layer, tensors, inputs)
                    entry.calls.append(call)
                    if index == 0:
                        entry.judge = _judging(oracles, cell, entry.contender, x, grad)
                        with tensors.seeded():
                            raw = call.once()
                        _judge(entry, entry.judge(layer, raw))
                        entry.variant = _variant_of(layer, call, x)

    def _time(self, entries: list[Entry], timing: str, budget: float) -> None:
        """Times the contenders in turn, each on its own rotation of layers."""
        running = {e.contender.name: e for e in entries if e.runs}
        for entry in list(running.values()):
            with _recorded(entry):
                _sample(entry, 0)
                if entry.samples[0] < _QUICK_CALL:  # the first calls may still set something up
                    entry.samples.clear()
                    entry.host_samples.clear()
                    for turn in range(2):
                        _sample(entry, turn)
            if not entry.runs:
                del running[entry.contender.name]
        if not running:
            return
        estimates = {
            name: min(entry.samples) * entry.timer.calls_a_sample
            for name, entry in running.items()
            if entry.timer is not None
        }
        if timing == HOST:
            counts = equal_counts(estimates, budget, LEAST_SAMPLES, MOST_HOST_SAMPLES)
        else:
            counts = sample_counts(estimates, budget, LEAST_SAMPLES, MOST_SAMPLES)
        for name in [name for name, count in counts.items() if count > 1]:
            running[name].samples.clear()
            running[name].host_samples.clear()
        counts = {name: count for name, count in counts.items() if count > 1}
        if timing == EAGER:
            for name in [name for name in counts if estimates[name] < _SETUP_SHOWS]:
                _warm_up(running[name].calls[: counts[name]])
        with _no_garbage_collection():
            for turn in rounds(counts, self.seed):
                for name in turn:
                    _sample(running[name], len(running[name].samples))

    def _report(
        self, bench: Bench, cell: Cell, timing: str, entries: list[Entry]
    ) -> dict[str, Any]:
        work = bench.work(cell, entries[0].contender)
        results = [self._result(bench, cell, timing, entry) for entry in entries]
        medians = {r["contender"]: r["median_s"] for r in results}
        control = None
        if medians[entries[0].contender.name] and medians[CONTROL]:
            control = medians[CONTROL] / medians[entries[0].contender.name]
        return {
            "mode": cell.mode,
            "out_features": cell.out_features,
            "in_features": cell.in_features,
            "tokens": cell.tokens,
            "dtype": cell.dtype,
            "rank": cell.rank,
            "timing": timing,
            "flop": work.flop,
            "bytes": work.bytes,
            "floor_s": roofline.floor_seconds(work, self.roofline),
            "control_ratio": control,
            "results": results,
        }

    def _result(self, bench: Bench, cell: Cell, timing: str, entry: Entry) -> dict[str, Any]:
        contender = entry.contender
        result: dict[str, Any] = {
            "contender": contender.name,
            "version": "" if entry.status == ABSENT else contender.version(),
            "variant": entry.variant,
            "has_lora": contender.has_lora,
            "status": entry.status,
            "note": entry.note,
            "samples": len(entry.samples),
            "rotation_bytes": int(len(entry.layers) * bench.work(cell, contender).bytes),
            "extra_memory_bytes": None,
            "timing_note": "",
        }
        names = ("median_s", "p20_s", "p80_s", "bytes_per_s", "flop_per_s", "of_roofline")
        result |= dict.fromkeys((*names, "host_s", "host_p20_s", "host_p80_s"))
        if entry.host_samples:
            host = summarize(entry.host_samples)
            result |= {"host_s": host.median, "host_p20_s": host.p20, "host_p80_s": host.p80}
        if entry.runs and entry.samples:
            summary, work = summarize(entry.samples), bench.work(cell, contender)
            result |= {
                "median_s": summary.median,
                "p20_s": summary.p20,
                "p80_s": summary.p80,
            }
            if timing != HOST:  # the host's time does not tell how fast the work itself is done
                floor = roofline.floor_seconds(work, self.roofline)
                result |= {
                    "bytes_per_s": work.bytes / summary.median,
                    "flop_per_s": work.flop / summary.median,
                    "of_roofline": floor / summary.median,
                }
            result["timing_note"] = self._timing_note(timing, entry, result["rotation_bytes"])
            if self.device.type == "cuda" and timing == EAGER:
                result["extra_memory_bytes"] = memory.cuda_extra(entry.calls[0].once)
        return result

    def _timing_note(self, timing: str, entry: Entry, rotation_bytes: int) -> str:
        """Returns what a reader of the times must know; "" if nothing."""
        notes = [entry.timer.note] if entry.timer is not None and entry.timer.note else []
        cache = last_level_cache(self.device)
        flushed = self.device.type == "cuda" and timing == EAGER
        # Host times are measured on a layer that stays in the caches.
        if rotation_bytes < CACHES * cache and not flushed and timing != HOST:
            notes.append(
                f"the rotation moves {rotation_bytes / 2**20:.1f} MiB, less than {CACHES} times "
                f"the last-level cache of {cache / 2**20:.1f} MiB: some of it may come from there"
            )
        return "; ".join(notes)


def _except_tokens(contender: Contender, cell: Cell) -> tuple[Any, ...]:
    """Returns a key that is the same for all cells that differ only in the number of tokens."""
    return contender.name, replace(cell, tokens=0)


def _judge(entry: Entry, verdict: Verdict) -> None:
    """Notes the verdict on the results of a contender."""
    entry.note = verdict.text
    if not verdict.passes:
        entry.status = REFUSED if entry.contender.is_ours else FAILS


def _variant_of(layer: BuiltLayer, call: Call, x: Any) -> str:
    with call.around(), torch.no_grad():
        return layer.variant(x)


def _judging(
    oracles: Oracles, cell: Cell, contender: Contender, x: Any, grad: Any
) -> Callable[[BuiltLayer, Any], Verdict]:
    """Returns a function that judges the raw results of a contender's layers for x and grad."""

    def judge(layer: BuiltLayer, raw: Any) -> Verdict:
        return oracles.check(contender, layer, x, grad, comparable(cell, layer, raw))

    return judge


def _warm_up(calls: Sequence[Call]) -> None:
    for call in calls:
        for _ in range(WARM_CALLS):
            call.once()


def _sample(entry: Entry, turn: int) -> None:
    assert entry.timer is not None
    sample = entry.timer.sample(turn)
    entry.samples.append(sample.seconds)
    if sample.host is not None:
        entry.host_samples.append(sample.host)


def _timed_as(timing: str, entry: Entry, device: torch.device) -> Entry:
    """Returns the entry without samples and with the timer for this way of timing. If it cannot be
    timed so, its status and note say why. A graph comes after the eager samples, which tell how
    long a call takes."""
    timed = replace(entry, timer=None, samples=[], host_samples=[])
    if not entry.runs:
        return timed
    with _recorded(timed):
        if timing == GRAPH:
            graph = GraphTimer(entry.calls, passes_of(len(entry.calls), min(entry.samples)))
            _check_graph(timed, graph)
            timed.timer = graph
        elif timing == HOST:
            timed.timer = host_timer(entry.calls, device)
        else:
            timed.timer = eager_timer(entry.calls, device)
    return timed


def _check_graph(entry: Entry, graph: GraphTimer) -> None:
    """Judges the result of every call in the graph, and notes the first wrong one."""
    assert entry.judge is not None
    for layer, raw in zip(entry.layers, graph.replayed(), strict=True):
        verdict = entry.judge(layer, raw)
        if not verdict.passes:
            _judge(entry, verdict)
            return


def passes_of(calls: int, seconds: float) -> int:
    """Returns how often a graph repeats a rotation of `calls` calls of `seconds` each."""
    enough = min(GRAPH_CALLS, GRAPH_SECONDS / seconds)
    return max(1, math.ceil(enough / calls))


@contextmanager
def _recorded(entry: Entry) -> Iterator[None]:
    """Notes an exception as the result of the contender that raised it, so that the others are
    still measured. The tables show it, and if the contender is ours the run exits with 1."""
    try:
        yield
    except NotApplicable as error:
        entry.status, entry.note = ABSENT, str(error)
    except Exception as error:
        lines = str(error).splitlines() or [""]
        entry.status, entry.note = ERROR, f"{type(error).__name__}: {lines[0][:300]}"


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def add_cpu_memory(reports: Sequence[tuple[Cell, dict[str, Any]]], seed: int) -> None:
    """Measures the peak memory of every contender that was timed in these cells, and puts it into
    the reports."""
    results = {
        (cell, result["contender"]): result
        for cell, report in reports
        for result in report["results"]
        if result["median_s"] is not None and result["contender"] != CONTROL
    }
    for task, extra in memory.cpu_extra(list(results), seed, torch.get_num_threads()).items():
        results[task]["extra_memory_bytes"] = extra
