"""Random weights of a layer. Everyone who asks for one gets a copy of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import pylora
from benchmarks.shapes import Cell
from pylora import NF4Weight, reference

SCALING = 0.5


class LayerTensors:
    """A random weight of one shape, dense and in NF4, with LoRA factors.

    Every method returns a copy, unless it says otherwise, so that each contender can be timed over
    memory that no other contender touches. What takes long to make is made once and kept.
    """

    def __init__(self, cell: Cell, device: torch.device, seed: int, real: bool = True) -> None:
        """If `real` is set, the NF4 weight is a quantized random weight. Otherwise its packed bytes
        are random, which is faster and enough to measure memory."""
        self.cell, self.device = cell, device
        self._seed = seed
        self._generator = torch.Generator(device).manual_seed(seed)
        self._remembered: dict[str, Any] = {}
        self._real = real
        self.scaling = SCALING

    def another(self, cell: Cell) -> LayerTensors:
        """Returns the tensors of another cell, with random numbers of their own."""
        seed = int(torch.randint(2**31, (), generator=self._generator, device=self.device))
        return LayerTensors(cell, self.device, seed, self._real)

    @contextmanager
    def seeded(self) -> Iterator[None]:
        """Puts torch's own generators in the same state whenever it is entered, and puts the old
        state back at the end. A layer that draws from them draws the same numbers each time."""
        with torch.random.fork_rng():
            torch.manual_seed(self._seed)
            yield

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.cell.dtype)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Draws normally distributed numbers, by default in the dtype of the cell."""
        values = torch.randn(*shape, generator=self._generator, device=self.device)
        return (values * scale).to(dtype or self.dtype)

    def remembered(self, key: str, make: Callable[[], Any]) -> Any:
        """Returns what `make` returned for the first call with this key; not a copy. Ops share the
        tensors of a shape, and so what belongs to one op needs a key that names it."""
        if key not in self._remembered:
            self._remembered[key] = make()
        return self._remembered[key]

    def source(self) -> Tensor:
        """Returns the weight before it is quantized, [out_features, in_features]."""
        return self._source().clone()

    def nf4(self) -> NF4Weight:
        return self.remembered("nf4", self._quantized).map_tensors(torch.clone)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Returns the NF4 weight dequantized to `dtype`."""
        return self.dense_once(dtype).clone()

    def dense_once(self, dtype: torch.dtype) -> Tensor:
        """Returns the NF4 weight dequantized to `dtype`, not as a copy: it must only be read. In
        float64 it is exact."""

        def dequantized() -> Tensor:
            w = self.nf4()
            return reference.dense(w.record, dtype)

        return self.remembered(f"dense {dtype}", dequantized)

    def lora(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Returns lora_A [r, in_features] and lora_B [out_features, r], both trainable.

        B is not zero, as it would be at the start of a training, so that an error in the low-rank
        path shows in the result.
        """
        return self._factors("lora", (), dtype)

    def lora_stacks(self, adapters: int) -> tuple[Tensor, Tensor]:
        """Returns the factors of many adapters: lora_A [adapters, r, in_features] and lora_B
        [adapters, out_features, r], both trainable."""
        return self._factors(f"lora of {adapters}", (adapters,), None)

    def _factors(
        self, key: str, stack: tuple[int, ...], dtype: torch.dtype | None
    ) -> tuple[Tensor, Tensor]:
        n, k, r = self.cell.out_features, self.cell.in_features, self.cell.rank

        def draw() -> tuple[Tensor, Tensor]:
            return self.normal(*stack, r, k, scale=k**-0.5), self.normal(*stack, n, r, scale=0.3)

        pair = self.remembered(key, draw)
        a, b = (t.detach().clone().to(dtype or t.dtype).requires_grad_() for t in pair)
        return a, b

    def _source(self) -> Tensor:
        n, k = self.cell.out_features, self.cell.in_features
        if self._real:
            return self.remembered("source", lambda: self.normal(n, k, scale=k**-0.5))
        return self.remembered(
            "source", lambda: torch.full((n, k), 0.01, dtype=self.dtype, device=self.device)
        )

    def _quantized(self) -> NF4Weight:
        if self._real:
            return pylora.quantize_nf4(self._source())
        n, k = self.cell.out_features, self.cell.in_features
        if k % 64:
            return pylora.quantize_nf4(self._source())
        packed = torch.randint(
            256, (n, k // 2), dtype=torch.uint8, device=self.device, generator=self._generator
        )
        absmax = torch.full((n, k // 64), 0.05, device=self.device)
        return NF4Weight(packed, absmax, torch.Size((n, k)), self.dtype)
