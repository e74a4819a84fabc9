"""A linear layer with a low-rank path, forward and backward, in pure PyTorch.

    xd = dropout(x)                                  regenerated from a seed
    h  = xd @ lora_A^T + lora_A_bias                 [..., r], before the activation
    y  = x @ W^T + bias + scaling * (act(h) @ lora_B^T + lora_B_bias)

With the identity this is LoRA (Hu et al., arXiv:2106.09685); with a nonlinearity it is the parallel
adapter (He et al., arXiv:2110.04366). W is dense [out_features, in_features] or NF4.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from pylora.reference.activation import ACTIVATIONS
from pylora.reference.dropout import dropout
from pylora.reference.nf4_linear import nf4_linear, nf4_linear_backward
from pylora.reference.rows import as_rows


def lora_linear(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    nested_blocksize: int,
    out_features: int,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    lora_A_bias: Tensor | None,
    lora_B_bias: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Returns y [..., out_features] in x.dtype and h [..., r] in fp32 (float64 for float64
    weights).

    The low-rank path runs in the dtype of lora_A, as PEFT runs it.
    """
    if absmax is None:
        base = linear(x, weight, None if bias is None else bias.to(x.dtype))
    else:
        q = (weight, absmax, nested_absmax, nested_code, offset, blocksize, nested_blocksize)
        base = nf4_linear(x, *q, out_features, bias)
    h = linear(dropout(x.to(lora_A.dtype), dropout_p, seed), lora_A, lora_A_bias)
    delta = linear(ACTIVATIONS[activation].forward(h), lora_B, lora_B_bias) * scaling
    return (base + delta).to(x.dtype), h.to(torch.promote_types(h.dtype, torch.float32))


def lora_linear_backward(
    grad: Tensor,
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    nested_blocksize: int,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    activation: str,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (x, weight, lora_A, lora_B, bias, lora_A_bias, lora_B_bias).

    dlora_B = scaling grad^T act(h);  dh = (scaling grad @ lora_B) * act'(h);  dlora_A = dh^T xd;
    dx = grad @ W + mask / (1 - p) * (dh @ lora_A). What `output_mask` leaves out is an empty tensor
    [0].
    """
    want_x, want_weight, want_A, want_B, want_bias, want_A_bias, want_B_bias = output_mask
    act = ACTIVATIONS[activation]
    flat_grad = as_rows(grad)
    scaled = flat_grad.to(lora_A.dtype) * scaling
    h = as_rows(h).to(lora_A.dtype)
    dh = act.backward(scaled @ lora_B, h)

    # Tensors of their own: an op's results must not share memory, not even when empty.
    dx, dweight, dlora_A, dlora_B, dbias, dA_bias, dB_bias = (x.new_empty(0) for _ in output_mask)
    if want_A:
        xd = as_rows(dropout(x.to(lora_A.dtype), dropout_p, seed))
        dlora_A = dh.t() @ xd
    if want_x:
        if absmax is None:
            base = grad @ weight
        else:
            q = (weight, absmax, nested_absmax, nested_code, offset, blocksize, nested_blocksize)
            base = nf4_linear_backward(grad, *q, x.shape[-1])
        dx = (base + dropout((dh @ lora_A).view(x.shape), dropout_p, seed)).to(x.dtype)
    if want_weight:
        dweight = flat_grad.t() @ as_rows(x)
    if want_B:
        dlora_B = scaled.t() @ act.forward(h)
    if want_bias:
        dbias = flat_grad.sum(0)
    if want_A_bias:
        dA_bias = dh.sum(0)
    if want_B_bias:
        dB_bias = scaled.sum(0)
    return dx, dweight, dlora_A, dlora_B, dbias, dA_bias, dB_bias
