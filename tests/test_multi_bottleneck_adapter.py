"""A bottleneck adapter for each token: numerics, gradients, isolation and ids, on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flat_calls import flat_of
from torch import Tensor
from torch.nn.functional import linear

import pylora
import pylora.functional as F
from pylora.backends import cpu
from pylora.functional import AdapterTensors
from pylora.reference.activation import ACTIVATIONS
from pylora.testing import assert_as_accurate_as_torch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BF16, FP32 = torch.bfloat16, torch.float32
# tokens, hidden, the sizes of the bottlenecks
CASES = {
    "a few tokens": (9, 70, (33, 8)),
    "several blocks": (230, 96, (16, 16, 16)),
    "odd": (50, 37, (45, 3)),
    "one adapter": (33, 40, (16,)),
}
ORDERS = ("mixed", "sorted", "one for all", "none", "unused")
FIELDS = ("down_weight", "down_bias", "up_weight", "up_bias")


def make_ids(tokens: int, adapters: int, order: str = "mixed") -> Tensor:
    if order == "one for all":
        return torch.full((tokens,), adapters - 1)
    if order == "none":
        return torch.full((tokens,), -1)
    if order == "unused":
        return torch.full((tokens,), -1).index_fill_(0, torch.arange(0, tokens, 3), adapters // 2)
    ids = torch.randint(-1, adapters, (tokens,))
    return ids.sort().values if order == "sorted" else ids


def make(
    tokens: int,
    hidden: int,
    sizes: tuple[int, ...],
    dtype: torch.dtype = FP32,
    weight_dtype: torch.dtype | None = None,
    device: str = "cpu",
    order: str = "mixed",
    residual: str = "x",
    has_bias: bool = True,
    activations: tuple[str, ...] = ("relu",),
) -> dict[str, Any]:
    """Returns the arguments of multi_bottleneck_adapter; their tensors need gradients."""
    weight_dtype = weight_dtype or dtype

    def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = weight_dtype) -> Tensor:
        return (torch.randn(*shape, device=device) * scale).to(dtype).requires_grad_()

    adapters = [
        AdapterTensors(
            normal(size, hidden, scale=hidden**-0.5),
            normal(size) if has_bias else None,
            normal(hidden, size, scale=size**-0.5),
            normal(hidden) if has_bias else None,
            activations[place % len(activations)],
            0.5 + place,
        )
        for place, size in enumerate(sizes)
    ]
    return {
        "x": normal(tokens, hidden, dtype=dtype),
        "adapters": adapters,
        "adapter_ids": make_ids(tokens, len(sizes), order).to(device),
        "residual": normal(tokens, hidden, dtype=dtype) if residual == "another" else None,
        "add_residual": residual != "none",
    }


def plain_torch(
    x: Tensor,
    adapters: list[AdapterTensors],
    adapter_ids: Tensor,
    residual: Tensor | None = None,
    add_residual: bool = True,
) -> Tensor:
    """Runs every adapter on its tokens, one after the other, with functions of torch."""
    path = torch.zeros_like(x)
    for place, (down, down_bias, up, up_bias, activation, scaling) in enumerate(adapters):
        own = (adapter_ids == place).nonzero()[:, 0]
        h = linear(x[own].to(down.dtype), down, down_bias)
        z = linear(ACTIVATIONS[activation].forward(h), up, up_bias) * scaling
        path = path.index_put((own,), z.to(x.dtype))
    return path + (x if residual is None else residual) if add_residual else path


def tensors_of(arguments: dict[str, Any]) -> list[Tensor]:
    """x, the residual and the tensors of the adapters, as far as they exist."""
    tensors = [arguments["x"], arguments["residual"]]
    for adapter in arguments["adapters"]:
        tensors += [getattr(adapter, field) for field in FIELDS]
    return [tensor for tensor in tensors if tensor is not None]


def with_tensors(arguments: dict[str, Any], tensors: list[Tensor]) -> dict[str, Any]:
    """The arguments with these tensors in place of their own, in the order of `tensors_of`."""
    left = iter(tensors)

    def changed(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else next(left)

    x, residual = changed(arguments["x"]), changed(arguments["residual"])
    adapters = [
        adapter._replace(**{field: changed(getattr(adapter, field)) for field in FIELDS})
        for adapter in arguments["adapters"]
    ]
    return arguments | {"x": x, "residual": residual, "adapters": adapters}


def run(function: Any, arguments: dict[str, Any], tensors: list[Tensor], grad: Tensor) -> Any:
    """Returns y and all gradients."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    y = function(**with_tensors(arguments, leaves))
    gradients = torch.autograd.grad(y, leaves, grad, materialize_grads=True)
    return [y.detach(), *gradients]


def check(arguments: dict[str, Any]) -> None:
    """The results and every gradient must obey the numerics rule."""
    tensors, grad = tensors_of(arguments), torch.randn_like(arguments["x"])
    own = {name: value for name, value in arguments.items() if name == "adapter_ids"}

    def in_torch(tensors: list[Tensor], grad: Tensor) -> Any:
        return run(plain_torch, arguments | own, tensors, grad)

    actual = run(F.multi_bottleneck_adapter, arguments, tensors, grad)
    assert_as_accurate_as_torch(actual, in_torch, tensors, grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", list(CASES))
def test_forward_and_backward_obey_the_numerics_rule(
    backend: str, device: str, case: str, dtype: torch.dtype
) -> None:
    t = make(*CASES[case], dtype=dtype, device=device)
    if backend in ("cpu", "triton"):
        explanation = pylora.explain("multi_bottleneck_adapter", **t)
        assert explanation.backend == explanation.backward.backend == backend
    check(t)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("residual", ["x", "another", "none"])
def test_every_order_of_the_ids(backend: str, device: str, order: str, residual: str) -> None:
    check(make(40, 48, (8, 24, 4), BF16, FP32, device, order, residual))


@pytest.mark.parametrize("has_bias", [True, False])
def test_adapters_of_different_kinds_together(backend: str, device: str, has_bias: bool) -> None:
    activations = ("gelu", "relu", "sigmoid")
    t = make(40, 48, (8, 24, 4), device=device, has_bias=has_bias, activations=activations)
    check(t)
    first, *others = t["adapters"]
    check(t | {"adapters": [first._replace(down_bias=None), *others]})


def test_nothing_of_an_adapter_reaches_the_tokens_of_another(backend: str, device: str) -> None:
    """Not even a NaN: tokens and gradients of the others have the same bits as without it."""
    t = make(24, 48, (8, 8), device=device)
    ids, (first, second) = t["adapter_ids"], t["adapters"]
    own = ids != 1
    x = t["x"].detach().clone()
    results = []
    for _ in range(2):
        leaf = x.clone().requires_grad_()
        y = F.multi_bottleneck_adapter(leaf, [first, second], ids)
        gradients = torch.autograd.grad(y.sum(), [leaf, first.down_weight, first.up_weight])
        results.append((y[own], gradients[0][own], *gradients[1:]))
        second = second._replace(up_weight=torch.full_like(second.up_weight, torch.nan))
        x[ids == 1] = torch.inf
    assert all(map(torch.equal, *results))
    assert torch.equal(results[0][0][ids[own] == -1], x[ids == -1])


def test_ids_for_each_row_hold_for_its_tokens(backend: str, device: str) -> None:
    t = make(24, 48, (8, 8), device=device)
    rows = t["x"].view(4, 6, 48)
    ids = torch.tensor([1, 0, -1, 1], device=device)
    y = F.multi_bottleneck_adapter(rows, t["adapters"], ids)
    each = ids.repeat_interleave(6)
    assert torch.equal(y.view(24, 48), F.multi_bottleneck_adapter(t["x"], t["adapters"], each))
    grid = F.multi_bottleneck_adapter(rows, t["adapters"], each.view(4, 6))
    assert torch.equal(y, grid)


def test_strides_and_empty_batches(backend: str, device: str) -> None:
    t = make(30, 48, (8, 20), device=device)
    expected = F.multi_bottleneck_adapter(**t)
    strided = t["x"].mT.contiguous().mT
    assert not strided.is_contiguous()
    torch.testing.assert_close(F.multi_bottleneck_adapter(**t | {"x": strided}), expected)
    empty = t["x"].detach()[:0].requires_grad_()
    y = F.multi_bottleneck_adapter(empty, t["adapters"], t["adapter_ids"][:0])
    assert y.shape == (0, 48)
    up = t["adapters"][0].up_weight
    assert not torch.autograd.grad(y.sum(), up)[0].any()


def test_a_residual_of_another_dtype_is_not_rounded(backend: str, device: str) -> None:
    t = make(9, 40, (8, 4), BF16, FP32, device, residual="another")
    residual = torch.randn(9, 40, device=device)
    y = F.multi_bottleneck_adapter(**t | {"residual": residual})
    path = F.multi_bottleneck_adapter(**t | {"residual": None, "add_residual": False})
    assert y.dtype == FP32 and torch.equal(y, residual + path)


def test_only_the_gradients_asked_for_are_computed(backend: str, device: str) -> None:
    t = make(20, 48, (12, 6), device=device, residual="another")
    grad, tensors = torch.randn(20, 48, device=device), tensors_of(t)
    _, *expected = run(F.multi_bottleneck_adapter, t, tensors, grad)
    for place, gradient in enumerate(expected):
        leaves = [tensor.detach().requires_grad_(i == place) for i, tensor in enumerate(tensors)]
        y = F.multi_bottleneck_adapter(**with_tensors(t, leaves))
        assert torch.equal(torch.autograd.grad(y, leaves[place], grad)[0], gradient)


def test_threads_do_not_change_a_bit() -> None:
    if cpu.BACKEND.unavailable() is not None:
        pytest.skip("the extension was not built")
    t = make(230, 100, (24, 8), BF16, FP32, order="sorted")
    grad, threads = torch.randn(230, 100).to(BF16), torch.get_num_threads()
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(run(F.multi_bottleneck_adapter, t, tensors_of(t), grad))
    torch.set_num_threads(threads)
    assert all(map(torch.equal, *results))


def test_nothing_but_x_the_ids_and_the_weights_is_kept_for_the_backward() -> None:
    t = make(20, 48, (12, 6))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: kept.append(v) or v, lambda v: v):
        F.multi_bottleneck_adapter(**t)
    own = {value.data_ptr() for value in (*tensors_of(t), t["adapter_ids"])}
    assert kept and {tensor.data_ptr() for tensor in kept} <= own


@pytest.mark.parametrize("residual", ["x", "another", "none"])
def test_gradients_pass_gradcheck(residual: str) -> None:
    """Only the reference takes float64."""
    t = make(5, 6, (4, 3), torch.float64, residual=residual, activations=("gelu", "tanh"))

    def function(*values: Tensor) -> Tensor:
        return F.multi_bottleneck_adapter(**with_tensors(t, list(values)))

    assert torch.autograd.gradcheck(function, tuple(tensors_of(t)))


def test_op_passes_opcheck(backend: str, device: str) -> None:
    t = make(5, 48, (12, 4), device=device, residual="another")
    args = flat_of(F.CALLS["multi_bottleneck_adapter"](**t))
    torch.library.opcheck(torch.ops.pylora.multi_bottleneck_adapter.default, args)

    def detached(value: Any) -> Any:
        if isinstance(value, list):
            return [detached(item) for item in value]
        return value.detach() if isinstance(value, Tensor) else value

    x, _, _, *adapters = map(detached, args)
    backward = torch.ops.pylora.multi_bottleneck_adapter_backward.default
    for wanted in (True, False):
        flat = (torch.randn_like(x), x, True, *adapters, [wanted for _ in range(9)])
        torch.library.opcheck(backward, flat)


def test_a_direct_call_of_the_op_has_gradients(backend: str, device: str) -> None:
    t = make(5, 48, (12, 4), device=device, residual="another")
    args = flat_of(F.CALLS["multi_bottleneck_adapter"](**t))
    torch.ops.pylora.multi_bottleneck_adapter(*args).sum().backward()
    assert all(tensor.grad is not None for tensor in tensors_of(t))


def test_a_compiled_function_gives_the_same_bits(backend: str, device: str) -> None:
    t = make(20, 48, (12, 6), device=device)
    grad, tensors = torch.randn(20, 48, device=device), tensors_of(t)
    expected = run(F.multi_bottleneck_adapter, t, tensors, grad)

    def function(*values: Tensor) -> Tensor:
        return F.multi_bottleneck_adapter(**with_tensors(t, list(values)))

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    y = compiled(*leaves)
    assert torch.equal(y, expected[0])
    for actual, gradient in zip(torch.autograd.grad(y, leaves, grad), expected[1:], strict=True):
        assert torch.equal(actual, gradient)


def test_transforms_of_torch_func_give_its_derivatives() -> None:
    t = make(6, 12, (4, 3))
    tensors = [tensor.detach() for tensor in tensors_of(t)]

    def loss(function: Any, *values: Tensor) -> Tensor:
        return function(**with_tensors(t, list(values))).square().sum()

    arguments = tuple(range(1, len(tensors) + 1))
    actual = torch.func.grad(loss, arguments)(F.multi_bottleneck_adapter, *tensors)
    expected = torch.func.grad(loss, arguments)(plain_torch, *tensors)
    torch.testing.assert_close(actual, expected)


def test_meta_tensors_need_no_kernel() -> None:
    t = make(5, 48, (12, 4))
    meta = with_tensors(t, [tensor.to("meta") for tensor in tensors_of(t)])
    y = F.multi_bottleneck_adapter(**meta | {"adapter_ids": t["adapter_ids"].to("meta")})
    assert y.device.type == "meta" and y.shape == (5, 48)


def test_errors_name_the_argument() -> None:
    t = make(6, 48, (12, 4))
    first, second = t["adapters"]
    for changed, error, message in (
        ({"adapters": []}, ValueError, r"adapters is \[\]; it must be a list of one or more"),
        ({"adapters": [tuple(first)]}, TypeError, r"adapters\[0\] is tuple; it must be an Adapter"),
        (
            {"adapters": [first, second._replace(down_weight=torch.ones(4, 47))]},
            ValueError,
            r"adapters\[1\].down_weight has 47 columns; it must have 48",
        ),
        (
            {"adapters": [first, second._replace(up_weight=torch.ones(48, 5))]},
            ValueError,
            r"adapters\[1\].up_weight has shape \(48, 5\); it must be \(48, 4\)",
        ),
        (
            {"adapters": [first, second._replace(down_weight=second.down_weight.bfloat16())]},
            TypeError,
            r"adapters\[1\].down_weight has dtype torch.bfloat16",
        ),
        (
            {"adapters": [first, second._replace(activation="softmax")]},
            ValueError,
            r"adapters\[1\].activation is 'softmax'",
        ),
        ({"x": torch.ones(6, 47)}, ValueError, "x has shape"),
        ({"adapter_ids": t["adapter_ids"].int()}, TypeError, "adapter_ids has dtype torch.int32"),
        ({"adapter_ids": torch.zeros(5).long()}, ValueError, r"adapter_ids has shape \(5,\)"),
        ({"adapter_ids": torch.full((6,), 2)}, ValueError, "adapter_ids has 2 at token 0"),
        ({"residual": torch.ones(5, 48)}, ValueError, "residual has shape"),
    ):
        with pytest.raises(error, match=message):
            F.multi_bottleneck_adapter(**t | changed)
