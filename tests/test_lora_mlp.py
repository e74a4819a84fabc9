"""The gated MLP as one op: numerics, gradients, saved tensors, compile, on every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from flat_calls import flat_of
from torch import Tensor, nn

import pylora
import pylora.functional as F
from pylora.functional import Projection
from pylora.reference.activation import GATED_ACTIVATIONS
from pylora.reference.dropout import dropout_mask
from pylora.testing import assert_as_accurate_as_torch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BF16, FP32 = torch.bfloat16, torch.float32
# tokens, in_features, intermediate, out_features, ranks (None: no LoRA), weight kinds, blocksize
CASES = {
    "llama": (16, 96, 128, 96, (32, 33, 34), ("nf4", "nf4", "nf4"), 32),
    "odd": (9, 64, 70, 41, (33, None, 32), ("nested", "nf4", "nested"), 64),
    "mixed": (40, 45, 66, 37, (None, 36, 34), ("dense", "nf4", "dense"), 32),
    "dense": (17, 70, 48, 36, (32, 34, None), ("dense", "dense", "dense"), 64),
}
Make, Check = Callable[..., Projection], Callable[..., None]
TensorsOf = Callable[..., list[Tensor]]


@pytest.fixture
def check(plain_projection: Callable[..., Tensor], check_projections: Check) -> Check:
    def run(
        x: Tensor, mlp: list[Projection], activation: str = "silu", p: float = 0.0, seed: int = 41
    ) -> None:
        sizes = (x.shape[-1], x.shape[-1], mlp[0].weight.shape[0])
        masks: list[Tensor | None] = [None] * 3
        if p:
            masks = [
                dropout_mask(torch.Size((*x.shape[:-1], size)), p, torch.tensor(seed + index))
                .to(x.device, torch.float64)
                .div(1 - p)
                for index, size in enumerate(sizes)
            ]

        def plain_torch(x: Tensor, gate: Projection, up: Projection, down: Projection) -> Tensor:
            activated = GATED_ACTIVATIONS[activation].forward(plain_projection(x, gate, masks[0]))
            return plain_projection(activated * plain_projection(x, up, masks[1]), down, masks[2])

        def ours(x: Tensor, *mlp: Projection) -> Tensor:
            return F.lora_mlp(x, *mlp, activation, p, seed)

        check_projections(ours, plain_torch, x, *mlp)

    return run


@pytest.fixture
def small(make_projection: Make, device: str) -> tuple[Tensor, list[Projection]]:
    """Returns x [9, 96] and three projections: nested with bias, dense, and NF4 with bias."""
    x = torch.randn(9, 96, device=device, requires_grad=True)
    gate = make_projection(70, 96, 6, "nested", device=device, has_bias=True)
    up = make_projection(70, 96, 3, "dense", device=device, scaling=2.0)
    return x, [gate, up, make_projection(32, 70, 4, device=device, has_bias=True)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", list(CASES))
def test_forward_and_backward_equal_the_reference(
    backend: str, device: str, make_projection: Make, check: Check, case: str, dtype: torch.dtype
) -> None:
    tokens, in_features, intermediate, out_features, ranks, weight_kinds, blocksize = CASES[case]
    x = torch.randn(tokens, in_features, device=device).to(dtype).requires_grad_()
    sizes = ((intermediate, in_features), (intermediate, in_features), (out_features, intermediate))
    options = {"dtype": dtype, "device": device, "blocksize": blocksize}
    mlp = [
        make_projection(*size, rank, weight_kind, has_bias=index != 1, **options)
        for index, (size, rank, weight_kind) in enumerate(
            zip(sizes, ranks, weight_kinds, strict=True)
        )
    ]
    check(x, mlp)


@pytest.mark.parametrize("activation", list(GATED_ACTIVATIONS))
@pytest.mark.parametrize("lora_dtype", [FP32, BF16])
def test_activation_dropout_and_lora_dtypes_obey_the_numerics_rule(
    backend: str,
    device: str,
    make_projection: Make,
    check: Check,
    activation: str,
    lora_dtype: torch.dtype,
) -> None:
    """LoRA is fp32 over bf16, or each projection has its own LoRA dtype and block size."""
    x = torch.randn(17, 96, device=device).to(BF16).requires_grad_()
    gate = make_projection(64, 96, 40, "nested", BF16, FP32, device)
    up = make_projection(64, 96, 33, "nf4", BF16, lora_dtype, device, blocksize=32)
    down = make_projection(48, 64, 35, "nf4", BF16, lora_dtype, device)
    check(x, [gate, up, down], activation, p=0.3)


def test_equals_the_composition_of_lora_linear(
    backend: str, small: Any, tensors_of: TensorsOf
) -> None:
    """With the documented seeds, the output and the gradients are equal bit for bit.

    Triton's kernels round act(gate) * up once instead of twice, so they promise no equal bits.
    """
    x, mlp = small
    seed = torch.tensor(2**62 + 5, device=x.device)
    leaves = [x, *tensors_of(*mlp)]

    def one_layer(x: Tensor, p: Projection, index: int) -> Tensor:
        return F.lora_linear(x, *p[:4], p.bias, dropout_p=0.5, seed=seed + index)

    def composition(x: Tensor, gate: Projection, up: Projection, down: Projection) -> Tensor:
        return one_layer(nn.functional.silu(one_layer(x, gate, 0)) * one_layer(x, up, 1), down, 2)

    y = F.lora_mlp(x, *mlp, dropout_p=0.5, seed=seed)
    if backend == "triton":
        assert_as_accurate_as_torch(y, composition, x, *mlp)
        return
    expected = composition(x, *mlp)
    assert torch.equal(y, expected)
    gradients = torch.autograd.grad(y.sum(), leaves)
    assert all(map(torch.equal, gradients, torch.autograd.grad(expected.sum(), leaves)))


def test_equals_peft(backend: str, device: str, check_against_peft: Check) -> None:
    """PEFT puts fp32 LoRA on the three projections of transformers' LlamaMLP in bf16."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = llama.LlamaConfig(hidden_size=96, intermediate_size=128)
    targets = ["gate_proj", "up_proj", "down_proj"]
    x = torch.randn(2, 9, 96, device=device).to(BF16)
    check_against_peft(llama.LlamaMLP(config).to(device, BF16), targets, F.lora_mlp, x)


@pytest.mark.parametrize("shape", [(0, 96), (2, 0, 96)])
def test_an_empty_batch_gives_empty_results(
    backend: str, device: str, small: Any, tensors_of: TensorsOf, shape: tuple[int, ...]
) -> None:
    _, mlp = small
    x = torch.zeros(shape, device=device, requires_grad=True)
    y = F.lora_mlp(x, *mlp, dropout_p=0.5)
    assert y.shape == (*shape[:-1], 32)
    for gradient in torch.autograd.grad(y.sum(), [x, *tensors_of(*mlp)]):
        assert not gradient.any()


def test_leading_dimensions_and_strides_change_no_value(
    backend: str, device: str, small: Any, check: Check
) -> None:
    _, mlp = small
    x = torch.randn(96, 3, 5, device=device).permute(2, 1, 0).requires_grad_()
    strided = mlp[0].lora_A.detach().t().contiguous().t().requires_grad_()
    mlp[0] = mlp[0]._replace(lora_A=strided)
    assert F.lora_mlp(x, *mlp).shape == (5, 3, 32)
    check(x, mlp, p=0.2)


@pytest.mark.parametrize("trained", [0, 1, 2])
def test_only_the_gradients_asked_for_are_computed(backend: str, small: Any, trained: int) -> None:
    """A projection that is trained alone gets the same gradients as if all were trained."""
    x, mlp = small
    frozen = [
        p
        if index == trained
        else Projection(*(t.detach() if isinstance(t, Tensor) else t for t in p))
        for index, p in enumerate(mlp)
    ]
    wanted = [mlp[trained].lora_A, mlp[trained].lora_B]
    gradients = torch.autograd.grad(F.lora_mlp(x.detach(), *frozen, "gelu", 0.1, 5).sum(), wanted)
    expected = torch.autograd.grad(F.lora_mlp(x, *mlp, "gelu", 0.1, 5).sum(), wanted)
    assert all(map(torch.equal, gradients, expected))


def test_saves_only_gate_and_up(backend: str, device: str, make_projection: Make) -> None:
    """The op saves two tensors as large as the intermediate. The composition would save four."""
    x = torch.randn(64, 96, device=device, requires_grad=True)
    sizes = ((512, 96), (512, 96), (96, 512))
    mlp = [make_projection(*size, 4, "nested", device=device) for size in sizes]
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        F.lora_mlp(x, *mlp, dropout_p=0.1)
    lora = sum(p.lora_A.nbytes + p.lora_B.nbytes + 64 * 4 * 4 for p in mlp)
    weights = sum(p.weight.nbytes for p in mlp)
    assert sum(saved.values()) <= x.nbytes + 2 * 64 * 512 * 4 + lora + weights + 8


def test_results_repeat_bit_for_bit(backend: str, small: Any, tensors_of: TensorsOf) -> None:
    x, mlp = small

    def run() -> list[Tensor]:
        y = F.lora_mlp(x, *mlp, "gelu", 0.5, 9)
        return [y, *torch.autograd.grad(y.sum(), [x, *tensors_of(*mlp)])]

    assert all(map(torch.equal, run(), run()))


@pytest.mark.parametrize("activation", list(GATED_ACTIVATIONS))
def test_gradients_pass_gradcheck(make_projection: Make, activation: str) -> None:
    """Only the reference takes float64."""
    x = torch.randn(2, 18, dtype=torch.float64, requires_grad=True)
    options = {"dtype": torch.float64, "blocksize": 32}
    gate = make_projection(5, 18, 2, "nested", has_bias=True, **options)
    up = make_projection(5, 18, 1, "dense", **options)
    down = make_projection(3, 5, 2, "dense", has_bias=True, **options)
    parts = [gate.lora_A, gate.lora_B, gate.bias, up.weight, up.lora_A, up.lora_B, *down[:3]]

    def function(x: Tensor, *t: Tensor) -> Tensor:
        projections = (
            Projection(gate.weight, t[0], t[1], 0.7, t[2]),
            Projection(t[3], t[4], t[5], 1.3),
            Projection(t[6], t[7], t[8], 0.5, t[9]),
        )
        return F.lora_mlp(x, *projections, activation, 0.25, 5)

    assert torch.autograd.gradcheck(function, (x, *parts, down.bias))


def test_op_passes_opcheck(backend: str, small: Any) -> None:
    x, mlp = small
    args = flat_of(F.CALLS["lora_mlp"](x, *mlp, "gelu_tanh", 0.25, 5))
    torch.library.opcheck(torch.ops.pylora.lora_mlp.default, args)
    detached = [
        [t.detach() if isinstance(t, Tensor) else t for t in arg] if isinstance(arg, list) else arg
        for arg in args
    ]
    detached[0] = x.detach()
    y, gate, up, h = torch.ops.pylora.lora_mlp(*detached)
    assert gate.shape == up.shape == (9, 70) and h[2].shape == (9, 4)
    backward = torch.ops.pylora.lora_mlp_backward.default
    args = (torch.randn_like(y), detached[0], gate, up, h, *detached[1:])
    # The mask has x, and then three of each: weights, lora_A, lora_B and biases.
    mask = [True, *[False, True, False], *[True, True, False] * 2, *[True, False, True]]
    for wanted in (mask, [False] * 13):
        torch.library.opcheck(backward, (*args, wanted))


def test_a_compiled_function_gives_the_same_bits(
    backend: str, small: Any, tensors_of: TensorsOf
) -> None:
    x, mlp = small
    seed = torch.tensor(11, device=x.device)
    leaves = [x, *tensors_of(*mlp)]

    def function(x: Tensor, *mlp: Projection) -> Tensor:
        return F.lora_mlp(x, *mlp, "silu", 0.25, seed).relu()

    compiled, expected = torch.compile(function, fullgraph=True)(x, *mlp), function(x, *mlp)
    assert torch.equal(compiled, expected)
    for a, b in zip(
        torch.autograd.grad(compiled.sum(), leaves),
        torch.autograd.grad(expected.sum(), leaves),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_autocast_computes_in_its_dtype(backend: str, device: str, small: Any) -> None:
    x, mlp = small
    with torch.autocast(device, dtype=BF16):
        y = F.lora_mlp(x, *mlp)
    cast = []
    for p in mlp:
        A, B = (None if t is None else t.to(BF16) for t in (p.lora_A, p.lora_B))
        weight = p.weight.to(BF16) if p is mlp[1] else p.weight
        cast.append(p._replace(weight=weight, lora_A=A, lora_B=B))
    assert torch.equal(y, F.lora_mlp(x.to(BF16), *cast))
    y.sum().backward()
    assert mlp[0].lora_A.grad.dtype == FP32 and mlp[1].weight.grad.dtype == FP32


def test_explain_and_meta_tensors_need_no_kernel(small: Any) -> None:
    x, mlp = small
    assert pylora.explain("lora_mlp", x, *mlp).op == "lora_mlp"
    with pytest.raises(ValueError, match="activation is 'relu'"):
        pylora.explain("lora_mlp", x, *mlp, "relu")
    on_meta = [Projection(*(t.to("meta") if hasattr(t, "to") else t for t in p)) for p in mlp]
    assert F.lora_mlp(torch.empty(2, 5, 96, device="meta"), *on_meta).shape == (2, 5, 32)


def test_errors_name_the_argument(make_projection: Make) -> None:
    gate, up, down = (make_projection(*size, 4) for size in ((48, 96), (48, 96), (32, 48)))
    x = torch.zeros(2, 96)
    cases: list[tuple[tuple[Any, ...], type, str]] = [
        ((x[:, :7], gate, up, down), ValueError, "its last dimension must be in_features = 96"),
        ((x, gate, down.weight, down), TypeError, "up is NF4Weight; it must be a Projection"),
        (
            (x, gate, down, down),
            ValueError,
            r"up.weight has shape \(32, 48\); it must have as many rows as gate.weight, 48",
        ),
        (
            (x, gate, up, up),
            ValueError,
            r"down.weight has shape \(48, 96\); it must be \[out_features, 48\]",
        ),
        (
            (x, gate, up, down._replace(lora_A=up.lora_A)),
            ValueError,
            r"down.lora_A has shape \(4, 96\); it must be \[r, 48\]",
        ),
        (
            (x, gate, up, down, "identity"),
            ValueError,
            "activation is 'identity'; it must be one of silu, gelu, gelu_tanh",
        ),
        ((x, gate, up, down, "silu", -0.1), ValueError, r"dropout_p is -0.1; it must be in"),
    ]
    for args, error, message in cases:
        with pytest.raises(error, match=message):
            F.lora_mlp(*args)
