"""The tokens sorted by adapter on the device, and which of them a program takes.

The tokens of one adapter are a group; the tokens without an adapter are the last group. Only the
device knows how many tokens a group has. The host launches as many tiles as the shapes allow at
most, and the tiles beyond the end of a group are empty.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pylora.kernels.configs import ADAPTER_TOKENS, cdiv
from pylora.kernels.launch import MAX_REGISTERS, on_device_of


@triton.jit
def _group_of(adapter_id, adapters):
    return tl.where((adapter_id >= 0) & (adapter_id < adapters), adapter_id, adapters).to(tl.int32)


@triton.jit(do_not_specialize=["M", "adapters"])
def _adapter_tokens_kernel(
    ids_ptr,  # int64 [M]
    order_ptr,  # int64 [M]
    begin_ptr,  # int32 [adapters + 2]
    M,
    adapters,
    BLOCK_M: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """A stable counting sort: the place of a token is the number of tokens that come before it.

    Shapes    ids [M]; order [M]: the tokens by group, ascending within each; begin [adapters + 2]:
              the place of each group's first token, and M behind the last  (M = tokens)
    Grid      one program per BLOCK_M of M tokens and adapters + 2 group boundaries
    Algorithm 1. Take tokens, and behind them boundaries, which come before all tokens of their
              group. 2. Count the tokens before each, BLOCK_J at a time. 3. Store them at their
              places.
    Limits    M^2 comparisons: made for up to some thousand tokens.
    """
    # 1. Take tokens and boundaries.
    query = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_token = query < M
    query_id = tl.load(ids_ptr + query, mask=is_token, other=0)
    group = tl.where(is_token, _group_of(query_id, adapters), query - M)[:, None]
    token = tl.where(is_token, query, -1)[:, None]
    # 2. Count the tokens before each.
    before = tl.zeros((BLOCK_M, BLOCK_J), tl.int32)
    for start in range(0, M, BLOCK_J):
        other = start + tl.arange(0, BLOCK_J)
        other_id = tl.load(ids_ptr + other, mask=other < M, other=0)
        other_group = tl.where(other < M, _group_of(other_id, adapters), adapters + 2)[None, :]
        comes_before = (other_group < group) | ((other_group == group) & (other[None, :] < token))
        before += comes_before.to(tl.int32)
    place = tl.sum(before, axis=1)
    # 3. Store them at their places.
    tl.store(order_ptr + place, query.to(tl.int64), mask=is_token)
    boundary = query - M
    tl.store(begin_ptr + boundary, place, mask=(boundary >= 0) & (boundary < adapters + 2))


@triton.jit
def _first_tile(begin, group, tile_tokens, by_place):
    """The number of a group's first tile, which leaves every tile to one group only.

    A group of c tokens that begins at place b has at most floor((b mod T + c) / T) + 1 tiles of T
    tokens, so floor(b / T) + group leaves room for them. With `by_place` it is b itself, which also
    leaves room and gives fewer tiles if there are more groups than tokens.
    """
    return tl.where(by_place != 0, begin, begin // tile_tokens + group)


@triton.jit
def tile_of(begin_ptr, groups, index, tile_tokens, by_place):
    """Returns (group, first, end) of the tile `index`, whose tokens have the places first to end.

    An empty tile has first >= end. The other arguments are those of `AdapterTokens.arguments`.
    """
    low = 0
    high = groups - 1
    while low < high:
        middle = (low + high + 1) // 2
        is_behind = _first_tile(tl.load(begin_ptr + middle), middle, tile_tokens, by_place) > index
        low = tl.where(is_behind, low, middle)
        high = tl.where(is_behind, middle - 1, high)
    begin = tl.load(begin_ptr + low)
    first = begin + (index - _first_tile(begin, low, tile_tokens, by_place)) * tile_tokens
    return low, first, tl.minimum(first + tile_tokens, tl.load(begin_ptr + low + 1))


class AdapterTokens(NamedTuple):
    """The tokens sorted by group.

    order    int64 [tokens], the tokens by group, ascending within each
    begin    int32 [groups + 1], the place in `order` where each group begins; the last entry is the
             number of tokens
    """

    order: Tensor
    begin: Tensor

    @property
    def groups(self) -> int:
        """The number of groups: one per adapter, and one for the tokens without an adapter."""
        return self.begin.numel() - 1

    def tiles(self, tile_tokens: int) -> int:
        """The largest number of tiles, each with up to `tile_tokens` tokens of one group."""
        tokens = self.order.numel()
        return min(tokens, tokens // tile_tokens + self.groups)

    def arguments(self, tile_tokens: int) -> dict[str, Any]:
        """The keyword arguments of a kernel that asks `tile_of` for its tokens."""
        tokens = self.order.numel()
        return {
            "order_ptr": self.order,
            "begin_ptr": self.begin,
            "groups": self.groups,
            "by_place": int(self.tiles(tile_tokens) == tokens),
        }


def adapter_tokens(ids: Tensor, adapters: int) -> AdapterTokens:
    """Sorts the tokens by adapter.

    ids    int64 [tokens]; a token whose id is outside [0, adapters) has no adapter
    """
    tokens = ids.numel()
    if tokens > ADAPTER_TOKENS.most_counted:
        group, order = torch.where((ids >= 0) & (ids < adapters), ids, adapters).sort(stable=True)
        boundaries = torch.arange(adapters + 2, device=ids.device)
        return AdapterTokens(order, torch.searchsorted(group, boundaries, out_int32=True))
    order = torch.empty_like(ids)
    begin = ids.new_empty(adapters + 2, dtype=torch.int32)
    config = ADAPTER_TOKENS
    with on_device_of(ids):
        _adapter_tokens_kernel[(cdiv(tokens + adapters + 2, config.block_m),)](
            ids,
            order,
            begin,
            tokens,
            adapters,
            BLOCK_M=config.block_m,
            BLOCK_J=config.block_j,
            maxnreg=MAX_REGISTERS,
        )
    return AdapterTokens(order, begin)
