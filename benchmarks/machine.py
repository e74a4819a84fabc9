"""Facts about the machine, the versions and the commit of a run."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks import heap

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "pylora-kernels",
    "bitsandbytes",
    "peft",
    "transformers",
    "torchao",
)
# The CPU features that decide which kernel runs.
_FLAGS = ("avx2", "fma", "f16c", "avx512", "avx_vnni", "amx", "asimd", "sve", "bf16", "i8mm")
_UNKNOWN_CACHE = 64 << 20


@lru_cache(maxsize=1)
def cache_bytes() -> dict[str, int]:
    """Returns the bytes of the data caches by level, such as {"L3": 33554432}. Caches of the same
    level that this process can use are added up."""
    instances: dict[tuple[str, str], int] = {}
    for cpu in usable_cpus():
        for index in Path(f"/sys/devices/system/cpu/cpu{cpu}/cache").glob("index*"):
            try:
                facts = {n: (index / n).read_text().strip() for n in ("level", "type", "size")}
                shared = (index / "shared_cpu_list").read_text().strip()
            except OSError:
                continue
            if facts["type"] != "Instruction":
                size = int(facts["size"].rstrip("K")) << 10
                instances["L" + facts["level"], shared] = size
    totals: dict[str, int] = {}
    for (level, _), size in sorted(instances.items()):
        totals[level] = totals.get(level, 0) + size
    return totals


def last_level_cache(device: torch.device) -> int:
    """Returns the bytes of the last cache before memory, or 64 MiB if they are unknown."""
    if device.type == "cuda":
        return cuda_l2_bytes()
    caches = cache_bytes()
    return caches[max(caches)] if caches else _UNKNOWN_CACHE


def memory_bytes(device: torch.device) -> int:
    """Returns the bytes of the memory in which the tensors of a device lie."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cuda_l2_bytes() -> int:
    return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size


def usable_cpus() -> list[int]:
    """Returns the numbers of the CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _cpu_facts() -> tuple[str, list[str]]:
    """Returns (model name, those flags of the CPU that begin with one of _FLAGS)."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine(), []
    fields: dict[str, str] = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    flags = fields.get("flags", fields.get("Features", "")).split()
    return (
        fields.get("model name", platform.machine()),
        sorted(flag for flag in flags if flag.startswith(_FLAGS)),
    )


def machine(device: torch.device) -> dict[str, Any]:
    """Returns the facts about this machine that a run records."""
    name, flags = _cpu_facts()
    facts: dict[str, Any] = {
        "device": device.type,
        "cpu": name,
        "cores": len(usable_cpus()),
        "threads": torch.get_num_threads(),
        "caches": cache_bytes(),
        "flags": flags,
        "os": platform.platform(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "heap": heap.state(),
        "gpu": None,
        "driver": None,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["caches"] = {**cache_bytes(), "GPU L2": cuda_l2_bytes()}
        facts["gpu"] = f"{properties.name}, {properties.total_memory >> 30} GiB"
        facts["driver"] = _output(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        )
    return facts


def versions() -> dict[str, str]:
    """Returns the versions of Python, CUDA and those of PACKAGES that are installed."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    return versions


def commit() -> dict[str, Any] | None:
    """Returns {"hash", "dirty"} of the checkout that this runs from, or None if it is not known.

    A copy without git gets it from PYLORA_COMMIT, in the form that `git describe --always
    --abbrev=40 --dirty --exclude '*'` prints: "-dirty" at the end says that files differ from the
    commit.
    """
    described = os.environ.get("PYLORA_COMMIT")
    if described:
        return {"hash": described.removesuffix("-dirty"), "dirty": described.endswith("-dirty")}
    revision = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    if not revision:
        return None
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain")
    return {"hash": revision, "dirty": bool(changed)}


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _output(*command: str) -> str | None:
    """Returns what a command prints, or None if it cannot be run or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
