"""The benchmark of host times: it finishes, refuses wrong results, and its goals are read.

No test looks at a time: the runs here are dry runs.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import results
from benchmarks.bench_host import BENCH
from benchmarks.command_line import main
from benchmarks.contender import BuiltLayer, Contender
from benchmarks.harness import Harness
from benchmarks.report import goals, host_tables
from benchmarks.results import CONTROL, OURS
from benchmarks.shapes import FORWARD, GRAD_FORWARD, HOST_MODES, TRAINING, Cell
from benchmarks.statistics import equal_counts
from benchmarks.timing import HOST, HOST_WARMUP, Call, HostTimer
from pylora.backends import extension

ROOT = Path(__file__).resolve().parent.parent
LIMITS = {"read_bytes_per_s": 1e10, "copy_bytes_per_s": 2e10, "matmul_flop_per_s": 1e12}
NAMES = [contender.name for contender in BENCH.contenders]
needs_extension = pytest.mark.skipif(
    extension.load()[0] is None, reason="the compiled extension is not built"
)


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Returns the JSON file that the command line writes, and the text that it prints."""
    out = tmp_path_factory.mktemp("results")
    command = f"-m benchmarks run --op host --threads 1 --seconds 0 --seed 7 --out {out}"
    done = subprocess.run(
        [sys.executable, *command.split()],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out / "host.json", done.stdout


@pytest.fixture
def run(dry_run: tuple[Path, str]) -> dict[str, Any]:
    return results.load(dry_run[0])


@needs_extension
def test_every_contender_is_measured_in_every_mode(run: dict[str, Any]) -> None:
    assert [cell["mode"] for cell in run["cells"]] == list(HOST_MODES)
    for cell in run["cells"]:
        assert (cell["out_features"], cell["in_features"], cell["tokens"]) == (64, 64, 1)
        assert cell["timing"] == HOST
        timed = {r["contender"]: r for r in cell["results"]}
        assert list(timed) == [OURS, CONTROL, *NAMES[1:]]
        for name, result in timed.items():
            if name.startswith(OURS) or name in ("F.linear", "nn.Linear"):
                assert result["status"] == "ok", (cell["mode"], name, result["note"])
            elif result["status"] != "absent":  # in eval mode a peer may round its scales to bf16
                assert result["status"] == "ok" or "eval" in name, (name, result["note"])
            if result["status"] == "ok":
                assert 0 < result["p20_s"] <= result["median_s"] <= result["p80_s"]
                assert result["of_roofline"] is None and result["timing_note"] == ""
        assert timed[OURS]["rotation_bytes"] == cell["bytes"], "the rotation must be a single layer"


def test_the_table_has_a_row_for_each_contender_and_the_goals(dry_run: tuple[Path, str]) -> None:
    printed = dry_run[1]
    tables = printed[printed.index("host: The median") :]
    for name in ("pylora nn.LoRALinear", "pylora plan nf4_linear", "F.linear", "nn.Linear"):
        assert f"\n  {name} " in tables, tables
    assert "less C" in tables and "forward + backward" in tables
    goal = "host time of pylora nn.LoRALinear, no_grad: at most 16.0 us"
    (line,) = [line for line in tables.splitlines() if goal in line]
    assert line.endswith(("met", "MISSED"))


def test_compare_and_report_read_a_run_of_host_times(
    dry_run: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(dry_run[0])
    assert main(["compare", path, path]) == 0
    assert "pylora F.nf4_linear" in capsys.readouterr().out
    assert main(["report", path]) == 0
    page = (dry_run[0].parent / "report.html").read_text()
    assert "<svg" in page and "pylora nn.NF4Linear" in page and "less C" in page
    assert (dry_run[0].parent / "host-64x64-m1.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("mode", "contender", "limit"),
    [
        (FORWARD, OURS, 16e-6),
        (FORWARD, "pylora nn.NF4Linear", 12e-6),
        (GRAD_FORWARD, OURS, 40e-6),
    ],
)
def test_a_goal_of_host_time_is_met_up_to_its_limit(
    run: dict[str, Any], mode: str, contender: str, limit: float
) -> None:
    def outcome(seconds: float) -> goals.GoalOutcome:
        changed = copy.deepcopy(run)
        cell = next(c for c in changed["cells"] if c["mode"] == mode)
        next(r for r in cell["results"] if r["contender"] == contender)["median_s"] = seconds
        (matching,) = [
            o
            for o in goals.goal_outcomes([changed])
            if (o.goal.op, o.goal.mode, o.goal.contender) == ("host", mode, contender)
        ]
        return matching

    assert outcome(limit * 0.99).met is True
    missed = outcome(limit * 1.01)
    assert missed.met is False and list(missed.values.values()) == [limit * 1.01]


def test_the_table_shows_what_a_layer_adds_to_its_c_call(run: dict[str, Any]) -> None:
    cell = run["cells"][0]
    seconds = {
        OURS: 50e-6,
        "pylora C call lora_linear": 9e-6,
        "pylora nn.NF4Linear": 30e-6,
        "pylora C call nf4_linear": 5e-6,
        "F.linear": 2e-6,
        "bitsandbytes + PEFT train": 100e-6,
        "bitsandbytes + PEFT eval": 80e-6,
    }
    template = cell["results"][0]
    cell["results"] = [
        {**template, "contender": name, "median_s": median, "has_lora": "nf4" not in name.lower()}
        for name, median in seconds.items()
    ]
    lora = host_tables.host_time(cell, OURS)
    assert lora is not None and lora.written() == ("50.0", "41.0", "25.00", "0.62")
    nf4 = host_tables.host_time(cell, "pylora nn.NF4Linear")
    assert nf4 is not None and nf4.written() == ("30.0", "25.0", "15.00", "0.38")
    peer = host_tables.host_time(cell, "F.linear")
    assert peer is not None and peer.beyond_c is None
    assert host_tables.host_time(cell, "dense + PEFT") is None


def _contender(name: str) -> Contender:
    return next(c for c in BENCH.contenders if c.name == name)


def _changed(name: str, change: Callable[[BuiltLayer], None]) -> Contender:
    contender = _contender(name)

    def build(tensors: Any) -> BuiltLayer:
        layer = contender.build(tensors)
        change(layer)
        return layer

    return replace(contender, build=build)


def _result(contender: Contender, mode: str) -> dict[str, Any]:
    harness = Harness(torch.device("cpu"), seed=1, seconds=0.0, limits=LIMITS)
    cell = Cell("host", mode, 64, 64, 1, rank=16)
    (report,) = harness.run(BENCH, (contender,), cell)
    return report["results"][0]


@pytest.mark.parametrize("mode", HOST_MODES)
@pytest.mark.parametrize(
    "name",
    [
        "pylora plan lora_linear",
        "pylora plan nf4_linear",
        pytest.param("pylora C call lora_linear", marks=needs_extension),
        pytest.param("pylora C call nf4_linear", marks=needs_extension),
    ],
)
def test_a_wrong_result_of_a_part_is_refused(name: str, mode: str) -> None:
    """The last result is spoiled: y in a forward, a gradient in the other modes."""

    def spoil(layer: BuiltLayer) -> None:
        right = layer.result

        def wrong(raw: Any) -> Any:
            *others, result = right(raw)
            return (*others, result * 1.05)

        layer.result = wrong

    assert _result(_contender(name), mode)["status"] == "ok"
    spoiled = _result(_changed(name, spoil), mode)
    assert spoiled["status"] == "refused" and spoiled["samples"] == 0


@needs_extension
@pytest.mark.parametrize("mode", [FORWARD, TRAINING])
def test_a_backend_without_a_c_call_is_reported(mode: str) -> None:
    def on_reference(layer: BuiltLayer) -> None:
        layer.backend = "reference"

    result = _result(_changed("pylora C call lora_linear", on_reference), mode)
    assert result["status"] == "absent"
    assert "lora_linear runs on the backend reference with 0 calls" in result["note"]
    assert _result(_changed("pylora plan lora_linear", on_reference), mode)["status"] == "ok"


def test_a_sample_of_host_time_is_the_mean_of_its_calls() -> None:
    made = []
    timer = HostTimer([Call(made.append, prepare=lambda: "prepared once")])
    made.clear()
    sample = timer.sample(0)
    assert sample.seconds > 0 and sample.host is None and timer.note == ""
    assert made == ["prepared once"] * timer.calls_a_sample
    assert timer.calls_a_sample > HOST_WARMUP


def test_host_time_begins_on_an_idle_device_and_leaves_it_idle() -> None:
    seen: list[str] = []
    timer = HostTimer([Call(lambda _: seen.append("call"))], lambda: seen.append("wait"))
    seen.clear()
    timer.sample(0)
    timed = timer.calls_a_sample - HOST_WARMUP
    assert seen == [*HOST_WARMUP * ["call"], "wait", *timed * ["call"], "wait"]


def test_every_contender_gets_the_same_number_of_samples() -> None:
    seconds = {"a": 0.01, "b": 0.09}
    assert equal_counts(seconds, 2.0, least=5, most=60) == {"a": 20, "b": 20}
    assert equal_counts(seconds, 0.0, least=5, most=60) == {"a": 5, "b": 5}
    assert equal_counts(seconds, 99.0, least=5, most=60) == {"a": 60, "b": 60}
