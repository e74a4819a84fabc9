"""Stateless functions: each checks its arguments and calls one op of `torch.ops.pylora`.

Shapes follow torch: x [..., in_features], weight [out_features, in_features], lora_A [r,
in_features], lora_B [out_features, r]. Any leading dimensions and strides, empty batches included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pylora import checks
from pylora import ops as _ops  # noqa: F401  (registers torch.ops.pylora.*)
from pylora.nf4 import (
    DEFAULT_BLOCKSIZE,
    NF4Weight,
    absmax_shape,
    check_blocksize,
    packed_shape,
)
from pylora.reference.absmax import quantize_absmax


class Projection(NamedTuple):
    """One linear projection and its LoRA: weight [out_features, in_features] dense or NF4."""

    weight: Tensor | NF4Weight
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    scaling: float = 1.0
    bias: Tensor | None = None


def quantize_nf4(
    weight: Tensor, blocksize: int = DEFAULT_BLOCKSIZE, double_quant: bool = False
) -> NF4Weight:
    """Quantizes a tensor to NF4, bit for bit as bitsandbytes does on a CPU.

    weight        float32, float16 or bfloat16, any shape, usually [out_features, in_features]
    blocksize     elements that share one absmax: 32, 64, 128, ... or 4096
    double_quant  store the absmax values as 8-bit codes: 4.13 instead of 4.5 bits a weight at 64

    Raises TypeError for another dtype, ValueError for another blocksize or a non-finite element.
    Source: QLoRA, arXiv:2305.14314.
    """
    checks.quantizable("weight", weight)
    check_blocksize(blocksize)
    checks.finite("weight", weight)
    qweight, absmax = torch.ops.pylora.nf4_quantize(weight.detach(), blocksize)
    nested: dict[str, Any] = {}
    if double_quant:
        absmax, nested_absmax, nested_code, offset = quantize_absmax(absmax)
        nested = {"nested_absmax": nested_absmax, "nested_code": nested_code, "offset": offset}
    return NF4Weight(
        qweight.view(packed_shape(weight.shape, blocksize)),
        absmax.view(absmax_shape(weight.shape, blocksize)),
        weight.shape,
        weight.dtype,
        blocksize,
        **nested,
    )


def _dequantize_arguments(
    w: NF4Weight, dtype: torch.dtype | None = None
) -> tuple[str, tuple[Any, ...]]:
    checks.nf4_weight("w", w)
    checks.floating_dtype("dtype", dtype)
    return "nf4_dequantize", (*w.op_arguments(), list(w.shape), dtype or w.dtype)


def dequantize_nf4(w: NF4Weight, dtype: torch.dtype | None = None) -> Tensor:
    """The dense weight: code * absmax in fp32, rounded once to `dtype` (default: `w.dtype`).

    Raises TypeError where `w` is no NF4Weight or `dtype` no floating-point dtype.
    """
    return _call(_dequantize_arguments(w, dtype))


def _nf4_linear_arguments(
    x: Tensor, w: NF4Weight, bias: Tensor | None = None
) -> tuple[str, tuple[Any, ...]]:
    checks.nf4_weight("w", w)
    x = checks.activations("x", x, w.in_features, w.device, name_of_weight="w")
    checks.vector("bias", bias, w.out_features, x.device)
    return "nf4_linear", (x, *w.op_arguments(), w.out_features, bias)


def nf4_linear(x: Tensor, w: NF4Weight, bias: Tensor | None = None) -> Tensor:
    """y = x @ dequantize(w)^T + bias without materializing the dense weight.

    x       [..., in_features] floating point; under autocast it is cast to the autocast dtype
    w       NF4Weight [out_features, in_features]
    bias    [out_features]

    Returns [..., out_features] in x.dtype. Differentiable in x and bias.
    Raises TypeError or ValueError naming the argument that does not fit.
    """
    return _call(_nf4_linear_arguments(x, w, bias))


def _lora_linear_arguments(
    x: Tensor,
    weight: Tensor | NF4Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    activation: str | None = None,
    lora_A_bias: Tensor | None = None,
    lora_B_bias: Tensor | None = None,
) -> tuple[str, tuple[Any, ...]]:
    checks.weight("weight", weight)
    out_features, in_features = weight.shape
    x = checks.activations("x", x, in_features, weight.device, name_of_weight="weight")
    if isinstance(weight, NF4Weight):
        base = weight.op_arguments()
    else:
        base = (checks.same_dtype_as_x("weight", weight, x), None, None, None, None, 0, 0)
    checks.lora_pair(lora_A, lora_B, out_features, in_features, x.device)
    checks.vector("bias", bias, out_features, x.device)
    checks.vector("lora_A_bias", lora_A_bias, lora_A.shape[0], x.device, lora_A.dtype)
    checks.vector("lora_B_bias", lora_B_bias, out_features, x.device, lora_A.dtype)
    checks.probability("dropout_p", dropout_p)
    activation = checks.activation("activation", activation)
    return "lora_linear", (
        x,
        *base,
        out_features,
        lora_A,
        lora_B,
        bias,
        lora_A_bias,
        lora_B_bias,
        float(scaling),
        float(dropout_p),
        dropout_seed(seed, x.device) if dropout_p > 0.0 else None,
        activation,
    )


def lora_linear(
    x: Tensor,
    weight: Tensor | NF4Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    activation: str | None = None,
    lora_A_bias: Tensor | None = None,
    lora_B_bias: Tensor | None = None,
) -> Tensor:
    """y = x @ W^T + bias + scaling * (act(dropout(x) @ lora_A^T + lora_A_bias) @ lora_B^T +
    lora_B_bias).

    x           [..., in_features] floating point; under autocast it is cast to the autocast dtype
    weight      [out_features, in_features], an NF4Weight or a tensor of x's dtype
    lora_A      [r, in_features] and lora_B [out_features, r], of one dtype, which may differ from
                x's
    scaling     alpha / r (rsLoRA: alpha / sqrt(r))
    dropout_p   probability of dropping an element of x on the low-rank path only, in [0, 1)
    seed        int or int64 scalar tensor that fixes the mask; drawn from torch's generator where
                None
    activation  None (LoRA), "relu", "gelu", "gelu_tanh", "silu", "tanh" or "sigmoid" (parallel
                adapter)

    Returns [..., out_features] in x.dtype. Differentiable in x, a dense weight, lora_A, lora_B and
    biases; the backward keeps x and the [..., r] projection, and regenerates the mask.
    Raises TypeError or ValueError naming the argument that does not fit.
    Source: LoRA, arXiv:2106.09685; parallel adapter, arXiv:2110.04366.
    """
    return _call(
        _lora_linear_arguments(
            x,
            weight,
            lora_A,
            lora_B,
            scaling,
            bias,
            dropout_p,
            seed,
            activation,
            lora_A_bias,
            lora_B_bias,
        )
    )[0]


def dropout_seed(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """The int64 scalar tensor of `seed`, drawn from torch's default generator where it is None."""
    if seed is None:
        return torch.randint(2**62, (), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise TypeError(
                f"seed is a {seed.dtype} tensor of {seed.numel()} elements; "
                "it must be an int or an int64 tensor of one element"
            )
        return seed.reshape(()).to(device)
    return torch.tensor(seed, dtype=torch.int64, device=device)


def _call(op_and_arguments: tuple[str, tuple[Any, ...]]) -> Any:
    op, arguments = op_and_arguments
    return getattr(torch.ops.pylora, op).default(*arguments)


def _quantize_arguments(
    weight: Tensor, blocksize: int = DEFAULT_BLOCKSIZE, double_quant: bool = False
) -> tuple[str, tuple[Any, ...]]:
    checks.quantizable("weight", weight)
    check_blocksize(blocksize)
    return "nf4_quantize", (weight, blocksize)


# For `pylora.explain`: public function -> the op it calls and that op's arguments.
OP_ARGUMENTS: dict[str, Callable[..., tuple[str, tuple[Any, ...]]]] = {
    "quantize_nf4": _quantize_arguments,
    "dequantize_nf4": _dequantize_arguments,
    "nf4_linear": _nf4_linear_arguments,
    "lora_linear": _lora_linear_arguments,
}
