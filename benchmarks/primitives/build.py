"""Compiles the programs in cuda/, each into a file that needs neither torch nor this Python."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from benchmarks.machine import ROOT
from pylora.files import replacing

SOURCES = Path(__file__).parent / "cuda"
FOLDER = ROOT / "build" / "primitives"
# The toolkit is looked for here if neither CUDA_HOME nor PATH leads to it.
_USUAL_HOME = Path("/usr/local/cuda")
_SECONDS = 300


class BuildError(RuntimeError):
    """A program could not be compiled. The message has its name and the compiler's first error."""


@dataclass(frozen=True)
class Target:
    """A program to run, or a library for ctypes.

    name     the .cu file in cuda/ has this name
    sources  other files that are compiled with it
    """

    name: str
    sources: tuple[Path, ...] = ()
    library: bool = False


TENSOR_MAP = ROOT / "csrc" / "cuda" / "hopper" / "tensor_map.cu"
PROGRAMS = {
    target.name: target
    for target in (
        Target("shared_memory"),
        Target("tensor_cores"),
        Target("arithmetic"),
        Target("l2_copies"),
        Target("dram", (TENSOR_MAP,)),
        Target("launches"),
    )
}
EMPTY_LAUNCH = Target("empty_launch", library=True)


def find_nvcc() -> Path | None:
    """Returns nvcc from CUDA_HOME, from PATH or from its usual folder, or None."""
    home = os.environ.get("CUDA_HOME")
    places = [f"{home}/bin"] if home else []
    places += [os.environ.get("PATH", ""), str(_USUAL_HOME / "bin")]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(places))
    return Path(nvcc) if nvcc else None


def command(nvcc: Path, target: Target, arch: str, output: Path, *flags: str) -> list[str]:
    """Returns the command that compiles a target. With the flag -cubin it makes a cubin."""
    shape = ["-shared", "-Xcompiler", "-fPIC"] if target.library else []
    include = [f"-I{ROOT / 'csrc'}", f"-I{SOURCES}"]
    sources = [SOURCES / f"{target.name}.cu"]
    if "-cubin" not in flags:
        sources += target.sources
    options = ["-std=c++20", "-O3", f"-arch=sm_{arch}", *shape, *flags, *include]
    return [str(part) for part in (nvcc, *options, "-o", output, *sources)]


def built(target: Target, arch: str, folder: Path = FOLDER) -> Path:
    """Returns the compiled program. It is compiled only if `folder` has none from the same sources,
    which may also have been compiled on another machine.

    Raises BuildError if there is no compiler, or if it fails.
    """
    suffix = ".so" if target.library else ""
    output = folder / f"{target.name}-sm_{arch}-{_source_digest()}{suffix}"
    if output.exists():
        return output
    nvcc = find_nvcc()
    if nvcc is None:
        raise BuildError(f"{target.name}: there is no nvcc, and no {output.name} in {folder}")
    with replacing(output) as temporary:
        try:
            done = subprocess.run(
                command(nvcc, target, arch, temporary),
                capture_output=True,
                text=True,
                timeout=_SECONDS,
            )
        except subprocess.TimeoutExpired as error:
            raise BuildError(f"{target.name}: nvcc took over {_SECONDS} s") from error
        if done.returncode != 0:
            lines = (done.stderr + done.stdout).splitlines()
            errors = [line for line in lines if "error" in line or "fatal" in line] or lines[-1:]
            raise BuildError(f"{target.name}: nvcc failed: {errors[0] if errors else ''}")
    return output


def _source_digest() -> str:
    """Returns a digest of every file that the programs may include. It is part of the name of a
    compiled program, so that a program from older sources is not taken for a current one."""
    digest = hashlib.sha256()
    folders = (SOURCES, ROOT / "csrc" / "cuda", ROOT / "csrc" / "common")
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    for path in sorted(files):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]
