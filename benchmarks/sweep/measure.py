"""Checks a point of a sweep against float64, then times it on the GPU in a graph of many calls."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.accuracy import Oracle
from benchmarks.contender import linear_work
from benchmarks.contenders_torch import LORA
from benchmarks.cuda_timing import EagerTimer, GraphTimer
from benchmarks.harness import CACHES, MOST_LAYERS, passes_of
from benchmarks.layer_tensors import LayerTensors
from benchmarks.linear_oracle import linear_oracle
from benchmarks.machine import last_level_cache
from benchmarks.shapes import FORWARD, Cell
from benchmarks.statistics import summarize
from benchmarks.sweep.kernels import Kernel, SweptLayer
from benchmarks.sweep.run import Point
from benchmarks.timing import Call

SECONDS_A_POINT = 10e-3
LEAST_SAMPLES, MOST_SAMPLES = 5, 20


class SweepMeasurer:
    """Measures points. It keeps the tensors of all shapes, and the oracle of the latest cell."""

    def __init__(
        self,
        device: torch.device,
        seed: int,
        kernels: Mapping[str, Kernel],
        eager: Callable[..., Any] = EagerTimer,
        graph: Callable[..., Any] = GraphTimer,
    ) -> None:
        self._device, self._seed, self._kernels = device, seed, kernels
        self._eager, self._graph = eager, graph
        self._tensors: dict[tuple[int, int], LayerTensors] = {}
        self._layers: dict[tuple[int, int], list[SweptLayer]] = {}
        self._judged: tuple[Cell, Tensor, Oracle] | None = None

    def __call__(self, point: Point) -> dict[str, Any]:
        cell = Cell(
            "lora_linear", FORWARD, point.out_features, point.in_features, point.tokens, rank=16
        )
        tensors = self._tensors_of(cell)
        x, oracle = self._oracle_of(cell, tensors)
        # A rotation as in the harness: its calls move several times the bytes of the cache.
        bytes_a_call = linear_work(cell, LORA[0]).bytes
        cache = last_level_cache(self._device)
        count = max(2, min(MOST_LAYERS, math.ceil(CACHES * cache / bytes_a_call)))
        calls = [self._call(point, x.clone(), layer) for layer in self._rotation(cell, count)]
        y = calls[0].once()
        verdict = oracle.check((y,))
        if not verdict.passes:
            return {"status": "fails the rule", "note": verdict.text}
        seconds = self._eager(calls).sample(0).seconds
        timer = self._graph(calls, passes_of(count, seconds))
        for y_of_graph in timer.replayed():
            # All calls have the same x and weight, so most results are equal bit for bit.
            if torch.equal(y_of_graph, y):
                continue
            verdict_on_graph = oracle.check((y_of_graph,))
            if not verdict_on_graph.passes:
                note = f"in a graph: {verdict_on_graph.text}"
                return {"status": "fails the rule", "note": note}
        seconds = timer.sample(0).seconds
        number = int(SECONDS_A_POINT / (seconds * timer.calls_a_sample))
        number = max(LEAST_SAMPLES, min(MOST_SAMPLES, number))
        summary = summarize([timer.sample(turn).seconds for turn in range(number)])
        return {
            "status": "ok",
            "note": verdict.text,
            "timing_note": timer.note,
            "median_s": summary.median,
            "p20_s": summary.p20,
            "p80_s": summary.p80,
            "samples": summary.samples,
            "calls_a_sample": timer.calls_a_sample,
            "rotation_bytes": int(count * bytes_a_call),
        }

    def device_works(self) -> bool:
        try:
            torch.cuda.synchronize(self._device)
        except RuntimeError:
            return False
        return True

    def _tensors_of(self, cell: Cell) -> LayerTensors:
        shape = (cell.out_features, cell.in_features)
        if shape not in self._tensors:
            self._tensors[shape] = LayerTensors(cell, self._device, self._seed)
        return self._tensors[shape]

    def _oracle_of(self, cell: Cell, tensors: LayerTensors) -> tuple[Tensor, Oracle]:
        if self._judged is None or self._judged[0] != cell:
            self._judged = None  # frees the memory of the old oracle before the new one is made
            x = tensors.normal(cell.tokens, cell.in_features)
            self._judged = (cell, x, Oracle(*linear_oracle(tensors, x, None, True)))
        return self._judged[1:]

    def _rotation(self, cell: Cell, count: int) -> list[SweptLayer]:
        tensors = self._tensors_of(cell)
        layers = self._layers.setdefault((cell.out_features, cell.in_features), [])
        while len(layers) < count:
            layers.append(SweptLayer(tensors.nf4(), *(t.detach() for t in tensors.lora())))
        return layers[:count]

    def _call(self, point: Point, x: Tensor, layer: SweptLayer) -> Call:
        forward, plan = self._kernels[point.kernel].forward, point.chosen
        return Call(lambda _: forward(x, layer, plan), around=torch.no_grad)
