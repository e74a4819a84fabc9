"""Writes what a call leaves: results.tgz with all logs and results, and summary.json, one page."""

from __future__ import annotations

import io
import json
import tarfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.results import write_atomically

ARCHIVE, SUMMARY = "results.tgz", "summary.json"
# A sanitizer can write gigabytes, and the archive has to stay under 16 MiB.
MAX_LOG_BYTES = 2 << 20
TAIL_LINES = 15


def save(out: Path, work: Path, summary: Mapping[str, Any]) -> None:
    """Replaces both files. If the process is killed, the last complete ones are still there."""
    packed = pack(work)
    write_atomically(out / ARCHIVE, packed)
    whole = {**summary, "archive": {"file": ARCHIVE, "bytes": len(packed)}, "json": _json_in(work)}
    write_atomically(out / SUMMARY, json.dumps(whole, indent=1) + "\n")


def pack(work: Path) -> bytes:
    """Returns the files below `work` as a .tgz. It leaves out names that begin with a dot, which
    are files that are being written."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=6) as archive:
        for path in _files(work):
            try:
                content = _content(path)
            except FileNotFoundError:  # the running step has just removed the file
                continue
            entry = tarfile.TarInfo(str(path.relative_to(work)))
            entry.size, entry.mtime = len(content), int(time.time())
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def tail(log: Path, lines: int = TAIL_LINES) -> list[str]:
    """Returns the last lines of a log that are not blank, at most 300 characters of each."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 65536))
        text = file.read().decode(errors="replace")
    return [line[:300] for line in text.splitlines() if line.strip()][-lines:]


def _files(work: Path) -> list[Path]:
    files = (path for path in work.rglob("*") if path.is_file() and not path.is_symlink())
    return sorted(path for path in files if not path.name.startswith("."))


def _content(path: Path) -> bytes:
    """Returns the content of a file. A long log is cut in the middle, where a line says how much is
    left out."""
    size = path.stat().st_size
    if path.suffix != ".log" or size <= MAX_LOG_BYTES:
        return path.read_bytes()
    half = MAX_LOG_BYTES // 2
    with path.open("rb") as file:
        begin = file.read(half)
        file.seek(size - half)
        end = file.read(half)
    return begin + f"\n[... {size - 2 * half} bytes left out ...]\n".encode() + end


def _json_in(work: Path) -> dict[str, str]:
    """Returns the place of each JSON file in the archive -> its size and the cells it lacks."""
    described = {}
    for path in _files(work):
        if path.suffix == ".json":
            described[str(path.relative_to(work))] = _described(path)
    return described


def _described(path: Path) -> str:
    try:
        text = path.read_text()
        content = json.loads(text)
    except FileNotFoundError:
        return "removed while this was written"
    except ValueError as error:
        return f"not complete: {error}"
    if isinstance(content, dict) and content.get("cells_left"):
        return f"{len(text)} characters, {content['cells_left']} cells were not measured"
    return f"{len(text)} characters"
