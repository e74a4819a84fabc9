"""The README's section of a CPU shows what was measured, and leaves out what was not."""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft", reason="the tables name its contenders")

from benchmarks import results, runner
from benchmarks.heap import KEPT
from benchmarks.registry import bench_of
from benchmarks.report import cpu_table, ratio_table
from benchmarks.shapes import FORWARD, QUICK_SHAPES, SUITES, TRAINING, Cell

Change = Callable[[dict[str, Any]], None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Returns a folder with what a README cannot do without: two runs, and whole models. No memory
    was measured."""
    for name in (*cpu_table.TABLES, results.MODELS_FILES):
        shutil.copy(cpu_table.RESULTS / f"{name}.json", tmp_path)
    results.save(tmp_path / "lora_layer.json", layer_run())
    return tmp_path


def layer_run() -> dict[str, Any]:
    """Returns the committed run of lora_layer without its memory."""
    run = results.load(cpu_table.RESULTS / "lora_layer.json")
    for cell in run["cells"]:
        for result in cell["results"]:
            result["extra_memory_bytes"] = None
    return run


def add(folder: Path, change: Change) -> dict[str, Any]:
    """Adds a changed copy of the run of lora_layer under the name that it then has."""
    run = layer_run()
    change(run)
    results.save(folder / f"{results.file_stem(run)}.json", run)
    return run


def with_kept_heap(run: dict[str, Any]) -> None:
    run["machine"]["heap"] = KEPT
    for cell in run["cells"]:
        for result in cell["results"]:
            if result["contender"].startswith("pylora") and result["median_s"]:
                result["median_s"] /= 1000


def test_a_run_with_a_kept_heap_stands_beside_the_default_one(folder: Path) -> None:
    before = cpu_table.section(folder)
    add(folder, with_kept_heap)
    after = cpu_table.section(folder)
    title = "<summary>The same with the heap kept</summary>"
    assert title not in before and after.count(title) == 1
    default, _, rest = after.partition(title)
    assert before.startswith(default.removesuffix("\n<details>"))
    kept, _, others = rest.partition("</details>")
    assert cpu_table.KEPT in kept and re.search(r"(\d+) ratios, \1 are at least 1", kept)
    assert before.endswith(others)


def test_a_file_with_the_name_of_another_run_is_refused(folder: Path) -> None:
    shutil.copy(folder / "lora_layer.json", folder / "lora_layer_heap_kept.json")
    with pytest.raises(results.InvalidResults, match=r"it must be lora_layer\.json"):
        cpu_table.section(folder)


@pytest.mark.parametrize("op", cpu_table.OTHERS)
def test_another_op_is_shown_if_it_was_measured(folder: Path, op: str) -> None:
    def renamed(run: dict[str, Any]) -> None:
        run["op"] = op
        for cell in run["cells"]:
            for result, name in zip(cell["results"], names, strict=False):
                result["contender"] = name

    _, pairs = cpu_table.OTHERS[op]
    names = list(dict.fromkeys(name for _, *both in pairs for name in both))
    assert f"`{op}`" not in cpu_table.section(folder)
    add(folder, renamed)
    section = cpu_table.section(folder)
    assert f"(`{op}`):\n\n|  | 1 | 2 |" in section
    assert [o for o in cpu_table.OTHERS if f"`{o}`" in section] == [op]


def test_a_training_step_with_dropout_is_compared_with_peft(folder: Path) -> None:
    def only_steps(run: dict[str, Any]) -> None:
        run["op"] = "lora_layer_dropout"
        run["cells"] = [cell for cell in run["cells"] if cell["mode"] == TRAINING][:2]

    add(folder, only_steps)
    text = cpu_table.section(folder).split("(`lora_layer_dropout`):")[1]
    assert "dropout of 0.1" in cpu_table.OTHERS["lora_layer_dropout"][0]
    assert "| 576x576 f+b, bnb + PEFT train |" in text and "| 576x576 f+b, dense + PEFT |" in text
    assert "eval |" not in text.partition("Whole models")[0]


def test_the_ratios_are_counted(folder: Path) -> None:
    run = copy.deepcopy(results.load(folder / "lora_layer.json"))
    run["cells"] = [c for c in run["cells"] if c["mode"] == TRAINING and c["tokens"] in (64, 512)]
    run["cells"] = run["cells"][:2]
    for cell, factor in zip(run["cells"], (1.04, 0.995), strict=True):
        times = {"pylora": 1.0, "bitsandbytes + PEFT train": factor}
        template = cell["results"][0]
        cell["results"] = [
            {**template, "contender": name, "median_s": seconds, "samples": 9}
            for name, seconds in times.items()
        ]
        cell["control_ratio"] = 1.5
    table = ratio_table.ratio_table(run, cpu_table.PAIRS, has_goal=True)
    assert table.startswith("|  | 64 | 512 |\n| --- | --- | --- |\n")
    assert "| 576x576 f+b, bnb + PEFT train | 1.04 | **0.99** |" in table
    assert "Of 2 ratios, 1 are at least 1, and 1 reach the goal" in table
    assert "in 2 of 2 measurements" in table
    assert "goal" not in ratio_table.ratio_table(run, cpu_table.PAIRS)


def test_memory_is_shown_if_it_was_measured(folder: Path) -> None:
    title = "<summary>Peak extra memory of a training step, MiB</summary>"
    assert title not in cpu_table.section(folder)
    sizes = {"pylora": 1.5, "pylora, dense": 2.0, "dense + PEFT": 20.25}

    def measured(run: dict[str, Any]) -> None:
        for cell in run["cells"]:
            for result in cell["results"]:
                size = sizes.get(result["contender"])
                if cell["mode"] == TRAINING and cell["tokens"] == 512 and size is not None:
                    result["extra_memory_bytes"] = int(size * 2**20)

    add(folder, measured)
    (text,) = cpu_table.section(folder).split(title)[1:]
    text = text.partition("</details>")[0]
    assert "LoRA layers, by shape and tokens:" in text and "Bottleneck" not in text
    assert "|  | pylora | pylora, dense | dense + PEFT |\n" in text
    shapes = ("576x576", "1536x576", "4096x4096", "4096x14336")
    assert [f"| {shape}, 512 | 1.5 | 2.0 | 20.2 |" in text for shape in shapes] == [True] * 4
    assert text.count("512 |") == len(shapes)


def test_memory_of_adapters_is_shown_beside_that_of_layers(folder: Path) -> None:
    def measured(run: dict[str, Any]) -> None:
        run["op"], run["cells"] = "bottleneck_adapter", run["cells"][-1:]
        for result, name in zip(run["cells"][0]["results"], names, strict=False):
            result |= {"contender": name, "extra_memory_bytes": 3 << 20}

    names = ["pylora", "eager torch", "pylora fp32", "eager torch fp32"]
    add(folder, measured)
    (text,) = cpu_table.section(folder).split("training step, MiB")[1:]
    assert "Bottleneck adapters, by shape and tokens:" in text and "LoRA layers, by" not in text
    assert f"|  | {' | '.join(names)} |\n" in text and "| 3.0 | 3.0 | 3.0 | 3.0 |" in text


@pytest.mark.parametrize("op", ["lora_linear", "lora_layer", "bottleneck_adapter"])
def test_memory_is_measured_for_the_shapes_of_a_bench(op: str) -> None:
    bench, suite = bench_of(op), SUITES["quick", "cpu"]
    shapes = bench.shapes or QUICK_SHAPES
    cells = [Cell(op, mode, *s, 512) for s in shapes for mode in (FORWARD, TRAINING)]
    measured = [cell for cell in cells if runner._has_memory(bench, cell, suite)]
    assert measured == [cell for cell in cells if cell.mode == TRAINING]
    for others in ({"tokens": 64}, {"out_features": 48}):
        assert not runner._has_memory(bench, replace(measured[0], **others), suite)
    given = replace(suite, shapes=((48, 64),))
    assert runner._has_memory(bench, Cell(op, TRAINING, 48, 64, 512), given)


def test_host_times_are_shown_if_they_were_measured(folder: Path) -> None:
    title = "<summary>What a call costs beside the computation, µs</summary>"
    assert title not in cpu_table.section(folder)
    path = cpu_table.RESULTS.parent / "amd-epyc-avx2" / "host.json"
    run = results.load(path)
    for cell in run["cells"]:
        for result in cell["results"]:
            if result["contender"] == cpu_table.OURS:
                result["median_s"] = 12.34e-6
            elif result["contender"] == cpu_table.PEFT_OVER_DENSE.name:
                result["median_s"] = None if cell["mode"] == TRAINING else 0.5e-6
    results.save(folder / path.name, run)
    (text,) = cpu_table.section(folder).split(title)[1:]
    text = text.partition("</details>")[0]
    assert "|  | no_grad | forward, grad | forward + backward |\n" in text
    assert "| pylora nn.LoRALinear | 12.3 | 12.3 | 12.3 |\n" in text
    assert "| dense + PEFT | 0.5 | 0.5 | - |\n" in text
    for name in ("pylora F.lora_linear", "pylora op lora_linear", "nn.Linear"):
        assert f"\n| {name} | " in text
    assert "plan" not in text.partition("|  |")[2] and "C call" not in text
    assert "control, two copies of pylora nn.LoRALinear" in text
