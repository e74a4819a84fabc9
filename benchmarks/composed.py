"""Ops of several linear layers: their contenders out of those for one layer, oracle and work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

import pylora
from benchmarks import contenders_peers, contenders_torch
from benchmarks.contender import (
    Bench,
    Contender,
    Layer,
    Work,
    item_size,
    linear_work,
    weight_bytes,
)
from benchmarks.contenders_torch import explained, on_reference
from benchmarks.operands import Operands
from benchmarks.shapes import BACKWARD, FORWARD, TRAINING, Cell
from pylora.functional import Projection

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Composition:
    """How an op is made of linear layers.

    op        the function of pylora.functional; it takes x and a Projection for each layer
    layers    cell -> the layers in it
    combine   (forward of each layer, x) -> the op's result
    outputs   results of the op
    split     gradient as drawn, layers -> one for each result
    """

    op: str
    layers: Callable[[Cell], tuple[Cell, ...]]
    combine: Callable[[Sequence[Forward], Tensor], Any]
    outputs: int = 1
    split: Callable[[Tensor, Sequence[Cell]], Any] = lambda grad, layers: grad

    def parts(self, operands: Operands) -> list[Operands]:
        """Operands of each layer, made once."""

        def make() -> list[Operands]:
            return [operands.another(cell) for cell in self.layers(operands.cell)]

        return operands.remembered("parts", make)

    def grads(self, operands: Operands) -> Callable[[Tensor], Any]:
        return lambda grad: self.split(grad, self.layers(operands.cell))

    def fused(self, operands: Operands) -> Layer:
        """The op of pylora itself."""
        function = getattr(pylora.functional, self.op)
        projections = [
            Projection(part.nf4(), *part.lora(), part.scaling) for part in self.parts(operands)
        ]
        parameters = [t for p in projections for t in (p.lora_A, p.lora_B) if t is not None]
        return Layer(
            lambda x: function(x, *projections),
            lambda x: explained(self.op, x, *projections),
            tuple(parameters),
            grads=self.grads(operands),
        )

    def of_single_layers(self, contender: Contender, name: str | None = None) -> Contender:
        """The op from `contender`'s single layers, called one after the other."""

        def build(operands: Operands) -> Layer:
            layers = [contender.build(part) for part in self.parts(operands)]
            return Layer(
                lambda x: self.combine([layer.forward for layer in layers], x),
                lambda x: f"{layers[0].path(x)}, layer by layer",
                tuple(parameter for layer in layers for parameter in layer.parameters),
                backend=layers[0].backend,
                environment=layers[0].environment,
                grads=self.grads(operands),
            )

        return replace(contender, build=build, name=name or contender.name, is_ours=False)

    def oracle(
        self, operands: Operands, x: Tensor, grad: Tensor | None, has_lora: bool
    ) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Plain torch and autograd over the dense weights that NF4 stands for."""
        parts = self.parts(operands)
        pairs = [tuple(t.detach() for t in part.lora()) if has_lora else () for part in parts]

        def compute(x: Tensor, grad: Tensor | None, pairs: list[tuple[Tensor, ...]]) -> Any:
            x = x.detach().requires_grad_(grad is not None)
            pairs = [tuple(t.detach().requires_grad_() for t in pair) for pair in pairs]

            def forward_of(part: Operands, pair: tuple[Tensor, ...]) -> Forward:
                def forward(x: Tensor) -> Tensor:
                    y = linear(x, part.dense_once(x.dtype))
                    return y + part.scaling * linear(linear(x, pair[0]), pair[1]) if pair else y

                return forward

            with torch.set_grad_enabled(grad is not None):
                y = self.combine([forward_of(*each) for each in zip(parts, pairs, strict=True)], x)
                outputs = y if isinstance(y, tuple) else (y,)
                if grad is None:
                    return outputs
                leaves = [x, *(t for pair in pairs for t in pair)]
                found = torch.autograd.grad(y, leaves, self.grads(operands)(grad))
            return (*(t.detach() for t in outputs), *found)

        return compute, (x, grad, pairs)

    def work(self, cell: Cell, contender: Contender) -> Work:
        """The FLOP of every layer; each weight and x are read and y written once, and so are the
        gradients. What passes from layer to layer may stay in the cache or be computed again."""
        layers, size = self.layers(cell), item_size(cell, contender)
        r = cell.rank if contender.has_lora else 0
        lora = size * r * sum(layer.out_features + layer.in_features for layer in layers)
        weights = sum(weight_bytes(layer, contender) for layer in layers) + lora
        x, y = size * cell.rows * cell.in_features, size * cell.rows * cell.result_features
        flop = sum(linear_work(layer, contender).flop for layer in layers)
        forward = Work(flop, weights + x, y)
        backward = Work(flop, weights + y + (x if r else 0), x + lora)
        if cell.mode == TRAINING:
            read, written = (
                getattr(forward, f) + getattr(backward, f) for f in ("bytes_read", "bytes_written")
            )
            return Work(flop, read, written)
        return forward if cell.mode == FORWARD else backward

    def bench(self, shapes: tuple[tuple[int, int], ...]) -> Bench:
        """torchao is absent: its own weight is not ours, and the oracle of a composition is."""
        ours, base_only, reference, *others = contenders_torch.LORA
        peers = [c for c in contenders_peers.LORA if "torchao" not in c.packages]
        return Bench(
            op=self.op,
            contenders=(
                replace(ours, build=self.fused),
                self.of_single_layers(ours, "pylora, lora_linear one by one"),
                self.of_single_layers(base_only),
                replace(reference, build=lambda operands: on_reference(self.fused(operands))),
                *(self.of_single_layers(contender) for contender in (*others, *peers)),
            ),
            work=self.work,
            oracle=self.oracle,
            rank=16,
            quick_modes=(FORWARD, BACKWARD, TRAINING),
            layers=self.layers,
            outputs=self.outputs,
            shapes=shapes,
            in_quick=False,
        )
