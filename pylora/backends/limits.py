"""Every threshold in tokens of every backend, with its measurement or the word "estimate".

A threshold decides which kernel runs for M, the number of tokens of x or of the gradient. What a
compiled kernel cannot do at all is a hard limit and comes from the extension
(`extension.hard_limits`). This module imports nothing, so kernels and backends alike can read it.
"""

from __future__ import annotations

# cuda: up to this many tokens the call is memory-bound and the small_m kernel runs. Estimate: no
# GPU has run it.
CUDA_SMALL_M = 64
# cuda: the same for GPUs that give a CTA less shared memory than CUDA_LITTLE_SHARED_MEMORY bytes
# (compute capability 8.6, 8.9 and 12.0). For more tokens they would write many partials to memory.
# Estimate.
CUDA_SMALL_M_OF_LITTLE_SHARED_MEMORY = 32
CUDA_LITTLE_SHARED_MEMORY = 128 << 10
# cuda: from this many tokens on the call is compute-bound, and the hopper kernel may run. Estimate.
CUDA_HOPPER_FROM = 128
# cuda: from this many tokens on, writing the decoded weight and reading it again costs less than
# decoding it for each tile of x, so the many_rows variant runs. Estimate.
CUDA_MANY_ROWS_FROM = 513
# triton: the same threshold for its dense product, by the bytes of an element of x. fp32 tiles lose
# more against the vendor's product than 16-bit tiles. Estimate.
TRITON_PRODUCT_FROM = {2: 513, 4: 65}
