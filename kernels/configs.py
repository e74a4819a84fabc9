"""Which tile shapes, splits and regime a kernel runs with: one rule per op.

Three regimes of the linear layers, by M, the rows of x:
  small     fused tiles, K split so that every multiprocessor has work; memory-bound
  middle    fused tiles, K whole
  large     the weight dequantized into a buffer, then one dense matrix product

Every threshold here is an estimate, from arithmetic and from the machine code: none has been
measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pylora.backends.limits import TRITON_PRODUCT_FROM
from pylora.kernels.launch import Facts


@dataclass(frozen=True)
class DequantizeConfig:
    """One program decodes this many elements, or one block where blocks are larger."""

    elements: int
    num_warps: int


@dataclass(frozen=True)
class TileConfig:
    """One program computes block_m x block_n of the output, block_k of the sum at a time."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class TilePlan:
    """A tile shape, and how often the sum is split; `per_split` is a multiple of its step."""

    tile: TileConfig
    splits: int
    per_split: int


@dataclass(frozen=True)
class ShrinkConfig:
    """One program computes block_m x block_r of a projection, block_k of the sum at a time."""

    block_m: int
    block_r: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class PointwiseConfig:
    block_m: int
    block_r: int


@dataclass(frozen=True)
class ExpandConfig:
    """One program adds to block_m x block_q of an output that is there already."""

    block_m: int
    block_q: int
    num_warps: int


@dataclass(frozen=True)
class AdapterRowsConfig:
    """One program places block_m rows, comparing block_j others at a time."""

    block_m: int
    block_j: int
    # Comparing each row with each costs less than a sort of several launches up to here.
    most_counted: int


DEQUANTIZE = DequantizeConfig(elements=4096, num_warps=4)
EXPAND = ExpandConfig(block_m=32, block_q=64, num_warps=4)
HIDDEN = PointwiseConfig(block_m=32, block_r=16)
# estimate: 8192^2 comparisons are some 10 us of a whole GPU's arithmetic.
ADAPTER_ROWS = AdapterRowsConfig(block_m=32, block_j=128, most_counted=8192)
SUM_OF_PIECES = DequantizeConfig(elements=1024, num_warps=4)


def is_large(M: int, itemsize: int) -> bool:
    """True if M rows of elements of this size are better off with a dense matrix product."""
    return M >= TRITON_PRODUCT_FROM[itemsize]


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _split(
    length: int, step: int, tiles: int, facts: Facts, per_multiprocessor: int, least: int
) -> tuple[int, int]:
    """(splits, length of each) so that tiles * splits fill the device, none below `least`."""
    wanted = max(1, per_multiprocessor * facts.multiprocessors // max(tiles, 1))
    steps = max(1, cdiv(length, step))
    splits = max(1, min(wanted, cdiv(length, least), steps))
    per_split = cdiv(steps, splits) * step
    return max(1, cdiv(length, per_split)), per_split


def _programs(M: int) -> int:
    """Programs that a multiprocessor should have.

    estimate: two keep its memory pipes full; larger tiles are bound by the matrix units, fill a
    multiprocessor alone, and would pay for a split with a workspace of M rows each.
    """
    return 2 if M <= 64 else 1


def forward_plan(
    M: int, Ns: Sequence[int], K: int, itemsize: int, blocksize: int, facts: Facts
) -> TilePlan:
    """Tiles of y = x @ W^T for weights of Ns rows; the weight is the operand held in registers.
    blocksize 0: dense."""
    # A step of K never crosses a block, so that one absmax serves it.
    block_k = min(64 if itemsize == 2 else 32, blocksize or 64)
    # estimate: 128 rows of W a step need a sixth fewer instructions a weight than 64, but leave
    # half as many tiles, and narrow layers would be split further.
    block_n = 128 if sum(Ns) >= 4096 else 64
    if itemsize == 4:
        tile = TileConfig(16 if M <= 16 else 64, 64, block_k, 4, 3)
    elif M <= 16:
        # 16 bytes of codes a thread and stage, or twice that: it takes some 24 KiB in flight on a
        # multiprocessor to hide the latency of memory.
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
    """Tiles of dx = grad @ W, summed over weights of Ns rows: block_n is the width of dx's tile,
    block_k the step over N."""
    if itemsize == 4:
        tile = TileConfig(32, 64, 32, 4, 3)
    elif M <= 16:
        tile = TileConfig(16, 64, 64, 4, 4)
    elif M <= 64 or blocksize == 32:
        # Twice the absmax values leave too few registers for a larger tile.
        tile = TileConfig(64, 64, 64, 4, 3)
    elif facts.capability < 90:
        # The accumulators are fragments of mma.sync here, and the mask takes registers as well.
        tile = TileConfig(64, 128, 64, 8, 3)
    else:
        tile = TileConfig(128, 128, 64, 8, 3)
    tiles = cdiv(M, tile.block_m) * cdiv(K, tile.block_n)
    length = length_of(Ns, tile)
    return TilePlan(tile, *_split(length, tile.block_k, tiles, facts, _programs(M), 512))


def length_of(Ns: Sequence[int], tile: TileConfig) -> int:
    """Of a backward sum over several weights, one behind the other, each to the end of a step."""
    return sum(cdiv(N, tile.block_k) for N in Ns) * tile.block_k


def _few_rows_each(M: int, adapters: int) -> bool:
    """estimate: adapters of up to 16 rows on average fill tiles of 16 rows better than others."""
    return M <= 16 * adapters


def multi_expand_tile(M: int, adapters: int, rank: int) -> TileConfig:
    """`EXPAND` for rows of many adapters; block_k is the step over the rank."""
    block_m, num_warps = (16, 4) if _few_rows_each(M, adapters) else (32, 8)
    return TileConfig(block_m, 64, _block_r(rank, 32), num_warps, 2)


def _block_r(rank: int, most: int) -> int:
    return min(most, max(16, 1 << (rank - 1).bit_length()))


def shrink_config(
    M: int, K: int, rank: int, fp32: bool, facts: Facts, adapters: int = 1
) -> tuple[ShrinkConfig, int, int]:
    """(config, splits of K, length of each) of projections of [M, K] to [M, at most rank].

    With several adapters the split is that of the worst case, one that owns all rows.
    """
    block_m = 16 if _few_rows_each(M, adapters) else 64
    config = ShrinkConfig(block_m, _block_r(rank, 64), 64, 4, 4)
    if fp32:
        config = ShrinkConfig(block_m, _block_r(rank, 32), 32, 4, 2)
    tiles = cdiv(M, block_m) * cdiv(rank, config.block_r)
    return config, *_split(K, config.block_k, tiles, facts, 2, 256)


def gated_shrink_config(
    M: int, K: int, rank: int, fp32: bool, facts: Facts
) -> tuple[ShrinkConfig, int, int]:
    """`shrink_config` of two gradients that are made on the way, which takes more registers."""
    config, splits, per_split = shrink_config(M, K, rank, fp32, facts)
    return replace(config, num_warps=8), splits, per_split


def weight_grad_config(
    M: int, columns: int, rank: int, fp32: bool, facts: Facts
) -> tuple[ShrinkConfig, int, int]:
    """(config, splits of M, length of each) of sums over M to [columns, at most rank].

    block_m is the width of the tile of columns, block_k the step over M.
    """
    config = ShrinkConfig(64, _block_r(rank, 64), 64, 4, 3)
    if fp32:
        config = ShrinkConfig(64, _block_r(rank, 32), 32, 4, 3)
    tiles = cdiv(columns, config.block_m) * cdiv(rank, config.block_r)
    return config, *_split(M, config.block_k, tiles, facts, 2, 256)
