"""The README's section of a CPU shows what was measured, and leaves out what was not."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft", reason="the tables name its contenders")

from benchmarks import results
from benchmarks.heap import KEPT
from benchmarks.report import cpu_table, ratio_table
from benchmarks.shapes import TRAINING

Change = Callable[[dict[str, Any]], None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Returns a folder with what a README cannot do without: two runs, and whole models."""
    for name in (*cpu_table.TABLES, results.MODELS_FILES):
        shutil.copy(cpu_table.RESULTS / f"{name}.json", tmp_path)
    return tmp_path


def add(folder: Path, change: Change) -> dict[str, Any]:
    """Adds a changed copy of the run of lora_layer under the name that it then has."""
    run = results.load(cpu_table.RESULTS / "lora_layer.json")
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
    assert cpu_table.KEPT in kept and "216 ratios, 216 are at least 1" in kept
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
