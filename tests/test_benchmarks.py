"""The benchmark harness: its command line, what it refuses, its files and its statistics.

No test looks at a time. The runs here are tiny and only have to finish with whole results.
"""

from __future__ import annotations

import copy
import json
import os
import re
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import results, statistics
from benchmarks.command_line import main
from benchmarks.contender import BuiltLayer, Contender, linear_work
from benchmarks.harness import Harness
from benchmarks.models import results as models_results
from benchmarks.registry import BENCHES, bench_of, check_against, ops_of, selected
from benchmarks.report import goals, plots, tables
from benchmarks.roofline import floor_seconds
from benchmarks.shapes import BACKWARD, FORWARD, SUITES, TRAINING, Cell
from benchmarks.statistics import FEW_SAMPLES

ROOT = Path(__file__).resolve().parent.parent
LIMITS = {"read_bytes_per_s": 1e10, "copy_bytes_per_s": 2e10, "matmul_flop_per_s": 1e12}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the command line writes for one tiny cell of each op and mode."""
    out = tmp_path_factory.mktemp("results")
    command = "-m benchmarks run --op nf4_quantize --op lora_linear --shape 32x64 --tokens 2"
    command += " --against dense,reference --threads 1 --seconds 0 --seed 7"
    done = subprocess.run(
        [sys.executable, *command.split(), "--out", str(out)],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "lora_linear forward 32x64 M=2 r=16 bfloat16 eager" in done.stdout
    return out


@pytest.fixture
def run(folder: Path) -> dict[str, Any]:
    return results.load(folder / "lora_linear.json")


def test_run_writes_every_cell_and_contender(run: dict[str, Any]) -> None:
    assert run["seed"] == 7 and run["machine"]["threads"] == 1
    assert run["versions"]["torch"] == torch.__version__
    assert [cell["mode"] for cell in run["cells"]] == [FORWARD, TRAINING]
    for cell in run["cells"]:
        timed = {r["contender"]: r for r in cell["results"]}
        assert {"pylora", "pylora (control)", "pylora reference", "dense bf16"} <= timed.keys()
        assert not any("bitsandbytes" in name for name in timed)
        for result in timed.values():
            assert result["status"] == "ok" and result["samples"] >= 1
            assert 0 < result["p20_s"] <= result["median_s"] <= result["p80_s"]
        assert timed["pylora reference"]["variant"].startswith("pure PyTorch")
        if sys.platform == "linux" and cell["mode"] == TRAINING:
            assert timed["pylora"]["extra_memory_bytes"] >= 0


def test_list_names_ops_and_contenders(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    assert all(op in printed for op in BENCHES)
    assert "bitsandbytes + PEFT train" in printed and "Llama-3 70B" in printed


def test_compare_and_report_read_what_a_run_wrote(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(folder / "lora_linear.json")
    assert main(["compare", path, path]) == 0
    assert "same" in capsys.readouterr().out
    assert main(["compare", path, str(folder / "nf4_quantize.json")]) == 2
    assert "only two runs of one op" in capsys.readouterr().err
    assert main(["report", str(folder)]) == 0
    page = (folder / "report.html").read_text()
    assert "<svg" in page and "dense bf16" in page
    assert not re.search(r"""(src|href)=["'](?!#)|@import|url\((?!#)""", page), (
        "the page must not load external assets"
    )
    assert list(folder.glob("lora_linear-forward-eager-speedup.png"))
    assert not list(folder.glob(".*")), "a temporary file was left behind"


def test_compare_names_what_became_slower(
    run: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slower = copy.deepcopy(run)
    for result in slower["cells"][0]["results"]:
        if result["contender"] == "pylora":
            for name in ("median_s", "p20_s", "p80_s"):
                result[name] *= 100
    for name, saved_run in (("a", run), ("b", slower)):
        results.save(tmp_path / f"{name}.json", saved_run)
    assert main(["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 1
    assert capsys.readouterr().out.count("SLOWER") == 1


def test_compare_shows_host_times(run: dict[str, Any], tmp_path: Path) -> None:
    """A GPU run has the host's time beside the device's. A slower host counts as slower."""

    def with_host_times(ours: float, control: float) -> dict[str, Any]:
        seconds, changed = {"pylora": ours, "pylora (control)": control}, copy.deepcopy(run)
        for result in changed["cells"][0]["results"]:
            host = seconds.get(result["contender"], 20e-6)
            result |= dict.fromkeys(("host_s", "host_p20_s", "host_p80_s"), host)
        return changed

    before, after = with_host_times(20e-6, 20e-6), with_host_times(30e-6, 30e-6)
    table, slower = tables.compare_table(before, after)
    (row,) = [line for line in table.splitlines() if "  pylora: host " in line]
    assert slower == table.count("SLOWER") == 1
    assert "20 us" in row and "30 us" in row and "+50.0%" in row and row.endswith("SLOWER")
    # Two copies of pylora differ by more than that, so this machine cannot tell them apart.
    table, slower = tables.compare_table(before, with_host_times(30e-6, 60e-6))
    assert slower == 0 and "SLOWER" not in table
    assert "host" not in tables.compare_table(run, run)[0]


def test_timing_under_pytest_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run"]) == 2
    assert "under pytest" in capsys.readouterr().err


def _harness_report(
    *contenders: Contender, mode: str = FORWARD, op: str = "lora_linear", out_features: int = 32
) -> dict[str, Any]:
    cell = Cell(op, mode, out_features, 64, 3, rank=4)
    harness = Harness(torch.device("cpu"), seed=1, seconds=0.0, limits=LIMITS)
    (report,) = harness.run(bench_of(op), contenders, cell)
    return {result["contender"]: result for result in report["results"]}


def _scaled(contender: Contender, factor: float, name: str, is_ours: bool) -> Contender:
    def build(tensors: Any) -> BuiltLayer:
        layer = contender.build(tensors)
        right = layer.forward
        layer.forward = lambda x: right(x) * factor
        return layer

    return replace(contender, build=build, name=name, is_ours=is_ours)


@pytest.mark.parametrize("mode", [FORWARD, BACKWARD, TRAINING])
def test_a_wrong_result_of_pylora_is_not_timed(mode: str) -> None:
    ours = bench_of("lora_linear").contenders[0]
    reports = _harness_report(
        _scaled(ours, 1.05, "pylora", True), _scaled(ours, 1.05, "peer", False), mode=mode
    )
    assert reports["pylora"]["status"] == "refused" and reports["pylora"]["samples"] == 0
    assert reports["pylora"]["median_s"] is None
    assert "error is" in reports["pylora"]["note"]
    assert reports["peer"]["status"] == "fails the rule" and reports["peer"]["samples"] > 0


def test_a_result_names_the_variant_of_the_backend_that_ran() -> None:
    ours = bench_of("lora_linear").contenders[0]

    def build(tensors: Any) -> BuiltLayer:
        layer = ours.build(tensors)
        layer.backend = "reference"
        return layer

    reports = _harness_report(ours, replace(ours, build=build, name="forced", is_ours=False))
    assert reports["forced"]["variant"].startswith("reference")


@pytest.mark.parametrize("mode", [FORWARD, BACKWARD, TRAINING])
def test_every_installed_contender_is_right(mode: str) -> None:
    contenders = bench_of("lora_linear").contenders
    reports = _harness_report(*(c for c in contenders if "PEFT" not in c.name), mode=mode)
    for name, result in reports.items():
        assert result["status"] in ("ok", "absent", "fails the rule"), (name, result["note"])
        assert result["status"] != "fails the rule" or "eval" in name, result["note"]


@pytest.mark.parametrize(
    ("op", "mode"),
    [
        ("lora_layer", TRAINING),
        ("lora_layer_autocast", TRAINING),
        ("dora_layer", TRAINING),
        ("lora_qkv", FORWARD),
        ("lora_qkv", BACKWARD),
        ("lora_mlp", TRAINING),
        ("multi_lora_linear", FORWARD),
        ("multi_lora_linear", TRAINING),
    ],
)
def test_contenders_of_multi_layer_ops_are_judged(op: str, mode: str) -> None:
    """pylora is right, and a contender whose last output is wrong is refused."""
    bench = bench_of(op)
    ours = bench.contenders[0]

    def build(tensors: Any) -> BuiltLayer:
        layer = ours.build(tensors)
        right = layer.forward

        def wrong(x: torch.Tensor) -> Any:
            y = right(x)
            return (*y[:-1], y[-1] * 1.05) if isinstance(y, tuple) else y * 1.05

        layer.forward = wrong
        return layer

    wrong = replace(ours, build=build, name="wrong")
    slow = "PEFT" if op != "multi_lora_linear" else "dense"
    others = [c for c in bench.contenders[1:] if slow not in c.name and not c.only_full]
    reports = _harness_report(ours, wrong, *others, mode=mode, op=op, out_features=128)
    assert reports.pop("wrong")["status"] == "refused"
    for name, result in reports.items():
        assert result["status"] in ("ok", "absent") or "eval" in name, (name, result["note"])


def test_only_the_full_suite_has_multi_layer_ops_and_host_times() -> None:
    """The quick suite must end within five minutes."""
    assert set(ops_of("full")) - set(ops_of("quick")) == {
        "lora_layer",
        "lora_layer_autocast",
        "lora_layer_dropout",
        "dora_layer",
        "lora_qkv",
        "lora_mlp",
        "multi_lora_linear",
        "bottleneck_adapter",
        "multi_bottleneck_adapter",
        "host",
    }


def test_least_work_of_multi_layer_ops_counts_each_tensor_once() -> None:
    m, n, k, r = 8, 256, 64, 4
    for op, shapes in (
        ("lora_qkv", [(64, k), (96, k), (96, k)]),
        ("lora_mlp", [(n, k), (n, k), (k, n)]),
    ):
        bench = bench_of(op)
        cell = Cell(op, FORWARD, n, k, m, rank=r)
        assert [(c.out_features, c.in_features) for c in bench.layers(cell)] == shapes
        work = bench.work(cell, bench.contenders[0])
        weights, lora = (sum(a * b for a, b in shapes), r * sum(a + b for a, b in shapes))
        assert work.flop == 2 * m * (weights + lora)
        assert work.bytes == weights * 4.5 / 8 + 2 * (lora + m * k + m * cell.result_features)


def test_an_error_of_one_contender_leaves_the_others() -> None:
    def build(tensors: Any) -> BuiltLayer:
        raise RuntimeError("no such kernel")

    ours = bench_of("lora_linear").contenders[0]
    reports = _harness_report(
        ours, Contender("broken", build), Contender("gone", build, ("no-such",))
    )
    assert reports["broken"]["status"] == "error" and "no such kernel" in reports["broken"]["note"]
    assert reports["gone"]["status"] == "absent" and "no-such" in reports["gone"]["note"]
    assert reports["pylora"]["status"] == "ok"


def test_a_contender_that_would_take_minutes_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, reference = (
        next(c for c in bench_of("lora_linear").contenders if c.name == name)
        for name in ("pylora", "pylora reference")
    )
    harness = Harness(torch.device("cpu"), seed=1, seconds=0.0, limits=LIMITS)

    def statuses(tokens: int) -> list[str]:
        cell = Cell("lora_linear", FORWARD, 32, 64, tokens, rank=4)
        (report,) = harness.run(bench_of("lora_linear"), (ours, reference), cell)
        return [result["status"] for result in report["results"]]

    assert statuses(1) == ["ok"] * 3
    monkeypatch.setattr("benchmarks.harness._SLOW_CALL", 0.0)
    assert statuses(1) == ["ok"] * 3, "it is left out only at more tokens"
    assert statuses(2) == ["absent"] * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: run.pop("seed"), "has no 'seed'"),
        (lambda run: run.update(schema=99), "schema 99; it must be 3"),
        (
            lambda run: run["machine"].update(threads="two"),
            "threads = 'two'; it must be an integer",
        ),
        (lambda run: run["cells"][0].update(tokens=True), r"cells\[0\] has tokens = True"),
        (lambda run: run["cells"][1].pop("floor_s"), r"cells\[1\] has no 'floor_s'"),
        (
            lambda run: run["cells"][0]["results"][1].update(median_s="fast"),
            r"results\[1\] has median_s = 'fast'; it must be an integer or a number or null",
        ),
        (lambda run: run["cells"].append(3), "is int; it must be an object"),
    ],
)
def test_invalid_results_are_refused(
    run: dict[str, Any], tmp_path: Path, change: Any, message: str
) -> None:
    change(run)
    path = tmp_path / "run.json"
    path.write_text(json.dumps(run))
    with pytest.raises(results.InvalidResults, match=message):
        results.load(path)
    with pytest.raises(results.InvalidResults, match=message):
        results.save(tmp_path / "other.json", run)
    assert not (tmp_path / "other.json").exists()


def test_results_of_an_older_schema_are_read_on_a_cpu_only(
    run: dict[str, Any], tmp_path: Path
) -> None:
    """GPU runs of the older schema are refused, because their times meant something else."""
    path, run = tmp_path / "run.json", copy.deepcopy(run)
    for result in (result for cell in run["cells"] for result in cell["results"]):
        result["timing_note"] = ""
    old = copy.deepcopy(run)
    old["schema"] = 1
    for cell in old["cells"]:
        cell["rows"] = cell.pop("tokens")
        for result in cell["results"]:
            result["path"] = result.pop("variant")
            for name in ("host_s", "host_p20_s", "host_p80_s", "timing_note"):
                del result[name]
    path.write_text(json.dumps(old))
    assert results.load(path) == run
    old["machine"]["device"] = "cuda"
    path.write_text(json.dumps(old))
    with pytest.raises(results.InvalidResults, match="schema 1, whose times on a GPU"):
        results.load(path)
    for folder in (ROOT / "benchmarks" / "results").iterdir():
        if folder.is_dir():
            results.load_all([folder])
            models_results.load_all([folder])


def test_unreadable_results_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.json"
    with pytest.raises(results.InvalidResults, match="cannot be read"):
        results.load(path)
    with pytest.raises(results.InvalidResults, match=r"holds no \.json file"):
        results.load_all([tmp_path])
    path.write_text("{")
    with pytest.raises(results.InvalidResults, match="not JSON"):
        results.load(path)
    assert main(["report", str(path)]) == 2
    assert "not JSON" in capsys.readouterr().err


def test_a_failed_write_leaves_the_old_file(run: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    results.save(path, run)
    run["cells"][0]["floor_s"] = float("nan")
    with pytest.raises(ValueError):
        results.save(path, run)
    assert results.load(path)["cells"][0]["floor_s"] > 0


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="must be one of nf4_quantize"):
        bench_of("nf5_linear")
    with pytest.raises(ValueError, match="has 'megatron'"):
        check_against(["dense", "megatron"])
    few = [c.name for c in selected(bench_of("nf4_linear"), None, few=True)]
    assert few[0] == "pylora" and "dense bf16" in few and "dense fp32" not in few
    assert "dense fp32" in [c.name for c in selected(bench_of("nf4_linear"), ["dense"], few=True)]


def test_quantiles_are_those_of_torch() -> None:
    samples = torch.rand(37).tolist()
    for q in (0.0, 0.2, 0.5, 0.8, 1.0):
        expected = torch.tensor(samples, dtype=torch.float64).quantile(q).item()
        assert statistics.quantile(samples, q) == pytest.approx(expected)
    with pytest.raises(ValueError, match="samples is empty"):
        statistics.quantile([], 0.5)


def test_noise_is_the_standard_error_of_the_median() -> None:
    medians = (10 + torch.randn(2000, 25)).median(dim=1).values
    noise = [
        statistics.relative_noise(statistics.summarize(row))
        for row in (10 + torch.randn(200, 25)).tolist()
    ]
    assert sum(noise) / len(noise) == pytest.approx(medians.std().item() / 10, rel=0.25)


def test_a_noisy_control_raises_the_threshold() -> None:
    steady = statistics.Summary(50, 1.0, 1.0, 1.0)
    assert statistics.change_threshold(steady, steady, []) == statistics.SMALLEST_CHANGE
    assert statistics.change_threshold(steady, steady, [1.0, 0.9]) == pytest.approx(0.1)


def test_samples_fit_the_budget_and_are_spread() -> None:
    seconds = {"a": 0.02, "b": 0.03, "c": 0.15, "d": 1.0}
    counts = statistics.sample_counts(seconds, 2.0, least=5, most=60)
    assert counts == {"a": 25, "b": 16, "c": 3, "d": 1}
    assert statistics.sample_counts({"a": 1e-6}, 2.0, least=5, most=60) == {"a": 60}
    turns = statistics.rounds(counts, seed=3)
    for name, count in counts.items():
        assert sum(name in turn for turn in turns) == count
    assert {r // 9 for r, turn in enumerate(turns) if "c" in turn} == {0, 1, 2}
    assert len({tuple(turn) for turn in turns}) > 1, "the order must change from round to round"


def test_least_work_of_a_linear_layer_counts_each_tensor_once() -> None:
    ours, _, _, dense, *_ = bench_of("lora_linear").contenders
    assert dense.name == "dense bf16"
    m, n, k, r = 8, 64, 128, 4
    cell = Cell("lora_linear", FORWARD, n, k, m, rank=r)
    work = linear_work(cell, ours)
    assert work.flop == 2 * m * n * k + 2 * m * r * (n + k)
    assert work.bytes == n * k * 4.5 / 8 + 2 * (m * k + r * (n + k) + m * n)
    assert linear_work(cell, dense).bytes == 2 * (n * k + m * k + m * n)
    modes = [linear_work(replace(cell, mode=mode), ours) for mode in (FORWARD, BACKWARD, TRAINING)]
    assert modes[0].flop + modes[1].flop == modes[2].flop
    assert floor_seconds(work, LIMITS) == pytest.approx(
        max(work.bytes / LIMITS["copy_bytes_per_s"], work.flop / LIMITS["matmul_flop_per_s"])
    )


def test_goals_take_the_best_mode_of_a_peer_and_every_shape(run: dict[str, Any]) -> None:
    goal = next(g for g in goals.CPU_GOALS if g.tokens == 16 and g.against == goals.BEST)
    cell = run["cells"][0]
    cell["tokens"] = 16
    template = cell["results"][0]
    cell["results"] = [
        {**template, "contender": name, "median_s": seconds}
        for name, seconds in (("pylora", 1.0), (goals.BNB_TRAIN, 9.0), (goals.BNB_EVAL, 4.5))
    ]
    run["cells"] = [{**cell, "out_features": n, "in_features": k} for n, k in goals.QUICK_SHAPES]
    assert next(o for o in goals.goal_outcomes([run]) if o.goal == goal).met is True
    run["cells"][1] = copy.deepcopy(run["cells"][1])
    run["cells"][1]["results"][0]["median_s"] = 2.0
    outcome = next(o for o in goals.goal_outcomes([run]) if o.goal == goal)
    assert outcome.met is False and list(outcome.values.values()) == [4.5, 2.25, 4.5]
    assert "MISSED" in goals.goals_table([run])
    assert "4.50" in tables.summary_table(run)


def test_the_quick_suite_has_the_quick_shapes() -> None:
    quick = SUITES["quick", "cpu"]
    cells = list(quick.cells("lora_linear", has_tokens=True, has_backward=True, rank=16))
    forward = {(c.out_features, c.in_features, c.tokens) for c in cells if c.mode == FORWARD}
    assert forward == {(*s, m) for s in goals.QUICK_SHAPES for m in (1, 4, 16, 64, 512)}
    assert {c.tokens for c in cells if c.mode == TRAINING} == {512}
    flat = list(quick.cells("nf4_quantize", has_tokens=False, has_backward=False, rank=0))
    assert [(c.out_features, c.in_features) for c in flat] == [(4096, 4096), (14336, 4096)]


def test_the_repository_root_leaves_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise transformers and PEFT would take our kernels/ for the Hugging Face package."""
    monkeypatch.setattr(sys, "path", [str(ROOT), "", *sys.path])
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "benchmarks" / "__main__.py"), run_name="benchmarks.__main__")
    assert not {str(ROOT), ""} & set(sys.path)


def test_no_two_lines_of_a_plot_look_the_same_and_few_samples_are_hollow(
    run: dict[str, Any],
) -> None:
    for bench in BENCHES.values():
        names = [contender.name for contender in bench.contenders]
        styles = [tuple(style.items()) for style in plots.styles_of(names).values()]
        assert len(set(styles)) == len(names), bench.op

    def drawn(*samples: int) -> tuple[str, list[list[int]]]:
        """Returns the title, and the places of the hollow points, of one cell for each number."""
        cells = []
        for tokens, number in enumerate(samples, 1):
            cells.append(copy.deepcopy(run["cells"][0]) | {"tokens": tokens})
            for result in cells[-1]["results"]:
                result["samples"] = number
        figure = plots.speedup(cells, "title")
        hollow = [x for x in figure.axes[0].lines if x.get_markerfacecolor() == "white"]
        return figure.get_suptitle(), [list(line.get_xdata()) for line in hollow]

    assert drawn(FEW_SAMPLES, FEW_SAMPLES) == ("title", [])
    title, places = drawn(FEW_SAMPLES, FEW_SAMPLES - 1)
    assert "A hollow point" in title and places and all(place == [2] for place in places)
