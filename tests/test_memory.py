"""Memory of training one layer: no dequantized copy of the weight, nothing kept between steps.

The peak resident size is measured in a separate process. Linux resets it on request.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pylora.backends import extension

SCRIPT = """
import json, sys
import torch, pylora, pylora.functional as F

OUT, IN, TOKENS, RANK = 4096, 4096, 256, 16

def peak_kib():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])

def reset_peak():
    open("/proc/self/clear_refs", "w").write("5")

torch.set_num_threads(2)
w = pylora.quantize_nf4(torch.randn(OUT, IN), double_quant=True)
A = torch.randn(RANK, IN).requires_grad_()
B = torch.randn(OUT, RANK).requires_grad_()

def step(tokens):
    x = torch.randn(tokens, IN, dtype=torch.bfloat16).requires_grad_()
    grad = torch.randn(tokens, OUT, dtype=torch.bfloat16)
    reset_peak()
    before = peak_kib()
    y = F.lora_linear(x, w, A, B, 0.5, dropout_p=float(sys.argv[2]))
    y.backward(grad)
    return (peak_kib() - before) * 1024

with pylora.use_backend(sys.argv[1]):
    step(TOKENS)  # the first call also loads pages of libraries, which stay
    used = min(step(TOKENS) for _ in range(3))
small = 4 * (A.numel() + B.numel()) + TOKENS * RANK * 4
print(json.dumps({
    "used": used,
    "y_and_dx": 2 * TOKENS * (OUT + IN),
    "small": small,
    "dense": 2 * OUT * IN,
}))
"""


def measure(backend: str, dropout_p: float) -> dict[str, int]:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak resident size can be reset only on Linux")
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, backend, str(dropout_p)],
        env={**os.environ, "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    numbers: dict[str, int] = json.loads(result.stdout)
    return numbers


def test_training_step_of_the_cpu_kernels_keeps_no_dense_weight() -> None:
    """Beside x and grad, a step needs y, dx, the small factors and 2 MiB for each thread."""
    if extension.load()[0] is None:
        pytest.skip("the extension is not built")
    n = measure("cpu", 0.1)
    assert n["used"] <= n["y_and_dx"] + 3 * n["small"] + 2 * 2 * 2**20, n


def test_training_step_of_the_reference_keeps_no_dense_weight() -> None:
    """The reference needs more than the kernels, but less than a dense bf16 weight."""
    n = measure("reference", 0.0)
    assert n["used"] - n["y_and_dx"] - 3 * n["small"] <= n["dense"], n


STEPS = """
import torch, pylora, pylora.functional as F

def resident():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1]) << 10

w = pylora.quantize_nf4(torch.randn(64, 64))
A, B = torch.randn(4, 64, requires_grad=True), torch.randn(64, 4, requires_grad=True)
x = torch.randn(2, 64, requires_grad=True)

def steps(count):
    for _ in range(count):
        torch.autograd.grad(F.lora_linear(x, w, A, B, 0.5).sum(), (x, A, B))

steps(2000)
before = resident()
steps(10000)
print((resident() - before) / 10000)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident size comes from /proc")
def test_steps_keep_no_memory() -> None:
    """A string that leaked in each forward and backward would be 96 bytes a step."""
    result = subprocess.run(
        [sys.executable, "-c", STEPS], capture_output=True, text=True, check=True
    )
    assert float(result.stdout) < 64  # bytes kept in each step
