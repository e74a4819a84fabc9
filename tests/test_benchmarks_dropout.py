"""The benchmark of LoRA with dropout judges each side by the mask that its checked call drew.

No test looks at a time: the runs here are dry runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("peft", reason="the benchmark compares with its layers")

from benchmarks.bench_lora_layer_dropout import BENCH
from benchmarks.contender import Contender
from benchmarks.contenders_dropout import PROBABILITY, our_mask, torch_mask
from benchmarks.harness import Harness
from benchmarks.layer_tensors import LayerTensors
from benchmarks.results import OURS
from benchmarks.shapes import TRAINING, Cell

LIMITS = {"read_bytes_per_s": 1e10, "copy_bytes_per_s": 2e10, "matmul_flop_per_s": 1e12}
CELL = Cell(BENCH.op, TRAINING, 96, 128, 17, rank=4)
DEVICE = torch.device("cpu")


def statuses(*contenders: Contender, device: torch.device = DEVICE) -> dict[str, Any]:
    harness = Harness(device, seed=5, seconds=0.0, limits=LIMITS)
    (report,) = harness.run(BENCH, contenders, CELL)
    return {result["contender"]: result for result in report["results"]}


def test_every_contender_is_right_about_its_own_mask() -> None:
    timed = statuses(*BENCH.contenders)
    assert {OURS, "pylora, dense", "bitsandbytes + PEFT train", "dense + PEFT"} <= set(timed)
    for name, result in timed.items():
        assert result["status"] in ("ok", "absent"), (name, result["note"])
        assert result["status"] == "ok" or "bitsandbytes" in name, (name, result["note"])


def before_each_call(contender: Contender, act: Callable[[Any], None]) -> Contender:
    """Returns the contender with a change of its module before each forward."""

    def build(tensors: LayerTensors) -> Any:
        layer = contender.build(tensors)
        module: Any = layer.forward

        def forward(x: Tensor | None) -> Tensor:
            act(module)
            return module(x)

        return replace(layer, forward=forward)

    return replace(contender, build=build)


@pytest.mark.parametrize("index", range(len(BENCH.contenders)))
def test_another_mask_and_no_mask_are_wrong(index: int) -> None:
    contender = BENCH.contenders[index]
    wrong = "refused" if contender.is_ours else "fails the rule"
    changes: list[Callable[[Any], Any]] = [lambda module: torch.rand(()), lambda m: m.eval()]
    for change in changes:
        result = statuses(before_each_call(contender, change))[contender.name]
        if result["status"] != "absent":  # bitsandbytes may be missing
            assert result["status"] == wrong and "error is" in result["note"], result
    assert statuses(contender)[contender.name]["status"] in ("ok", "absent")


def test_the_timed_path_of_our_layer_is_the_one_that_is_checked() -> None:
    tensors = LayerTensors(CELL, DEVICE, seed=1)
    for contender in BENCH.contenders:
        if contender.is_ours:
            module: Any = contender.build(tensors).forward
            assert module.training and module.lora_dropout == PROBABILITY
            assert module._kept is not None


@pytest.mark.parametrize("mask", [our_mask, torch_mask])
def test_a_mask_is_drawn_again_and_has_the_rate(mask: Callable[[Tensor], Tensor]) -> None:
    tensors, x = LayerTensors(CELL, DEVICE, seed=3), torch.zeros(300, 400)
    before = torch.get_rng_state()
    masks = []
    for _ in range(2):
        with tensors.seeded():
            masks.append(mask(x))
    assert torch.equal(*masks) and torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(mask(x), masks[0])
    deviation = (PROBABILITY * (1 - PROBABILITY) / x.numel()) ** 0.5
    assert abs(1 - masks[0].double().mean().item() - PROBABILITY) < 5 * deviation


def test_only_training_steps_on_a_cpu_are_measured() -> None:
    assert BENCH.modes == (TRAINING,) and not BENCH.in_quick
    for contender in BENCH.contenders:
        assert "CPU" in str(contender.unavailable(CELL, torch.device("cuda")))
