"""The rules that choose tile shapes, splits and the regime of each kernel.

The linear layers have three regimes, chosen by M, the number of tokens:
  small     fused tiles; K is split so that every multiprocessor has work; memory-bound
  middle    fused tiles; K is not split
  large     the weight is dequantized into a buffer, then multiplied by one dense product

`block_m`, `block_n` and so on are the sizes of a tile, named as Triton's users name them; they have
nothing to do with NF4 blocks. Every threshold here is an estimate from arithmetic and from the
machine code: none has been measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pylora.backends.limits import TRITON_MAX_BOTTLENECK, TRITON_PRODUCT_FROM
from pylora.kernels.launch import Facts


@dataclass(frozen=True)
class DequantizeConfig:
    """One program decodes `elements` elements, or one NF4 block if blocks are larger than that."""

    elements: int
    num_warps: int


@dataclass(frozen=True)
class TileConfig:
    """One program computes a tile of block_m x block_n of the output, summing block_k at a time."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class TilePlan:
    """A tile shape, and how the sum is split.

    splits       how many programs share the sum of one tile; each leaves a partial
    per_split    the length of the sum of each program, a multiple of the tile's block_k
    """

    tile: TileConfig
    splits: int
    per_split: int


@dataclass(frozen=True)
class ShrinkConfig:
    """One program computes block_m x block_r of a projection, summing block_k at a time."""

    block_m: int
    block_r: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class PointwiseConfig:
    """One program computes block_m x block_r of an element-wise result."""

    block_m: int
    block_r: int


@dataclass(frozen=True)
class ExpandConfig:
    """One program adds to block_m x block_q of an output that has been computed before."""

    block_m: int
    block_q: int
    num_warps: int


@dataclass(frozen=True)
class AdapterTokensConfig:
    """One program sorts block_m tokens by adapter, comparing them with block_j others at a time."""

    block_m: int
    block_j: int
    # Up to this many tokens, comparing each with each costs less than a sort of several launches.
    most_counted: int


DEQUANTIZE = DequantizeConfig(elements=4096, num_warps=4)
EXPAND = ExpandConfig(block_m=32, block_q=64, num_warps=4)
HIDDEN = PointwiseConfig(block_m=32, block_r=16)
# Estimate: 8192^2 comparisons take a whole GPU some 10 us.
ADAPTER_TOKENS = AdapterTokensConfig(block_m=32, block_j=128, most_counted=8192)
SUM_OF_PARTIALS = DequantizeConfig(elements=1024, num_warps=4)


def is_large(M: int, itemsize: int) -> bool:
    """True if a dense product is faster than fused tiles for M tokens.

    itemsize    bytes of an element of x
    """
    return M >= TRITON_PRODUCT_FROM[itemsize]


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def _split(
    length: int, step: int, tiles: int, facts: Facts, per_multiprocessor: int, least: int
) -> tuple[int, int]:
    """(splits, per_split) such that tiles * splits programs fill the device.

    length              the length of the sum
    step                the number that per_split is a multiple of
    tiles               the number of tiles of the output
    per_multiprocessor  programs that a multiprocessor should have
    least               the shortest sum that is worth a program of its own
    """
    wanted = max(1, per_multiprocessor * facts.multiprocessors // max(tiles, 1))
    steps = max(1, cdiv(length, step))
    splits = max(1, min(wanted, cdiv(length, least), steps))
    per_split = cdiv(steps, splits) * step
    return max(1, cdiv(length, per_split)), per_split


def _programs(M: int) -> int:
    """The number of programs that a multiprocessor should have.

    Estimate: two programs keep its memory pipes full. Larger tiles are bound by the matrix units,
    so one program fills a multiprocessor, and each split would cost another [M, N] of partials.
    """
    return 2 if M <= 64 else 1


def forward_plan(
    M: int, Ns: Sequence[int], K: int, itemsize: int, blocksize: int, facts: Facts
) -> TilePlan:
    """The plan of linear_tiles: y [M, N] = x [M, K] @ W^T for each N in Ns.

    The weight is the operand held in registers. blocksize is 0 for dense weights.
    """
    # A step of K never crosses an NF4 block, so it needs one absmax value.
    block_k = min(64 if itemsize == 2 else 32, blocksize or 64)
    # Estimate: tiles of 128 rows of W need a sixth fewer instructions per weight than tiles of 64,
    # but there are half as many of them, so the sums of narrow layers would be split further.
    block_n = 128 if sum(Ns) >= 4096 else 64
    if itemsize == 4:
        tile = TileConfig(16 if M <= 16 else 64, 64, block_k, 4, 3)
    elif M <= 16:
        # A stage loads 16 or 32 bytes of codes per thread. A multiprocessor needs some 24 KiB in
        # flight to hide the latency of memory, hence six stages.
        tile = TileConfig(16, block_n, block_k, 4, 6)
    elif M <= 32:
        tile = TileConfig(32, block_n, block_k, 4, 4)
    elif M <= 64:
        tile = TileConfig(64, block_n, block_k, 4, 3)
    elif M <= 128 or block_k < 64:
        # Shorter steps leave too few registers for an epilogue on a larger tile.
        tile = TileConfig(64, 128, block_k, 8, 3)
    else:
        tile = TileConfig(128, 128, block_k, 8, 3)
    tiles = cdiv(M, tile.block_m) * sum(cdiv(N, tile.block_n) for N in Ns)
    return TilePlan(tile, *_split(K, block_k, tiles, facts, _programs(M), 512))


def backward_plan(
    M: int, Ns: Sequence[int], K: int, itemsize: int, blocksize: int, facts: Facts
) -> TilePlan:
    """The plan of linear_tiles_backward: dx [M, K] = the sum of grad [M, N] @ W over the Ns.

    block_n is the width of a tile of dx, and block_k the step over N. blocksize is 0 for dense
    weights.
    """
    if itemsize == 4:
        tile = TileConfig(32, 64, 32, 4, 3)
    elif M <= 16:
        tile = TileConfig(16, 64, 64, 4, 4)
    elif M <= 64 or blocksize == 32:
        # Blocks of 32 have twice as many absmax values: too few registers remain for larger tiles.
        tile = TileConfig(64, 64, 64, 4, 3)
    elif facts.capability < 90:
        # Here the accumulators are fragments of mma.sync, and the mask needs registers as well.
        tile = TileConfig(64, 128, 64, 8, 3)
    else:
        tile = TileConfig(128, 128, 64, 8, 3)
    tiles = cdiv(M, tile.block_m) * cdiv(K, tile.block_n)
    length = length_of(Ns, tile)
    return TilePlan(tile, *_split(length, tile.block_k, tiles, facts, _programs(M), 512))


def length_of(Ns: Sequence[int], tile: TileConfig) -> int:
    """The length of a backward sum over several weights, which lie one behind the other.

    Each weight's N is rounded up to whole steps.
    """
    return sum(cdiv(N, tile.block_k) for N in Ns) * tile.block_k


def _few_tokens_each(M: int, adapters: int) -> bool:
    """True if tiles of 16 tokens fit the adapters better than larger ones.

    Estimate: they do if an adapter has up to 16 tokens on average.
    """
    return M <= 16 * adapters


def multi_expand_tile(M: int, adapters: int, rank: int) -> TileConfig:
    """The tile [block_m, block_n] of multi_lora_expand; block_k is the step over the rank."""
    block_m, num_warps = (16, 4) if _few_tokens_each(M, adapters) else (32, 8)
    return TileConfig(block_m, 64, _block_r(rank, 32), num_warps, 2)


def _block_r(rank: int, most: int) -> int:
    return min(most, max(16, 1 << (rank - 1).bit_length()))


def shrink_config(
    M: int,
    K: int,
    rank: int,
    fp32: bool,
    facts: Facts,
    adapters: int = 1,
    factors: int = 1,
    widest: int = 64,
) -> tuple[ShrinkConfig, int, int]:
    """(config, splits of K, per_split) of projections of [M, K] to [M, R], R <= rank.

    If there are several adapters, the splits suit the worst case: one adapter has all the tokens.
    A program computes the projections on several factors at once, at most `widest` ranks of each.
    """
    block_m = 16 if _few_tokens_each(M, adapters) else 64
    # The sums of all factors and one more product must fit into the registers.
    block_r, block_k, stages, most = _block_r(rank, widest), 64, 4, 8192
    if fp32:
        block_r, block_k, stages, most = _block_r(rank, 32), 32, 2, 4096
    config = ShrinkConfig(block_m, block_r, block_k, 4, stages)
    if block_m * block_r * factors > most:
        config = replace(config, num_warps=8)
    tiles = cdiv(M, block_m) * cdiv(rank, config.block_r)
    return config, *_split(K, config.block_k, tiles, facts, 2, 256)


def gated_shrink_config(
    M: int, K: int, rank: int, fp32: bool, facts: Facts
) -> tuple[ShrinkConfig, int, int]:
    """`shrink_config` for gated_shrink, which makes its inputs itself and needs more registers."""
    config, splits, per_split = shrink_config(M, K, rank, fp32, facts, widest=32)
    return replace(config, num_warps=8), splits, per_split


def weight_grad_config(
    M: int, columns: int, rank: int, fp32: bool, facts: Facts, factors: int = 1
) -> tuple[ShrinkConfig, int, int]:
    """(config, splits of M, per_split) of sums over M to [columns, R], R <= rank.

    block_m is the width of a tile of columns, and block_k the step over M. A program computes the
    gradients of several factors at once.
    """
    # Four warps have too few registers for the sums of three factors and one more product.
    num_warps = 8 if factors > 2 else 4
    config = ShrinkConfig(64, _block_r(rank, 64), 64, num_warps, 2 if factors > 2 else 3)
    if fp32:
        # A product in fp32 arithmetic has all of a row of a tile in registers.
        config = ShrinkConfig(64, _block_r(rank, 32), 32, 8, 3)
    tiles = cdiv(columns, config.block_m) * cdiv(rank, config.block_r)
    return config, *_split(M, config.block_k, tiles, facts, 2, 256)


def bottleneck_tile(
    M: int, bottleneck: int, fp32: bool, facts: Facts, narrow: bool = False
) -> ShrinkConfig:
    """The tile of bottleneck_adapter: block_m tokens with the whole bottleneck, block_k of hidden.

    Each program reads both weights, so tiles are as tall as they can be while every multiprocessor
    has one. The backward has two sums of block_m x block_r in registers.

    narrow    True if norms and dropout need registers as well
    """
    block_r = _block_r(bottleneck, TRITON_MAX_BOTTLENECK)
    tallest, stages = 64, 3
    if block_r > 64:
        tallest = 16 if fp32 else 32
    if narrow and fp32:
        # A product in fp32 arithmetic has all of block_r in registers for each of its rows.
        tallest, stages = min(tallest, 32), 2
    sizes = (size for size in (16, 32, 64) if cdiv(M, size) <= facts.multiprocessors)
    block_m = min(next(sizes, tallest), tallest)
    # Three stages of a tile of x and one of the factor take up to 64 KiB of shared memory.
    fit = (64 << 10) // (3 * (4 if fp32 else 2) * (block_m + block_r))
    block_k = min(128, 1 << fit.bit_length() - 1)
    if narrow:
        block_k = min(block_k // 2, 32 if fp32 else 64)
    block_k = max(16, block_k)
    num_warps = 8 if block_m * block_r > 2048 else 4
    return ShrinkConfig(block_m, block_r, block_k, num_warps, stages)
