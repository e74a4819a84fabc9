"""The goals on a GPU: which cells a goal covers, and how their times decide it."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.registry import BENCHES
from benchmarks.report import cuda_goals, goals, page
from benchmarks.report.cuda_goals import CUDA_GOALS, DECODED, DENSE, PEFT, CudaGoal
from benchmarks.results import BASE_ONLY, OURS
from benchmarks.shapes import BACKWARD, FORWARD

US = 1e-6


def _cell(
    tokens: int,
    shape: tuple[int, int] = (14336, 4096),
    timing: str = "graph",
    mode: str = FORWARD,
    **times: float | tuple[float, float],
) -> dict[str, Any]:
    """Returns a cell with these times in us: the device's or, for an eager call, (device, host)."""
    names = {"ours": OURS, "peft": PEFT, "decoded": DECODED, "dense": DENSE, "base": BASE_ONLY}
    results = []
    for word, time in times.items():
        device, host = time if isinstance(time, tuple) else (time, None)
        seconds = {"median_s": device * US, "host_s": None if host is None else host * US}
        results.append({"contender": names[word], "of_roofline": 0.5, "status": "ok", **seconds})
    return {
        "mode": mode,
        "timing": timing,
        "dtype": "bfloat16",
        "tokens": tokens,
        "out_features": shape[0],
        "in_features": shape[1],
        "results": results,
    }


def _run(*cells: dict[str, Any], device: str = "cuda", op: str = "lora_linear") -> dict[str, Any]:
    machine = {"device": device, "flags": ["amx_bf16"], "heap": "default"}
    return {"op": op, "machine": machine, "cells": list(cells)}


def _outcome(run: dict[str, Any], goal: CudaGoal) -> cuda_goals.CudaGoalOutcome:
    return next(outcome for outcome in cuda_goals.goal_outcomes([run]) if outcome.goal == goal)


def _goal(**fields: Any) -> CudaGoal:
    (goal,) = (g for g in CUDA_GOALS if all(getattr(g, k) == v for k, v in fields.items()))
    return goal


def test_every_goal_names_contenders_that_exist() -> None:
    for goal in CUDA_GOALS:
        names = {contender.name for contender in BENCHES[goal.op].contenders}
        assert goal.measure == cuda_goals.LIMIT or goal.against in names, goal
        assert goal.shapes in cuda_goals.SHAPES
    assert len({str(goal) for goal in CUDA_GOALS}) == len(CUDA_GOALS)


def test_the_worst_cell_decides() -> None:
    goal = _goal(tokens=(512, 1024), against=PEFT)
    cells = [_cell(tokens, ours=10, peft=us) for tokens, us in ((512, 20), (1024, 14), (2048, 10))]
    outcome = _outcome(_run(*cells), goal)
    assert outcome.met is True and outcome.worst == pytest.approx(1.4)
    assert (outcome.where, outcome.cells) == ("14336x4096 M=1024", 2)
    cells.append(_cell(512, (4096, 4096), ours=10, peft=12))
    outcome = _outcome(_run(*cells), goal)
    assert outcome.verdict == "MISSED" and outcome.where == "4096x4096 M=512"
    # A smaller weight has no goal, and an eager cell belongs to another goal.
    cells[-1:] = [_cell(512, (576, 576), ours=10, peft=1)]
    cells.append(_cell(512, timing="eager", ours=(10, 10), peft=(1, 1)))
    assert _outcome(_run(*cells), goal).met is True


def test_an_eager_call_takes_the_slower_of_host_and_device() -> None:
    """pylora is three times as fast on the device, but its host time is long."""
    goal = _goal(tokens=(1, 4), timing="eager", mode=FORWARD)
    slow = _cell(1, timing="eager", ours=(10, 50), peft=(30, 70))
    assert _outcome(_run(slow), goal).worst == pytest.approx(1.4)
    fast = _cell(1, timing="eager", ours=(10, 12), peft=(30, 70))
    assert _outcome(_run(fast), goal).verdict == "met"


@pytest.mark.parametrize(
    ("shape", "targets"), [((8192, 8192), {4.0}), ((28672, 8192), {1.8}), ((8224, 4096), {1.8})]
)
def test_goals_depend_on_the_shape_of_the_layer(
    shape: tuple[int, int], targets: set[float]
) -> None:
    outcomes = cuda_goals.goal_outcomes([_run(_cell(16, shape, ours=10, peft=30))])
    assert {o.goal.target for o in outcomes if o.goal.against == PEFT and o.cells} == targets


def test_stretch_surcharge_and_limit_decide_their_goals() -> None:
    goal = _goal(tokens=(2048, cuda_goals.MANY), against=DECODED, mode=FORWARD, op="lora_linear")
    for us, words in ((100, "MISSED"), (110, "not the stretch"), (120, "and the stretch")):
        assert words in _outcome(_run(_cell(4096, ours=100, decoded=us)), goal).verdict
    run = _run(_cell(1, ours=108, base=100), _cell(4, ours=103, base=100))
    surcharge = _outcome(run, _goal(tokens=(1, 16), against=BASE_ONLY))
    assert surcharge.worst == pytest.approx(0.08) and surcharge.met is True
    limit = _outcome(run, _goal(tokens=(1, 4), measure="limit", shapes="larger than 4096x4096"))
    assert limit.worst == 0.5 and limit.met is False
    backward = _cell(2048, mode=BACKWARD, timing="eager", ours=(100, 5), dense=(90, 5))
    assert _outcome(_run(backward), _goal(mode=BACKWARD, against=DENSE)).met is True


def test_tables_name_the_gpu_goals_for_gpu_runs_only() -> None:
    table = goals.goals_table([_run(_cell(64, ours=10, peft=30))])
    assert table.count("\n") == len(CUDA_GOALS) + 1
    assert f"goals on a GPU: 2 met, 0 missed, {len(CUDA_GOALS) - 2} not measured" in table
    assert table.count("not measured") == len(CUDA_GOALS) - 2 + 1
    html = "".join(page._goals([_run(_cell(64, ours=10, peft=30))]))
    assert html.count("<tr>") == len(CUDA_GOALS) + 1 == html.count("</tr>")
    on_cpu = goals.goals_table([_run(_cell(64, ours=10, peft=30), device="cpu")])
    assert "GPU" not in on_cpu and "no CPU goal was measured" in on_cpu
