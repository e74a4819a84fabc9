"""The bench of an op of several linear layers, made from the contenders for a single layer."""

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
    BuiltLayer,
    Contender,
    Work,
    item_size,
    linear_work,
    weight_bytes,
)
from benchmarks.contenders_torch import explained, on_reference
from benchmarks.layer_tensors import LayerTensors
from benchmarks.shapes import BACKWARD, FORWARD, TRAINING, Cell
from pylora.functional import Projection

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Composition:
    """How an op is made of linear layers.

    op        the name of a function in pylora.functional that takes x and a Projection a layer
    layers    the cell of the op -> the cell of each layer
    combine   (the forward of each layer, x) -> the result of the op
    outputs   how many results the op returns
    split     (random gradient, the cells of the layers) -> the gradient of each result
    """

    op: str
    layers: Callable[[Cell], tuple[Cell, ...]]
    combine: Callable[[Sequence[Forward], Tensor], Any]
    outputs: int = 1
    split: Callable[[Tensor, Sequence[Cell]], Any] = lambda grad, layers: grad

    def parts(self, tensors: LayerTensors) -> list[LayerTensors]:
        """Returns the tensors of each layer, which are made once."""

        def make() -> list[LayerTensors]:
            return [tensors.another(cell) for cell in self.layers(tensors.cell)]

        return tensors.remembered(f"{self.op} parts", make)

    def grads(self, tensors: LayerTensors) -> Callable[[Tensor], Any]:
        """Returns a function from a random gradient to the gradients of all results."""
        return lambda grad: self.split(grad, self.layers(tensors.cell))

    def fused(self, tensors: LayerTensors) -> BuiltLayer:
        """Builds the op of pylora itself."""
        function = getattr(pylora.functional, self.op)
        projections = [
            Projection(part.nf4(), *part.lora(), part.scaling) for part in self.parts(tensors)
        ]
        parameters = [t for p in projections for t in (p.lora_A, p.lora_B) if t is not None]
        return BuiltLayer(
            lambda x: function(x, *projections),
            lambda x: explained(self.op, x, *projections),
            tuple(parameters),
            grads=self.grads(tensors),
        )

    def of_single_layers(self, contender: Contender, name: str | None = None) -> Contender:
        """Returns a contender that calls single layers of `contender` one after the other."""

        def build(tensors: LayerTensors) -> BuiltLayer:
            layers = [contender.build(part) for part in self.parts(tensors)]
            return BuiltLayer(
                lambda x: self.combine([layer.forward for layer in layers], x),
                lambda x: f"{layers[0].variant(x)}, layer by layer",
                tuple(parameter for layer in layers for parameter in layer.parameters),
                backend=layers[0].backend,
                environment=layers[0].environment,
                grads=self.grads(tensors),
            )

        return replace(contender, build=build, name=name or contender.name, is_ours=False)

    def oracle(
        self, tensors: LayerTensors, x: Tensor, grad: Tensor | None, has_lora: bool
    ) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Returns (function, its arguments): the op in plain torch over the dequantized weights."""
        parts = self.parts(tensors)
        pairs = [tuple(t.detach() for t in part.lora()) if has_lora else () for part in parts]

        def compute(x: Tensor, grad: Tensor | None, pairs: list[tuple[Tensor, ...]]) -> Any:
            x = x.detach().requires_grad_(grad is not None)
            pairs = [tuple(t.detach().requires_grad_() for t in pair) for pair in pairs]

            def forward_of(part: LayerTensors, pair: tuple[Tensor, ...]) -> Forward:
                def forward(x: Tensor) -> Tensor:
                    y = linear(x, part.dense_once(x.dtype))
                    return y + part.scaling * linear(linear(x, pair[0]), pair[1]) if pair else y

                return forward

            with torch.set_grad_enabled(grad is not None):
                y = self.combine(
                    [
                        forward_of(*part_and_pair)
                        for part_and_pair in zip(parts, pairs, strict=True)
                    ],
                    x,
                )
                outputs = y if isinstance(y, tuple) else (y,)
                if grad is None:
                    return outputs
                leaves = [x, *(t for pair in pairs for t in pair)]
                grads = torch.autograd.grad(y, leaves, self.grads(tensors)(grad))
            return (*(t.detach() for t in outputs), *grads)

        return compute, (x, grad, pairs)

    def work(self, cell: Cell, contender: Contender) -> Work:
        """Returns the least work of the op.

        All layers have to be computed. Each weight and x have to be read once, and y and the
        gradients written once. What passes from layer to layer may stay in the cache, or may be
        computed again, and does not count.
        """
        layers, size = self.layers(cell), item_size(cell, contender)
        r = cell.rank if contender.has_lora else 0
        lora = size * r * sum(layer.out_features + layer.in_features for layer in layers)
        weights = sum(weight_bytes(layer, contender) for layer in layers) + lora
        x, y = size * cell.tokens * cell.in_features, size * cell.tokens * cell.result_features
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
        """Returns the bench of the op. torchao is left out, since it has a weight of its own: the
        oracle here is over our weights."""
        ours, base_only, reference, *others = contenders_torch.LORA
        peers = [c for c in contenders_peers.LORA if "torchao" not in c.packages]
        return Bench(
            op=self.op,
            contenders=(
                replace(ours, build=self.fused),
                self.of_single_layers(ours, "pylora, lora_linear one by one"),
                self.of_single_layers(base_only),
                replace(reference, build=lambda tensors: on_reference(self.fused(tensors))),
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
