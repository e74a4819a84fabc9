"""The op bottleneck_adapter: numerics, gradients, explanations and errors, on every backend."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from bottleneck_calls import (
    NORMS,
    RESIDUALS,
    SEED,
    check,
    make,
    plain_torch,
    run,
    tensors_of,
    with_tensors,
)
from flat_calls import chosen, flat_of, refusal_of
from torch import Tensor

import pylora
import pylora.functional as F
from pylora.backends import cpu, limits, triton
from pylora.functional import Norm
from pylora.reference.activation import ACTIVATIONS
from pylora.reference.dropout import dropout_mask

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BF16, FP32 = torch.bfloat16, torch.float32
# tokens, hidden, bottleneck
SHAPES = {
    "a few tokens": (7, 70, 33),
    "several blocks": (203, 96, 16),
    "odd": (50, 37, 45),
    "several chains": (30, 600, 20),
    "tiles of tokens": (90, 200, 150),
    "a wide bottleneck": (26, 40, 530),
    "one token": (1, 40, 33),
    "one feature": (40, 37, 1),
}
WEIGHTS = ("down_weight", "down_bias", "up_weight", "up_bias")


@pytest.fixture(autouse=True)
def only_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the cpu backend from running an adapter as products of torch."""
    monkeypatch.setattr(limits, "CPU_ADAPTER_PRODUCTS_TO", 0)
    monkeypatch.setattr(limits, "CPU_ADAPTER_PRODUCTS_FROM", math.inf)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", list(SHAPES))
def test_forward_and_backward_obey_the_numerics_rule(
    backend: str, device: str, case: str, dtype: torch.dtype
) -> None:
    # The errors of one token or one feature are luck, so there are many of them.
    draws = [
        make(*SHAPES[case], dtype=dtype, device=device)
        for _ in range(16 if case.startswith("one ") else 1)
    ]
    t = draws[0]
    if backend == "cpu" or (backend == "triton" and case != "a wide bottleneck"):
        explanation = pylora.explain("bottleneck_adapter", **t)
        assert explanation.backend == explanation.backward.backend == backend
    check(*draws)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_every_activation(backend: str, device: str, activation: str) -> None:
    check(make(40, 64, 24, BF16, FP32, device, activation=activation))


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dtypes", [(FP32, FP32), (BF16, FP32), (BF16, BF16), (FP32, BF16)])
def test_every_residual(
    backend: str, device: str, residual: str, has_bias: bool, dtypes: tuple[Any, Any]
) -> None:
    check(make(40, 72, 24, *dtypes, device, residual=residual, has_bias=has_bias))


@pytest.mark.parametrize("before", NORMS)
@pytest.mark.parametrize("after", NORMS)
def test_every_norm(backend: str, device: str, before: str | None, after: str | None) -> None:
    """Every residual comes with every norm, but not with every pair of them."""
    residual = RESIDUALS[(NORMS.index(before) + NORMS.index(after)) % len(RESIDUALS)]
    options = {"before": before, "after": after, "residual": residual, "activation": "gelu"}
    # The largest error of a few biases is luck, so there are many draws; fewer in Triton's slow
    # interpreter.
    draws = 4 if backend == "triton" else 16
    check(*(make(21, 48, 12, device=device, **options) for _ in range(draws)))
    options |= {"dropout_p": 0.2, "seed": SEED}
    check(*(make(21, 48, 12, BF16, FP32, device, **options) for _ in range(draws)))


def test_dropout_drops_the_output_and_scales_the_rest(backend: str, device: str) -> None:
    """The seed decides which elements of z are dropped; the others grow by 1 / (1 - p)."""
    t = make(64, 96, 16, device=device, residual="none")
    z = F.bottleneck_adapter(**t)
    y = F.bottleneck_adapter(**t, dropout_p=0.25, seed=SEED)
    mask = dropout_mask(z.shape, 0.25, torch.tensor(SEED, device=device))
    assert torch.equal(y == 0, ~mask) and 0.2 < float((y == 0).float().mean()) < 0.3
    torch.testing.assert_close(y[mask], z[mask] / 0.75)
    assert torch.equal(y, F.bottleneck_adapter(**t, dropout_p=0.25, seed=SEED))
    assert not torch.equal(y, F.bottleneck_adapter(**t, dropout_p=0.25, seed=SEED + 1))
    # Without a seed, torch's generator draws one.
    torch.manual_seed(3)
    first = F.bottleneck_adapter(**t, dropout_p=0.25)
    assert not torch.equal(first, F.bottleneck_adapter(**t, dropout_p=0.25))
    torch.manual_seed(3)
    assert torch.equal(first, F.bottleneck_adapter(**t, dropout_p=0.25))


@pytest.mark.parametrize("shape", [(0, 40), (2, 0, 40), (0, 3, 40)])
def test_an_empty_batch_gives_empty_results(
    backend: str, device: str, shape: tuple[int, ...]
) -> None:
    t = make(1, 40, 4, device=device)
    t["x"] = torch.zeros(shape, device=device, requires_grad=True)
    y = F.bottleneck_adapter(**t)
    assert y.shape == shape
    for gradient in torch.autograd.grad(y.sum(), [t["x"], *(t[name] for name in WEIGHTS)]):
        assert not gradient.any()


def test_leading_dimensions_and_strides_change_no_value(backend: str, device: str) -> None:
    t = {name: v.detach() if isinstance(v, Tensor) else v for name, v in make(30, 48, 20).items()}
    t = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in t.items()}
    expected = F.bottleneck_adapter(**t).view(5, 6, 48)
    x = t["x"].view(5, 6, 48).permute(2, 1, 0).contiguous().permute(2, 1, 0)
    strided = {name: t[name].mT.contiguous().mT for name in ("down_weight", "up_weight")}
    assert not x.is_contiguous() and not strided["up_weight"].is_contiguous()
    torch.testing.assert_close(F.bottleneck_adapter(**t | strided | {"x": x}), expected)
    one = F.bottleneck_adapter(**t | {"x": t["x"][0]})
    torch.testing.assert_close(one, expected[0, 0])


def test_a_residual_of_another_dtype_is_not_rounded(backend: str, device: str) -> None:
    t = make(9, 40, 8, BF16, FP32, device, residual="another")
    t["residual"] = residual = torch.randn(9, 40, device=device, requires_grad=True)
    y = F.bottleneck_adapter(**t)
    path = F.bottleneck_adapter(**t | {"residual": None, "add_residual": False})
    assert y.dtype == FP32 and path.dtype == BF16 and torch.equal(y, residual + path)
    y.sum().backward()
    assert torch.equal(residual.grad, torch.ones_like(residual))


def test_only_the_gradients_asked_for_are_computed(backend: str, device: str) -> None:
    """Each gradient has the same bits if no other one is wanted."""
    t = make(20, 48, 12, device=device, residual="another")
    grad = torch.randn(20, 48, device=device)
    tensors = tensors_of(t)
    _, expected = run(F.bottleneck_adapter, t, tensors, grad)
    for (name, tensor), gradient in zip(tensors.items(), expected, strict=True):
        leaf = tensor.detach().requires_grad_()
        others = {other: value.detach() for other, value in tensors.items()}
        y = F.bottleneck_adapter(**with_tensors(t, others | {name: leaf}))
        assert torch.equal(torch.autograd.grad(y, leaf, grad)[0], gradient)


def test_results_repeat_bit_for_bit(backend: str, device: str) -> None:
    t = make(300, 64, 24, BF16, FP32, device)
    grad = torch.randn(300, 64, device=device).to(BF16)
    (y, grads), (again, more) = (
        run(F.bottleneck_adapter, t, tensors_of(t), grad) for _ in range(2)
    )
    assert torch.equal(y, again) and all(map(torch.equal, grads, more))


def test_threads_do_not_change_a_bit() -> None:
    if cpu.BACKEND.unavailable() is not None:
        pytest.skip("the extension was not built")
    t = make(230, 300, 40, BF16, FP32)
    grad, threads = torch.randn(230, 300).to(BF16), torch.get_num_threads()
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(run(F.bottleneck_adapter, t, tensors_of(t), grad))
    torch.set_num_threads(threads)
    (y, grads), (again, more) = results
    assert torch.equal(y, again) and all(map(torch.equal, grads, more))


def test_nothing_but_x_and_the_weights_is_kept_for_the_backward() -> None:
    t = make(20, 48, 12)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: kept.append(v) or v, lambda v: v):
        F.bottleneck_adapter(**t)
    own = {value.data_ptr() for value in tensors_of(t).values()}
    assert kept and {tensor.data_ptr() for tensor in kept} <= own


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize(
    "norms", [(None, None), ("layer_norm", "rms_norm"), ("rms_norm", "layer_norm")]
)
def test_gradients_pass_gradcheck(residual: str, norms: tuple[str | None, str | None]) -> None:
    """Only the reference takes float64."""
    options = {"dropout_p": 0.3, "seed": 5} if norms[0] else {}
    before, after = norms
    t = make(
        3,
        6,
        4,
        torch.float64,
        residual=residual,
        before=before,
        after=after,
        activation="gelu",
        **options,
    )
    tensors = tensors_of(t)

    def function(*values: Tensor) -> Tensor:
        return F.bottleneck_adapter(**with_tensors(t, dict(zip(tensors, values, strict=True))))

    assert torch.autograd.gradcheck(function, tuple(tensors.values()))


@pytest.mark.parametrize("norm", [None, "layer_norm"])
def test_op_passes_opcheck(backend: str, device: str, norm: str | None) -> None:
    options = {"dropout_p": 0.3, "seed": 5} if norm else {}
    t = make(5, 48, 12, device=device, residual="another", before=norm, **options)
    call = F.CALLS["bottleneck_adapter"](**t)
    args = flat_of(call)
    torch.library.opcheck(torch.ops.pylora.bottleneck_adapter.default, args)
    x, _, _, *adapter = (a.detach() if isinstance(a, Tensor) else a for a in args)
    backward = torch.ops.pylora.bottleneck_adapter_backward.default
    norms = [norm is not None, norm is not None, False, False]
    for mask in ([True, True, True, True, True, *norms], [False for _ in range(9)]):
        torch.library.opcheck(backward, (torch.randn_like(x), x, True, *adapter, mask))


def test_a_direct_call_of_the_op_has_gradients(backend: str, device: str) -> None:
    t = make(5, 48, 12, device=device, residual="another")
    y = torch.ops.pylora.bottleneck_adapter(*flat_of(F.CALLS["bottleneck_adapter"](**t)))
    y.sum().backward()
    assert all(tensor.grad is not None for tensor in tensors_of(t).values())


def test_a_compiled_function_gives_the_same_bits(backend: str, device: str) -> None:
    t = make(9, 48, 12, device=device, residual="another")
    tensors = tensors_of(t)

    def function(*values: Tensor) -> Tensor:
        return F.bottleneck_adapter(**t | dict(zip(tensors, values, strict=True))).relu()

    leaves = list(tensors.values())
    compiled, expected = torch.compile(function, fullgraph=True)(*leaves), function(*leaves)
    assert torch.equal(compiled, expected)
    for a, b in zip(
        torch.autograd.grad(compiled.sum(), leaves),
        torch.autograd.grad(expected.sum(), leaves),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_transforms_of_torch_func_give_its_derivatives() -> None:
    t = make(5, 12, 4, torch.float64, residual="another", after="layer_norm", activation="silu")
    t = with_tensors(t, {name: value.detach() for name, value in tensors_of(t).items()})

    def ours(x: Tensor) -> Tensor:
        return F.bottleneck_adapter(**t | {"x": x})

    def expected(x: Tensor) -> Tensor:
        return plain_torch(**t | {"x": x})

    for transform in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(transform(ours)(t["x"]), transform(expected)(t["x"]))
    mapped = torch.func.vmap(lambda x, r: F.bottleneck_adapter(**t | {"x": x, "residual": r}))
    torch.testing.assert_close(mapped(t["x"], t["residual"]), ours(t["x"]))


def test_autocast_leaves_x_and_the_residual_as_they_are(backend: str, device: str) -> None:
    t = make(9, 48, 12, device=device)
    expected = F.bottleneck_adapter(**t)
    with torch.autocast(device, dtype=BF16):
        y = F.bottleneck_adapter(**t)
    assert y.dtype == FP32 and torch.equal(y, expected)


def test_meta_tensors_need_no_kernel() -> None:
    t = {name: v.to("meta") if isinstance(v, Tensor) else v for name, v in make(9, 48, 12).items()}
    assert F.bottleneck_adapter(**t).shape == (9, 48)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, None),
        ({"before": "rms_norm", "after": "layer_norm", "dropout_p": 0.1, "seed": 1}, None),
        ({"dtype": torch.float64}, "x is torch.float64; the kernels take"),
        ({"bottleneck": 1025}, "the bottleneck has 1025 features; the kernels take up to 1024"),
    ],
)
def test_explain_says_why_the_cpu_kernels_do_not_run(
    options: dict[str, Any], reason: str | None
) -> None:
    if cpu.BACKEND.unavailable() is not None:
        pytest.skip("the extension was not built")
    t = make(**{"tokens": 4, "hidden": 16, "bottleneck": 8} | options)
    flat = flat_of(F.CALLS["bottleneck_adapter"](**t))
    refusal = refusal_of(cpu.BACKEND, "bottleneck_adapter", *flat)
    assert refusal is None if reason is None else reason in (refusal or "")
    assert chosen("bottleneck_adapter", *flat) == ("cpu" if reason is None else "reference")
    explanation = pylora.explain("bottleneck_adapter", **t)
    assert (explanation.backward.backend == "cpu") == (reason is None)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, None),
        ({"bottleneck": 256, "weight_dtype": torch.float16}, None),
        ({"before": "rms_norm", "after": "layer_norm"}, None),
        ({"dropout_p": 0.1, "seed": 1}, None),
        ({"weight_dtype": torch.float64}, "down_weight is torch.float64; the kernels take"),
        ({"bottleneck": 257}, "the bottleneck has 257 features; the kernels take up to 256"),
    ],
)
def test_the_triton_kernels_say_why_they_do_not_run(
    options: dict[str, Any], reason: str | None
) -> None:
    if triton.BACKEND.unavailable() is not None:
        pytest.skip("Triton kernels cannot run here")
    t = make(
        **{"tokens": 4, "hidden": 16, "bottleneck": 8, "device": triton.BACKEND.device()} | options
    )
    flat = flat_of(F.CALLS["bottleneck_adapter"](**t))
    refusal = refusal_of(triton.BACKEND, "bottleneck_adapter", *flat)
    assert refusal is None if reason is None else reason in (refusal or "")


def test_errors_name_the_argument(backend: str) -> None:
    t = make(6, 48, 4)
    norm = Norm("layer_norm", torch.ones(48))
    cases: list[tuple[dict[str, Any], type, str]] = [
        ({"x": t["x"][:, :7]}, ValueError, "its last dimension must be hidden = 48"),
        ({"x": t["x"].int()}, TypeError, "x has dtype torch.int32; it must be a floating-point"),
        ({"down_weight": t["down_weight"][0]}, ValueError, r"it must be \[bottleneck, hidden\]"),
        ({"down_weight": t["down_weight"][:0]}, ValueError, "with bottleneck >= 1"),
        (
            {"up_weight": t["up_weight"][:7]},
            ValueError,
            r"up_weight has shape \(7, 4\); it must be \(48, 4\)",
        ),
        ({"up_weight": t["up_weight"].half()}, TypeError, "it must be down_weight's dtype"),
        (
            {"down_bias": torch.ones(3)},
            ValueError,
            r"down_bias has shape \(3,\); it must be \(4,\)",
        ),
        (
            {"up_bias": torch.ones(48).half()},
            TypeError,
            "up_bias has dtype torch.float16; it must be down_weight's dtype",
        ),
        (
            {"activation": "softmax"},
            ValueError,
            "activation is 'softmax'; it must be None or one of",
        ),
        ({"scaling": "big"}, TypeError, "scaling is 'big'; it must be a number"),
        (
            {"residual": t["x"][:5]},
            ValueError,
            r"residual has shape \(5, 48\); it must be x's shape",
        ),
        ({"residual": t["x"].int()}, TypeError, "residual has dtype torch.int32"),
        ({"residual": t["x"].to("meta")}, ValueError, "residual is on meta; it must be on cpu"),
        (
            {"residual": t["x"], "add_residual": False},
            ValueError,
            "it must be None if add_residual",
        ),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p is 1.0; it must be in \[0, 1\)"),
        ({"norm_before": "layer_norm"}, TypeError, "norm_before is str; it must be a Norm or None"),
        ({"norm_after": Norm("batch", norm.weight)}, ValueError, "norm_after.kind is 'batch'"),
        (
            {"norm_after": Norm("rms_norm", norm.weight[:3])},
            ValueError,
            r"norm_after.weight has shape \(3,\)",
        ),
    ]
    for changed, error, message in cases:
        with pytest.raises(error, match=message):
            F.bottleneck_adapter(**t | changed)
