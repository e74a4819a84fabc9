"""`make gpu-wheels`: downloads small wheels to carry to a GPU machine that has no network.

    python -m benchmarks.gpu.wheels [--python 3.12] [--cuda 130] [--have peft tqdm ...]

It downloads the packages that the benchmarks need and that the machine does not have, for the
machine's Python and in the versions of requirements.lock. From bitsandbytes it keeps only the
library for one version of CUDA and the one for the CPU. From the other packages it takes only
wheels of pure Python, and prints which packages it left out.
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
# A Python that has torch for a GPU has these packages.
WITH_TORCH = ("torch", "triton", "numpy", "packaging", "setuptools")
# The wheels, the code and an extension together may have so many MB on a borrowed machine.
LIMIT_MB = 64
_LIBRARY = re.compile(r"^bitsandbytes/libbitsandbytes_(?P<device>\w+)\.so$")


def imported(folder: Path = ROOT / "benchmarks") -> set[str]:
    """Returns the packages that the benchmarks import and that come neither with Python nor with
    pylora."""
    names: set[str] = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - {"benchmarks", "pylora"}


def strip(wheel: Path, devices: Iterable[str], out: Path) -> Path:
    """Writes the bitsandbytes wheel with only the libraries for these devices, such as "cuda130"
    and "cpu". Raises ValueError if it lacks one of them.
    """
    devices = set(devices)
    buffer = io.BytesIO()
    with zipfile.ZipFile(wheel) as source:
        names = {name: _LIBRARY.match(name) for name in source.namelist()}
        available = {match["device"] for match in names.values() if match}
        if not devices <= available:
            raise ValueError(
                f"{wheel.name} has libraries for {', '.join(sorted(available))}; "
                f"{', '.join(sorted(devices - available))} is wanted"
            )
        kept = [name for name, match in names.items() if not match or match["device"] in devices]
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
    """Returns RECORD with only the lines about files that are kept, since pip looks for each file
    that it lists."""
    lines = io.StringIO()
    rows = (row for row in csv.reader(io.StringIO(content)) if row and row[0] in kept)
    csv.writer(lines, lineterminator="\n").writerows(rows)
    return lines.getvalue()


def requirements(wheel: Path) -> set[str]:
    """Returns the canonical names of the packages that a wheel requires."""
    with zipfile.ZipFile(wheel) as source:
        (name,) = (n for n in source.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = Metadata.from_email(source.read(name), validate=False)
    return {
        canonicalize_name(needed.name)
        for needed in metadata.requires_dist or []
        if needed.marker is None or needed.marker.evaluate({"extra": ""})
    }


def locked(python: str) -> dict[str, str]:
    """Returns canonical name -> "name==version" in requirements.lock for this version of Python."""
    pins = {}
    for line in LOCK.read_text().splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            if pin.marker is None or pin.marker.evaluate({"python_version": python}):
                pins[canonicalize_name(pin.name)] = f"{pin.name}{pin.specifier}"
    return pins


def download(pin: str, tags: list[str], into: Path) -> Path | None:
    """Downloads the wheel of "name==version", and returns None if none has these tags."""
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
    """Downloads what the benchmarks need beyond `have`, and returns a reason for each package that
    was left out."""
    pins = locked(python)
    known = {canonicalize_name(name) for name in (*WITH_TORCH, *have)}
    left = sorted({canonicalize_name(name) for name in imported()} - known)
    left_out = []
    while left:
        name = left.pop(0)
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
        left += sorted(needed - known - set(left))
    return left_out


def names_of(have: Iterable[str]) -> list[str]:
    """Returns the package names in `have`. An entry that ends in .json is a machine.json, which
    each call of `make gpu` leaves, and stands for the packages in it."""
    names: list[str] = []
    for word in have:
        is_file = word.endswith(".json")
        names += json.loads(Path(word).read_text())["packages"] if is_file else [word]
    return names


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.wheels")
    parser.add_argument(
        "--python", default="3.12", help="version of the machine's Python; default: 3.12"
    )
    parser.add_argument("--platform", default="manylinux_2_24_x86_64")
    parser.add_argument(
        "--cuda", default="130", help="CUDA version of the machine's torch; default: 130"
    )
    parser.add_argument(
        "--have",
        nargs="*",
        default=["peft", "transformers"],
        help="packages on the machine beside torch, or a machine.json; default: peft transformers",
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
    print(f"{total:.1f} MB in {out}; wheels, code and extension may have {LIMIT_MB} MB together")
    return 0


if __name__ == "__main__":
    sys.exit(main())
