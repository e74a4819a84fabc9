"""Installs pylora into the Python that runs this, and compiles only if it must.

    python -m benchmarks.gpu.install [--arch 90a]

1. If the pylora that is installed has an extension from these sources for this GPU, it is kept.
2. Otherwise, if pylora/ has such an extension (_C*.so) that was carried here, it is used.
3. Otherwise the extension is compiled.

What was done is printed, with the reason why the steps before it were not enough. Nothing is
downloaded, so no network is needed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.gpu.steps import ROOT

# From this version on, setuptools understands the license in pyproject.toml.
MIN_SETUPTOOLS = 77

_INSTALLED = """
import json, pylora, pylora.kernels
from pylora import _C
print(json.dumps({"package": pylora.__file__, **_C.build_info()}))
"""
# This loads the extension alone, since the package may not be installed yet.
_ALONE = """
import importlib.util, json, sys, torch
spec = importlib.util.spec_from_file_location("pylora._C", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(json.dumps(module.build_info()))
"""


def find_cuda_home() -> Path | None:
    """Returns the newest CUDA toolkit in /usr/local, or None. It is for a machine that has neither
    nvcc on PATH nor CUDA_HOME."""
    homes = [path.parent.parent for path in Path("/usr/local").glob("cuda*/bin/nvcc")]

    def version(home: Path) -> list[int]:
        digits = "".join(c if c.isdigit() else " " for c in home.resolve().name)
        return [int(word) for word in digits.split()]

    return max(homes, key=version, default=None)


def build_info(code: str, *arguments: str) -> dict[str, Any] | str:
    """Runs `code` in another Python and returns the build info that it prints. If the extension
    could not be loaded, returns the reason."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | {"PYTHONSAFEPATH": "1", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        return (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
    return json.loads(done.stdout.splitlines()[-1])


def why_not(info: dict[str, Any] | str, arch: str | None) -> str | None:
    """Returns why an extension cannot be used, or None if it is made from these sources for this
    GPU. Without `arch`, in a dry run, it may be built for any GPU or for none.
    """
    if isinstance(info, str):
        return info
    if info.get("sources") != source_digest():
        return "it was compiled from other sources"
    built = [name.removesuffix("+PTX") for name in info["cuda_archs"]]
    if arch is not None and arch not in built:
        return f"it was built for {', '.join(built) or 'the CPU alone'}, and {arch} is wanted"
    return None


def load_setup() -> ModuleType:
    """Returns setup.py as a module. It is a script that is not on the import path, so it is loaded
    from its file."""
    spec = importlib.util.spec_from_file_location("pylora_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module here
    spec.loader.exec_module(module)
    return module


def source_digest() -> str:
    """Returns the digest that setup.py computes of the sources and flags of the extension."""
    return load_setup().source_digest()


def carried(arch: str | None) -> Path | None:
    """Returns a compiled extension in pylora/ that can be used, or None. For each that cannot be
    used it prints the reason."""
    for path in sorted((ROOT / "pylora").glob("_C*.so")):
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        reason: str | None = f"it is not for this Python, which loads _C{suffix}"
        if path.name == f"_C{suffix}":
            reason = why_not(build_info(_ALONE, str(path)), arch)
        if reason is None:
            return path
        print(f"pylora/{path.name} is not reused: {reason}")
    return None


def command() -> list[str]:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-v"]
    return [*pip, "--no-index", "--no-deps", "--no-build-isolation", "--editable", str(ROOT)]


def install(arch: str | None, extension: Path | None) -> int:
    """Installs with pip, which compiles unless an extension is given. Returns pip's exit code."""
    installed = metadata.version("setuptools")
    if int(installed.split(".")[0]) < MIN_SETUPTOOLS:
        print(f"setuptools is {installed}; it must be {MIN_SETUPTOOLS} or later")
        return 1
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    if extension is not None:
        environment["PYLORA_EXTENSION"] = str(extension)
    elif arch is not None:
        environment["PYLORA_CUDA_ARCHS"] = arch
    print(f"$ {shlex.join(command())}", flush=True)
    return subprocess.run(command(), env=environment).returncode


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.install")
    parser.add_argument(
        "--arch", help="the architecture of the GPU, such as 90a; default: any, or none"
    )
    arch = parser.parse_args().arch
    info = build_info(_INSTALLED)
    reason = why_not(info, arch)
    if reason is None:
        assert isinstance(info, dict)
        if Path(info["package"]).resolve().parent == ROOT / "pylora":
            print(f"command to install: {shlex.join(command())}")
            print(f"kept the installed extension: {describe(info)}")
            return 0
        reason = f"it lies in {Path(info['package']).parent}"
    print(f"the installed pylora is not kept: {reason}")
    extension = carried(arch)
    code = install(arch, extension)
    if code != 0:
        return code
    info = build_info(_INSTALLED)
    reason = why_not(info, arch)
    if reason is not None:
        print(f"what was installed cannot be used: {reason}")
        return 1
    assert isinstance(info, dict)
    done = f"reused pylora/{extension.name}" if extension is not None else "compiled"
    print(f"{done}: {describe(info)}")
    return 0


def describe(info: dict[str, Any]) -> str:
    return f"for {', '.join(info['cuda_archs']) or 'the CPU alone'}, {info['compiler']}"


if __name__ == "__main__":
    sys.exit(main())
