"""Every row threshold of every backend, with the measurement behind it or the word "estimate".

A threshold decides which kernel runs for M, the rows of x or of the gradient. What a compiled
kernel cannot do at all is a hard limit and comes from the extension (`extension.hard_limits`). This
module imports nothing, so that kernels and backends alike can read it.
"""

from __future__ import annotations

# cuda: up to this many rows reading the weight takes the time, and the kernel for few rows is used.
# Estimate: no GPU has run it.
CUDA_SMALL_M = 64
# cuda: the same on GPUs that give a CTA less shared memory than CUDA_LITTLE_SHARED_MEMORY bytes
# (compute capability 8.6, 8.9 and 12.0): more rows would need sums of many slices in memory.
# Estimate.
CUDA_SMALL_M_OF_LITTLE_SHARED_MEMORY = 32
CUDA_LITTLE_SHARED_MEMORY = 128 << 10
# cuda: from this many rows on arithmetic takes the time, and the Hopper kernel may run. Estimate.
CUDA_HOPPER_FROM = 128
# cuda: from this many rows on, writing the decoded weight and reading it again costs less than
# decoding it for each tile of x: one dense product. Estimate.
CUDA_MANY_ROWS_FROM = 513
# triton: the same, by the bytes of an element of x; fp32 tiles lose more against the vendor's
# product. Estimate.
TRITON_PRODUCT_FROM = {2: 513, 4: 65}
