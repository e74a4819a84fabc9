"""Compiles a source once and keeps the object under a name made of its content.

An object can then not be out of date: another source, header, flag or compiler makes another name.
The objects lie in PYLORA_BUILD_CACHE (default: build/objects); setup.py, the resource report of the
CUDA kernels and the tests that run those kernels on the CPU share them.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What nobody has used for so long is removed. A use within a day is not written down: a linker
# would take the object for a new one.
DAY = 86400
KEEP_DAYS = 30


def folder() -> Path:
    return Path(os.environ.get("PYLORA_BUILD_CACHE") or ROOT / "build" / "objects").expanduser()


@functools.cache
def tool_version(tool: str) -> str:
    """What a compiler says when it is asked for its version."""
    return subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout


def with_includes(source: Path, folders: Sequence[Path]) -> list[Path]:
    """A file, the files beside it or in `folders` that it includes, and those that they include.

    What is not found there belongs to a toolkit, which has a version. Conditions are not looked at,
    so that a file may be listed that the compiler does not read.
    """
    found: set[Path] = set()
    waiting = [source]
    while waiting:
        path = Path(os.path.normpath(waiting.pop()))
        if path not in found:
            found.add(path)
            names = re.findall(r'^[ \t]*#[ \t]*include[ \t]*["<]([^">]+)', path.read_text(), re.M)
            places = [place / name for place in (path.parent, *folders) for name in names]
            waiting += [place for place in places if place.is_file()]
    return sorted(found)


def content_key(words: Iterable[str], source: Path, folders: Sequence[Path]) -> str:
    """The same for the same words and the same bytes in `source` and all that it includes."""
    digest = hashlib.sha256("\0".join(words).encode())
    for path in with_includes(source, folders):
        content = path.read_bytes()
        digest.update(f"\n{path.relative_to(ROOT)} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:32]


@contextlib.contextmanager
def only_one(name: str) -> Iterator[Path]:
    """The path of a kept file, while no other process makes it."""
    import fcntl  # not on Windows, where setup.py has to say that it builds nothing

    folder().mkdir(parents=True, exist_ok=True)
    path = folder() / name
    with open(path.with_name(f"{name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield path


def remove_unused() -> None:
    """Remove the objects and programs that nobody has used for KEEP_DAYS."""
    for old in folder().glob("*"):
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            if time.time() - old.stat().st_mtime > KEEP_DAYS * DAY:
                old.unlink()


def kept_object(
    command: Sequence[str],
    source: Path,
    folders: Sequence[Path],
    tools: Sequence[str],
    parallel: Sequence[str] = (),
) -> tuple[Path, bool]:
    """The object that `command` makes from a source, and whether it was there before.

    folders     of our own headers; `tools` are the compilers, whose versions count
    parallel    flags that change how fast the object is made, not what it is

    Of several processes that want an object one makes it, and the others wait for it.
    """
    nvcc_flags = [f"{name}={os.environ[name]}" for name in os.environ if name.startswith("NVCC_")]
    words = [*command, *map(tool_version, tools), *sorted(nvcc_flags)]
    key = content_key(words, source, folders)
    path = str(source.relative_to(ROOT))
    with only_one(f"{source.name}-{key}.o") as output:
        if output.exists():
            if time.time() - output.stat().st_mtime > DAY:
                os.utime(output)
            return output, True
        part = output.with_suffix(".part")
        ran = subprocess.run([*command, *parallel, "-c", path, "-o", str(part)], cwd=ROOT)
        if ran.returncode != 0:
            raise SystemExit(f"pylora: {path} did not compile; the error is above")
        if content_key(words, source, folders) != key:
            part.unlink()
            raise SystemExit(f"pylora: {path} was changed while it was compiled; build again")
        part.replace(output)
    remove_unused()
    return output, False


def kept_program(command: Sequence[str], objects: Sequence[Path]) -> Path:
    """The program that `command` links from kept objects, whose names are their content."""
    words = [*command, *(path.name for path in objects)]
    key = hashlib.sha256("\0".join(words).encode()).hexdigest()[:32]
    with only_one(f"program-{key}") as output:
        if not output.exists():
            part = output.with_suffix(".part")
            ran = subprocess.run([*command, *map(str, objects), "-o", str(part)], cwd=ROOT)
            if ran.returncode != 0:
                raise SystemExit("pylora: a program did not link; the error is above")
            part.replace(output)
        elif time.time() - output.stat().st_mtime > DAY:
            os.utime(output)
    return output
