"""One adapter for each token: numerics, gradients, isolation of adapters, ids, on every backend."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from flat_calls import flat_of, reference_op
from torch import Tensor

import pylora
import pylora.functional as F
from pylora import reference
from pylora.reference.adapter_groups import Tiles, tiles
from pylora.testing import assert_as_accurate_as_torch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BF16, FP32 = torch.bfloat16, torch.float32
# tokens, out_features, in_features, adapters, rank, weight kind
CASES = {
    "a few tokens": (7, 70, 96, 5, 33, "nf4"),
    "several tiles": (200, 65, 64, 3, 8, "nested"),
    "rank beyond a tile": (90, 40, 45, 2, 80, "nf4"),
    "dense": (80, 48, 70, 4, 16, "dense"),
    "one adapter": (33, 40, 64, 1, 16, "nf4"),
}
SEGMENTS = "mixed", "sorted", "one for all", "none", "unused"
NAMES = ("x", "lora_A", "lora_B", "bias")


def make_ids(tokens: int, adapters: int, how: str = "mixed") -> Tensor:
    if how == "one for all":
        return torch.full((tokens,), adapters - 1)
    if how == "none":
        return torch.full((tokens,), -1)
    if how == "unused":
        return torch.full((tokens,), -1).index_fill_(0, torch.arange(0, tokens, 3), adapters // 2)
    ids = torch.randint(-1, adapters, (tokens,))
    return ids.sort().values if how == "sorted" else ids


def make(
    tokens: int,
    out_features: int,
    in_features: int,
    adapters: int,
    rank: int,
    weight_kind: str = "nf4",
    dtype: torch.dtype = FP32,
    lora_dtype: torch.dtype | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Returns the arguments of multi_lora_linear. All but NF4 weights, scalings and ids need
    gradients."""

    def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(*shape, device=device) * scale).to(dtype).requires_grad_()

    scale, low_rank = in_features**-0.5, lora_dtype or dtype
    weight: Any = normal(out_features, in_features, scale=scale)
    if weight_kind != "dense":
        quantized = weight.detach().float()
        weight = pylora.quantize_nf4(quantized, 32, double_quant=weight_kind == "nested")
    return {
        "x": normal(tokens, in_features),
        "weight": weight,
        "lora_A": normal(adapters, rank, in_features, scale=scale, dtype=low_rank),
        "lora_B": normal(adapters, out_features, rank, dtype=low_rank),
        "adapter_ids": make_ids(tokens, adapters).to(device),
        "scalings": torch.rand(adapters, device=device) + 0.5,
        "bias": normal(out_features),
    }


def plain_torch(
    x: Tensor,
    weight: Any,
    lora_A: Tensor,
    lora_B: Tensor,
    adapter_ids: Tensor,
    scalings: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """Computes each adapter in turn on its own tokens, as PEFT serves a mixed batch."""
    if isinstance(weight, pylora.NF4Weight):
        weight = reference.dense(weight.record, x.dtype)
    linear = torch.nn.functional.linear
    y = linear(x, weight, bias)
    for index, (A, B) in enumerate(zip(lora_A, lora_B, strict=True)):
        own_tokens = (adapter_ids == index).nonzero()[:, 0]
        delta = linear(linear(x[own_tokens].to(A.dtype), A), B) * float(scalings[index])
        y = y.index_add(0, own_tokens, delta.to(y.dtype))
    return y


def gradients(grad: Tensor, function: Any, arguments: dict[str, Any]) -> Any:
    """Returns the gradients of x, lora_A, lora_B, bias and a dense weight."""
    leaves = {
        name: value.detach().requires_grad_()
        for name, value in arguments.items()
        if isinstance(value, Tensor) and name not in ("adapter_ids", "scalings")
    }
    y = function(**arguments | leaves)
    return torch.autograd.grad(y, list(leaves.values()), grad)


def check(arguments: dict[str, Any]) -> None:
    y = F.multi_lora_linear(**arguments)
    assert_as_accurate_as_torch(y, plain_torch, **arguments)
    grad = torch.randn_like(y)
    actual = gradients(grad, F.multi_lora_linear, arguments)
    assert_as_accurate_as_torch(actual, gradients, grad, plain_torch, arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", list(CASES))
def test_forward_and_backward_equal_the_reference(
    backend: str, device: str, case: str, dtype: torch.dtype
) -> None:
    t = make(*CASES[case], dtype=dtype, device=device)
    if backend == "triton":  # Triton has kernels for all cases
        assert pylora.explain("multi_lora_linear", **t).backend == "triton"
    check(t)


@pytest.mark.parametrize("how", SEGMENTS)
def test_every_order_of_ids_obeys_the_numerics_rule(backend: str, device: str, how: str) -> None:
    """LoRA is fp32 over bf16. An adapter without tokens gets zero gradients."""
    t = make(150, 48, 96, 4, 16, "nested", BF16, FP32, device)
    t["adapter_ids"] = make_ids(150, 4, how).to(device)
    check(t)
    present = set(t["adapter_ids"].tolist())
    dlora_A, dlora_B = gradients(torch.ones(150, 48).to(t["x"]), F.multi_lora_linear, t)[1:3]
    for index in range(4):
        used = index in present
        assert bool(dlora_A[index].any()) == bool(dlora_B[index].any()) == used


@pytest.fixture
def on_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes the reference work on tiles, as it does on a GPU, but here on the CPU."""
    module = sys.modules["pylora.reference.multi_lora_linear"]

    def groups(ids: Tensor, adapters: int, rank: int) -> list[Tiles]:
        return [tiles(ids, adapters, max(64, rank))]

    monkeypatch.setattr(module, "groups", groups)
    with pylora.use_backend("reference"):
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", list(CASES))
def test_tiles_obey_the_numerics_rule(on_tiles: None, case: str, dtype: torch.dtype) -> None:
    check(make(*CASES[case], dtype=dtype))


@pytest.mark.parametrize("how", SEGMENTS)
def test_tiles_take_every_order_of_ids(on_tiles: None, how: str) -> None:
    test_every_order_of_ids_obeys_the_numerics_rule("reference", "cpu", how)


def test_tiles_add_up_in_fp32(on_tiles: None) -> None:
    """One adapter has 63 tiles. If each partial sum were rounded to bf16, the error would show."""
    check(make(4000, 24, 32, 1, 16, dtype=BF16))


def test_tiles_keep_adapters_apart(on_tiles: None) -> None:
    test_adapters_do_not_touch_each_other("reference", "cpu")
    test_results_repeat_bit_for_bit("reference", "cpu")
    for shape in ((0, 96), (2, 0, 96)):
        test_an_empty_batch_gives_empty_results("reference", "cpu", shape)


def test_equals_lora_linear_of_each_adapter(backend: str, device: str) -> None:
    """The expected tokens come from lora_linear, or from nf4_linear if they have no adapter."""
    t = make(60, 48, 96, 3, 33, dtype=BF16, device=device)

    @pylora.use_backend("reference")
    def one_by_one(x: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor) -> Tensor:
        y = F.nf4_linear(x, t["weight"], bias)
        for index, scaling in enumerate(t["scalings"].tolist()):
            own_tokens = t["adapter_ids"] == index
            trailing = (lora_A[index], lora_B[index], scaling, bias)
            y[own_tokens] = F.lora_linear(x[own_tokens], t["weight"], *trailing)
        return y

    y = F.multi_lora_linear(**t)
    assert_as_accurate_as_torch(y, one_by_one, *(t[name] for name in NAMES))


def test_equals_a_mixed_batch_of_peft(backend: str, device: str) -> None:
    """PEFT's `adapter_names` is for inference: one adapter for each sample, and equal ranks."""
    peft = pytest.importorskip("peft")
    options = {"r": 40, "target_modules": ["0"], "init_lora_weights": False}
    alphas = {"en": 20, "de": 80, "fr": 40}
    configs = {name: peft.LoraConfig(lora_alpha=a, **options) for name, a in alphas.items()}
    plain = torch.nn.Sequential(torch.nn.Linear(96, 48)).to(device)
    model = peft.get_peft_model(plain, configs["en"], adapter_name="en")
    for name in ("de", "fr"):
        model.add_adapter(name, configs[name])
    layer = model.base_model.model[0].eval()
    x = torch.randn(6, 5, 96, device=device)
    names = ["de", "__base__", "en", "en", "fr", "de"]
    ids = torch.tensor([1, -1, 0, 0, 2, 1], device=device)

    def through_peft(x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        kwargs = {"adapter_names": names}
        return torch.func.functional_call(layer, parameters, (x,), kwargs)

    parameters = dict(layer.named_parameters())
    A, B = (
        torch.stack([parameters[f"lora_{which}.{name}.weight"] for name in alphas])
        for which in "AB"
    )
    scalings = torch.tensor([0.5, 2.0, 1.0], device=device)
    base = (parameters["base_layer.weight"], A, B, ids, scalings, parameters["base_layer.bias"])
    assert_as_accurate_as_torch(F.multi_lora_linear(x, *base), through_peft, x, parameters)


def test_adapters_do_not_touch_each_other(backend: str, device: str) -> None:
    """A diverged adapter, or a NaN in a token, changes only its own tokens and gradients."""
    t = make(90, 48, 96, 3, 16, device=device)
    ids = t["adapter_ids"]
    grad = torch.randn(90, 48, device=device)
    y = F.multi_lora_linear(**t)
    dx, dA, dB, _ = gradients(grad, F.multi_lora_linear, t)
    other_tokens = ids != 1
    # The poisoned tensor -> (dlora_A depends on it, dlora_B depends on it).
    for name, depend in {
        "lora_A": (False, True),
        "lora_B": (True, False),
        "x": (True, True),
    }.items():
        poisoned = dict(t)
        poisoned[name] = t[name].detach().clone()
        poisoned[name][~other_tokens if name == "x" else 1] = torch.nan
        assert torch.equal(F.multi_lora_linear(**poisoned)[other_tokens], y[other_tokens])
        poisoned_gradients = gradients(grad, F.multi_lora_linear, poisoned)
        assert torch.equal(poisoned_gradients[0][other_tokens], dx[other_tokens])
        for gradient, expected, depends in zip(
            poisoned_gradients[1:3], (dA, dB), depend, strict=True
        ):
            assert bool(gradient[1].isnan().any()) == depends
            assert torch.equal(gradient[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("shape", [(0, 96), (2, 0, 96), (0, 3, 96)])
def test_an_empty_batch_gives_empty_results(
    backend: str, device: str, shape: tuple[int, ...]
) -> None:
    t = make(1, 48, 96, 3, 4, device=device)
    t["x"] = torch.zeros(shape, device=device, requires_grad=True)
    t["adapter_ids"] = torch.zeros(shape[:-1], dtype=torch.int64, device=device)
    y = F.multi_lora_linear(**t)
    assert y.shape == (*shape[:-1], 48)
    for gradient in torch.autograd.grad(y.sum(), [t[name] for name in NAMES]):
        assert not gradient.any()


def test_leading_dimensions_and_strides_change_no_value(backend: str, device: str) -> None:
    """Ids are given for each token, flat or in x's shape, or for each sample and all its tokens."""
    t = make(15, 48, 96, 3, 8, device=device)
    flat = {**t, "adapter_ids": torch.tensor([0, 2, -1, 1, 2], device=device).repeat_interleave(3)}
    x = t["x"].detach().view(5, 3, 96).permute(2, 1, 0).contiguous().permute(2, 1, 0)
    lora_A = t["lora_A"].detach().mT.contiguous().mT
    assert not x.is_contiguous() and not lora_A.is_contiguous()
    ids = flat["adapter_ids"]
    for given in (ids, ids.view(5, 3), ids.view(5, 3).t().contiguous().t(), ids[::3]):
        y = F.multi_lora_linear(**flat | {"x": x, "lora_A": lora_A, "adapter_ids": given})
        assert y.shape == (5, 3, 48)
        assert_as_accurate_as_torch(y.view(15, 48), plain_torch, **flat)


def test_only_the_gradients_asked_for_are_computed(backend: str, device: str) -> None:
    t = make(20, 48, 96, 3, 4, device=device)
    t |= {"x": t["x"].detach(), "bias": t["bias"].detach()}
    grad = torch.randn(20, 48, device=device)
    y = F.multi_lora_linear(**t)
    lora_gradients = torch.autograd.grad(y, [t["lora_A"], t["lora_B"]], grad)
    expected = gradients(grad, F.multi_lora_linear, t)[1:3]
    assert all(map(torch.equal, lora_gradients, expected))


def test_results_repeat_bit_for_bit(backend: str, device: str) -> None:
    t = make(300, 48, 96, 5, 8, dtype=BF16, device=device)
    grad = torch.randn(300, 48, device=device).to(BF16)
    runs = [[F.multi_lora_linear(**t), *gradients(grad, F.multi_lora_linear, t)] for _ in range(2)]
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("tile_tokens", [1, 4, 64])
def test_each_token_is_in_one_tile_of_its_adapter(tile_tokens: int) -> None:
    """Only tokens with a valid id are in a tile, and the number of tiles keeps to its bound."""
    for tokens, adapters in ((0, 3), (1, 1), (50, 7), (50, 60), (129, 2)):
        ids = torch.randint(-2, adapters + 2, (tokens,))
        made = tiles(ids, adapters, tile_tokens)
        valid = (ids >= 0) & (ids < adapters)
        assert torch.equal(made.covered, valid)
        used = made.token[made.token < tokens]
        assert sorted(used.tolist()) == valid.nonzero()[:, 0].tolist()
        owner = made.adapter.repeat_interleave(tile_tokens)
        flat = made.token.view(-1)
        assert torch.equal(ids[flat[flat < tokens]], owner[flat < tokens])
        assert torch.equal(flat[made.place[valid]], valid.nonzero()[:, 0])
        assert len(made.adapter) <= tokens // tile_tokens + adapters


def test_reference_never_waits_for_a_gpu() -> None:
    """Meta tensors have no data, so an op that asks the device for a value raises."""
    t = make(7, 48, 96, 3, 4, "dense")
    arguments = {name: value.detach().to("meta") for name, value in t.items()}
    (x, *args) = flat_of(F.CALLS["multi_lora_linear"](**arguments))
    y, h = reference_op("multi_lora_linear")(x, *args)
    backward = (*args[:7], *args[8:-1], [True] * 5)
    results = reference_op("multi_lora_linear_backward")(y, x, h, *backward)
    shapes = [(7, 96), (48, 96), (3, 4, 96), (3, 48, 4), (48,)]
    assert [tuple(result.shape) for result in results] == shapes
    with pytest.raises(RuntimeError):
        bool((arguments["adapter_ids"] < 0).any())


def test_gradients_pass_gradcheck() -> None:
    """Only the reference takes float64. There are a tile of 64 tokens and a shorter one."""
    options = {"dtype": torch.float64, "device": "cpu"}
    for weight_kind in ("nested", "dense"):
        t = make(6, 4, 18, 3, 2, weight_kind, **options)
        differentiable = [
            name for name, v in t.items() if isinstance(v, Tensor) and v.grad_fn is None
        ]
        differentiable = [name for name in differentiable if t[name].requires_grad]

        def function(
            *values: Tensor, names: list[str] = differentiable, t: dict[str, Any] = t
        ) -> Tensor:
            return F.multi_lora_linear(**t | dict(zip(names, values, strict=True)))

        assert torch.autograd.gradcheck(function, tuple(t[name] for name in differentiable))


def test_op_passes_opcheck(backend: str, device: str) -> None:
    run_opcheck(make(5, 48, 96, 3, 4, "nested", device=device), is_dense=False)


def test_op_passes_opcheck_over_a_dense_base() -> None:
    """The cpu backend runs a dense base in torch, and the adapters in its kernels."""
    run_opcheck(make(5, 48, 96, 3, 4, "dense"), is_dense=True)


def run_opcheck(t: dict[str, Any], is_dense: bool) -> None:
    args = flat_of(F.CALLS["multi_lora_linear"](**t))
    torch.library.opcheck(torch.ops.pylora.multi_lora_linear.default, args)
    x, *other_args = (a.detach() if isinstance(a, Tensor) else a for a in args)
    y, h = torch.ops.pylora.multi_lora_linear(x, *other_args)
    assert y.shape == (5, 48) and h.shape == (5, 4) and h.dtype == FP32
    backward = torch.ops.pylora.multi_lora_linear_backward.default
    for mask in ([True, is_dense, True, True, True], [False] * 5):
        torch.library.opcheck(
            backward, (torch.randn_like(y), x, h, *other_args[:7], *other_args[8:-1], mask)
        )


def test_a_direct_call_of_the_op_has_gradients(backend: str, device: str) -> None:
    t = make(5, 48, 96, 3, 4, device=device)
    args = flat_of(F.CALLS["multi_lora_linear"](**t))
    y, h = torch.ops.pylora.multi_lora_linear(*args)
    assert y.requires_grad and not h.requires_grad
    y.sum().backward()
    assert all(t[name].grad is not None for name in NAMES)


def test_a_compiled_function_gives_the_same_bits(backend: str, device: str) -> None:
    t = make(9, 48, 96, 3, 4, device=device)
    leaves = [t[name] for name in NAMES]

    def function(*values: Tensor) -> Tensor:
        return F.multi_lora_linear(**t | dict(zip(NAMES, values, strict=True))).relu()

    compiled, expected = torch.compile(function, fullgraph=True)(*leaves), function(*leaves)
    assert torch.equal(compiled, expected)
    for a, b in zip(
        torch.autograd.grad(compiled.sum(), leaves),
        torch.autograd.grad(expected.sum(), leaves),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_autocast_computes_in_its_dtype(backend: str, device: str) -> None:
    for weight_kind in ("nf4", "dense"):
        t = make(9, 48, 96, 3, 4, weight_kind, device=device)
        with torch.autocast(device, dtype=BF16):
            y = F.multi_lora_linear(**t)
        cast = dict(t, x=t["x"].to(BF16))
        if weight_kind == "dense":
            cast["weight"] = t["weight"].to(BF16)
        assert y.dtype == BF16 and torch.equal(y, F.multi_lora_linear(**cast))
        y.sum().backward()
        assert t["lora_A"].grad.dtype == FP32


def test_explain_and_meta_tensors_need_no_kernel() -> None:
    t = make(9, 48, 96, 3, 4)
    assert pylora.explain("multi_lora_linear", **t).op == "multi_lora_linear"
    on_meta = {name: value.to("meta") for name, value in t.items()}
    assert F.multi_lora_linear(**on_meta).shape == (9, 48)


def test_errors_name_the_argument(backend: str) -> None:
    t = {k: v.cpu() if k != "weight" else v.to("cpu") for k, v in make(6, 48, 96, 3, 4).items()}
    ids = t["adapter_ids"]
    cases: list[tuple[dict[str, Any], type, str]] = [
        ({"x": t["x"][:, :7]}, ValueError, "its last dimension must be in_features = 96"),
        (
            {"lora_A": t["lora_A"][0]},
            ValueError,
            r"lora_A has shape \(4, 96\); it must be \[n, r, 96\]",
        ),
        ({"lora_A": t["lora_A"][:0]}, ValueError, "with n >= 1 and r >= 1"),
        (
            {"lora_B": t["lora_B"][:2]},
            ValueError,
            r"lora_B has shape \(2, 48, 4\); it must be \(3, 48, 4\)",
        ),
        ({"lora_B": t["lora_B"].half()}, TypeError, "it must be lora_A's dtype, torch.float32"),
        ({"scalings": torch.ones(2)}, ValueError, r"scalings has shape \(2,\); it must be \(3,\)"),
        ({"scalings": [1.0, 1.0, 1.0]}, TypeError, "scalings is list; it must be a Tensor"),
        ({"scalings": torch.ones(3, requires_grad=True)}, ValueError, "scalings requires grad"),
        (
            {"adapter_ids": ids.int()},
            TypeError,
            "adapter_ids has dtype torch.int32; it must be torch.int64",
        ),
        (
            {"adapter_ids": ids[:4]},
            ValueError,
            r"adapter_ids has shape \(4,\); it must be \(6,\)$",
        ),
        (
            {"x": t["x"].view(2, 3, 96), "adapter_ids": ids[:4]},
            ValueError,
            r"it must be \(6,\) or \(2, 3\) or \(2,\)$",
        ),
        ({"adapter_ids": ids.to("meta")}, ValueError, "adapter_ids is on meta"),
        (
            {"adapter_ids": ids.index_fill(0, torch.tensor([2, 4]), 3)},
            ValueError,
            r"adapter_ids has 3 at token 2; it must be in \[-1, 3\)",
        ),
        (
            {"adapter_ids": ids.index_fill(0, torch.tensor([5]), -2)},
            ValueError,
            r"adapter_ids has -2 at token 5",
        ),
        ({"bias": torch.zeros(3)}, ValueError, r"bias has shape \(3,\); it must be \(48,\)"),
    ]
    for changed, error, message in cases:
        with pytest.raises(error, match=message):
            F.multi_lora_linear(**t | changed)
