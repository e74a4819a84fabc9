"""Tile plans measured on the user's GPU, in a file of the user's cache.

    PYLORA_AUTOTUNE=1     a layer's first call of each shape measures the plans around the rule's of
                          `configs` and keeps the fastest
    PYLORA_CACHE          folder of the file (default: pylora in XDG_CACHE_HOME or ~/.cache)

Plans found once are used by every later process; without the variable nothing is measured. The
file names the GPU and the versions that its plans hold for.
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

# What a plan must save to be worth a change: less is noise.
_WORTHWHILE = 0.97


def cache_file() -> Path:
    return settings.cache_folder() / "tuning.json"


@lru_cache(maxsize=8)
def _holds_for(index: int) -> str:
    """What the plans of a device depend on, beside their shapes."""
    name = torch.cuda.get_device_name(index) if index >= 0 else "no GPU"
    return f"{name}, triton {triton.__version__}"


@lru_cache(maxsize=1)
def _plans() -> dict[str, dict[str, TilePlan]]:
    """Everything in the file, by `_holds_for` and by key; empty without a file."""
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
    """Reads the file again at the next call."""
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
    kind: object,
    rule: TilePlan,
    length: int,
    run: Callable[[TilePlan], Any],
) -> TilePlan:
    """The plan measured for this call on x's device, or the rule's.

    sizes     what the plan depends on beside the rows of x, which are rounded up to a power of two
    kind      of the layers, in the words of its repr
    length    of the sum that the plan may split
    run       runs the call with a plan
    """
    measures = settings.current().autotune
    if not measures and not _plans():
        return rule
    rows = 1 << (max(x.shape[0], 1) - 1).bit_length()
    key = f"{kernel} {x.dtype} rows {rows} sizes {sizes} {kind}"
    plans = _plans().setdefault(_holds_for(x.get_device()), {})
    if key not in plans and measures and not _is_capturing(x):
        plans[key] = fastest(rule, length, lambda plan: _milliseconds(run, plan))
        _save()
    return plans.get(key, rule)


def _is_capturing(x: Tensor) -> bool:
    """A CUDA graph records launches and runs none: nothing can be measured then."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _milliseconds(run: Callable[[TilePlan], Any], plan: TilePlan) -> float:
    """Median time with a cold L2; infinite for a plan that the device has no room for."""
    try:
        return triton.testing.do_bench(lambda: run(plan), warmup=5, rep=30, return_mode="median")
    except triton.runtime.errors.OutOfResources:
        return math.inf


def fastest(rule: TilePlan, length: int, milliseconds: Callable[[TilePlan], float]) -> TilePlan:
    """The best plan found from the rule's on, one parameter after the other."""
    best, time = rule, milliseconds(rule)
    for changed in _PARAMETERS:
        for plan in changed(best, length):
            found = milliseconds(plan)
            if found < _WORTHWHILE * time:
                best, time = plan, found
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
    """The plans that differ from this one in one parameter, for a sum of this length."""
    return [near for changed in _PARAMETERS for near in changed(plan, length)]
