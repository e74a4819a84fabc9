"""A Triton kernel that does nothing. It shows what a launch costs the host."""

from __future__ import annotations

import triton


@triton.jit
def empty_kernel(x_ptr):
    return
