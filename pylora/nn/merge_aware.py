"""Merge-aware LoRA: the forward computes with the very weight that a merge into NF4 would write.

    y = x Q(W + scaling B A)^T + bias

Q quantizes to the base's format, with its blocksize and double quantization, so that the merged
4-bit model is the trained one, bit for bit. Q is flat almost everywhere. The gradients of A and B
pass it as if it were the identity (a straight-through estimator): with G = grad^T x,

    dA = scaling B^T G = scaling (grad B)^T x,    dB = scaling G A^T = scaling grad^T (x A^T),

and the gradient of x goes through the quantized weight, grad Q(W + scaling B A), which is exact.

Each forward dequantizes, adds and quantizes the whole weight, for which it needs an fp32 copy of
the layer's weight for a while; the backward has the products of a low-rank path.
Source: straight-through estimators, Bengio et al., arXiv:1308.3432. QA-LoRA (arXiv:2309.14717)
merges without loss by restricting A instead, and LoftQ (arXiv:2310.08659) quantizes W knowing LoRA.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pylora.backends.backend import autocast_off
from pylora.functional import nf4_linear, quantize_nf4
from pylora.nf4_weight import NF4Weight


@torch.no_grad()
def requantized(base: NF4Weight, weight: Tensor) -> NF4Weight:
    """A dense weight in the format of `base`; the base itself if it has these very values.

    weight    fp32 [out_features, in_features]
    """
    if torch.equal(weight, base.dequantize(torch.float32)):
        return base  # nothing was trained; requantizing would only add an error
    return replace(quantize_nf4(weight, base.blocksize, base.double_quant), dtype=base.dtype)


def merge_aware_linear(
    x: Tensor,
    merged: NF4Weight,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
) -> Tensor:
    """y [..., out_features] of a layer with the weight `merged`, which is Q(W + scaling B A)."""
    y = nf4_linear(x, merged, bias)
    return _StraightThrough.apply(y, x, lora_A, lora_B, scaling)


class _StraightThrough(torch.autograd.Function):
    """Returns y, and gives A and B the gradients that they have if Q is the identity."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, x, lora_A, lora_B, ctx.scaling = inputs
        ctx.save_for_backward(x, lora_A, lora_B)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, lora_A, lora_B = ctx.saved_tensors
        _, _, wants_A, wants_B, _ = ctx.needs_input_grad
        of_A = of_B = None
        tokens = x.reshape(-1, x.shape[-1]).to(lora_A.dtype)
        of_y = grad.reshape(-1, grad.shape[-1]).to(lora_B.dtype)
        with autocast_off(x.device.type):
            if wants_A:
                of_A = ctx.scaling * ((of_y @ lora_B).t() @ tokens)
            if wants_B:
                of_B = ctx.scaling * (of_y.t() @ (tokens @ lora_A.t()))
        return grad, None, of_A, of_B, None
