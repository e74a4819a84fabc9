"""The parts of README.md that are made from committed JSON.

python -m benchmarks.report.readme    rewrites each part between its two marks
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks.machine import ROOT
from benchmarks.report import cpu_table, gpu_table, methods_table
from benchmarks.results import write_atomically

README = ROOT / "README.md"
SECTIONS: dict[str, Callable[[], str]] = {
    "the CPU's times": cpu_table.section,
    "the GPU's times": gpu_table.section,
    "the methods": methods_table.section,
}


def marks(name: str) -> tuple[str, str]:
    """The lines before and after the part of this name."""
    return f"<!-- begin of {name} -->\n", f"<!-- end of {name} -->\n"


def with_section(text: str, name: str, new: str) -> str:
    """The text of the README with a new part between the marks of `name`.

    Raises ValueError if the text does not have both marks.
    """
    begin, end = marks(name)
    before, found, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found and found_end):
        raise ValueError(f"the README must have {begin.strip()!r} and {end.strip()!r}")
    return f"{before}{begin}{new}{end}{after}"


def main(path: Path = README) -> None:
    text = path.read_text("utf-8")
    for name, section in SECTIONS.items():
        text = with_section(text, name, section())
    write_atomically(path, text)


if __name__ == "__main__":
    main()
