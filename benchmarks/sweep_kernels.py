"""The kernels of lora_linear that a sweep measures, and the plans of each, coarse to fine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.operands import SCALING
from pylora import dispatch
from pylora.backends import cuda_hopper, cuda_many_rows, extension
from pylora.calls import Layer, LoraLinearCall, LowRank
from pylora.nf4_weight import NF4Weight

Plan = dict[str, int]


class Refused(Exception):
    """The kernel cannot run this plan, and has not been launched; says why."""


@dataclass(frozen=True)
class Operand:
    """One layer's tensors: the weight [N, K] and LoRA's factors."""

    weight: NF4Weight
    lora_A: Tensor
    lora_B: Tensor

    def layer(self) -> Layer:
        return Layer(self.weight.record, None, LowRank(self.lora_A, self.lora_B, scaling=SCALING))

    def arguments(self) -> tuple[Any, ...]:
        """Those of the extension's lora_linear behind x."""
        identity = extension.ACTIVATION_CODES["identity"]
        low_rank = (self.lora_A, self.lora_B, None, None, None, SCALING, 0.0, None, identity)
        return (*self.weight.op_arguments(), self.weight.shape[0], *low_rank)


@dataclass(frozen=True)
class Kernel:
    """One way to compute lora_linear.

    least, most  rows of x for which plans are measured
    levels       (x, N) -> lists of plans, the first of the rule's alone, each finer than the one
                 before
    forward      (x, operand, plan) -> y; raises Refused
    why_not      device -> why it cannot run there, None if it can
    """

    name: str
    least: int
    most: int
    levels: Callable[[Tensor, int], list[list[Plan]]]
    forward: Callable[[Tensor, Operand, Plan], Tensor]
    why_not: Callable[[torch.device], str | None]


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def cuts(parts: int, wanted: tuple[int, ...]) -> list[int]:
    """How many slices come of so many parts if each slice gets as many as the next, for about as
    many slices as wanted."""
    found = (_cdiv(parts, _cdiv(parts, slices)) for slices in wanted if slices <= parts)
    return list(dict.fromkeys(found))


def _even_grid(items: int, ctas: int) -> int:
    """CTAs, at most so many, that all have the same number of items, or one less."""
    return _cdiv(items, _cdiv(items, ctas))


def _compiled(
    rule: Plan, firsts: tuple[int, ...], tiles: Callable[[int], int], parts: int, processors: int
) -> list[list[Plan]]:
    """Plans of the C++ kernels: {first parameter, slices, grid}; `tiles` of a first parameter."""
    name = next(iter(rule))

    def plans(wanted: tuple[int, ...], grids: Callable[[int], list[int]]) -> Iterator[Plan]:
        for first in firsts:
            for slices in cuts(parts, wanted):
                for grid in dict.fromkeys(grids(tiles(first) * slices)):
                    yield {name: first, "slices": slices, "grid": grid}

    def one_or_two(items: int) -> list[int]:  # CTAs an SM
        return [min(items, processors), min(items, 2 * processors)]

    def others(items: int) -> list[int]:
        more = [_even_grid(items, processors), _even_grid(items, 2 * processors)]
        return [*one_or_two(items), *more, min(items, 4 * processors)]

    coarse, fine = (1, 2, 4, 8, 16, rule["slices"]), (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, parts)
    return [[rule], list(plans(coarse, one_or_two)), list(plans(fine, others))]


def _processors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count


def _small_levels(x: Tensor, N: int) -> list[list[Plan]]:
    names = ("output_warps", "slices", "grid")
    rule = dict(zip(names, torch.ops.pylora_C.lora_linear_plan(x, N), strict=True))
    parts = _cdiv(x.shape[1], 128)  # chunks of columns
    return _compiled(rule, (1, 2, 4), lambda warps: _cdiv(N, 16 * warps), parts, _processors(x))


def _hopper_levels(x: Tensor, N: int) -> list[list[Plan]]:
    names = ("tile_tokens", "slices", "grid")
    rule = dict(zip(names, torch.ops.pylora_C.lora_linear_hopper_plan(x, N), strict=True))
    M, K = x.shape
    return _compiled(
        rule,
        (128, 256),
        lambda tokens: _cdiv(N, 128) * _cdiv(M, tokens),
        K // 64,  # blocks of columns
        _processors(x),
    )


def _planned(op: str) -> Callable[[Tensor, Operand, Plan], Tensor]:
    def forward(x: Tensor, operand: Operand, plan: Plan) -> Tensor:
        function = getattr(torch.ops.pylora_C, op)
        try:
            y, _ = function(x, *operand.arguments(), *plan.values())
        except RuntimeError as error:
            if "cannot run this plan" in str(error):
                raise Refused(str(error).splitlines()[0]) from error
            raise
        return y

    return forward


def _triton_levels(x: Tensor, N: int) -> list[list[Plan]]:
    from pylora.kernels import configs, tuning
    from pylora.kernels.launch import facts

    M, K = x.shape
    rule = configs.forward_plan(M, [N], K, x.element_size(), 64, facts(x))
    near = tuning.neighbours(rule, K)
    far = [plan for each in near for plan in tuning.neighbours(each, K)]

    def written(plan: configs.TilePlan) -> Plan:
        return {**asdict(plan.tile), "splits": plan.splits, "per_split": plan.per_split}

    return [[written(plan) for plan in level] for level in ([rule], near, far)]


def _triton(x: Tensor, operand: Operand, plan: Plan) -> Tensor:
    from triton.errors import TritonError
    from triton.runtime.errors import OutOfResources

    from pylora.kernels.configs import TileConfig, TilePlan
    from pylora.kernels.lora_linear import lora_linear_by_tiles

    tile = {name: value for name, value in plan.items() if not name.endswith(("splits", "split"))}
    chosen = TilePlan(TileConfig(**tile), plan["splits"], plan["per_split"])
    try:
        return lora_linear_by_tiles(x, operand.layer(), chosen)
    except OutOfResources as error:
        raise Refused(str(error)) from error
    except TritonError as error:
        raise RuntimeError(f"Triton: {error}") from error


def _product(x: Tensor, operand: Operand, plan: Plan) -> Tensor:
    y, _ = cuda_many_rows.lora_linear(LoraLinearCall(x, operand.layer()))
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
