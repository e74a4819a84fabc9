"""Transforms of torch.func and forward-mode AD give plain torch's derivatives, for every op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn.functional import linear, silu

import pylora
import pylora.functional as F
from pylora.calls import DoraLinearCall
from pylora.nn import LoRALinear, NF4Linear
from pylora.ops import run_output
from pylora.testing import assert_as_accurate_as_torch

Call = Callable[..., Any]

IN, OUT, RANK, TOKENS = 96, 64, 3, 5
OPS = ["nf4_linear", "lora_linear", "dora_linear", "lora_qkv", "lora_mlp", "multi_lora_linear"]
IDS = torch.tensor([1, -1, 0, 1, 1])
NORM = torch.rand(OUT, generator=torch.Generator().manual_seed(0)) + 0.5
SCALINGS = torch.tensor([0.5, 2.0])


def op(name: str, w: pylora.NF4Weight, down: pylora.NF4Weight) -> Call:
    """The op as a function (x, A [2, r, in], B [2, out, r]) -> a tensor."""

    def call(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        q = F.Projection(w, A[0], B[0], 0.5)
        if name == "nf4_linear":
            return F.nf4_linear(x, w)
        if name == "lora_linear":
            return F.lora_linear(x, w, A[0], B[0], 0.5, activation="silu", lora_B_bias=B[1, :, 0])
        if name == "dora_linear":
            checked = F.CALLS["lora_linear"](x, w, A[0], B[0], 0.5)
            return run_output(
                DoraLinearCall(checked.x, checked.layer, B[1, :, 0], B[1, :, 1], NORM)
            )
        if name == "lora_qkv":
            return torch.cat(F.lora_qkv(x, q, F.Projection(w, A[1], B[1]), F.Projection(w)), -1)
        if name == "lora_mlp":
            return F.lora_mlp(x, q, F.Projection(w, A[1], B[1]), F.Projection(down))
        return F.multi_lora_linear(x, w, A, B, IDS, SCALINGS)

    return call


def in_torch(name: str, w: pylora.NF4Weight, down: pylora.NF4Weight) -> Call:
    """The same function in plain torch."""

    def call(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        base = linear(x, w.dequantize(torch.float64).to(x.dtype))
        first, second = (linear(linear(x, a), b) for a, b in zip(A, B, strict=True))
        if name == "nf4_linear":
            return base
        if name == "lora_linear":
            return base + 0.5 * (linear(silu(linear(x, A[0])), B[0]) + B[1, :, 0])
        if name == "dora_linear":
            return (base + 0.5 * first) * (B[1, :, 1] / NORM) + B[1, :, 0]
        if name == "lora_qkv":
            return torch.cat([base + 0.5 * first, base + second, base], -1)
        if name == "lora_mlp":
            hidden = silu(base + 0.5 * first) * (base + second)
            return linear(hidden, down.dequantize(torch.float64).to(x.dtype))
        one, two = ((i == IDS).unsqueeze(-1) for i in (0, 1))
        scaled = [low * s for low, s in zip((first, second), SCALINGS.tolist(), strict=True)]
        return base + one * scaled[0] + two * scaled[1]

    return call


def dual(call: Call, *args: Tensor) -> Tensor:
    """The directional derivative by dual tensors; each argument is its own direction."""
    with forward_ad.dual_level():
        y = call(*(forward_ad.make_dual(t, t) for t in args))
        return forward_ad.unpack_dual(y).tangent


def summed(call: Call) -> Call:
    return lambda *args: call(*args).square().sum()


EVERYTHING = (0, 1, 2)
TRANSFORMS: dict[str, Callable[..., Any]] = {
    "jvp": lambda call, *args: jvp(call, args, args),
    "dual": dual,
    "dual_no_grad": torch.no_grad()(dual),
    "jacfwd": lambda call, *args: jacfwd(call)(*args),
    "jacrev": lambda call, *args: jacrev(call)(*args),
    "grad": lambda call, *args: grad(summed(call), EVERYTHING)(*args),
    "vjp": lambda call, *args: vjp(call, *args)[1](torch.ones_like(call(*args))),
    "vmap_x": lambda call, x, A, B: vmap(call, (0, None, None))(torch.stack([x, -x]), A, B),
    "vmap_B": lambda call, x, A, B: vmap(call, (None, None, 1))(x, A, torch.stack([B, -B], 1)),
    "per_sample": lambda call, x, A, B: vmap(grad(summed(call), EVERYTHING), (0, None, None))(
        torch.stack([x, -x]), A, B
    ),
    "twice": lambda call, *args: grad(
        lambda *args: sum(g.square().sum() for g in grad(summed(call), EVERYTHING)(*args)),
        EVERYTHING,
    )(*args),
    "forward_over_reverse": lambda call, *args: jvp(grad(summed(call)), args, args),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", OPS)
def test_transforms_give_the_derivatives_of_plain_torch(name: str, transform: str) -> None:
    w = pylora.quantize_nf4(torch.randn(OUT, IN) / 8, 32, double_quant=True)
    down = pylora.quantize_nf4(torch.randn(7, OUT) / 8)
    args = (torch.randn(TOKENS, IN), torch.randn(2, RANK, IN) / 8, torch.randn(2, OUT, RANK))
    got = TRANSFORMS[transform](op(name, w, down), *args)

    def expected(*args: Tensor) -> Any:
        return TRANSFORMS[transform](in_torch(name, w, down), *args)

    assert_as_accurate_as_torch(got, expected, *args)


def test_registered_ops_have_the_transforms_themselves() -> None:
    w = pylora.quantize_nf4(torch.randn(OUT, IN))
    x = torch.randn(TOKENS, IN)

    def call(x: Tensor) -> Tensor:
        return torch.ops.pylora.nf4_linear(x, *w.op_arguments(), OUT, None)

    def derivatives(x: Tensor, call: Call) -> Any:
        return jvp(call, (x,), (x,)), dual(call, x), vmap(grad(summed(call)))(x), jacfwd(call)(x)

    assert_as_accurate_as_torch(
        derivatives(x, call),
        lambda x: derivatives(x, lambda x: linear(x, w.dequantize(torch.float64).to(x.dtype))),
        x,
    )


@pytest.mark.parametrize("use_dora", [False, True])
def test_gradients_per_sample_of_a_layer_are_those_of_one_sample_at_a_time(use_dora: bool) -> None:
    layer = LoRALinear(NF4Linear(64, 48), r=4, use_dora=use_dora, dtype=torch.float64)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(6, 3, 64, dtype=torch.float64)
    layer(x[0])  # a layer that keeps its plan must not use it under a transform
    trained = {n: p.detach() for n, p in layer.named_parameters() if p.requires_grad}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(layer, parameters, (x,)).square().sum()

    per_sample = vmap(grad(loss), (None, 0))(trained, x)
    directional = jvp(lambda parameters: loss(parameters, x[0]), (trained,), (trained,))[1]
    for index, sample in enumerate(x):
        layer.zero_grad()
        layer(sample).square().sum().backward()
        for name, gradients in per_sample.items():
            parameter = layer.get_parameter(name)
            assert parameter.grad is not None
            # DoRA's norm is computed in fp32 from the factors.
            torch.testing.assert_close(gradients[index].float(), parameter.grad.float())
        if index == 0:  # forward and reverse mode agree: DoRA's norm is a constant to both
            products = [(layer.get_parameter(n).grad * p).sum() for n, p in trained.items()]
            torch.testing.assert_close(directional.float(), torch.stack(products).sum().float())


def test_vmap_draws_the_masks_that_its_randomness_asks_for() -> None:
    layer = LoRALinear(NF4Linear(64, 48), r=4, lora_dropout=0.5)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 64).expand(2, 3, 64)
    with torch.no_grad():
        same, different = (vmap(layer, randomness=word)(x) for word in ("same", "different"))
    assert torch.equal(same[0], same[1])
    assert not torch.equal(different[0], different[1])


def test_ids_may_be_batched() -> None:
    w = pylora.quantize_nf4(torch.randn(OUT, IN))
    x, A, B = torch.randn(TOKENS, IN), torch.randn(2, RANK, IN), torch.randn(2, OUT, RANK)
    ids = torch.stack([IDS, IDS.flip(0)])
    with torch.no_grad():
        y = vmap(lambda ids: F.multi_lora_linear(x, w, A, B, ids, SCALINGS))(ids)
        for got, row in zip(y, ids, strict=True):
            torch.testing.assert_close(got, F.multi_lora_linear(x, w, A, B, row, SCALINGS))


def test_bad_ids_are_refused_under_transforms_that_can_see_them() -> None:
    w = pylora.quantize_nf4(torch.randn(OUT, IN))
    A, B = torch.randn(2, RANK, IN), torch.randn(2, OUT, RANK)
    with pytest.raises(ValueError, match="adapter_ids has 2 at token 0"):
        grad(lambda x: F.multi_lora_linear(x, w, A, B, IDS + 1, SCALINGS).sum())(torch.randn(5, IN))


def test_a_nan_of_an_adapter_stays_with_its_tokens_under_transforms() -> None:
    w = pylora.quantize_nf4(torch.randn(OUT, IN))
    x, A, B = torch.randn(TOKENS, IN), torch.randn(2, RANK, IN), torch.randn(2, OUT, RANK)
    B[1] = torch.nan
    call = op("multi_lora_linear", w, w)
    dx, dA, dB = grad(summed(call), EVERYTHING)(x, A, B)
    assert dx[IDS != 1].isfinite().all() and dA[0].isfinite().all() and dB[0].isfinite().all()
    assert dx[IDS == 1].isnan().all()


@pytest.mark.parametrize("transform", ["jvp", "vmap"])
def test_quantizing_under_a_transform_is_refused(transform: str) -> None:
    weight = torch.randn(3, 8, 64)
    with pytest.raises(NotImplementedError, match=r"pylora::nf4_quantize .* outside them"):
        if transform == "jvp":
            jvp(lambda w: F.quantize_nf4(w).absmax, (weight,), (weight,))
        else:
            vmap(lambda w: F.quantize_nf4(w).absmax)(weight)


def test_nothing_that_a_transform_made_is_kept() -> None:
    pylora.nf4._kept_code.cache_clear()
    w = pylora.quantize_nf4(torch.randn(OUT, IN))
    x = torch.randn(TOKENS, IN)
    call = op("nf4_linear", w, w)
    grad(summed(call))(x, torch.randn(2, RANK, IN), torch.randn(2, OUT, RANK))
    with pylora.use_backend("reference"):
        y = F.nf4_linear(x, w)
    assert not torch._C._functorch.is_functorch_wrapped_tensor(y)
    assert_as_accurate_as_torch(y, lambda x: linear(x, w.dequantize(torch.float64).to(x.dtype)), x)


@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap_x"])
def test_transforms_compile(transform: str) -> None:
    w = pylora.quantize_nf4(torch.randn(OUT, IN))
    args = (torch.randn(TOKENS, IN), torch.randn(2, RANK, IN), torch.randn(2, OUT, RANK))
    call = op("lora_linear", w, w)

    def transformed(*args: Tensor) -> Any:
        return TRANSFORMS[transform](call, *args)

    compiled = torch.compile(transformed, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*args), transformed(*args))
