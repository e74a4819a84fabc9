"""The keys of the rows of the committed tables, so that only what has changed is compiled again.

A row of a table holds a key: a digest of all that decides its numbers. These are the kernel's
source with what it includes or calls, how it is compiled, the versions of the compilers, and the
code that reads the machine code (READERS). A row with the key of today would be measured to
be what it is. CI_FULL=1 compiles and measures everything all the same.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.gpu.install import load_setup

# The files that turn a compiled kernel into the numbers of a row.
READERS = [Path(__file__).with_name(f"{name}.py") for name in ("cuda", "triton", "sass")]
READERS.append(Path(__file__).with_name("cycle_model.py"))


def everything() -> bool:
    """Returns True if rows with the key of today are measured as well."""
    return os.environ.get("CI_FULL", "") not in ("", "0")


def key_of(words: Iterable[str]) -> str:
    """Returns a digest of the words and of READERS."""
    digest = hashlib.sha256("\0".join(words).encode())
    for path in READERS:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class CudaFiles:
    """The CUDA files, with the toolkit that compiles them for every architecture we ship."""

    def __init__(self) -> None:
        self.setup: ModuleType = load_setup()
        self.toolkit: Any = self.setup.Cuda.find("all")

    @property
    def missing(self) -> str | None:
        """Returns why nothing can be compiled; None if it can."""
        if isinstance(self.toolkit, str):
            return self.toolkit
        return None if self.setup.find_compiler() else "no C++ compiler was found"

    def keys(self) -> dict[str, str]:
        """Returns the keys of the CUDA files by their paths in the repository."""
        setup, folders = self.setup, [self.setup.ROOT / "csrc"]
        words = [*self.toolkit.flags(), setup.tool_version(str(self.toolkit.nvcc))]
        return {
            str(path.relative_to(setup.ROOT)): key_of(
                [setup.content_key(words, path, folders), setup.CUDA_ARCHS]
            )
            for path in setup.cuda_files()
        }

    def objects(self, files: Iterable[str]) -> dict[str, Path]:
        """Returns the compiled object of each file."""
        setup = self.setup
        compilation = setup.Compilation(setup.find_compiler(), Path(), self.toolkit, "")
        made = compilation.cuda_objects(setup.ROOT / file for file in files)
        return {str(path.relative_to(setup.ROOT)): output for path, output in made.items()}
