"""Every threshold in tokens of every backend, with its measurement or the word "estimate".

A threshold decides which kernel runs for M, the number of tokens of x or of the gradient. What a
compiled kernel cannot do at all is a hard limit and comes from the extension
(`extension.hard_limits`). This module imports nothing, so kernels and backends alike can read it.
"""

from __future__ import annotations

# cpu: with at least so many tokens, and so many multiplications of the base, torch multiplies
# decoded panels faster on AMX than our tiles multiply what they decode. On a Sapphire Rapids with 2
# threads a forward and backward with LoRA of [4096, 4096] takes 67 ms at 512 tokens by tiles and 64
# by panels, at 2048 tokens 271 and 217; [576, 576] takes 3.1 and 3.9 at 1024, 9.6 and 8.0 at 2048.
CPU_AMX_PRODUCTS_FROM = 1024
CPU_AMX_PRODUCTS_WORK = 2**29

# cpu: the kernel of a bottleneck adapter packs its weights in each call. Up to this many tokens,
# and from this many elements of a weight on, by the bytes of an element, torch's products take less
# time. On the same machine a forward takes, by the kernel and in torch: [64, 4096] in fp32 0.38 ms
# and 0.22 at 1 token, 1.06 and 0.84 at 64, 1.09 and 1.06 at 128; [256, 4096] in bf16 0.80 and 0.69
# at 1 token, 1.05 and 0.85 at 64; [64, 4096] in bf16 0.36 and 0.43 at 16.
CPU_ADAPTER_PRODUCTS_TO = 64
CPU_ADAPTER_PRODUCTS_SIZE = {2: 2**20, 4: 2**18}
# cpu: in fp32 with AVX-512 torch's products are faster for any number of tokens if the bottleneck
# is so wide. Forward and backward of 512 tokens took, by the kernel and in torch: [64, 4096] 4.1 +
# 9.6 ms and 5.4 + 11.7, [128, 4096] 7.2 + 17.5 and 7.0 + 16.3, [256, 4096] 14.1 + 33.8 and 12.2 +
# 28.3.
CPU_ADAPTER_PRODUCTS_FROM = 128

# The measurements below are those of an H100 (benchmarks/results/h100-sxm/sweep.json) in
# microseconds, for a weight [out_features, in_features]. Other GPUs have not been measured.
#
# cuda: up to this many tokens the small_m kernel runs, to which up to 8 tokens cost about the same:
# [4096, 4096] takes 18.7 at 4 tokens and 28.5 at 16, and the hopper kernel 24.6 at 32. The Triton
# kernels take 17.3, but their launches cost the host more than the GPU saves unless a CUDA graph
# holds them.
CUDA_SMALL_M = 8
# cuda: from this many tokens on the hopper kernel runs, on GPUs that have it.
CUDA_HOPPER_FROM = 9
# cuda: from this many tokens on the many_rows variant is as fast as the hopper kernel or faster. At
# 8192 tokens both take 431 for [4096, 4096]; for [14336, 4096] it takes 1362 and the kernel 1469.
CUDA_HOPPER_TO = 8192
# cuda: from this many tokens on, writing the decoded weight and reading it again costs less than
# decoding it for each tile of x, so the many_rows variant runs if the hopper kernel cannot.
# [14336, 4096] takes 127 at 256 tokens, and Triton's tiles take 162; at 128 it is 117 against 79.
CUDA_MANY_ROWS_FROM = 256
# cuda: the same for a backward, whose tiles exist in Triton alone. Up to 255 tokens they are faster
# on the GPU, but their six launches cost the host 1.5 ms, and the products of torch 0.1 ms.
CUDA_BACKWARD_PRODUCT_FROM = 9
# triton: the same threshold for its dense product, by the bytes of an element of x. That of fp32 is
# an estimate: fp32 tiles lose more against the vendor's product than 16-bit tiles.
TRITON_PRODUCT_FROM = {2: 256, 4: 65}
# triton: the widest bottleneck of an adapter, whose sums a program holds in registers. It is an
# estimate of what fits.
TRITON_MAX_BOTTLENECK = 256
