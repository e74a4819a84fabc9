"""Groups the tokens by adapter: in segments on a CPU, in tiles on other devices.

Segments have the lengths of the groups, which the host can know on a CPU only; elsewhere it would
wait for the device. Both classes have the same methods: they gather the tokens of an adapter, scale
values by it, and put results where they belong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

_TILE_TOKENS = 64


def check_adapter_ids(adapter_ids: Tensor, adapters: int) -> None:
    """Raises ValueError if the ids are on the CPU and one of them is outside [-1, adapters).

    On other devices nothing is checked, because that would wait for the device; a token with such
    an id gets the base alone.
    """
    if adapter_ids.device.type != "cpu" or adapter_ids.numel() == 0:
        return
    least, most = adapter_ids.aminmax()
    if int(least) < -1 or int(most) >= adapters:
        bad = (adapter_ids < -1) | (adapter_ids >= adapters)
        token = int(bad.nonzero()[0, 0])
        raise ValueError(
            f"adapter_ids has {int(adapter_ids[token])} at token {token}; "
            f"it must be in [-1, {adapters}), -1 for the base alone"
        )


@dataclass(frozen=True)
class Segment:
    """All tokens of one adapter.

    adapter    its index
    tokens     int64, in ascending order
    """

    adapter: int
    tokens: Tensor

    @cached_property
    def rows(self) -> slice | Tensor:
        """The index of the tokens: a slice, which copies nothing, if they follow each other."""
        first, last = int(self.tokens[0]), int(self.tokens[-1])
        together = last - first + 1 == self.tokens.numel()
        return slice(first, last + 1) if together else self.tokens

    def gathered(self, matrix: Tensor) -> Tensor:
        """The rows of `matrix` [tokens, features] that belong to this segment's tokens."""
        return matrix[self.rows]

    def view_of(self, total: Tensor) -> Tensor | None:
        """The rows of the tokens in `total` without a copy; None if they do not lie together."""
        return total[self.rows] if isinstance(self.rows, slice) else None

    def put(self, total: Tensor, values: Tensor) -> None:
        """Stores gathered `values` in the rows of their tokens in `total`."""
        total[self.rows] = values

    def scaled(self, values: Tensor, scalings: Tensor) -> Tensor:
        """`values` times the scaling of their adapter."""
        return values * scalings[self.adapter]

    def add_to(self, total: Tensor, values: Tensor) -> None:
        """Adds gathered `values` to the rows of their tokens in `total`, rounding once."""
        total[self.rows] = (total[self.rows] + values).to(total.dtype)

    def summed_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype to compute a sum over tokens in; here one matmul finishes it."""
        return dtype

    def put_sum(self, total: Tensor, values: Tensor) -> None:
        """Stores a sum over the tokens as its adapter's entry of `total` [adapters, ...]."""
        total[self.adapter] = values


@dataclass(frozen=True)
class Tiles:
    """All tokens that have an adapter, as a batch of tiles with one adapter each.

    Only the device knows how many tokens an adapter has, but the shapes bound the number of tiles:
    as in MoE kernels (vLLM's moe_align_block_size), the tokens of each adapter are padded to whole
    tiles.

    adapter    int64 [tiles]; valid even for the unused tiles at the end
    lengths    int64 [adapters], the number of tiles of each adapter, in order
    token      int64 [tiles, tile_tokens]; the number of tokens stands for an empty place
    place      int64 [tokens], the token's place in the flattened tiles; 0 without an adapter
    covered    bool [tokens], False for a token without an adapter
    """

    adapter: Tensor
    lengths: Tensor
    token: Tensor
    place: Tensor
    covered: Tensor

    def gathered(self, matrix: Tensor) -> Tensor:
        """The rows of `matrix` as [tiles, tile_tokens, features], zero at empty places."""
        count = matrix.shape[0]
        values = matrix[self.token.clamp(max=max(count - 1, 0))]
        return values.masked_fill_((self.token == count).unsqueeze(-1), 0)

    def scaled(self, values: Tensor, scalings: Tensor) -> Tensor:
        # The scalings are used in fp32 at least, whatever dtype they are given in.
        scalings = scalings.to(torch.promote_types(values.dtype, torch.float32))
        return values * scalings[self.adapter].view(-1, 1, 1)

    def add_to(self, total: Tensor, values: Tensor) -> None:
        added = values.flatten(0, 1)[self.place]
        total.copy_(total + added.masked_fill_(~self.covered.unsqueeze(-1), 0))

    def summed_dtype(self, dtype: torch.dtype) -> torch.dtype:
        # The tiles of an adapter are added up after the matmul, which must not have rounded them.
        return torch.promote_types(dtype, torch.float32)

    def put_sum(self, total: Tensor, values: Tensor) -> None:
        # index_add is not used because its order changes from run to run on a GPU.
        flat = torch.segment_reduce(
            values.flatten(1), "sum", lengths=self.lengths, axis=0, unsafe=True
        )
        total.copy_(flat.view(total.shape))


@dataclass(frozen=True)
class Masked:
    """All tokens, with zeros in the places of those that are not of one adapter.

    adapter    its index
    own        bool [tokens, 1], True for its tokens
    """

    adapter: int
    own: Tensor

    def gathered(self, matrix: Tensor) -> Tensor:
        """`matrix` [tokens, features], in which other tokens are zero and add nothing to a sum."""
        return torch.where(self.own, matrix, 0.0)

    def view_of(self, total: Tensor) -> None:
        """Never: the tokens do not lie together."""
        return None

    def put(self, total: Tensor, values: Tensor) -> None:
        """Stores the rows of `values` that are the adapter's in `total`."""
        total.copy_(torch.where(self.own, values, total))


Groups = Sequence[Segment | Tiles]


def groups(adapter_ids: Tensor, adapters: int, rank: int) -> Groups:
    """The groups of the tokens; a token whose id is outside [0, adapters) is in none.

    adapter_ids    int64 [tokens]
    """
    if adapter_ids.device.type == "cpu":
        return segments(adapter_ids, adapters)
    # A tile has at least as many tokens as the rank, so the adapters that are gathered for the
    # tiles are no larger than x and all of the adapters together.
    return [tiles(adapter_ids, adapters, max(_TILE_TOKENS, rank))]


def selections(adapter_ids: Tensor, adapters: int) -> Sequence[Segment | Masked]:
    """The tokens of each adapter: on a CPU those that are its own, elsewhere all, masked.

    adapter_ids    int64 [tokens]
    """
    if adapter_ids.device.type == "cpu":
        return segments(adapter_ids, adapters)
    return [Masked(index, (adapter_ids == index).unsqueeze(-1)) for index in range(adapters)]


def segments(adapter_ids: Tensor, adapters: int) -> list[Segment]:
    """A segment for each adapter that has tokens; the host reads the ids."""
    ids, order = adapter_ids.sort(stable=True)
    begin = torch.searchsorted(ids, torch.arange(adapters + 1, device=ids.device)).tolist()
    return [
        Segment(index, order[first:end])
        for index, (first, end) in enumerate(pairwise(begin))
        if first < end
    ]


def tiles(adapter_ids: Tensor, adapters: int, tile_tokens: int) -> Tiles:
    """The tokens in tiles of `tile_tokens`; the host does not wait for the device."""
    device, tokens = adapter_ids.device, adapter_ids.numel()
    covered = (adapter_ids >= 0) & (adapter_ids < adapters)
    group, order = torch.where(covered, adapter_ids, adapters).sort(stable=True)
    begin = torch.searchsorted(group, torch.arange(adapters + 1, device=device))
    lengths = (begin.diff() + tile_tokens - 1) // tile_tokens
    end_tile = lengths.cumsum(0)
    # Each adapter has less than one tile of padding, and no tile is without a token.
    count = min(tokens, tokens // tile_tokens + adapters)
    adapter = torch.searchsorted(end_tile, torch.arange(count, device=device), right=True)
    safe_group = group.clamp(max=adapters - 1)
    first_place = (end_tile - lengths)[safe_group] * tile_tokens
    within = torch.arange(tokens, device=device) - begin[safe_group]
    # All tokens without an adapter go to one place behind the tiles, which is cut off.
    places = torch.where(group < adapters, first_place + within, count * tile_tokens)
    token = torch.full((count * tile_tokens + 1,), tokens, device=device)
    token.scatter_(0, places, order)
    place = torch.empty_like(order).scatter_(0, order, places)
    return Tiles(
        adapter=adapter.clamp(max=adapters - 1),
        lengths=lengths,
        token=token[:-1].view(count, tile_tokens),
        place=torch.where(covered, place, 0),
        covered=covered,
    )
