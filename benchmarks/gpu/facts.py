"""Prints what the machine is as one line of JSON: the GPU, the versions, the commit, the packages.

It runs in a process of its own, because it imports torch and touches the GPU. The process that
watches the steps must do neither.
"""

from __future__ import annotations

import json
import sys
from importlib import metadata
from typing import Any

import torch

from benchmarks import machine

# The Hopper kernels use instructions that a compiler accepts only for "90a".
_ARCHS = {(9, 0): "90a"}


def facts() -> dict[str, Any]:
    has_gpu = torch.cuda.is_available()
    capability = torch.cuda.get_device_capability() if has_gpu else (0, 0)
    return {
        "gpu": torch.cuda.get_device_name() if has_gpu else None,
        "arch": _ARCHS.get(capability, "{}{}".format(*capability)) if has_gpu else "",
        "cores": len(machine.usable_cpus()),
        "python": sys.executable,
        "versions": machine.versions(),
        "commit": machine.commit(),
        "packages": sorted({package.metadata["Name"] for package in metadata.distributions()}),
    }


if __name__ == "__main__":
    print(json.dumps(facts()))
