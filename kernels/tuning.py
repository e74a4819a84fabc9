"""Tile plans that were measured on the user's GPU, kept in a file in the user's cache.

    PYLORA_AUTOTUNE=1     the first call of each shape measures the plan of the rule in `configs`
                          and its neighbours, and keeps the fastest
    PYLORA_CACHE          folder of the file (default: pylora in XDG_CACHE_HOME or ~/.cache)

Every later process uses the plans in the file, with or without PYLORA_AUTOTUNE. The file says for
which GPU and which version of Triton each plan was measured.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from pylora import settings
from pylora.files import replacing
from pylora.kernels.configs import TileConfig, TilePlan, cdiv

# A plan replaces the best one so far if it takes at most this share of its time; less is noise.
_WORTHWHILE = 0.97


def cache_file() -> Path:
    return settings.cache_folder() / "tuning.json"


@lru_cache(maxsize=8)
def _holds_for(index: int) -> str:
    """The device and version that measured plans hold for; index is -1 if there is no GPU."""
    name = torch.cuda.get_device_name(index) if index >= 0 else "no GPU"
    return f"{name}, triton {triton.__version__}"


@lru_cache(maxsize=1)
def _plans() -> dict[str, dict[str, TilePlan]]:
    """The contents of the file: plans by `_holds_for` and by key; empty if there is no file."""
    path = cache_file()
    if not path.exists():
        return {}
    try:
        stored = json.loads(path.read_text())
        return {
            device: {
                key: TilePlan(TileConfig(**plan["tile"]), plan["splits"], plan["per_split"])
                for key, plan in plans.items()
            }
            for device, plans in stored.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} must hold tile plans: {error!r}; delete it, or set PYLORA_CACHE elsewhere"
        ) from error


def forget() -> None:
    """Forgets the file's contents, so that the next call reads it again."""
    _plans.cache_clear()


def _save() -> None:
    """Replaces the file as a whole: another process sees the old one or the new one."""
    stored = {d: {key: asdict(plan) for key, plan in ps.items()} for d, ps in _plans().items()}
    with replacing(cache_file()) as temporary:
        temporary.write_text(json.dumps(stored))


def tuned(
    kernel: str,
    x: Tensor,
    sizes: tuple[int, ...],
    layer_key: object,
    rule: TilePlan,
    length: int,
    run: Callable[[TilePlan], Any],
) -> TilePlan:
    """The plan that was measured for this call on x's device, or `rule` if none was.

    kernel       name of the tile kernel
    x            [M, ...], the input or the gradient; plans are kept for M rounded up to a power of
                 two
    sizes        the other sizes that the plan depends on
    layer_key    what the layers have in common; its repr becomes part of the key
    length       the length of the sum that the plan may split
    run          runs the call with a plan
    """
    measures = settings.current().autotune
    if not measures and not _plans():
        return rule
    M = 1 << (max(x.shape[0], 1) - 1).bit_length()
    key = f"{kernel} {x.dtype} M {M} sizes {sizes} {layer_key}"
    plans = _plans().setdefault(_holds_for(x.get_device()), {})
    if key not in plans and measures and not _is_capturing(x):
        plans[key] = fastest(rule, length, lambda plan: _milliseconds(run, plan))
        _save()
    return plans.get(key, rule)


def _is_capturing(x: Tensor) -> bool:
    """True while a CUDA graph records launches; none of them runs, so nothing can be measured."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _milliseconds(run: Callable[[TilePlan], Any], plan: TilePlan) -> float:
    """The median time with a cold L2; infinite if the device has no room for the plan."""
    try:
        return triton.testing.do_bench(lambda: run(plan), warmup=5, rep=30, return_mode="median")
    except triton.runtime.errors.OutOfResources:
        return math.inf


def fastest(rule: TilePlan, length: int, milliseconds: Callable[[TilePlan], float]) -> TilePlan:
    """The fastest plan of a search that starts at `rule` and changes one parameter at a time."""
    best, time = rule, milliseconds(rule)
    for changed in _PARAMETERS:
        for plan in changed(best, length):
            plan_time = milliseconds(plan)
            if plan_time < _WORTHWHILE * time:
                best, time = plan, plan_time
    return best


def _with_splits(plan: TilePlan, splits: int, length: int) -> TilePlan:
    step = plan.tile.block_k
    per_split = cdiv(cdiv(length, step), max(splits, 1)) * step
    return replace(plan, splits=max(1, cdiv(length, per_split)), per_split=per_split)


def _tiles(plan: TilePlan, length: int) -> Iterator[TilePlan]:
    tile = plan.tile
    for block_m in (tile.block_m // 2, tile.block_m, 2 * tile.block_m):
        for block_n in (64, 128):
            if 16 <= block_m <= 128 and (block_m, block_n) != (tile.block_m, tile.block_n):
                yield replace(plan, tile=replace(tile, block_m=block_m, block_n=block_n))


def _warps(plan: TilePlan, length: int) -> Iterator[TilePlan]:
    yield replace(plan, tile=replace(plan.tile, num_warps=12 - plan.tile.num_warps))


def _stages(plan: TilePlan, length: int) -> Iterator[TilePlan]:
    for num_stages in (plan.tile.num_stages - 1, plan.tile.num_stages + 1):
        if num_stages >= 2:
            yield replace(plan, tile=replace(plan.tile, num_stages=num_stages))


def _splits(plan: TilePlan, length: int) -> Iterator[TilePlan]:
    for splits in (plan.splits // 2, 2 * plan.splits):
        changed = _with_splits(plan, splits, length)
        if changed.splits != plan.splits:
            yield changed


_PARAMETERS = (_tiles, _warps, _stages, _splits)


def neighbours(plan: TilePlan, length: int) -> list[TilePlan]:
    """The plans that differ from `plan` in one parameter; the sum that they split has `length`."""
    return [near for changed in _PARAMETERS for near in changed(plan, length)]
