"""Stateless functions: each checks its arguments, builds one call record and runs it.

Shapes follow torch: x [..., in_features], weight [out_features, in_features], lora_A [r,
in_features], lora_B [out_features, r]. x may have any leading dimensions, any strides and no
tokens.

Inside transforms of torch.func, such as `grad`, `jvp` and `vmap`, and in forward-mode AD, a call
runs as operations of PyTorch over the decoded weight, with derivatives of any order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pylora import checks
from pylora.bottleneck import (
    AdapterTensors,
    bottleneck_adapter_call,
    multi_bottleneck_adapter_call,
)
from pylora.calls import (
    Adapters,
    DequantizeCall,
    Layer,
    LoraLinearCall,
    LoraMlpCall,
    LoraQkvCall,
    LowRank,
    MultiLoraCall,
    Nf4LinearCall,
    Norm,
    QuantizeCall,
)
from pylora.dropout import dropout_of
from pylora.nf4 import DEFAULT_BLOCKSIZE, absmax_shape, check_blocksize, packed_shape
from pylora.nf4_weight import NF4Weight
from pylora.ops import run, run_output
from pylora.projections import Projection, base_weight, input_of, layers_of
from pylora.reference.absmax import quantize_absmax


def quantize_nf4(
    weight: Tensor, blocksize: int = DEFAULT_BLOCKSIZE, double_quant: bool = False
) -> NF4Weight:
    """Quantizes a tensor to NF4, bit for bit as bitsandbytes does on a CPU.

    weight        float32, float16 or bfloat16, any shape, usually [out_features, in_features]
    blocksize     elements that share one absmax: 32, 64, 128, ... or 4096
    double_quant  stores the absmax values as 8-bit codes: 4.13 instead of 4.5 bits per weight if
                  the blocksize is 64

    Returns an NF4Weight on the same device. Raises TypeError for another dtype, ValueError for
    another blocksize or a non-finite element.
    Source: QLoRA, arXiv:2305.14314.
    """
    call = _quantize_call(weight, blocksize, double_quant)
    checks.finite("weight", weight)
    qweight, absmax = run(call)
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


def _quantize_call(
    weight: Tensor, blocksize: int = DEFAULT_BLOCKSIZE, double_quant: bool = False
) -> QuantizeCall:
    checks.quantizable("weight", weight)
    check_blocksize(blocksize)
    return QuantizeCall(weight.detach(), blocksize)


def _dequantize_call(w: NF4Weight, dtype: torch.dtype | None = None) -> DequantizeCall:
    checks.nf4_weight("w", w)
    dtype = w.dtype if dtype is None else dtype
    checks.floating_dtype("dtype", dtype)
    return DequantizeCall(w.record, tuple(w.shape), dtype)


def dequantize_nf4(w: NF4Weight, dtype: torch.dtype | None = None) -> Tensor:
    """The dense weight of `w.shape`: code * absmax in fp32, rounded once to `dtype`.

    w        NF4Weight
    dtype    float16, bfloat16, float32 or float64; `w.dtype` if None

    Raises TypeError if `w` is no NF4Weight or `dtype` is another dtype.
    Source: QLoRA, arXiv:2305.14314.
    """
    return run(_dequantize_call(w, dtype))


def _nf4_linear_call(x: Tensor, w: NF4Weight, bias: Tensor | None = None) -> Nf4LinearCall:
    checks.nf4_weight("w", w)
    checks.matrix("w", w)
    x = checks.activations("x", x, w.in_features, w.device, name_of_weight="w")
    checks.vector("bias", bias, w.out_features, x.device)
    return Nf4LinearCall(x, Layer(w.record, bias))


def nf4_linear(x: Tensor, w: NF4Weight, bias: Tensor | None = None) -> Tensor:
    """y = x @ dequantize(w)^T + bias, without a dense copy of the whole weight.

    x       [..., in_features] floating point; under autocast it is cast to the autocast dtype
    w       NF4Weight [out_features, in_features]
    bias    [out_features]; None without a bias

    Returns [..., out_features] in x.dtype. It can be differentiated in x and bias, also twice.
    Raises TypeError or ValueError that names the argument that does not fit.
    Source: QLoRA, arXiv:2305.14314.
    """
    return run(_nf4_linear_call(x, w, bias))


def _lora_linear_call(
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
) -> LoraLinearCall:
    checks.weight("weight", weight)
    out_features, in_features = weight.shape
    x = checks.activations("x", x, in_features, weight.device, name_of_weight="weight")
    base = base_weight("weight", weight, x)
    checks.lora_pair(lora_A, lora_B, out_features, in_features, x.device)
    checks.vector("bias", bias, out_features, x.device)
    checks.vector("lora_A_bias", lora_A_bias, lora_A.shape[0], x.device, lora_A.dtype)
    checks.vector("lora_B_bias", lora_B_bias, out_features, x.device, lora_A.dtype)
    dropout = dropout_of(dropout_p, seed, x)
    activation = checks.activation("activation", activation)
    checks.number("scaling", scaling)
    low_rank = LowRank(
        checks.low_rank(lora_A, x),
        checks.low_rank(lora_B, x),
        checks.low_rank(lora_A_bias, x),
        checks.low_rank(lora_B_bias, x),
        float(scaling),
        activation,
        dropout,
    )
    return LoraLinearCall(x, Layer(base, bias, low_rank))


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
    """A linear layer with LoRA or with a parallel adapter, in one op.

        h = dropout(x) @ lora_A^T + lora_A_bias
        y = x @ W^T + bias + scaling * (act(h) @ lora_B^T + lora_B_bias)

    x            [..., in_features] floating point; under autocast it is cast to the autocast dtype
    weight       [out_features, in_features], an NF4Weight or a tensor of x's dtype
    lora_A       [r, in_features]
    lora_B       [out_features, r], of lora_A's dtype, which may differ from x's
    scaling      alpha / r (rsLoRA: alpha / sqrt(r))
    bias         [out_features]; None without a bias
    dropout_p    probability of dropping an element of x on the low-rank path only, in [0, 1)
    seed         int or int64 scalar tensor that fixes the mask; drawn from torch's generator if
                 None
    activation   None for LoRA; "relu", "gelu", "gelu_tanh", "silu", "tanh" or "sigmoid" for a
                 parallel adapter, also by transformers' names: "swish", "gelu_pytorch_tanh",
                 "gelu_new"
    lora_A_bias  [r], of lora_A's dtype; None without a bias
    lora_B_bias  [out_features], of lora_A's dtype; None without a bias

    Returns y [..., out_features] in x.dtype. It can be differentiated once in x, a dense weight,
    lora_A, lora_B and the biases. The backward keeps x and h [..., r], and regenerates the mask.
    Raises TypeError or ValueError that names the argument that does not fit.
    Source: LoRA, arXiv:2106.09685; parallel adapter, arXiv:2110.04366.
    """
    call = _lora_linear_call(
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
    return run_output(call)


def _lora_qkv_call(
    x: Tensor,
    q: Projection,
    k: Projection,
    v: Projection,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> LoraQkvCall:
    projections = {"q": q, "k": k, "v": v}
    x = input_of(projections, x)
    dropout = dropout_of(dropout_p, seed, x)
    in_features = dict.fromkeys(projections, x.shape[-1])
    return LoraQkvCall(x, layers_of(projections, x, in_features, dropout))


def lora_qkv(
    x: Tensor,
    q: Projection,
    k: Projection,
    v: Projection,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The query, key and value projections of x, each with or without LoRA, in one op.

    x            [..., in_features] floating point; under autocast it is cast to the autocast dtype
    q, k, v      Projections over weights [out_features, in_features], NF4 or dense; they may differ
                 in out_features, rank, blocksize and scaling
    dropout_p    probability of dropping an element of x on each low-rank path, in [0, 1)
    seed         int or int64 scalar tensor; drawn from torch's generator if None. q, k and v
                 draw independent masks: they equal `lora_linear` with the seeds seed, seed + 1 and
                 seed + 2

    Returns (q, k, v), each [..., out_features] in x.dtype. It can be differentiated once in x,
    dense weights, lora_A, lora_B and biases. The backward keeps x once, and the h [..., r] of each.
    Raises TypeError or ValueError that names the argument that does not fit. Source: LoRA,
    arXiv:2106.09685.
    """
    (query, key, value), _ = run(_lora_qkv_call(x, q, k, v, dropout_p, seed))
    return query, key, value


def _lora_mlp_call(
    x: Tensor,
    gate: Projection,
    up: Projection,
    down: Projection,
    activation: str = "silu",
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> LoraMlpCall:
    projections = {"gate": gate, "up": up, "down": down}
    x = input_of(projections, x)
    intermediate = gate.weight.shape[0]
    if up.weight.shape[0] != intermediate:
        raise ValueError(
            f"up.weight has shape {tuple(up.weight.shape)}; "
            f"it must have as many rows as gate.weight, {intermediate}"
        )
    in_features = {"gate": x.shape[-1], "up": x.shape[-1], "down": intermediate}
    activation = checks.gated_activation("activation", activation)
    dropout = dropout_of(dropout_p, seed, x)
    return LoraMlpCall(x, layers_of(projections, x, in_features, dropout), activation)


def lora_mlp(
    x: Tensor,
    gate: Projection,
    up: Projection,
    down: Projection,
    activation: str = "silu",
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """y = down(act(gate(x)) * up(x)), each projection with or without LoRA, in one op.

    x             [..., in_features] floating point; under autocast it is cast to the autocast dtype
    gate, up      Projections over weights [intermediate, in_features], NF4 or dense
    down          Projection over a weight [out_features, intermediate], NF4 or dense
    activation    "silu", "gelu" or "gelu_tanh", also by transformers' names: "swish",
                  "gelu_pytorch_tanh", "gelu_new"
    dropout_p     probability of dropping an element of the input of each low-rank path, in [0, 1)
    seed          int or int64 scalar tensor; drawn from torch's generator if None. gate, up and
                  down draw independent masks: they equal `lora_linear` with the seeds seed,
                  seed + 1 and seed + 2

    Returns y [..., out_features] in x.dtype. It can be differentiated once in x, dense weights,
    lora_A, lora_B and biases. The backward keeps x, gate(x), up(x) and the h [..., r] of each
    projection; it computes act(gate(x)) * up(x) again.
    Raises TypeError or ValueError that names the argument that does not fit.
    Source: GLU variants, arXiv:2002.05202; LoRA, arXiv:2106.09685.
    """
    y, *_ = run(_lora_mlp_call(x, gate, up, down, activation, dropout_p, seed))
    return y


def _multi_lora_linear_call(
    x: Tensor,
    weight: Tensor | NF4Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    adapter_ids: Tensor,
    scalings: Tensor,
    bias: Tensor | None = None,
) -> MultiLoraCall:
    checks.weight("weight", weight)
    out_features, in_features = weight.shape
    x = checks.activations("x", x, in_features, weight.device, name_of_weight="weight")
    base = base_weight("weight", weight, x)
    checks.lora_stacks(lora_A, lora_B, scalings, out_features, in_features, x.device)
    checks.vector("bias", bias, out_features, x.device)
    ids = checks.adapter_ids("adapter_ids", adapter_ids, x)
    return MultiLoraCall(x, Layer(base, bias), Adapters(lora_A, lora_B, ids, scalings))


def multi_lora_linear(
    x: Tensor,
    weight: Tensor | NF4Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    adapter_ids: Tensor,
    scalings: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """A linear layer over a batch in which each token has its own LoRA adapter, or none.

        y[m] = x[m] @ W^T + bias + scalings[i] * (x[m] @ lora_A[i]^T) @ lora_B[i]^T

    for each token m and i = adapter_ids[m].

    x            [..., in_features] floating point; under autocast it is cast to the autocast dtype
    weight       [out_features, in_features], an NF4Weight or a tensor of x's dtype
    lora_A       [n, r, in_features]
    lora_B       [n, out_features, r], of lora_A's dtype, which may differ from x's
    adapter_ids  int64, -1 for the base alone: one id for each token, flat or in the shape of x
                 without its last dimension, or one for each x[i], which holds for all tokens in it.
                 On a CPU an id outside [-1, n) raises ValueError. On a GPU ids are not checked,
                 because that would wait for the device: a token with such an id gets the base
                 alone, and nothing out of bounds is read
    scalings     [n] floating point, alpha / r of each adapter; constants without a gradient
    bias         [out_features]; None without a bias

    Returns y [..., out_features] in x.dtype. It can be differentiated once in x, a dense weight,
    lora_A, lora_B and bias; adapters that no token has get zeros. The backward keeps x and
    h [..., r].
    Raises TypeError or ValueError that names the argument that does not fit.
    Source: Punica, arXiv:2310.18547; S-LoRA, arXiv:2311.03285.
    """
    y, _ = run(_multi_lora_linear_call(x, weight, lora_A, lora_B, adapter_ids, scalings, bias))
    return y


def bottleneck_adapter(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    activation: str | None = "relu",
    scaling: float = 1.0,
    residual: Tensor | None = None,
    add_residual: bool = True,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    norm_before: Norm | None = None,
    norm_after: Norm | None = None,
) -> Tensor:
    """A bottleneck adapter, in one op.

        z = scaling * (act(norm_before(x) @ down_weight^T + down_bias) @ up_weight^T + up_bias)
        y = residual + norm_after(dropout(z))

    x             [..., hidden] floating point; autocast does not cast it
    down_weight   [bottleneck, hidden]
    down_bias     [bottleneck]; None without a bias
    up_weight     [hidden, bottleneck]
    up_bias       [hidden]; None without a bias
    activation    "relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid", or "identity" (also
                  None), also by transformers' names: "swish", "gelu_pytorch_tanh", "gelu_new"
    residual      of x's shape; x itself if None. If its dtype is not x's, torch adds it to the path
    add_residual  False to leave the residual out: y is then the path alone, which a parallel
                  adapter adds to the output of another layer
    dropout_p     probability of dropping an element of z, in [0, 1)
    seed          int or int64 scalar tensor that fixes the mask; drawn from torch's generator if
                  None
    norm_before, norm_after
                  a `Norm` (LayerNorm or RMSNorm) over x, or over what the residual is added to;
                  None without one

    All tensors of the adapter have one dtype, which may differ from x's; the path runs in it.
    Returns y [..., hidden] in x.dtype, or in the dtype to which torch promotes x's and the
    residual's. It can be differentiated once in x, the residual and every tensor of the adapter.
    The backward keeps x alone: it computes the bottleneck again, and regenerates the mask.
    Raises TypeError or ValueError that names the argument that does not fit.
    Source: Houlsby et al., arXiv:1902.00751; Pfeiffer et al., arXiv:2005.00247.
    """
    call = bottleneck_adapter_call(
        x,
        down_weight,
        down_bias,
        up_weight,
        up_bias,
        activation,
        scaling,
        residual,
        add_residual,
        dropout_p,
        seed,
        norm_before,
        norm_after,
    )
    y = run(call)
    return residual + y if residual is not None and call.residual is None else y


def multi_bottleneck_adapter(
    x: Tensor,
    adapters: Sequence[AdapterTensors],
    adapter_ids: Tensor,
    residual: Tensor | None = None,
    add_residual: bool = True,
) -> Tensor:
    """Bottleneck adapters over a batch in which each token has its own, or none, in one op.

        z[m] = scaling * (act(x[m] @ down_weight^T + down_bias) @ up_weight^T + up_bias)
        y[m] = residual[m] + z[m]

    for each token m and the adapter adapters[adapter_ids[m]].

    x            [..., hidden] floating point; autocast does not cast it
    adapters     one `AdapterTensors` or more, all of one dtype, which may differ from x's; they may
                 have bottlenecks of different sizes. Nothing of them is copied on a CPU
    adapter_ids  int64, -1 for the residual alone: one id for each token, flat or in the shape of x
                 without its last dimension, or one for each x[i], which holds for all tokens in it.
                 On a CPU an id outside [-1, n) raises ValueError; on a GPU a token with such an id
                 gets the residual alone
    residual, add_residual
                 as in `bottleneck_adapter`

    Returns y [..., hidden] as `bottleneck_adapter` does. It can be differentiated once in x, the
    residual and every tensor of the adapters; an adapter that no token has gets zeros. The backward
    keeps x alone.
    Raises TypeError or ValueError that names the argument that does not fit.
    Source: BatchSplit of AdapterHub, Pfeiffer et al., arXiv:2007.07779.
    """
    call = multi_bottleneck_adapter_call(x, adapters, adapter_ids, residual, add_residual)
    y = run(call)
    return residual + y if residual is not None and call.residual is None else y


# The name of a public function -> the function that makes the record of a call to it. explain and
# the modules use it.
CALLS: dict[str, Callable[..., Any]] = {
    "quantize_nf4": _quantize_call,
    "dequantize_nf4": _dequantize_call,
    "nf4_linear": _nf4_linear_call,
    "lora_linear": _lora_linear_call,
    "lora_qkv": _lora_qkv_call,
    "lora_mlp": _lora_mlp_call,
    "multi_lora_linear": _multi_lora_linear_call,
    "bottleneck_adapter": bottleneck_adapter_call,
    "multi_bottleneck_adapter": multi_bottleneck_adapter_call,
}
