"""`make gpu-wheels`: small wheels to carry to a GPU machine that has no network.

    python -m benchmarks.gpu.wheels [--python 3.12] [--cuda 130] [--have peft tqdm ...]

The benchmarks' packages that the machine does not have are downloaded for its Python, in the
versions of requirements.lock. bitsandbytes is stripped to the library of one CUDA version and that
of the CPU. Of the rest only wheels of pure Python are taken; what is left out is printed.
"""

from __future__ import annotations

import argparse
import ast
import csv
import io
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

from packaging.metadata import Metadata
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks.gpu.steps import ROOT
from benchmarks.results import write_atomically

LOCK = ROOT / "requirements.lock"
OUT = ROOT / "build" / "gpu-wheels"
# A Python that holds torch for a GPU has these.
WITH_TORCH = ("torch", "triton", "numpy", "packaging", "setuptools")
# With the code and an extension, this is what a borrowed machine may take.
LIMIT_MB = 64
_NATIVE = re.compile(r"^bitsandbytes/libbitsandbytes_(?P<kind>\w+)\.so$")


def imported(folder: Path = ROOT / "benchmarks") -> set[str]:
    """The packages that the benchmarks import and that neither Python nor pylora brings."""
    names: set[str] = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - {"benchmarks", "pylora"}


def strip(wheel: Path, kinds: Iterable[str], out: Path) -> Path:
    """Writes the bitsandbytes wheel without the libraries of other kinds than "cuda130" or "cpu".

    Raises ValueError if it has none of a kind that is wanted.
    """
    kinds = set(kinds)
    buffer = io.BytesIO()
    with zipfile.ZipFile(wheel) as source:
        names = {name: _NATIVE.match(name) for name in source.namelist()}
        found = {match["kind"] for match in names.values() if match}
        if not kinds <= found:
            raise ValueError(
                f"{wheel.name} has libraries for {', '.join(sorted(found))}; "
                f"{', '.join(sorted(kinds - found))} is wanted"
            )
        kept = [name for name, match in names.items() if not match or match["kind"] in kinds]
        (record,) = (name for name in kept if name.endswith(".dist-info/RECORD"))
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as target:
            for name in kept:
                content = source.read(name)
                if name == record:
                    content = _record(content.decode(), kept).encode()
                target.writestr(source.getinfo(name), content, zipfile.ZIP_DEFLATED)
    write_atomically(out / wheel.name, buffer.getvalue())
    return out / wheel.name


def _record(content: str, kept: list[str]) -> str:
    """The lines of RECORD about the files that are left: pip installs what it lists."""
    lines = io.StringIO()
    rows = (row for row in csv.reader(io.StringIO(content)) if row and row[0] in kept)
    csv.writer(lines, lineterminator="\n").writerows(rows)
    return lines.getvalue()


def requirements(wheel: Path) -> set[str]:
    """The packages that a wheel cannot do without, under their canonical names."""
    with zipfile.ZipFile(wheel) as source:
        (name,) = (n for n in source.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = Metadata.from_email(source.read(name), validate=False)
    return {
        canonicalize_name(needed.name)
        for needed in metadata.requires_dist or []
        if needed.marker is None or needed.marker.evaluate({"extra": ""})
    }


def locked(python: str) -> dict[str, str]:
    """Canonical name -> "name==version" in requirements.lock for this version of Python."""
    found = {}
    for line in LOCK.read_text().splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            if pin.marker is None or pin.marker.evaluate({"python_version": python}):
                found[canonicalize_name(pin.name)] = f"{pin.name}{pin.specifier}"
    return found


def download(pin: str, tags: list[str], into: Path) -> Path | None:
    """The wheel of "name==version"; None if there is none with these tags."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    options = ["--no-deps", "--only-binary=:all:", *tags, "--dest", str(into)]
    done = subprocess.run([*pip, *options, pin], capture_output=True, text=True)
    if done.returncode == 0:
        (wheel,) = into.glob("*.whl")
        return wheel
    if "No matching distribution" in done.stderr:
        return None
    raise RuntimeError(f"{pin} could not be downloaded:\n{done.stderr.strip()}")


def fetch(
    have: Iterable[str],
    python: str,
    platform: str,
    cuda: str,
    out: Path,
    get: Callable[[str, list[str], Path], Path | None] = download,
) -> list[str]:
    """Downloads what the benchmarks need beyond `have`; returns what was left out, in words."""
    pins = locked(python)
    known = {canonicalize_name(name) for name in (*WITH_TORCH, *have)}
    wanted = sorted({canonicalize_name(name) for name in imported()} - known)
    left_out = []
    while wanted:
        name = wanted.pop(0)
        known.add(name)
        if name not in pins:
            left_out.append(f"{name}: requirements.lock does not have it")
            continue
        is_stripped = name == "bitsandbytes"
        tags = ["--platform", platform] if is_stripped else ["--platform", "any", "--abi", "none"]
        with tempfile.TemporaryDirectory() as folder:
            wheel = get(pins[name], ["--python-version", python, *tags], Path(folder))
            if wheel is None:
                left_out.append(f"{name}: it has no wheel of pure Python")
                continue
            needed = requirements(wheel)
            if is_stripped:
                kept = strip(wheel, (f"cuda{cuda}", "cpu"), out)
            else:
                kept = out / wheel.name
                write_atomically(kept, wheel.read_bytes())
        print(f"{kept.stat().st_size / 1e6:6.2f} MB  {kept.name}")
        wanted += sorted(needed - known - set(wanted))
    return left_out


def names_of(have: Iterable[str]) -> list[str]:
    """The names themselves, and those in a machine.json, which each call of `make gpu` leaves."""
    names: list[str] = []
    for word in have:
        is_file = word.endswith(".json")
        names += json.loads(Path(word).read_text())["packages"] if is_file else [word]
    return names


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.wheels")
    parser.add_argument("--python", default="3.12", help="that of the machine; default: 3.12")
    parser.add_argument("--platform", default="manylinux_2_24_x86_64")
    parser.add_argument("--cuda", default="130", help="CUDA of the machine's torch; default: 130")
    parser.add_argument(
        "--have",
        nargs="*",
        default=["peft", "transformers"],
        help="packages the machine has beside torch, or a machine.json; default: peft transformers",
    )
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("*.whl"):
        old.unlink()
    have = names_of(arguments.have)
    left_out = fetch(have, arguments.python, arguments.platform, arguments.cuda, out)
    for line in left_out:
        print(f"left out: {line}")
    total = sum(wheel.stat().st_size for wheel in out.glob("*.whl")) / 1e6
    print(f"{total:.1f} MB in {out}, of {LIMIT_MB} MB that code, wheels and extension may have")
    return 0


if __name__ == "__main__":
    sys.exit(main())
