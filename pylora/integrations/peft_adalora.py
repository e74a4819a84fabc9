"""PEFT's AdaLoRA layers over pylora's kernels.

    y = base(x) + scaling / (ranknum + 1e-5) * (dropout(x) @ (lora_A * lora_E)^T) @ lora_B^T

The product of lora_A and the factors in front of it is the A of one fused op. Source: AdaLoRA,
arXiv:2303.10512.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pylora import functional
from pylora.dropout import dropout_seed
from pylora.integrations.peft_base import (
    Parts,
    PeftSwap,
    drop_rate,
    in_compute_dtype,
    in_dtype_of_base,
    why_not_called,
    why_not_input,
)


class AdaLoraSwap(PeftSwap):
    """PEFT's SVDLinear or SVDLinear4bit: base and adapter in one op."""

    def parts_of(self, module: Any, name: str) -> Parts:
        A, B, dropout = module.lora_A[name], module.lora_B[name], module.lora_dropout[name]
        return Parts(module.base_layer, A, B, dropout)

    def why_not_fused(self, module: Any, active: Sequence[str], parts: Parts, x: Any) -> str | None:
        if parts.A.shape[0] == 0:
            return "its rank is 0"
        why_not = why_not_called((parts.base, parts.dropout), parts.dropout)
        return why_not or why_not_input(module, parts.base, x)

    def with_base(self, module: Any, name: str, parts: Parts, x: Tensor) -> Tensor:
        base, _, B, dropout = parts
        weight = self.weight_of(base)
        given = in_compute_dtype(base, x)
        p = drop_rate(dropout)
        arguments = {
            "lora_A": _scaled_A(module, name),
            "lora_B": B,
            "scaling": 1.0,
            "bias": base.bias,
            "dropout_p": p,
            "seed": dropout_seed(None, x.device) if p else None,
        }
        y = functional.lora_linear(given, weight, **arguments)
        if self.must_verify():
            self.verify(y, functional.lora_linear, weight, given.to(y.dtype), **arguments)
        return in_dtype_of_base(base, y, x)

    def without_base(self, module: Any, name: str, x: Tensor) -> Tensor:
        B = module.lora_B[name]
        dropped: Tensor = module.lora_dropout[name](x.to(B.dtype))
        return dropped @ _scaled_A(module, name).T @ B.T


def _scaled_A(module: Any, name: str) -> Tensor:
    """The lora_A [r, in_features] that gives what AdaLoRA adds with a scaling of 1.

    The number of ranks is a tensor: reading it as a number would wait for the device.
    """
    A, E = module.lora_A[name], module.lora_E[name]
    scaling = module.scaling[name] / (module.ranknum[name] + 1e-5)
    scaled: Tensor = A * (E * scaling).to(A.dtype)
    return scaled
