"""Fresh random operands of a layer. Whoever asks gets memory of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import pylora
from benchmarks.shapes import Cell
from pylora import NF4Weight, reference

SCALING = 0.5


class Operands:
    """The weight of one shape, dense and in NF4, and its LoRA; every method returns a copy.

    Copies let each contender rotate over memory that nobody else touches; what is costly to make
    is made once and remembered.
    """

    def __init__(self, cell: Cell, device: torch.device, seed: int, real: bool = True) -> None:
        """`real` quantizes random numbers; otherwise the packed bytes themselves are random, which
        is faster and enough to measure memory."""
        self.cell, self.device = cell, device
        self._generator = torch.Generator(device).manual_seed(seed)
        self._remembered: dict[str, Any] = {}
        self._real = real
        self.scaling = SCALING

    def another(self, cell: Cell) -> Operands:
        """Operands of another shape, of random data of their own."""
        seed = int(torch.randint(2**31, (), generator=self._generator, device=self.device))
        return Operands(cell, self.device, seed, self._real)

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.cell.dtype)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.randn(*shape, generator=self._generator, device=self.device)
        return (values * scale).to(dtype or self.dtype)

    def remembered(self, key: str, make: Callable[[], Any]) -> Any:
        if key not in self._remembered:
            self._remembered[key] = make()
        return self._remembered[key]

    def source(self) -> Tensor:
        """The weight before it is quantized, [out_features, in_features]."""
        return self._source().clone()

    def nf4(self) -> NF4Weight:
        return self.remembered("nf4", self._quantized).map_tensors(torch.clone)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """What the NF4 weight stands for, dequantized to `dtype`."""
        return self.dense_once(dtype).clone()

    def dense_once(self, dtype: torch.dtype) -> Tensor:
        """The same in memory shared by all who ask: to read, by the reference, exact in float64."""

        def dequantized() -> Tensor:
            w = self.nf4()
            return reference.dense(w.record, dtype)

        return self.remembered(f"dense {dtype}", dequantized)

    def lora(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """lora_A [r, in_features] and lora_B [out_features, r], both trainable.

        B is not zero as at the start of a training: its part of the result must count.
        """
        return self._factors("lora", (), dtype)

    def lora_stacks(self, adapters: int) -> tuple[Tensor, Tensor]:
        """The same of many adapters: lora_A [adapters, r, in_features] and lora_B."""
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
