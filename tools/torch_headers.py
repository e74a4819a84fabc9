"""Checks that the C++ files that include torch compile against every torch that pylora promises.

    python -m tools.torch_headers            every minor release from the oldest that pylora takes
    python -m tools.torch_headers 2.11 2.15  these alone

The newest patch of each minor release on pip's index is checked. The headers come from the macOS
wheels, which are by far the smallest (about 100 MB); the headers are the same for every system.
They take 65 MB a release and are kept in the folder PYLORA_TORCH_HEADERS, by default
"torch-headers" in pylora's cache folder (`pylora.settings.cache_folder`). The commands are those
that setup.py compiles with, plus -fsyntax-only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from packaging.version import Version
from setuptools import Distribution

import setup
from pylora import settings

INCLUDE = "torch/include/"
# Wheels of any macOS up to this one are taken. The headers do not depend on Python either: 3.14 is
# the newest that the oldest torch has wheels for, so it is the last that a new torch will drop.
WHEELS = ("--only-binary=:all:", "--platform=macosx_99_0_arm64", "--python-version=3.14")


def run_pip(*arguments: str) -> str:
    # PIP_CONSTRAINT may say what can be installed on this machine. Nothing is installed here.
    environment = os.environ | {"PIP_CONSTRAINT": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    command = [sys.executable, "-m", "pip", *arguments]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    if ran.returncode != 0:
        raise SystemExit(f"`pip {' '.join(arguments)}` failed:\n{ran.stderr.strip()}")
    return ran.stdout


def released() -> list[Version]:
    """Returns every release of torch on pip's index."""
    listed = json.loads(run_pip("index", "versions", "torch", "--json", *WHEELS))
    return [Version(version) for version in listed["versions"]]


def newest_of_each_minor(versions: list[Version], oldest: tuple[int, int]) -> list[Version]:
    """Returns the newest patch of each minor release from `oldest` on, in ascending order."""
    newest: dict[tuple[int, int], Version] = {}
    for version in sorted(versions):
        minor = (version.major, version.minor)
        if minor >= oldest and not version.is_prerelease and version.local is None:
            newest[minor] = version
    if oldest not in newest:
        raise SystemExit("pip's index has no torch {}.{}".format(*oldest))
    return [newest[minor] for minor in sorted(newest)]


def cache_folder() -> Path:
    chosen = os.environ.get("PYLORA_TORCH_HEADERS")
    return Path(chosen).expanduser() if chosen else settings.cache_folder() / "torch-headers"


def headers_of(version: Version) -> Path:
    """Returns the folder torch/include of a release, and downloads it if the cache lacks it."""
    kept = cache_folder() / str(version)
    if not kept.exists():
        print(f"torch {version}: downloading its headers to {kept}", flush=True)
        kept.parent.mkdir(parents=True, exist_ok=True)
        # The wheel is deleted with this folder; the headers are moved out once they are complete.
        with tempfile.TemporaryDirectory(dir=kept.parent, prefix=f".{version}-") as folder:
            run_pip("download", "--no-deps", f"--dest={folder}", *WHEELS, f"torch=={version}")
            (wheel,) = Path(folder).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                members = [name for name in archive.namelist() if name.startswith(INCLUDE)]
                archive.extractall(folder, members)
            # The rename fails if another process was faster; its headers are as good.
            with contextlib.suppress(OSError):
                (Path(folder) / INCLUDE).rename(kept)
            if not kept.exists():
                raise SystemExit(f"the headers of torch {version} could not be moved to {kept}")
    return kept


def torch_facing_files() -> list[Path]:
    files = sorted(path.relative_to(setup.ROOT) for path in setup.ROOT.glob("csrc/**/*.cpp"))
    return [path for path in files if setup.is_torch_facing(path)]


def compile_error(compilation: setup.Compilation, path: Path) -> str | None:
    """Returns what the compiler says about a file, or None if the file compiles."""
    command = compilation.command(path)
    assert command is not None, f"{path} is not part of the build"
    command += ["-fsyntax-only", str(path)]
    ran = subprocess.run(command, cwd=setup.ROOT, capture_output=True, text=True)
    return ran.stderr.strip() if ran.returncode != 0 else None


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.torch_headers")
    parser.add_argument("minor", nargs="*", help="such as 2.11; default: every one")
    minors = parser.parse_args().minor
    compiler = setup.find_compiler()
    if compiler is None:
        raise SystemExit("no C++ compiler was found (tried CXX, c++, g++, clang++)")
    releases = newest_of_each_minor(released(), setup.TORCH_TARGET)
    if minors:
        known = {f"{release.major}.{release.minor}": release for release in releases}
        if unknown := set(minors) - set(known):
            raise SystemExit(f"minor must be among {', '.join(known)}; got {' '.join(unknown)}")
        releases = [known[minor] for minor in minors]

    project = Distribution()
    project.parse_config_files()
    # To parse these files needs the toolkit's headers and no GPU.
    found = setup.Cuda.find("all")
    cuda = found if isinstance(found, setup.Cuda) else None
    compilation = setup.Compilation(compiler, Path(), cuda, project.get_version())
    files = torch_facing_files()
    skipped = [path for path in files if compilation.command(path) is None]
    files = [path for path in files if path not in skipped]
    failures = 0
    for release in releases:
        against = replace(compilation, torch_include=headers_of(release))
        with ThreadPoolExecutor(setup.max_jobs()) as pool:
            errors = list(pool.map(lambda path, c=against: compile_error(c, path), files))
        for path, error in zip(files, errors, strict=True):
            if error is not None:
                failures += 1
                print(f"torch {release}: {path} does not compile:\n{error}")
        print(f"torch {release}: {errors.count(None)} of {len(files)} files compile", flush=True)
    for path in skipped:
        print(f"{path}: not checked: {found}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
