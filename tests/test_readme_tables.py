"""The README shows the numbers that the committed JSON has."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("peft", reason="the results of whole models name its contenders")

from benchmarks.report import gpu_table, readme


@pytest.mark.parametrize("name", readme.SECTIONS)
def test_the_readme_has_the_numbers_of_the_json(name: str) -> None:
    text = readme.README.read_text("utf-8")
    assert readme.with_section(text, name, readme.SECTIONS[name]()) == text


def test_only_the_parts_between_the_marks_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    stale = [begin + "stale\n" + end for begin, end in map(readme.marks, readme.SECTIONS)]
    path.write_text("before\n" + "between\n".join(stale) + "after\n")
    readme.main(path)
    text = path.read_text("utf-8")
    assert text.startswith("before\n") and text.endswith("after\n") and "between\n" in text
    assert "stale" not in text and "NVIDIA H100" in text and "full fine-tuning" in text


def test_a_readme_without_the_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="begin of the methods"):
        readme.with_section("text", "the methods", "new")


def test_a_losing_ratio_is_in_bold_type() -> None:
    assert [gpu_table._ratio(r) for r in (0.5, 1.0, None)] == ["**0.50x**", "1.00x", "-"]
