"""The fused linear + LoRA op: numerics, gradients, dropout by seed, compile, on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import pylora
import pylora.functional as F
from pylora import reference
from pylora.reference.activation import ACTIVATIONS
from pylora.reference.dropout import dropout_mask
from pylora.testing import assert_as_accurate_as_torch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAMES = ("x", "lora_A", "lora_B", "bias", "lora_A_bias", "lora_B_bias")


def inputs(
    tokens: int,
    out_features: int,
    in_features: int,
    rank: int,
    dtype: torch.dtype,
    lora_dtype: torch.dtype,
    device: str = "cpu",
) -> dict[str, Tensor]:
    def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(*shape, device=device) * scale).to(dtype).requires_grad_()

    return {
        "x": normal(tokens, in_features),
        "lora_A": normal(rank, in_features, scale=in_features**-0.5, dtype=lora_dtype),
        "lora_B": normal(out_features, rank, dtype=lora_dtype),
        "bias": normal(out_features),
        "lora_A_bias": normal(rank, dtype=lora_dtype),
        "lora_B_bias": normal(out_features, dtype=lora_dtype),
    }


def plain_torch(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    lora_A_bias: Tensor | None,
    lora_B_bias: Tensor | None,
    weight: Any,
    scaling: float,
    mask: Tensor | None,
    activation: str,
) -> Tensor:
    """Computes what PEFT computes over a dequantized base, with a given dropout mask."""
    if isinstance(weight, pylora.NF4Weight):
        weight = reference.dense(weight.record, x.dtype)
    linear = torch.nn.functional.linear
    dropped = x.to(lora_A.dtype)
    if mask is not None:
        dropped = dropped * mask
    h = ACTIVATIONS[activation].forward(linear(dropped, lora_A, lora_A_bias))
    return (linear(x, weight, bias) + linear(h, lora_B, lora_B_bias) * scaling).to(x.dtype)


def check(
    tensors: dict[str, Tensor], weight: Any, scaling: float, p: float, activation: str
) -> None:
    """Judges the output and every gradient against autograd through `plain_torch`."""
    x = tensors["x"]
    seed = torch.tensor(987654321098765)
    mask = None
    if p:
        mask = dropout_mask(x.shape, p, seed).to(x.device, torch.float64) / (1 - p)
        mask = mask.to(tensors["lora_A"].dtype)
    y = F.lora_linear(
        x,
        weight,
        tensors["lora_A"],
        tensors["lora_B"],
        scaling,
        tensors["bias"],
        p,
        seed,
        activation,
        tensors["lora_A_bias"],
        tensors["lora_B_bias"],
    )
    values = [tensors[name] for name in NAMES]
    assert_as_accurate_as_torch(y, plain_torch, *values, weight, scaling, mask, activation)
    grad = torch.randn_like(y)
    actual = torch.autograd.grad(y, values, grad)

    def gradients(grad: Tensor, weight: Any, mask: Tensor | None, *values: Tensor) -> Any:
        leaves = [value.detach().requires_grad_() for value in values]
        result = plain_torch(*leaves, weight, scaling, mask, activation)
        return torch.autograd.grad(result, leaves, grad)

    assert_as_accurate_as_torch(actual, gradients, grad, weight, mask, *values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lora_dtype", [None, torch.float32])
@pytest.mark.parametrize(
    ("tokens", "out_features", "in_features", "blocksize", "rank"),
    [
        (16, 96, 256, 64, 32),
        (1, 128, 128, 32, 40),
        (5, 40, 420, 64, 33),
        (40, 1, 13, 32, 33),
        (70, 65, 576, 64, 64),
    ],
)
def test_forward_and_backward_equal_the_reference(
    backend: str,
    device: str,
    tokens: int,
    out_features: int,
    in_features: int,
    blocksize: int,
    rank: int,
    dtype: torch.dtype,
    lora_dtype: torch.dtype | None,
) -> None:
    weight = torch.randn(out_features, in_features, device=device)
    w = pylora.quantize_nf4(weight, blocksize, double_quant=tokens % 2 == 0)
    tensors = inputs(tokens, out_features, in_features, rank, dtype, lora_dtype or dtype, device)
    check(tensors, w, 0.5, 0.0, "identity")


@pytest.mark.parametrize("rank", [1, 3, 8, 300, 1100])
def test_every_rank_obeys_the_numerics_rule(backend: str, device: str, rank: int) -> None:
    """The test has no biases: they have few elements, so torch's largest error in them is luck."""
    w = pylora.quantize_nf4(torch.randn(80, 192, device=device))
    t = inputs(30, 80, 192, rank, torch.bfloat16, torch.float32, device)
    tensors = (t["x"], t["lora_A"], t["lora_B"])
    trailing = (None, None, None, w, 0.5, None, "identity")
    y = F.lora_linear(t["x"], w, t["lora_A"], t["lora_B"], 0.5)
    assert_as_accurate_as_torch(y, plain_torch, *tensors, *trailing)
    grad = torch.randn_like(y)

    def gradients(grad: Tensor, *values: Tensor) -> Any:
        leaves = [value.detach().requires_grad_() for value in values]
        return torch.autograd.grad(plain_torch(*leaves, *trailing), leaves, grad)

    assert_as_accurate_as_torch(torch.autograd.grad(y, tensors, grad), gradients, grad, *tensors)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_activation_and_dropout_obey_the_numerics_rule(
    backend: str, device: str, p: float, activation: str
) -> None:
    w = pylora.quantize_nf4(torch.randn(48, 192, device=device))
    for dtype in DTYPES:
        check(inputs(9, 48, 192, 40, dtype, dtype, device), w, 1.5, p, activation)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dense_base_obeys_the_numerics_rule(
    backend: str, device: str, dtype: torch.dtype
) -> None:
    weight = torch.randn(48, 192, device=device).to(dtype)
    check(inputs(9, 48, 192, 40, dtype, dtype, device), weight, 1.5, 0.3, "identity")


def test_a_dense_base_has_a_gradient(backend: str, device: str) -> None:
    """The hybrid method may train the base itself."""
    weight = torch.randn(48, 192, device=device, requires_grad=True)
    t = inputs(9, 48, 192, 6, torch.float32, torch.float32, device)
    y = F.lora_linear(t["x"], weight, t["lora_A"], t["lora_B"], 2.0)
    grad = torch.randn_like(y)
    (actual,) = torch.autograd.grad(y, weight, grad)
    assert_as_accurate_as_torch(actual, lambda g, x: g.t() @ x, grad, t["x"])


def test_x_needs_no_gradient(backend: str, device: str) -> None:
    """In the first layer of a frozen model only LoRA needs gradients."""
    w = pylora.quantize_nf4(torch.randn(48, 192, device=device))
    t = inputs(9, 48, 192, 6, torch.float32, torch.float32, device)
    x = t["x"].detach()
    F.lora_linear(x, w, t["lora_A"], t["lora_B"], 2.0).sum().backward()
    assert t["lora_A"].grad is not None and t["lora_B"].grad is not None and x.grad is None


@pytest.mark.parametrize("shape", [(0, 192), (2, 0, 192)])
def test_an_empty_batch_gives_empty_results(
    backend: str, device: str, shape: tuple[int, ...]
) -> None:
    w = pylora.quantize_nf4(torch.randn(48, 192, device=device))
    t = inputs(1, 48, 192, 6, torch.float32, torch.float32, device)
    x = torch.zeros(shape, device=device, requires_grad=True)
    y = F.lora_linear(x, w, t["lora_A"], t["lora_B"], 2.0, dropout_p=0.5)
    y.sum().backward()
    assert y.shape == (*shape[:-1], 48) and x.grad is not None and x.grad.shape == shape
    assert t["lora_A"].grad is not None and not t["lora_A"].grad.any()


def test_leading_dimensions_and_strides_change_no_value(backend: str, device: str) -> None:
    w = pylora.quantize_nf4(torch.randn(48, 192, device=device))
    t = inputs(1, 48, 192, 6, torch.float32, torch.float32, device)
    x = torch.randn(192, 3, 5, device=device).permute(2, 1, 0).requires_grad_()
    lora_A, lora_B = t["lora_A"].t().contiguous().t(), t["lora_B"]
    y = F.lora_linear(x, w, lora_A, lora_B, 2.0, dropout_p=0.2, seed=3)
    assert y.shape == (5, 3, 48)
    mask = dropout_mask(x.shape, 0.2, torch.tensor(3)).to(x.device) / 0.8
    trailing = (w, 2.0, mask, "identity")
    assert_as_accurate_as_torch(y, plain_torch, x, lora_A, lora_B, None, None, None, *trailing)
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape


def test_dropout_is_a_function_of_the_seed(backend: str, device: str) -> None:
    w = pylora.quantize_nf4(torch.randn(48, 192, device=device))
    t = inputs(9, 48, 192, 6, torch.float32, torch.float32, device)

    def run(**kwargs: Any) -> Tensor:
        return F.lora_linear(t["x"], w, t["lora_A"], t["lora_B"], 2.0, dropout_p=0.5, **kwargs)

    assert torch.equal(run(seed=1), run(seed=torch.tensor(1)))
    assert not torch.equal(run(seed=1), run(seed=2))
    torch.manual_seed(0)
    first = run()
    assert not torch.equal(first, run())
    torch.manual_seed(0)
    assert torch.equal(first, run())


def test_saves_only_x_and_small_factors(backend: str, device: str) -> None:
    w = pylora.quantize_nf4(torch.randn(256, 512, device=device), double_quant=True)
    t = inputs(64, 256, 512, 4, torch.float32, torch.float32, device)
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        F.lora_linear(t["x"], w, t["lora_A"], t["lora_B"], 2.0, dropout_p=0.1)
    small = 64 * 4 * 4 + t["lora_A"].nbytes + t["lora_B"].nbytes + 8
    assert sum(saved.values()) <= t["x"].nbytes + w.nbytes + small


def test_gradients_pass_gradcheck() -> None:
    """Only the reference takes float64. Every formula of the explicit backward is checked."""
    w = pylora.quantize_nf4(torch.randn(4, 18), 32, double_quant=True)
    t = inputs(2, 4, 18, 2, torch.float64, torch.float64)
    dense = torch.randn(4, 18, dtype=torch.float64, requires_grad=True)
    for activation in ACTIVATIONS:

        def on_nf4(*values: Tensor, activation: str = activation) -> Tensor:
            x, lora_A, lora_B, bias, A_bias, B_bias = values
            return F.lora_linear(
                x, w, lora_A, lora_B, 0.7, bias, 0.25, 5, activation, A_bias, B_bias
            )

        assert torch.autograd.gradcheck(on_nf4, tuple(t[name] for name in NAMES))

    def on_dense(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        return F.lora_linear(x, weight, lora_A, lora_B, 0.7, dropout_p=0.25, seed=5)

    assert torch.autograd.gradcheck(on_dense, (t["x"], dense, t["lora_A"], t["lora_B"]))


@pytest.mark.parametrize("dense", [False, True])
def test_op_passes_opcheck(backend: str, device: str, dense: bool) -> None:
    t = inputs(3, 48, 192, 6, torch.float32, torch.float32, device)
    weight = torch.randn(48, 192, device=device)
    w = pylora.quantize_nf4(weight, double_quant=True)
    base = (weight, None, None, None, None, 0, 0) if dense else w.op_arguments()
    seed = torch.tensor(5, device=device)
    args = (t["x"], *base, 48, t["lora_A"], t["lora_B"], t["bias"], t["lora_A_bias"])
    args = (*args, t["lora_B_bias"], 0.7, 0.25, seed, "silu")
    torch.library.opcheck(torch.ops.pylora.lora_linear.default, args)
    detached = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
    h = torch.ops.pylora.lora_linear(*detached)[1]
    backward = (torch.randn(3, 48, device=device), detached[0], h, *base, detached[9], detached[10])
    for mask in ([True, dense, True, True, True, True, True], [False] * 7):
        torch.library.opcheck(
            torch.ops.pylora.lora_linear_backward.default,
            (*backward, 0.7, 0.25, seed, "silu", mask),
        )


def test_a_direct_call_of_the_op_has_gradients(backend: str, device: str) -> None:
    """Other frameworks call torch.ops.pylora, and autograd works without further code."""
    w = pylora.quantize_nf4(torch.randn(48, 192, device=device))
    t = inputs(3, 48, 192, 6, torch.float32, torch.float32, device)
    trailing = (None, None, None, 0.7, 0.0, None, "identity")
    y, h = torch.ops.pylora.lora_linear(
        t["x"], *w.op_arguments(), 48, t["lora_A"], t["lora_B"], *trailing
    )
    assert y.requires_grad and not h.requires_grad and h.dtype == torch.float32
    y.sum().backward()
    assert t["lora_B"].grad is not None


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_a_compiled_function_gives_the_same_bits(backend: str, device: str, p: float) -> None:
    w = pylora.quantize_nf4(torch.randn(48, 192, device=device))
    t = inputs(9, 48, 192, 6, torch.float32, torch.float32, device)
    seed = torch.tensor(11, device=device)

    def function(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        return F.lora_linear(x, w, lora_A, lora_B, 0.5, dropout_p=p, seed=seed).relu()

    leaves = (t["x"], t["lora_A"], t["lora_B"])
    y, expected = torch.compile(function, fullgraph=True)(*leaves), function(*leaves)
    assert torch.equal(y, expected)
    for a, b in zip(
        torch.autograd.grad(y.sum(), leaves),
        torch.autograd.grad(expected.sum(), leaves),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_autocast_computes_in_its_dtype(backend: str, device: str) -> None:
    t = inputs(9, 48, 192, 6, torch.float32, torch.float32, device)
    weight = torch.randn(48, 192, device=device)
    for base in (weight, pylora.quantize_nf4(weight)):
        with torch.autocast(device, dtype=torch.bfloat16):
            y = F.lora_linear(t["x"], base, t["lora_A"], t["lora_B"], 0.5)
        assert y.dtype == torch.bfloat16
        cast = base if isinstance(base, pylora.NF4Weight) else base.bfloat16()
        x, A, B = (t[name].bfloat16() for name in ("x", "lora_A", "lora_B"))
        assert torch.equal(y, F.lora_linear(x, cast, A, B, 0.5))
        y.sum().backward()
        assert t["lora_A"].grad is not None and t["lora_A"].grad.dtype == torch.float32


def test_errors_name_the_argument() -> None:
    w = pylora.quantize_nf4(torch.randn(48, 192))
    x, A, B = torch.zeros(2, 192), torch.zeros(4, 192), torch.zeros(48, 4)
    cases: list[tuple[tuple[Any, ...], dict[str, Any], type, str]] = [
        (
            (x, w, A[:, :5], B, 1.0),
            {},
            ValueError,
            r"lora_A has shape \(4, 5\); it must be \[r, 192\]",
        ),
        ((x, w, A[:0], B[:, :0], 1.0), {}, ValueError, "with r >= 1"),
        (
            (x, w, A, B[:, :2], 1.0),
            {},
            ValueError,
            r"lora_B has shape \(48, 2\); it must be \(48, 4\)",
        ),
        ((x, w, A, B.half(), 1.0), {}, TypeError, "lora_B has dtype torch.float16"),
        (
            (x, w, A, B, 1.0),
            {"dropout_p": 1.0},
            ValueError,
            r"dropout_p is 1.0; it must be in \[0, 1\)",
        ),
        ((x, w, A, B, 1.0), {"activation": "softsign"}, ValueError, "activation is 'softsign'"),
        ((x, w, A, B, 1.0), {"dropout_p": 0.1, "seed": torch.zeros(2)}, TypeError, "seed is a"),
        ((x[:, :7], w, A, B, 1.0), {}, ValueError, "its last dimension must be in_features = 192"),
        ((x, torch.zeros(48), A, B, 1.0), {}, ValueError, r"weight has shape \(48,\)"),
        ((x, "w", A, B, 1.0), {}, TypeError, "weight is str"),
        (
            (x, torch.zeros(48, 192).half(), A, B, 1.0),
            {},
            TypeError,
            "weight has dtype torch.float16",
        ),
        ((x, w, A, B, 1.0, torch.zeros(3)), {}, ValueError, r"bias has shape \(3,\)"),
        ((x, w, A.to("meta"), B, 1.0), {}, ValueError, "lora_A is on meta; it must be on cpu"),
    ]
    for args, kwargs, error, message in cases:
        with pytest.raises(error, match=message):
            F.lora_linear(*args, **kwargs)


def test_meta_tensors_give_the_shapes() -> None:
    """A model that is built on the meta device needs shapes without memory."""
    w = pylora.quantize_nf4(torch.randn(48, 192), double_quant=True).to("meta")
    x, A, B = (torch.empty(shape, device="meta") for shape in ((2, 5, 192), (4, 192), (48, 4)))
    assert F.lora_linear(x, w, A, B, 1.0, dropout_p=0.1).shape == (2, 5, 48)
    assert F.nf4_linear(x, w).device.type == "meta"
