"""The kernels of lora_linear that a sweep measures, and the plans of each from coarse to fine.

A plan holds the numbers by which a kernel splits its work, such as the size of a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.layer_tensors import SCALING
from pylora import dispatch
from pylora.backends import cuda_hopper, cuda_many_rows, extension
from pylora.calls import Layer, LoraLinearCall, LowRank
from pylora.nf4_weight import NF4Weight

KernelPlan = dict[str, int]


class Refused(Exception):
    """Raised if a kernel cannot run a plan and was not launched. The message is the reason."""


@dataclass(frozen=True)
class SweptLayer:
    """A layer of a sweep: the weight [N, K] and the factors of LoRA."""

    weight: NF4Weight
    lora_A: Tensor
    lora_B: Tensor

    def record(self) -> Layer:
        """Returns the call record of the layer."""
        return Layer(self.weight.record, None, LowRank(self.lora_A, self.lora_B, scaling=SCALING))

    def arguments(self) -> tuple[Any, ...]:
        """Returns the arguments of the extension's lora_linear that follow x."""
        identity = extension.ACTIVATION_CODES["identity"]
        low_rank = (self.lora_A, self.lora_B, None, None, None, SCALING, 0.0, None, identity)
        return (*self.weight.op_arguments(), self.weight.shape[0], *low_rank)


@dataclass(frozen=True)
class Kernel:
    """One way to compute lora_linear.

    least, most  plans are measured for numbers of tokens between these two
    levels       (x, N) -> lists of plans; the first has only the plan of the rule, and each list
                 is finer than the one before
    forward      (x, layer, plan) -> y; raises Refused if the kernel cannot run the plan
    why_not      device -> the reason why the kernel cannot run there, or None if it can
    """

    name: str
    least: int
    most: int
    levels: Callable[[Tensor, int], list[list[KernelPlan]]]
    forward: Callable[[Tensor, SweptLayer, KernelPlan], Tensor]
    why_not: Callable[[torch.device], str | None]


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def cuts(parts: int, wanted: tuple[int, ...]) -> list[int]:
    """Returns numbers of splits near the wanted ones into which `parts` can be cut, so that all
    splits but the last have the same number of parts."""
    numbers = (_cdiv(parts, _cdiv(parts, splits)) for splits in wanted if splits <= parts)
    return list(dict.fromkeys(numbers))


def _even_grid(items: int, ctas: int) -> int:
    """Returns a number of CTAs, at most `ctas`, of which each has the same number of items or one
    less."""
    return _cdiv(items, _cdiv(items, ctas))


def _compiled(
    rule: KernelPlan,
    firsts: tuple[int, ...],
    tiles: Callable[[int], int],
    parts: int,
    processors: int,
) -> list[list[KernelPlan]]:
    """Returns the levels of plans {first parameter, splits, grid} of a C++ kernel.

    rule        the plan of the rule
    firsts      the values of the first parameter
    tiles       a first parameter -> the number of output tiles
    parts       how many parts of K splits can be made of
    processors  the number of SMs
    """
    name = next(iter(rule))

    def plans(wanted: tuple[int, ...], grids: Callable[[int], list[int]]) -> Iterator[KernelPlan]:
        for first in firsts:
            for splits in cuts(parts, wanted):
                for grid in dict.fromkeys(grids(tiles(first) * splits)):
                    yield {name: first, "splits": splits, "grid": grid}

    def one_or_two(items: int) -> list[int]:  # one or two CTAs for each SM
        return [min(items, processors), min(items, 2 * processors)]

    def others(items: int) -> list[int]:
        more = [_even_grid(items, processors), _even_grid(items, 2 * processors)]
        return [*one_or_two(items), *more, min(items, 4 * processors)]

    coarse, fine = (1, 2, 4, 8, 16, rule["splits"]), (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, parts)
    return [[rule], list(plans(coarse, one_or_two)), list(plans(fine, others))]


def _processors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count


def _small_levels(x: Tensor, N: int) -> list[list[KernelPlan]]:
    names = ("output_warps", "splits", "grid")
    rule = dict(zip(names, torch.ops.pylora_C.lora_linear_plan(x, N), strict=True))
    parts = _cdiv(x.shape[1], 128)  # pieces of 128 columns
    return _compiled(rule, (1, 2, 4), lambda warps: _cdiv(N, 16 * warps), parts, _processors(x))


def _hopper_levels(x: Tensor, N: int) -> list[list[KernelPlan]]:
    names = ("tile_tokens", "splits", "grid")
    rule = dict(zip(names, torch.ops.pylora_C.lora_linear_hopper_plan(x, N), strict=True))
    M, K = x.shape
    return _compiled(
        rule,
        (128, 256),
        lambda tokens: _cdiv(N, 128) * _cdiv(M, tokens),
        K // 64,  # NF4 blocks in a row
        _processors(x),
    )


def _planned(op: str) -> Callable[[Tensor, SweptLayer, KernelPlan], Tensor]:
    def forward(x: Tensor, layer: SweptLayer, plan: KernelPlan) -> Tensor:
        function = getattr(torch.ops.pylora_C, op)
        try:
            y, _ = function(x, *layer.arguments(), *plan.values())
        except RuntimeError as error:
            if "cannot run this plan" in str(error):
                raise Refused(str(error).splitlines()[0]) from error
            raise
        return y

    return forward


def _triton_levels(x: Tensor, N: int) -> list[list[KernelPlan]]:
    from pylora.kernels import configs, tuning
    from pylora.kernels.launch import facts

    M, K = x.shape
    rule = configs.forward_plan(M, [N], K, x.element_size(), 64, facts(x))
    near = tuning.neighbours(rule, K)
    far = [plan for neighbour in near for plan in tuning.neighbours(neighbour, K)]

    def written(plan: configs.TilePlan) -> KernelPlan:
        return {**asdict(plan.tile), "splits": plan.splits, "per_split": plan.per_split}

    return [[written(plan) for plan in level] for level in ([rule], near, far)]


def _triton(x: Tensor, layer: SweptLayer, plan: KernelPlan) -> Tensor:
    from triton.errors import TritonError
    from triton.runtime.errors import OutOfResources

    from pylora.kernels.configs import TileConfig, TilePlan
    from pylora.kernels.lora_linear import lora_linear_by_tiles

    tile = {name: value for name, value in plan.items() if name not in ("splits", "per_split")}
    chosen = TilePlan(TileConfig(**tile), plan["splits"], plan["per_split"])
    try:
        return lora_linear_by_tiles(x, layer.record(), chosen)
    except OutOfResources as error:
        raise Refused(str(error)) from error
    except TritonError as error:
        raise RuntimeError(f"Triton: {error}") from error


def _product(x: Tensor, layer: SweptLayer, plan: KernelPlan) -> Tensor:
    y, _ = cuda_many_rows.lora_linear(LoraLinearCall(x, layer.record()))
    return y


def _cuda_why_not(device: torch.device) -> str | None:
    return dispatch.BACKENDS["cuda"].unavailable()


def _hopper_why_not(device: torch.device) -> str | None:
    return _cuda_why_not(device) or cuda_hopper.device_reason(device)


KERNELS = (
    Kernel("small", 1, 64, _small_levels, _planned("lora_linear_planned"), _cuda_why_not),
    Kernel(
        "hopper", 32, 8192, _hopper_levels, _planned("lora_linear_hopper_planned"), _hopper_why_not
    ),
    Kernel(
        "triton",
        1,
        8192,
        _triton_levels,
        _triton,
        lambda device: dispatch.BACKENDS["triton"].unavailable(),
    ),
    Kernel("product", 1, 8192, lambda x, N: [[{}]], _product, _cuda_why_not),
)
