"""Benchmarks of one run share the random tensors of a shape, but not what belongs to one op."""

from __future__ import annotations

import pytest
import torch

from benchmarks.harness import Harness
from benchmarks.registry import bench_of
from benchmarks.shapes import FORWARD, Cell

LIMITS = {"read_bytes_per_s": 1e10, "copy_bytes_per_s": 2e10, "matmul_flop_per_s": 1e12}


@pytest.mark.parametrize(
    "ops", [("lora_qkv", "lora_mlp"), ("multi_lora_linear", "multi_bottleneck_adapter")]
)
def test_two_ops_of_one_shape_are_right_in_any_order(ops: tuple[str, str]) -> None:
    for order in (ops, ops[::-1]):
        harness = Harness(torch.device("cpu"), seed=1, seconds=0.0, limits=LIMITS)
        for op in order:
            bench, cell = bench_of(op), Cell(op, FORWARD, 128, 64, 24, rank=bench_of(op).rank)
            (report,) = harness.run(bench, bench.contenders[:1], cell)
            for result in report["results"]:
                assert result["status"] == "ok", (op, result["note"])
