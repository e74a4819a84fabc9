"""lora_qkv and lora_mlp on Triton in cases where they take other branches than in the ops' tests.

The cases are shared launches, the regimes, and splits that cross from one weight to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import pylora
import pylora.functional as F
from pylora.backends.triton import BACKEND
from pylora.functional import Projection
from pylora.reference.activation import GATED_ACTIVATIONS
from pylora.reference.dropout import dropout_mask

if BACKEND.unavailable() is not None:
    pytest.skip(f"no Triton kernels here: {BACKEND.unavailable()}", allow_module_level=True)

from pylora.kernels import configs, launch, lora_linear, lora_linear_backward
from pylora.kernels.lora_shrink import lora_shrink
from pylora.kernels.precision import lora_operands

DEVICE = BACKEND.device()
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
Make = Callable[..., Projection]


@pytest.fixture(autouse=True)
def on_triton(poisoned_buffers: None) -> Iterator[None]:
    with pylora.use_backend("triton"):
        yield


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts how often the host code launches each kernel that layers may share."""
    calls: dict[str, int] = {}

    def counted(module: Any, name: str) -> None:
        function = getattr(module, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] = calls.get(name, 0) + 1
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    for name in ("lora_shrink", "launch_linear_tiles"):
        counted(lora_linear, name)
    for name in ("lora_weight_grad", "launch_linear_tiles_backward"):
        counted(lora_linear_backward, name)
    return calls


@pytest.fixture
def check_qkv(plain_projection: Any, check_projections: Any) -> Callable[..., None]:
    def check(x: Tensor, qkv: list[Projection], p: float = 0.0) -> None:
        masks = [mask_of(x.shape, p, index) for index in range(3)]

        def plain_torch(x: Tensor, *qkv: Projection) -> tuple[Tensor, ...]:
            return tuple(plain_projection(x, *pair) for pair in zip(qkv, masks, strict=True))

        check_projections(lambda x, *qkv: F.lora_qkv(x, *qkv, p, SEED), plain_torch, x, *qkv)

    return check


@pytest.fixture
def check_mlp(plain_projection: Any, check_projections: Any) -> Callable[..., None]:
    def check(x: Tensor, mlp: list[Projection], activation: str, p: float = 0.0) -> None:
        widths = (x.shape[-1], x.shape[-1], mlp[0].weight.shape[0])
        masks = [mask_of((x.shape[0], width), p, i) for i, width in enumerate(widths)]

        def plain_torch(x: Tensor, gate: Projection, up: Projection, down: Projection) -> Tensor:
            hidden = GATED_ACTIVATIONS[activation].forward(plain_projection(x, gate, masks[0]))
            return plain_projection(hidden * plain_projection(x, up, masks[1]), down, masks[2])

        def ours(x: Tensor, *mlp: Projection) -> Tensor:
            return F.lora_mlp(x, *mlp, activation, p, SEED)

        check_projections(ours, plain_torch, x, *mlp)

    return check


SEED = 2**40 + 77


def mask_of(shape: tuple[int, ...], p: float, index: int) -> Tensor | None:
    if p == 0.0:
        return None
    mask = dropout_mask(torch.Size(shape), p, torch.tensor(SEED + index))
    return mask.to(DEVICE, torch.float64) / (1 - p)


def input_of(tokens: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(tokens, columns).to(DEVICE, dtype).requires_grad_()


def test_layers_that_are_alike_share_their_launches(
    make_projection: Make, check_qkv: Any, counts: dict[str, int]
) -> None:
    """All low-rank projections read x once, and the tiles read it once, whatever the ranks are."""
    x = input_of(40, 128, FP16)
    sizes_and_ranks = ((96, 36), (40, 33), (70, 60))
    qkv = [make_projection(*(n, 128, r), "nested", FP16, FP32, DEVICE) for n, r in sizes_and_ranks]
    outputs = F.lora_qkv(x, *qkv)
    assert counts == {"lora_shrink": 1, "launch_linear_tiles": 1}
    torch.autograd.grad(sum(y.float().sum() for y in outputs), [x, *[p.lora_A for p in qkv]])
    assert counts["launch_linear_tiles_backward"] == 1
    # One pass over x gives every dlora_A, and one pass over each grad gives a dlora_B.
    assert counts["lora_weight_grad"] == 1 + 3
    check_qkv(x, qkv, 0.3)


def test_layers_that_differ_share_no_launch(
    make_projection: Make, check_qkv: Any, counts: dict[str, int]
) -> None:
    """Block sizes, LoRA dtypes and biases differ. Only LoRA factors of one dtype share a launch."""
    x = input_of(33, 128, BF16)
    q = make_projection(48, 128, 36, "nf4", BF16, FP32, DEVICE, blocksize=32, has_bias=True)
    k = make_projection(40, 128, 34, "nf4", BF16, BF16, DEVICE, blocksize=32)
    v = make_projection(33, 128, 35, "dense", BF16, FP32, DEVICE)
    F.lora_qkv(x, q, k, v)
    # q and v have LoRA factors of the same dtype.
    assert counts == {"lora_shrink": 2, "launch_linear_tiles": 3}
    check_qkv(x, [q, k, v])


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_split_sums_of_several_weights_obey_the_numerics_rule(
    make_projection: Make, check_qkv: Any, p: float
) -> None:
    """There are few tiles, so sums are split: the forward pass splits K.

    The backward pass splits the rows of all weights, one after the other. A split may begin inside
    one weight and end inside the next.
    """
    x, long = input_of(5, 1088, FP32), (500, 333, 460)
    facts = launch.facts(x)
    assert configs.forward_plan(5, (40, 24, 32), 1088, 4, 64, facts).splits > 1
    plan = configs.backward_plan(5, long, 128, 4, 64, facts)
    assert plan.splits > 1 and plan.per_split not in (512, 512 + 352)
    qkv = [make_projection(size, 1088, 33, "nested", FP32, None, DEVICE) for size in (40, 24, 32)]
    check_qkv(x, qkv, p)
    x = input_of(5, 128, FP32)
    check_qkv(x, [make_projection(size, 128, 33, "nf4", FP32, None, DEVICE) for size in long], p)


@pytest.mark.parametrize(
    ("dtype", "lora_dtype", "p"),
    [(BF16, FP32, 0.0), (BF16, FP32, 0.3), (FP16, FP16, 0.0), (FP16, FP32, 0.3)],
)
def test_large_m_obeys_the_numerics_rule(
    make_projection: Make,
    check_qkv: Any,
    check_mlp: Any,
    dtype: torch.dtype,
    lora_dtype: torch.dtype,
    p: float,
) -> None:
    """The dense product is extended by the columns of every LoRA, or finished later."""
    tokens = 520
    assert configs.is_large(tokens, 2)
    x = input_of(tokens, 64, dtype)
    options = {"dtype": dtype, "lora_dtype": lora_dtype, "device": DEVICE, "has_bias": True}
    q = make_projection(48, 64, 20, "nested", **options)
    k = make_projection(40, 64, 5, "nf4", **options)
    check_qkv(x, [q, k, make_projection(36, 64, 33, "dense", **options)], p)
    gate, up = (make_projection(64, 64, rank, "nf4", **options) for rank in (20, 33))
    check_mlp(x, [gate, up, make_projection(40, 64, 17, "nested", **options)], "silu", p)


@pytest.mark.parametrize("dtype", [FP16, BF16])
@pytest.mark.parametrize("columns", [64, 320])
def test_projections_are_right_while_the_input_is_copied(dtype: torch.dtype, columns: int) -> None:
    """Later tiles of x, and the zeros behind the last one, must not replace a tile in use."""
    x = torch.randn(256, columns).to(DEVICE, dtype)
    factors = [torch.randn(64, columns).to(DEVICE, dtype) for _ in range(3)]
    copy = x.new_empty(256, columns + 16)
    partials = lora_shrink(x, factors, lora_operands(dtype, dtype), copy=copy)
    assert torch.equal(copy[:, :columns], x)
    for factor, projection in zip(factors, partials, strict=True):
        expected = x.double() @ factor.double().T
        torch.testing.assert_close(projection.double().sum(0), expected, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("activation", GATED_ACTIVATIONS)
def test_mlp_without_lora_on_gate_and_down_obeys_the_numerics_rule(
    make_projection: Make, check_mlp: Any, counts: dict[str, int], activation: str
) -> None:
    """down has no LoRA, so the kernel that computes act(gate) * up does no projection."""
    x = input_of(9, 64, FP32)
    gate = make_projection(96, 64, None, "nf4", device=DEVICE)
    up = make_projection(96, 64, 33, "nf4", device=DEVICE)
    check_mlp(x, [gate, up, make_projection(40, 96, None, "nf4", device=DEVICE)], activation)
    assert counts["lora_shrink"] == 1
