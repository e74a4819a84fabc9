"""`Report`: which layers of a model compute through pylora, which do not, and why."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class LayerReport:
    """What `pylora.accelerate` did with one layer.

    name       its name in the model
    kind       the class of the module
    swapped    true if it computes through pylora now
    variant    the backend and kernel for one token and for 512 tokens; empty if it was left
    reason     why it was left; empty if it was swapped
    """

    name: str
    kind: str
    swapped: bool
    variant: str = ""
    reason: str = ""


@dataclass(frozen=True, repr=False)
class Report:
    """The layers that `pylora.accelerate` looked at, and notes about the whole model.

    It prints as a table, in which layers that differ by their numbers alone share a line.
    """

    layers: tuple[LayerReport, ...]
    notes: tuple[str, ...] = ()

    @property
    def swapped(self) -> tuple[LayerReport, ...]:
        """The layers that compute through pylora."""
        return tuple(layer for layer in self.layers if layer.swapped)

    @property
    def left(self) -> tuple[LayerReport, ...]:
        """The layers that compute as they did before."""
        return tuple(layer for layer in self.layers if not layer.swapped)

    def __repr__(self) -> str:
        groups = Counter(
            (
                re.sub(r"\d+", "*", layer.name) or "(the model)",
                layer.kind,
                "swapped" if layer.swapped else "left",
                layer.variant or layer.reason,
            )
            for layer in self.layers
        )
        rows = [("layers", "count", "class", "", "variant, or why it was left")]
        rows += [(n, str(count), kind, what, why) for (n, kind, what, why), count in groups.items()]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [f"{len(self.swapped)} layers compute through pylora, {len(self.left)} were left"]
        for row in rows:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=False))
            lines.append(f"  {'  '.join(cells)}  {row[4]}".rstrip())
        return "\n".join([*lines, *self.notes])
