"""multi_lora_linear: an NF4 weight and eight LoRA adapters; each token has one of them or none.

PEFT on bitsandbytes runs such a batch in inference alone (`adapter_names`). Contenders without LoRA
do less work than pylora, and are compared with it nevertheless.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

import pylora.functional as F
from benchmarks import contenders_peers, contenders_torch
from benchmarks.contender import Bench, BuiltLayer, Contender, Work, item_size, linear_work
from benchmarks.contenders_torch import explained, on_reference
from benchmarks.layer_tensors import LayerTensors
from benchmarks.shapes import BACKWARD, FORWARD, TRAINING, Cell

ADAPTERS = 8


def adapter_ids(tensors: LayerTensors, tokens: int) -> Tensor:
    """Draws an adapter for each token. About one in nine tokens has none (-1)."""

    def draw() -> Tensor:
        generator = torch.Generator().manual_seed(tokens)
        ids = torch.randint(-1, ADAPTERS, (tokens,), generator=generator)
        return ids.to(tensors.device)

    return tensors.remembered(f"multi_lora_linear ids {tokens}", draw)


def _pylora(tensors: LayerTensors) -> BuiltLayer:
    w, (A, B) = tensors.nf4(), tensors.lora_stacks(ADAPTERS)
    scalings = torch.full((ADAPTERS,), tensors.scaling, device=tensors.device)

    def arguments(x: Tensor) -> tuple[Any, ...]:
        return x, w, A, B, adapter_ids(tensors, x.shape[0]), scalings

    return BuiltLayer(
        lambda x: F.multi_lora_linear(*arguments(x)),
        lambda x: explained("multi_lora_linear", *arguments(x)),
        (A, B),
    )


def _one_by_one(tensors: LayerTensors) -> BuiltLayer:
    """Builds nf4_linear on all tokens, followed by LoRA for one adapter after the other."""
    w, (A, B) = tensors.nf4(), tensors.lora_stacks(ADAPTERS)

    def forward(x: Tensor) -> Tensor:
        return added_up(F.nf4_linear(x, w), x, A, B, tensors)

    return BuiltLayer(forward, lambda x: "nf4_linear, and three matmuls an adapter", (A, B))


def added_up(y: Tensor, x: Tensor, A: Tensor, B: Tensor, tensors: LayerTensors) -> Tensor:
    """Returns y plus the low-rank path of every adapter on its tokens."""
    ids = adapter_ids(tensors, x.shape[0])
    for index in range(ADAPTERS):
        chosen = (ids == index).nonzero()[:, 0]  # the tokens of this adapter
        delta = linear(linear(x[chosen], A[index]), B[index]) * tensors.scaling
        y = y.index_add(0, chosen, delta)
    return y


def _oracle(
    tensors: LayerTensors, x: Tensor, grad: Tensor | None, has_lora: bool
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    stacks = [t.detach() for t in tensors.lora_stacks(ADAPTERS)] if has_lora else []

    def compute(x: Tensor, grad: Tensor | None, stacks: list[Tensor]) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_(grad is not None) for t in (x, *stacks)]
        with torch.set_grad_enabled(grad is not None):
            y = linear(leaves[0], tensors.dense_once(x.dtype))
            if stacks:
                y = added_up(y, *leaves, tensors)
            grads = torch.autograd.grad(y, leaves, grad) if grad is not None else ()
        return (y.detach(), *grads)

    return compute, (x, grad, stacks)


def _work(cell: Cell, contender: Contender) -> Work:
    """Returns the work of lora_linear, plus the reads of the factors of the other adapters and the
    writes of their gradients."""
    single = linear_work(cell, contender)
    if not contender.has_lora:
        return single
    others = min(ADAPTERS, cell.tokens) - 1
    lora = others * item_size(cell, contender) * cell.rank * (cell.out_features + cell.in_features)
    reads = {FORWARD: 1, BACKWARD: 1, TRAINING: 2}[cell.mode]
    writes = 0 if cell.mode == FORWARD else 1
    return Work(single.flop, single.bytes_read + reads * lora, single.bytes_written + writes * lora)


_OURS, _BASE_ONLY, _REFERENCE, *_ = contenders_torch.LORA

BENCH = Bench(
    op="multi_lora_linear",
    contenders=(
        Contender(_OURS.name, _pylora, _OURS.packages, is_ours=True),
        _BASE_ONLY,
        Contender(
            _REFERENCE.name, lambda tensors: on_reference(_pylora(tensors)), _REFERENCE.packages
        ),
        Contender("pylora nf4_linear, adapters one by one", _one_by_one, _OURS.packages),
        *contenders_torch.DENSE,
        *contenders_peers.mixed_batch(ADAPTERS, adapter_ids),
        *contenders_peers.LINEAR[:2],
    ),
    work=_work,
    oracle=_oracle,
    rank=16,
    shapes=((4096, 4096), (14336, 4096)),
    in_quick=False,
)
