"""Autotuning of the Triton tiles with a clock of our own: what is measured, kept and read again."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from flat_calls import reference_op

import pylora
from pylora.backends.triton import BACKEND
from pylora.testing import assert_as_accurate_as_torch

if BACKEND.unavailable() is not None:
    pytest.skip(f"no Triton kernels here: {BACKEND.unavailable()}", allow_module_level=True)

from pylora.calls import Layer, LowRank, Weight
from pylora.kernels import configs, tuning
from pylora.kernels.configs import TileConfig, TilePlan

DEVICE = BACKEND.device()
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
RULE = TilePlan(TileConfig(32, 64, 64, 4, 3), splits=2, per_split=512)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("PYLORA_CACHE", str(tmp_path / "cache"))
    tuning.forget()
    with pylora.use_backend("triton"):
        yield tmp_path / "cache"
    tuning.forget()


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[TilePlan]:
    """Returns the plans that are timed. The plan with the most splits is made the fastest."""
    plans: list[TilePlan] = []

    def milliseconds(run: Any, plan: TilePlan) -> float:
        run(plan)
        plans.append(plan)
        return 1.0 / plan.splits

    monkeypatch.setattr(tuning, "_milliseconds", milliseconds)
    return plans


def call() -> tuple[Any, ...]:
    weight = torch.randn(40, 512) / 512**0.5
    with pylora.use_backend("reference"):
        q = pylora.quantize_nf4(weight).to(DEVICE).op_arguments()
    return (torch.randn(20, 512, device=DEVICE), *q, 40, None)


def test_fastest_finds_the_best_value_of_each_parameter() -> None:
    """The time is a sum over two parameters. Plans that cannot run are passed over."""

    def milliseconds(plan: TilePlan) -> float:
        if plan.tile.block_m == 64:
            return math.inf
        of_tile = abs(plan.tile.block_m - 32) - plan.tile.block_n / 64
        return 10 + of_tile + abs(plan.splits - 4)

    best = tuning.fastest(RULE, 1024, milliseconds)
    assert best == TilePlan(TileConfig(32, 128, 64, 4, 3), splits=4, per_split=256)
    assert tuning.fastest(RULE, 1024, lambda plan: 1.0) == RULE


def test_every_plan_around_a_rule_covers_the_sum() -> None:
    for length in (64, 1088, 4096):
        rule = TilePlan(RULE.tile, *configs._split(length, 64, 4, configs.Facts(90, 132), 2, 512))
        tried: list[TilePlan] = []

        def milliseconds(plan: TilePlan, tried: list[TilePlan] = tried) -> float:
            tried.append(plan)
            return 1.0

        tuning.fastest(rule, length, milliseconds)
        assert len(tried) == len(set(tried)) > 5
        for plan in tried:
            assert plan.per_split % plan.tile.block_k == 0
            assert (plan.splits - 1) * plan.per_split < length <= plan.splits * plan.per_split


def test_neighbours_change_one_parameter() -> None:
    near = tuning.neighbours(RULE, 1024)
    assert RULE not in near and len(near) == len(set(near)) > 5
    for plan in near:
        tile, of_rule = plan.tile, RULE.tile
        changed = [
            (tile.block_m, tile.block_n) != (of_rule.block_m, of_rule.block_n),
            tile.num_warps != of_rule.num_warps,
            tile.num_stages != of_rule.num_stages,
            plan.splits != RULE.splits,
        ]
        assert sum(changed) == 1 and tile.block_k == of_rule.block_k


@pytest.mark.parametrize(
    "plan",
    [
        TilePlan(TileConfig(16, 64, 64, 4, 2), splits=1, per_split=512),
        TilePlan(TileConfig(32, 128, 64, 8, 3), splits=4, per_split=128),
    ],
)
def test_a_chosen_plan_gives_the_right_result(plan: TilePlan) -> None:
    """The rule would not choose these two plans for this call. The call has LoRA."""
    from pylora.kernels.lora_linear import lora_linear_by_tiles

    x, *q, out_features, bias = call()
    A = torch.randn(4, 512, device=DEVICE) / 512**0.5
    B = torch.randn(out_features, 4, device=DEVICE)
    weight = Weight.of(tuple(q), (out_features, 512))
    layer = Layer(weight, bias, LowRank(A, B, scaling=0.5))

    def expected(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        trailing = (bias, None, None, 0.5, 0.0, None, "identity")
        return reference_op("lora_linear")(x, *q, out_features, A, B, *trailing)[0]

    assert_as_accurate_as_torch(lora_linear_by_tiles(x, layer, plan), expected, x, A, B)


def test_nothing_is_measured_unless_asked_for(measured: list[TilePlan], folder: Path) -> None:
    args = call()
    torch.ops.pylora.nf4_linear(*args)
    assert not measured and not folder.exists()


def test_a_plan_is_measured_once_and_read_by_later_processes(
    measured: list[TilePlan], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = call()
    plain = torch.ops.pylora.nf4_linear(*args)
    monkeypatch.setenv("PYLORA_AUTOTUNE", "1")
    pylora.refresh()
    y = torch.ops.pylora.nf4_linear(*args)
    assert_as_accurate_as_torch(y, reference_op("nf4_linear"), *args)
    count = len(measured)
    assert count > 5
    torch.ops.pylora.nf4_linear(*args)
    # Numbers of tokens share a plan up to the next power of two.
    torch.ops.pylora.nf4_linear(args[0][:17], *args[1:])
    assert len(measured) == count
    torch.ops.pylora.nf4_linear(args[0][:16], *args[1:])
    assert len(measured) > count
    monkeypatch.setenv("PYLORA_AUTOTUNE", "0")
    pylora.refresh()
    tuning.forget()
    del measured[:]
    # The bits depend on the order of the sum, so y shows that the plan was read: it was not
    # measured again, and it is not the rule's.
    assert torch.equal(torch.ops.pylora.nf4_linear(*args), y)
    assert not measured and not torch.equal(y, plain)
    assert [path.name for path in folder.iterdir()] == ["tuning.json"]


def test_plans_of_another_gpu_are_kept_but_not_used(
    measured: list[TilePlan], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYLORA_AUTOTUNE", "1")
    pylora.refresh()
    args = call()
    torch.ops.pylora.nf4_linear(*args)
    path = folder / "tuning.json"
    ((_, plans),) = json.loads(path.read_text()).items()
    path.write_text(json.dumps({"another GPU, triton 0": plans}))
    tuning.forget()
    del measured[:]
    torch.ops.pylora.nf4_linear(*args)
    assert measured
    assert len(json.loads(path.read_text())) == 2


@pytest.mark.parametrize("text", ["{", "[]", '{"a GPU": {"a key": {"tile": {}}}}'])
def test_a_file_without_tile_plans_is_named(folder: Path, text: str) -> None:
    folder.mkdir()
    (folder / "tuning.json").write_text(text)
    with pytest.raises(ValueError, match=r"tuning\.json must hold tile plans"):
        torch.ops.pylora.nf4_linear(*call())
