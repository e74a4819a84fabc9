"""Calls of bottleneck adapters, and the same in modules of torch, for tests of their kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear, rms_norm

import pylora.functional as F
from pylora.functional import Norm
from pylora.reference.activation import ACTIVATIONS
from pylora.reference.dropout import dropout_mask
from pylora.testing import assert_as_accurate_as_torch

SEED = 1234567890123
NORMS = (None, "layer_norm", "rms_norm")
RESIDUALS = ("x", "another", "none")


def make(
    tokens: int,
    hidden: int,
    bottleneck: int,
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None,
    device: str = "cpu",
    residual: str = "x",
    before: str | None = None,
    after: str | None = None,
    has_bias: bool = True,
    norm_has_bias: bool | None = None,
    eps: float = 1e-5,
    **options: Any,
) -> dict[str, Any]:
    """Returns the arguments of bottleneck_adapter; their tensors need gradients.

    before, after    the kinds of the norms
    norm_has_bias    if None, a LayerNorm has a bias and an RMSNorm has none
    """
    weight_dtype = weight_dtype or dtype

    def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = weight_dtype) -> Tensor:
        return (torch.randn(*shape, device=device) * scale).to(dtype).requires_grad_()

    def norm(kind: str | None) -> Norm | None:
        if kind is None:
            return None
        biased = kind == "layer_norm" if norm_has_bias is None else norm_has_bias
        return Norm(kind, normal(hidden), normal(hidden) if biased else None, eps)

    return {
        "x": normal(tokens, hidden, dtype=dtype),
        "down_weight": normal(bottleneck, hidden, scale=hidden**-0.5),
        "down_bias": normal(bottleneck) if has_bias else None,
        "up_weight": normal(hidden, bottleneck, scale=bottleneck**-0.5),
        "up_bias": normal(hidden) if has_bias else None,
        "residual": normal(tokens, hidden, dtype=dtype) if residual == "another" else None,
        "add_residual": residual != "none",
        "scaling": 0.7,
        "norm_before": norm(before),
        "norm_after": norm(after),
        **options,
    }


def in_torch(x: Tensor, norm: Norm | None) -> Tensor:
    if norm is None:
        return x
    shape = (x.shape[-1],)
    weight = norm.weight.to(x.dtype)
    bias = None if norm.bias is None else norm.bias.to(x.dtype)
    if norm.kind == "layer_norm":
        return layer_norm(x, shape, weight, bias, norm.eps)
    y = rms_norm(x, shape, weight, norm.eps)
    return y if bias is None else y + bias


def plain_torch(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    activation: str = "relu",
    scaling: float = 1.0,
    residual: Tensor | None = None,
    add_residual: bool = True,
    dropout_p: float = 0.0,
    seed: int = SEED,
    norm_before: Norm | None = None,
    norm_after: Norm | None = None,
) -> Tensor:
    """Computes the adapter as the `adapters` library does: with modules of torch, one by one."""
    h = linear(in_torch(x.to(down_weight.dtype), norm_before), down_weight, down_bias)
    z = linear(ACTIVATIONS[activation].forward(h), up_weight, up_bias) * scaling
    if dropout_p:
        mask = dropout_mask(z.shape, dropout_p, torch.tensor(seed, device=z.device))
        z = z * mask.to(z.dtype) / (1 - dropout_p)
    z = in_torch(z, norm_after)
    if add_residual:
        z = (x if residual is None else residual) + z
    return z.to(x.dtype)


def tensors_of(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors among the arguments, with those of the norms under names of their own."""
    tensors = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(value, Norm):
            tensors[f"{name}.weight"] = value.weight
            if value.bias is not None:
                tensors[f"{name}.bias"] = value.bias
    return tensors


def with_tensors(arguments: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The arguments with these tensors in place of their own."""
    changed = {name: value for name, value in tensors.items() if "." not in name}
    for name in ("norm_before", "norm_after"):
        norm = arguments.get(name)
        if norm is not None:
            weight, bias = tensors[f"{name}.weight"], tensors.get(f"{name}.bias")
            changed[name] = Norm(norm.kind, weight, bias, norm.eps)
    return arguments | changed


def run(function: Any, arguments: dict[str, Any], tensors: dict[str, Tensor], grad: Any) -> Any:
    """Returns y, and the gradients of all tensors."""
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    y = function(**with_tensors(arguments, leaves))
    return y.detach(), torch.autograd.grad(y, list(leaves.values()), grad)


def check(*draws: dict[str, Any]) -> None:
    """The results and every gradient, of all draws at once, must obey the numerics rule."""

    def run_all(function: Any, calls: list[tuple[Any, ...]]) -> list[Tensor]:
        results = [run(function, *call) for call in calls]
        outputs = zip(*((y, *gradients) for y, gradients in results), strict=True)
        return [torch.stack(output) for output in outputs]

    # The rule converts tensors in tuples, lists and dicts to float64, and so the tensors of the
    # norms are given once more beside them.
    calls = [(t, tensors_of(t), torch.randn_like(t["x"])) for t in draws]
    assert_as_accurate_as_torch(run_all(F.bottleneck_adapter, calls), run_all, plain_torch, calls)
