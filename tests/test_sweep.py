"""The sweep of plans: its order, its file, what it refuses, and how it goes on.

No GPU is needed, because kernels and clocks are stand-ins.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from flat_calls import reference_op
from torch import Tensor

from benchmarks.command_line import main
from benchmarks.results import InvalidResults
from benchmarks.sweep import kernels as sweep_kernels
from benchmarks.sweep.file import SweepFile, load
from benchmarks.sweep.kernels import KERNELS, Kernel, KernelPlan, Refused, SweptLayer, cuts
from benchmarks.sweep.measure import SweepMeasurer
from benchmarks.sweep.run import Point, coarse_to_fine, points, sweep
from benchmarks.timing import Call, ClockTimer

CPU = torch.device("cpu")
FACTS = {
    "machine": {"gpu": "a stand-in", "device": "cuda"},
    "versions": {"torch": "2.13.0"},
    "commit": {"hash": "0" * 40, "dirty": False},
}
OK = {"status": "ok", "note": "right", "median_s": 2.0, "p20_s": 1.0, "p80_s": 3.0}
OK |= {"samples": 5, "calls_a_sample": 32, "rotation_bytes": 1 << 20}


def _kernel(name: str, forward: Any = None, most: int = 8192) -> Kernel:
    levels: list[list[KernelPlan]] = [
        [{"splits": 1}],
        [{"splits": s} for s in (1, 2)],
        [{"splits": 3}],
    ]
    return Kernel(name, 1, most, lambda x, N: levels, forward, lambda device: None)


@pytest.fixture
def planned() -> list[Point]:
    kernels = [_kernel("few", most=2), _kernel("many")]
    return points(kernels, [(64, 128), (128, 64)], [1, 2, 4], CPU)


class Measure:
    """Measures nothing. `answers` maps the number of a point to the answer or error for it."""

    def __init__(self, answers: dict[int, Any] | None = None, works: bool = True) -> None:
        self.answers, self.works, self.seen = answers or {}, works, list[Point]()

    def __call__(self, point: Point) -> dict[str, Any]:
        self.seen.append(point)
        answer = self.answers.get(len(self.seen) - 1, OK)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def device_works(self) -> bool:
        return self.works


def _file(path: Path, **changed: Any) -> SweepFile:
    return SweepFile(path, {**FACTS, **changed}, {"hopper": "needs another GPU"})


def test_points_are_ordered_from_coarse_to_fine(planned: list[Point]) -> None:
    """The rule's plans for every kernel, shape and M come first, and no plan comes twice."""
    assert coarse_to_fine([1, 2, 4, 8, 16]) == [1, 16, 4, 2, 8]
    assert coarse_to_fine([7]) == [7]
    assert [point.level for point in planned] == sorted(point.level for point in planned)
    rules = [point for point in planned if point.level == 0]
    assert {(p.kernel, p.out_features, p.tokens) for p in rules} == {
        *(("few", n, m) for n in (64, 128) for m in (1, 2)),
        *(("many", n, m) for n in (64, 128) for m in (1, 2, 4)),
    }
    assert list(dict.fromkeys(p.tokens for p in rules)) == [1, 4, 2]
    assert len({point.key for point in planned}) == len(planned) == 10 * 3


def test_a_sweep_that_is_cut_off_goes_on(planned: list[Point], tmp_path: Path) -> None:
    path, times = tmp_path / "sweep.json", iter(range(100))
    said: list[str] = []
    first = Measure()
    assert sweep(planned, first, _file(path), 7.5, lambda: next(times), said.append)
    assert first.seen == planned[: len(first.seen)] and 0 < len(first.seen) < len(planned)
    left = len(planned) - len(first.seen)
    assert said == [f"time is up: the same command goes on with the {left} plans left"]
    second = Measure()
    assert sweep(planned, second, _file(path), 1e9)
    assert first.seen + second.seen == planned
    file = load(path)
    assert file["left_out"] == {"hopper": "needs another GPU"}
    assert [p["median_s"] for p in file["points"]] == [2.0] * len(planned)
    assert [p["level"] for p in file["points"]] == [p.level for p in planned]
    assert not list(tmp_path.glob(".*")), "a temporary file was left behind"


def test_every_point_is_kept_with_its_status(planned: list[Point], tmp_path: Path) -> None:
    wrong = {"status": "fails the rule", "note": "error is 3 times"}
    answers = {0: Refused("splits must"), 1: RuntimeError("out of memory"), 2: wrong}
    file, measure = _file(tmp_path / "sweep.json"), Measure(answers)
    assert not sweep(planned, measure, file, 1e9), "a wrong result must fail the sweep"
    kept_points = load(tmp_path / "sweep.json")["points"]
    assert [p["status"] for p in kept_points[:4]] == ["refused", "error", "fails the rule", "ok"]
    assert [p["note"] for p in kept_points[:3]] == [
        "splits must",
        "out of memory",
        "error is 3 times",
    ]
    assert all(p["median_s"] is None for p in kept_points[:3]) and len(kept_points) == len(planned)
    assert file.summary() == f"{len(planned) - 3} ok, 1 refused, 1 error, 1 fails the rule"


def test_a_lost_device_ends_the_sweep(planned: list[Point], tmp_path: Path) -> None:
    said: list[str] = []
    measure = Measure({3: RuntimeError("illegal address")}, works=False)
    file = _file(tmp_path / "sweep.json")
    assert not sweep(planned, measure, file, 1e9, say=said.append)
    assert len(measure.seen) == 4 and "illegal address" in said[0]
    resumed = Measure()
    assert sweep(planned, resumed, _file(tmp_path / "sweep.json"), 1e9)
    assert resumed.seen == planned[4:], "the plan that lost the device must not be tried again"


def test_a_point_that_ends_the_process_is_given_up(planned: list[Point], tmp_path: Path) -> None:
    path = tmp_path / "sweep.json"
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            sweep(planned, Measure({0: KeyboardInterrupt()}), _file(path), 1e9)
        assert load(path)["points"][0]["status"] == "started"
    resumed = Measure()
    assert sweep(planned, resumed, _file(path), 1e9)
    assert resumed.seen == planned[1:]
    assert load(path)["points"][0]["status"] == "did not finish"
    assert load(path)["points"][0]["note"] == "2 processes ended while it ran"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"machine": {"gpu": "another"}}, "measured with gpu = a stand-in, here it is another"),
        ({"versions": {"torch": "2.14.0"}}, "with versions = "),
        ({"commit": None}, "with commit = "),
    ],
)
def test_points_of_two_machines_do_not_mix(
    planned: list[Point], tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    sweep(planned, Measure(), _file(tmp_path / "sweep.json"), 1e9)
    with pytest.raises(InvalidResults, match=message):
        _file(tmp_path / "sweep.json", **changed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file.update(kind="run"), "is not a sweep"),
        (lambda file: file.update(schema=9), "schema 9; it must be 2"),
        (lambda file: file["points"][1].pop("plan"), r"points\[1\] has no 'plan'"),
        (lambda file: file["points"][0].update(median_s="fast"), "median_s = 'fast'"),
    ],
)
def test_invalid_files_are_refused(
    planned: list[Point], tmp_path: Path, change: Any, message: str
) -> None:
    path = tmp_path / "sweep.json"
    sweep(planned, Measure(), _file(path), 1e9)
    file = json.loads(path.read_text())
    change(file)
    path.write_text(json.dumps(file))
    with pytest.raises(InvalidResults, match=message):
        load(path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would begin to measure")
def test_the_command_needs_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "--device", "cuda", "--out", str(tmp_path / "sweep.json")]) == 2
    assert "torch finds no CUDA device" in capsys.readouterr().err


# The plans of the kernels


def test_cuts_leave_no_slice_empty() -> None:
    assert cuts(32, (1, 2, 4, 8, 16)) == [1, 2, 4, 8, 16]
    assert cuts(5, (1, 2, 3, 4, 5, 8)) == [1, 2, 3, 5], "4 splits of 5 parts would leave one empty"
    for parts in range(1, 40):
        for splits in cuts(parts, tuple(range(1, 41))):
            share = -(-parts // splits)
            assert (splits - 1) * share < parts <= splits * share


@pytest.mark.parametrize("name", ["small", "hopper"])
def test_compiled_plans_keep_to_the_limits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel would take each plan if it had enough shared memory. The rule's plan comes first."""
    first, tile, parts = ("output_warps", 16, 32) if name == "small" else ("tile_tokens", 128, 64)
    choices = (1, 2, 4) if name == "small" else (128, 256)
    M, N, K = 64, 14336, 4096

    class Ops:
        lora_linear_plan = staticmethod(lambda x, N: (4, 2, 264))
        lora_linear_hopper_plan = staticmethod(lambda x, N: (128, 1, 112))

    monkeypatch.setattr(torch.ops, "pylora_C", Ops, raising=False)
    monkeypatch.setattr(sweep_kernels, "_processors", lambda x: 132)
    kernel = next(kernel for kernel in KERNELS if kernel.name == name)
    levels = kernel.levels(torch.empty(M, K), N)
    assert len(levels[0]) == 1 and len(levels[2]) > len(levels[1]) > 10
    for plan in (plan for level in levels for plan in level):
        assert list(plan) == [first, "splits", "grid"] and plan[first] in choices
        tiles = -(-N // (tile * plan[first])) if name == "small" else -(-N // tile)
        assert 1 <= plan["grid"] <= tiles * plan["splits"]
        assert cuts(parts, (plan["splits"],)) == [plan["splits"]]
    assert {plan[first] for plan in levels[1]} == set(choices)


def test_triton_plans_cover_the_sum() -> None:
    pytest.importorskip("triton")
    kernel = next(kernel for kernel in KERNELS if kernel.name == "triton")
    levels = kernel.levels(torch.empty(20, 1088, dtype=torch.bfloat16), 4096)
    assert len(levels[0]) == 1 and len(levels[2]) > len(levels[1]) > 4
    for plan in (plan for level in levels for plan in level):
        assert plan["per_split"] % plan["block_k"] == 0
        assert (plan["splits"] - 1) * plan["per_split"] < 1088 <= plan["splits"] * plan["per_split"]


def test_only_a_refused_plan_raises_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = _operand()

    class Ops:
        message = "the kernel cannot run this plan: splits must be 1; got splits 2\n(at a line)"

        @classmethod
        def lora_linear_planned(cls, *args: Any) -> Any:
            assert args[-2:] == (2, 3)
            raise RuntimeError(cls.message)

    monkeypatch.setattr(torch.ops, "pylora_C", Ops, raising=False)
    forward = next(kernel for kernel in KERNELS if kernel.name == "small").forward
    with pytest.raises(Refused, match=r"got splits 2$"):
        forward(torch.empty(1, 64), layer, {"splits": 2, "grid": 3})
    Ops.message = "CUDA error"
    with pytest.raises(RuntimeError, match="CUDA error"):
        forward(torch.empty(1, 64), layer, {"splits": 2, "grid": 3})


@pytest.mark.parametrize(
    ("op", "first"), [("lora_linear", "output_warps"), ("lora_linear_hopper", "tile_tokens")]
)
def test_planned_ops_take_the_plan_after_the_arguments_of_the_op(op: str, first: str) -> None:
    """The numbers of the plan come in the same order as those that the rule returns."""
    from pylora.backends import extension

    if extension.load()[0] is None:
        pytest.skip("the extension is not built")
    ops = torch.ops.pylora_C

    def arguments(name: str) -> list[tuple[str, str]]:
        schema = getattr(ops, name).default._schema
        return [(argument.name, str(argument.type)) for argument in schema.arguments]

    choice = [first, "splits", "grid"]
    assert arguments(f"{op}_planned") == arguments(op) + [(name, "int") for name in choice]
    returned = getattr(ops, f"{op}_plan").default._schema.returns
    assert [result.name for result in returned] == choice
    layer = _operand()
    with pytest.raises(NotImplementedError, match="CPU"):
        getattr(ops, f"{op}_planned")(torch.randn(1, 64), *layer.arguments(), 1, 1, 1)


# The measurement


def _operand() -> SweptLayer:
    import pylora

    weight = pylora.quantize_nf4(torch.randn(32, 64))
    return SweptLayer(weight, torch.randn(4, 64), torch.randn(32, 4))


class Graph(ClockTimer):
    """Runs every call in each sample, as a CUDA graph does."""

    def __init__(self, calls: list[Call], passes: int) -> None:
        super().__init__(calls)
        self.calls_a_sample = passes * len(calls)

    def replayed(self) -> list[Any]:
        return [call.once() for call in self._calls]


def _reference(x: Tensor, layer: SweptLayer, plan: KernelPlan) -> Tensor:
    if plan["splits"] == 2:
        raise Refused("two splits are too many")
    y = reference_op("lora_linear")(x, *layer.arguments()[:-1], "identity")[0]
    return y * 1.1 if plan["splits"] == 3 else y


def test_points_are_checked_before_they_are_timed(tmp_path: Path) -> None:
    """A plan with three splits gives a wrong result, which is not timed."""
    kernel = _kernel("stand-in", _reference)
    measure = SweepMeasurer(CPU, 3, {"stand-in": kernel}, ClockTimer, Graph)
    file = _file(tmp_path / "sweep.json")
    to_measure = points([kernel], [(32, 64)], [1, 3], CPU)
    assert not sweep(to_measure, measure, file, 1e9)
    kept_points = load(tmp_path / "sweep.json")["points"]
    by_splits = {
        splits: [p for p in kept_points if p["plan"]["splits"] == splits] for splits in (1, 2, 3)
    }
    for point in by_splits[1]:
        assert point["status"] == "ok" and 0 < point["p20_s"] <= point["median_s"]
        assert point["samples"] >= 5 and point["calls_a_sample"] >= 2
    assert {p["status"] for p in by_splits[2]} == {"refused"}
    assert {p["status"] for p in by_splits[3]} == {"fails the rule"}
    assert all("error is" in p["note"] and p["median_s"] is None for p in by_splits[3])
