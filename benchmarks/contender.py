"""What a contender is: who it is, how its layer is built, and the least work it has to do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from benchmarks.operands import Operands
from benchmarks.shapes import BACKWARD, MODES, TRAINING, Cell

NF4_BITS = 4.5  # a weight, with one fp32 absmax per 64


@dataclass
class Layer:
    """One contender's layer over memory of its own.

    forward      x -> result; x is None for an op that takes none
    path         x -> the path that a call with x takes, in words; asked after a call, with the
                 backend and the environment of one
    parameters   what a backward differentiates besides x
    result       makes a raw result comparable, outside the timed region
    weight       the dense weight this layer stands for, where its format is not our NF4
    backend      the pylora backend to force
    environment  variables that are set while it runs
    grads        the gradient as drawn -> what the results of forward are differentiated with
    prepared     (x, grad) -> the call to time, all of its arguments prepared, for a part of a layer
                 that autograd does not differentiate; it does a forward if grad is None, else a
                 forward and a backward. None: `forward` is timed
    """

    forward: Callable[[Tensor | None], Any]
    path: Callable[[Tensor | None], str]
    parameters: tuple[Tensor, ...] = ()
    result: Callable[[Any], Any] = lambda raw: raw
    weight: Tensor | None = None
    backend: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    grads: Callable[[Tensor], Any] = lambda grad: grad
    prepared: Callable[[Tensor, Tensor | None], Callable[[], Any]] | None = None


class NotApplicable(Exception):
    """A contender says, in words, that it does not apply to the cell it was built for."""


@dataclass(frozen=True)
class Contender:
    """One implementation to time.

    weights       "nf4" or "dense": what it has to read
    has_lora      computes the low-rank path too
    unavailable   None where it can run this cell on this device, else the reason in words
    only_full     part of the full suite, and of the quick one only when asked for
    dtype         of its activations, where that is not the cell's
    """

    name: str
    build: Callable[[Operands], Layer]
    packages: tuple[str, ...] = ("torch",)
    weights: str = "nf4"
    has_lora: bool = True
    modes: tuple[str, ...] = MODES
    unavailable: Callable[[Cell, torch.device], str | None] = lambda cell, device: None
    only_full: bool = False
    dtype: str | None = None
    is_ours: bool = False

    def version(self) -> str:
        return ", ".join(f"{name} {metadata.version(name)}" for name in self.packages)

    def why_not(self, cell: Cell, device: torch.device) -> str | None:
        """None where this contender takes part in `cell`, else the reason."""
        missing = [name for name in self.packages if not installed(name)]
        if missing:
            return f"not installed: {', '.join(missing)}"
        if cell.mode not in self.modes:
            return f"has no {cell.mode}"
        return self.unavailable(cell, device)


def installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


@dataclass(frozen=True)
class Work:
    """The least that a contender's own format has to compute and move."""

    flop: float
    bytes_read: float
    bytes_written: float

    @property
    def bytes(self) -> float:
        return self.bytes_read + self.bytes_written


def weight_bytes(cell: Cell, contender: Contender) -> float:
    """Bytes of one weight as this contender holds it."""
    return cell.numel * (NF4_BITS / 8 if contender.weights == "nf4" else item_size(cell, contender))


def item_size(cell: Cell, contender: Contender) -> int:
    return getattr(torch, contender.dtype or cell.dtype).itemsize


def linear_work(cell: Cell, contender: Contender) -> Work:
    """Forward reads x and W and writes y; backward reads grad, W and, for LoRA, x, and writes dx.

    FLOP: 2 M N K for y and again for dx. Rank r adds 2 M r (N + K) forward and twice that backward
    (da, dx, dA, dB). The weights of the low-rank path are read once and their gradients written.
    """
    m, n, k = cell.rows, cell.out_features, cell.in_features
    r = cell.rank if contender.has_lora else 0
    size = item_size(cell, contender)
    weight = weight_bytes(cell, contender)
    lora = r * (n + k)
    forward = Work(2 * m * n * k + 2 * m * lora, weight + size * (m * k + lora), size * m * n)
    backward = Work(
        2 * m * n * k + 4 * m * lora,
        weight + size * (m * n + (m * k if r else 0) + lora),
        size * (m * k + lora),
    )
    if cell.mode == TRAINING:
        return Work(*(getattr(forward, f) + getattr(backward, f) for f in Work.__match_args__))
    return backward if cell.mode == BACKWARD else forward


@dataclass(frozen=True)
class Bench:
    """One op: its contenders, its work, and what is right.

    contenders    the first is pylora itself
    work          least FLOP and bytes of a contender in a cell
    oracle        (operands, x, grad, has_lora) -> (function, its arguments) in plain torch
    has_rows      the op takes x
    rank          of the LoRA on our side; 0 where there is none
    quick_modes   what the quick suite measures of it
    layers        the linear layers in a cell, each a cell of its own
    outputs       results of the forward
    shapes        to measure instead of the suite's; () for the suite's own
    rows          to measure instead of the suite's; () for the suite's own
    modes         to measure instead of the suite's; () for the suite's own
    in_quick      part of the quick suite; otherwise of the full one, and whenever it is asked for
    host_time     the time of the host alone is measured: several calls a sample, on one layer each,
                  and on CUDA without waiting for the device
    budget        how many times the suite's seconds to spend on a cell
    """

    op: str
    contenders: tuple[Contender, ...]
    work: Callable[[Cell, Contender], Work]
    oracle: Callable[..., tuple[Callable[..., Any], tuple[Any, ...]]]
    has_rows: bool = True
    has_backward: bool = True
    rank: int = 0
    quick_modes: tuple[str, ...] = MODES
    layers: Callable[[Cell], tuple[Cell, ...]] = lambda cell: (cell,)
    outputs: int = 1
    shapes: tuple[tuple[int, int], ...] = ()
    rows: tuple[int, ...] = ()
    modes: tuple[str, ...] = ()
    in_quick: bool = True
    host_time: bool = False
    budget: float = 1.0
