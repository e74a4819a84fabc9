"""The README shows the times of a GPU as the committed JSON has them."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("peft", reason="the results of whole models name its contenders")

from benchmarks.report import gpu_table


def test_the_readme_has_the_numbers_of_the_json() -> None:
    text = gpu_table.README.read_text()
    assert gpu_table.with_section(text, gpu_table.section()) == text


def test_only_the_part_between_the_marks_is_replaced(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{gpu_table.BEGIN}stale\n{gpu_table.END}after\n")
    gpu_table.main(readme)
    text = readme.read_text()
    assert text.startswith(f"before\n{gpu_table.BEGIN}NVIDIA H100")
    assert text.endswith(f"|\n{gpu_table.END}after\n") and "stale" not in text


def test_a_losing_ratio_is_in_bold_type() -> None:
    assert [gpu_table._ratio(r) for r in (0.5, 1.0, None)] == ["**0.50x**", "1.00x", "-"]
