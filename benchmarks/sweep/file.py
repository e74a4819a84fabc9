"""The JSON file of a sweep, with a line for each point. It is replaced after each point."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.results import (
    OPTIONAL_NUMBER,
    InvalidResults,
    check_fields,
    write_atomically,
)

SCHEMA = 2
STARTED = "started"  # the status of a point while it is measured
# A file holds only points that agree in all of these.
_MUST_AGREE = ("gpu", "versions", "commit")

_FILE: dict[str, Any] = {
    "schema": int,
    "kind": str,
    "op": str,
    "dtype": str,
    "rank": int,
    "date": str,
    "machine": dict,
    "versions": dict,
    "commit": (dict, type(None)),
    "left_out": dict,  # kernel -> why it has no points
    "points": list,
}
# These fields of a point are null unless it was timed.
_TIMES: dict[str, Any] = {
    **dict.fromkeys(("median_s", "p20_s", "p80_s"), OPTIONAL_NUMBER),
    "samples": (int, type(None)),
    "calls_a_sample": (int, type(None)),
    "rotation_bytes": (int, type(None)),
}
_POINT: dict[str, Any] = {
    "kernel": str,
    "out_features": int,
    "in_features": int,
    "tokens": int,
    "level": int,
    "plan": dict,
    "starts": int,
    "status": str,
    "note": str,
    "timing_note": str,
    **_TIMES,
}


def load(path: Path) -> dict[str, Any]:
    """Returns the sweep in a file. Raises InvalidResults, which names the field that is missing or
    wrong."""
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise InvalidResults(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InvalidResults(f"{path} is not JSON: {error}") from error
    if not isinstance(content, Mapping) or content.get("kind") != "sweep":
        raise InvalidResults(f"{path} is not a sweep; give the new file another name")
    if content.get("schema") != SCHEMA:
        raise InvalidResults(f"{path} has schema {content.get('schema')!r}; it must be {SCHEMA}")
    check_fields(content, _FILE, str(path))
    for i, point in enumerate(content["points"]):
        check_fields(point, _POINT, f"{path}, points[{i}]")
    return dict(content)


def key_of(point: Mapping[str, Any]) -> tuple[Any, ...]:
    """Returns the `Point.key` of a point in a file."""
    place = (point[name] for name in ("kernel", "out_features", "in_features", "tokens"))
    return (*place, tuple(point["plan"].items()))


class SweepFile:
    """The points of a sweep by key. The file always holds all of them."""

    def __init__(self, path: Path, facts: Mapping[str, Any], left_out: Mapping[str, str]) -> None:
        """Reads the points that are in the file already.

        Raises InvalidResults if they were measured on another GPU, with other versions or at
        another commit, since such points cannot be compared.
        """
        self._path = path
        self._head = {
            "schema": SCHEMA,
            "kind": "sweep",
            "op": "lora_linear",
            "dtype": "bfloat16",
            "rank": 16,
            "date": machine.now(),
            **facts,
            "left_out": dict(left_out),
        }
        self._points: dict[tuple[Any, ...], dict[str, Any]] = {}
        self._lines: dict[tuple[Any, ...], str] = {}
        if path.exists():
            before = load(path)
            was, now = ({"gpu": h["machine"]["gpu"], **h} for h in (before, self._head))
            for name in _MUST_AGREE:
                if was[name] != now[name]:
                    raise InvalidResults(
                        f"{path} was measured with {name} = {was[name]}, here it is {now[name]}; "
                        "give --out another file"
                    )
            for point in before["points"]:
                self._keep(key_of(point), point)

    def __len__(self) -> int:
        return len(self._points)

    def get(self, key: tuple[Any, ...]) -> dict[str, Any] | None:
        return self._points.get(key)

    def put(self, key: tuple[Any, ...], point: Mapping[str, Any]) -> None:
        """Adds or replaces a point, and writes the file."""
        whole = {**dict.fromkeys(_TIMES), "note": "", "timing_note": "", **point}
        check_fields(whole, _POINT, f"{self._path}, a point")
        self._keep(key, whole)
        head = json.dumps(self._head, indent=1, ensure_ascii=False, allow_nan=False)
        body = ",\n".join(self._lines.values())
        text = head.removesuffix("\n}") + f',\n "points": [\n{body}\n]\n}}\n'
        write_atomically(self._path, text)

    def _keep(self, key: tuple[Any, ...], point: dict[str, Any]) -> None:
        self._points[key] = point
        # Each point is encoded once, since the file is written after each of thousands of points.
        self._lines[key] = json.dumps(point, ensure_ascii=False, allow_nan=False)

    def summary(self) -> str:
        """Says how many points have which status."""
        counts = Counter(point["status"] for point in self._points.values())
        return ", ".join(f"{count} {status}" for status, count in counts.most_common()) or "none"
