"""Makes glibc keep the memory that a program frees, for `python -m benchmarks run --keep-heap`.

By default glibc gives a large block back to the system as soon as it is freed. The next call then
gets fresh pages for its results, and Linux clears each of them when it is first touched. That takes
longer than some of the calls that are measured. A program that keeps its memory does not pay it.

glibc reads its settings (mallopt(3)) when a process starts, and so a run starts anew to set them.
This module must not import torch, which would be loaded twice.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence

# What a run says about its heap.
KEPT, DEFAULT = "kept", "default"
NOTE = (
    "heap kept: glibc gives no freed memory back to the system, so that calls reuse the pages of "
    "earlier ones"
)
# The heap grows by this much more than is needed, so that it seldom grows.
_TOP_PAD = 16 << 20  # bytes
# glibc never keeps a freed block of this size by itself: its own threshold ends at 32 MiB, and a
# heap that is trimmed keeps the padding at most.
_PROBE = 64 << 20  # bytes
# Fresh pages behind the padding cause at least 24 faults, even if they are huge ones of 2 MiB.
_FEW_FAULTS = 12


def glibc_version() -> str | None:
    """Returns the C library's name and version, such as "glibc 2.36"; None if it is another."""
    try:
        return os.confstr("CS_GNU_LIBC_VERSION")
    except (AttributeError, OSError, ValueError):
        return None


def settings() -> dict[str, str]:
    """Returns the environment variables with which glibc keeps the memory that is freed.

    No block is mapped on its own, and the top of the heap is never trimmed: both thresholds are the
    bytes of the machine's memory. glibc before 2.35 ignores a threshold above 32 MiB, and so the
    number of mapped blocks is limited to zero too.
    """
    memory = str(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return {
        "MALLOC_MMAP_THRESHOLD_": memory,
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": memory,
        "MALLOC_TOP_PAD_": str(_TOP_PAD),
    }


def is_kept() -> bool:
    """Returns True if glibc keeps freed memory in this process. It is measured: a large block is
    filled, freed and filled again, which causes page faults if its pages are fresh."""
    if glibc_version() is None:
        return False
    import resource

    libc = ctypes.CDLL(None)
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes, libc.free.restype = [ctypes.c_void_p], None
    faults = 0
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        block = libc.malloc(_PROBE)
        if not block:
            raise MemoryError(f"malloc has no {_PROBE} bytes")
        ctypes.memset(block, 1, _PROBE)
        libc.free(block)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return faults < _FEW_FAULTS


def state() -> str:
    """Returns KEPT or DEFAULT, as a run records it."""
    return KEPT if is_kept() else DEFAULT


def keep(words: Sequence[str]) -> None:
    """Returns if this process keeps its heap. Otherwise starts `python -m benchmarks` anew in its
    place, with the same words and with glibc's settings, and does not return.

    Raises ValueError if the C library is not glibc, or if the settings have no effect.
    """
    version = glibc_version()
    if version is None:
        raise ValueError(
            "--keep-heap is set, but the C library is not glibc; it must be glibc, whose settings "
            "keep the heap"
        )
    if is_kept():
        return
    if settings().items() <= os.environ.items():
        raise ValueError(
            f"--keep-heap is set, but the settings have no effect on {version}; unset "
            "GLIBC_TUNABLES and LD_PRELOAD, which may replace them"
        )
    sys.stdout.flush()
    command = [sys.executable, "-m", "benchmarks", *words]
    os.execve(sys.executable, command, {**os.environ, **settings()})


def default_environment() -> dict[str, str]:
    """Returns the environment of this process without the settings, for a process whose memory is
    measured: a heap that keeps its memory hides how much of it a call needs."""
    return {name: value for name, value in os.environ.items() if name not in settings()}
