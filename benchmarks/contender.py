"""What a contender is, how it builds a layer, and the least work that it has to do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from benchmarks.layer_tensors import LayerTensors
from benchmarks.shapes import BACKWARD, MODES, TRAINING, Cell

NF4_BITS = 4.5  # for each weight: a code of 4 bits, and an fp32 absmax for 64 weights


@dataclass
class BuiltLayer:
    """A layer that a contender has built, with memory of its own.

    forward      x -> result; x is None for an op that takes none
    variant      x -> the kernel variant that a call with x runs, in words; it is asked after a
                 call, with the same backend and environment
    parameters   the tensors besides x for which a backward computes gradients
    result       turns a raw result into what the oracle returns; it runs outside the timed region
    weight       the dense weight that this layer stands for, if its format is not our NF4
    oracle       (x, grad) -> what the oracle of a bench returns. It is for a layer that draws
                 random numbers from torch's own generators, which the bench's oracle cannot know.
                 The harness makes the call that it checks in `LayerTensors.seeded`
    backend      the pylora backend that is forced, if any
    environment  environment variables that are set while it runs
    grads        random gradient -> the gradients of all results of forward
    prepared     (x, grad) -> the call to time, with all arguments prepared. It is for a part of a
                 layer that autograd does not see. The call does a forward, and a backward too if
                 grad is not None. If `prepared` is None, `forward` is timed
    """

    forward: Callable[[Tensor | None], Any]
    variant: Callable[[Tensor | None], str]
    parameters: tuple[Tensor, ...] = ()
    result: Callable[[Any], Any] = lambda raw: raw
    weight: Tensor | None = None
    oracle: Callable[[Tensor, Tensor | None], Any] | None = None
    backend: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    grads: Callable[[Tensor], Any] = lambda grad: grad
    prepared: Callable[[Tensor, Tensor | None], Callable[[], Any]] | None = None


class NotApplicable(Exception):
    """Raised by a contender that cannot take part in a cell. The message is the reason."""


@dataclass(frozen=True)
class Contender:
    """One implementation to time.

    build         makes a layer from random weights
    packages      the Python packages that it needs and whose versions the results name
    weights       the format of the weight that it reads, "nf4" or "dense"
    has_lora      it computes the low-rank path too
    modes         the modes that it can run
    unavailable   (cell, device) -> the reason why it cannot run there, or None if it can
    only_full     it is part of the full suite alone, unless it is asked for by name
    dtype         the dtype of its activations, if it is not that of the cell
    """

    name: str
    build: Callable[[LayerTensors], BuiltLayer]
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
        """Returns why this contender does not take part in `cell`, or None if it does."""
        missing = [name for name in self.packages if not installed(name)]
        if missing:
            return f"not installed: {', '.join(missing)}"
        if cell.mode not in self.modes:
            return f"it has no {cell.mode}"
        return self.unavailable(cell, device)


def installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


@dataclass(frozen=True)
class Work:
    """The least that a contender has to compute and move, given the format of its weight."""

    flop: float
    bytes_read: float
    bytes_written: float

    @property
    def bytes(self) -> float:
        return self.bytes_read + self.bytes_written


def weight_bytes(cell: Cell, contender: Contender) -> float:
    """Returns the bytes of the weight of a layer in the format of this contender."""
    return cell.numel * (NF4_BITS / 8 if contender.weights == "nf4" else item_size(cell, contender))


def item_size(cell: Cell, contender: Contender) -> int:
    """Returns the bytes of one number of the activations."""
    return getattr(torch, contender.dtype or cell.dtype).itemsize


def linear_work(cell: Cell, contender: Contender) -> Work:
    """Returns the least work of a linear layer.

    A forward reads x and W and writes y. A backward reads grad and W, with LoRA also x, and writes
    dx. The factors of LoRA are read once, and their gradients are written.

    y takes 2 M N K FLOP, and so does dx. LoRA of rank r adds 2 M r (N + K) to a forward and twice
    as much to a backward.
    """
    m, n, k = cell.tokens, cell.out_features, cell.in_features
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
    """How to measure one op.

    contenders    who takes part; the first is pylora itself
    work          (cell, contender) -> the least FLOP and bytes
    oracle        (tensors, x, grad, has_lora) -> (a function in plain torch, its arguments)
    has_tokens    the op takes x
    has_backward  the op has a backward
    rank          the rank of LoRA in pylora; 0 without LoRA
    quick_modes   the modes that the quick suite measures
    layers        cell -> the linear layers in it, each as a cell
    outputs       how many results a forward returns
    shapes        measured in place of the suite's shapes, if there are any
    tokens        measured in place of the suite's numbers of tokens, if there are any
    modes         measured in place of the suite's modes, if there are any
    in_quick      the quick suite measures this op; if not, it is measured by the full suite or if
                  it is asked for
    host_time     only the time of the host is measured: a sample is several calls of one layer,
                  and on CUDA nothing waits for the device
    budget        the time to spend on a cell, as a multiple of the suite's
    """

    op: str
    contenders: tuple[Contender, ...]
    work: Callable[[Cell, Contender], Work]
    oracle: Callable[..., tuple[Callable[..., Any], tuple[Any, ...]]]
    has_tokens: bool = True
    has_backward: bool = True
    rank: int = 0
    quick_modes: tuple[str, ...] = MODES
    layers: Callable[[Cell], tuple[Cell, ...]] = lambda cell: (cell,)
    outputs: int = 1
    shapes: tuple[tuple[int, int], ...] = ()
    tokens: tuple[int, ...] = ()
    modes: tuple[str, ...] = ()
    in_quick: bool = True
    host_time: bool = False
    budget: float = 1.0
