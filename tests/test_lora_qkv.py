"""The query, key and value projections as one op: numerics, gradients, compile, every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from flat_calls import flat_of
from torch import Tensor

import pylora
import pylora.functional as F
from pylora.functional import Projection
from pylora.reference.dropout import dropout_mask

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BF16, FP32 = torch.bfloat16, torch.float32
# tokens, in_features, out_features, ranks (None: no LoRA), weight kinds, blocksize
CASES = {
    "grouped-query": (16, 128, (96, 32, 32), (32, 33, 40), ("nf4", "nf4", "nf4"), 64),
    "odd": (9, 96, (70, 37, 41), (33, None, 35), ("nested", "nf4", "nested"), 64),
    "straddling": (17, 45, (40, 33, 33), (32, 32, None), ("nf4", "nested", "nf4"), 32),
    "mixed": (40, 64, (48, 48, 33), (None, 36, 34), ("dense", "nf4", "dense"), 32),
    "dense": (33, 70, (64, 32, 36), (32, 34, None), ("dense", "dense", "dense"), 64),
}
Make = Callable[..., Projection]
TensorsOf = Callable[..., list[Tensor]]
Check = Callable[..., None]


def masks_of(x: Tensor, p: float, seed: int) -> list[Tensor | None]:
    """Returns a mask for each projection, from the seeds seed, seed + 1 and seed + 2."""
    if p == 0.0:
        return [None] * 3
    masks = (dropout_mask(x.shape, p, torch.tensor(seed + i)) for i in range(3))
    return [mask.to(x.device, torch.float64) / (1 - p) for mask in masks]


@pytest.fixture
def check(plain_projection: Callable[..., Tensor], check_projections: Callable[..., None]) -> Check:
    def run(x: Tensor, qkv: list[Projection], p: float = 0.0, seed: int = 41) -> None:
        masks = masks_of(x, p, seed)

        def plain_torch(x: Tensor, *qkv: Projection) -> tuple[Tensor, ...]:
            return tuple(plain_projection(x, *pair) for pair in zip(qkv, masks, strict=True))

        check_projections(lambda x, *qkv: F.lora_qkv(x, *qkv, p, seed), plain_torch, x, *qkv)

    return run


@pytest.fixture
def grouped(make_projection: Make, device: str) -> tuple[Tensor, list[Projection]]:
    """Returns x [9, 96] and three projections: nested with bias, dense, and NF4 without LoRA."""
    x = torch.randn(9, 96, device=device, requires_grad=True)
    q = make_projection(70, 96, 6, "nested", device=device, has_bias=True)
    k = make_projection(32, 96, 3, "dense", device=device, scaling=2.0)
    return x, [q, k, make_projection(32, 96, None, device=device, has_bias=True)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", list(CASES))
def test_forward_and_backward_equal_the_reference(
    backend: str,
    device: str,
    make_projection: Make,
    check: Check,
    case: str,
    dtype: torch.dtype,
) -> None:
    tokens, in_features, sizes, ranks, weight_kinds, blocksize = CASES[case]
    x = torch.randn(tokens, in_features, device=device).to(dtype).requires_grad_()
    options = {"dtype": dtype, "device": device, "blocksize": blocksize}
    qkv = [
        make_projection(size, in_features, rank, weight_kind, has_bias=index != 1, **options)
        for index, (size, rank, weight_kind) in enumerate(
            zip(sizes, ranks, weight_kinds, strict=True)
        )
    ]
    check(x, qkv)


@pytest.mark.parametrize("lora_dtype", [FP32, BF16])
def test_dropout_and_lora_dtypes_obey_the_numerics_rule(
    backend: str,
    device: str,
    make_projection: Make,
    check: Check,
    lora_dtype: torch.dtype,
) -> None:
    """LoRA is fp32 over bf16, or each projection has its own LoRA dtype and block size."""
    x = torch.randn(17, 96, device=device).to(BF16).requires_grad_()
    q = make_projection(64, 96, 40, "nested", BF16, FP32, device)
    k = make_projection(32, 96, 33, "nf4", BF16, lora_dtype, device, blocksize=32)
    v = make_projection(32, 96, 35, "dense", BF16, lora_dtype, device)
    check(x, [q, k, v], p=0.3)


def test_equals_lora_linear_of_each_projection(backend: str, grouped: Any) -> None:
    """With the documented seeds the outputs are equal bit for bit. The masks are independent."""
    x, qkv = grouped
    seed = torch.tensor(2**62 + 5, device=x.device)
    outputs = F.lora_qkv(x, *qkv, 0.5, seed)
    expected = [
        F.lora_linear(x, p.weight, p.lora_A, p.lora_B, p.scaling, p.bias, 0.5, seed + index)
        for index, p in enumerate(qkv[:2])
    ]
    assert all(map(torch.equal, outputs[:2], expected))
    assert torch.equal(outputs[2], F.nf4_linear(x, qkv[2].weight, qkv[2].bias))
    same = [qkv[0], qkv[0], qkv[0]]
    first, second, third = F.lora_qkv(x, *same, 0.5, 1)
    assert not torch.equal(first, second) and not torch.equal(second, third)


def test_equals_peft(backend: str, device: str, check_against_peft: Callable[..., None]) -> None:
    """PEFT puts LoRA on the projections of transformers' grouped-query LlamaAttention."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = llama.LlamaConfig(hidden_size=96, num_attention_heads=3, num_key_value_heads=1)
    attention = llama.LlamaAttention(config, layer_idx=0)
    targets = ["q_proj", "k_proj", "v_proj"]

    class Projections(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = attention

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return tuple(getattr(attention, name)(x) for name in targets)

    x = torch.randn(2, 9, 96, device=device).to(BF16)
    module = Projections().to(device, BF16)
    check_against_peft(module, [f"attention.{name}" for name in targets], F.lora_qkv, x)


def test_dropout_is_a_function_of_the_seed(backend: str, grouped: Any) -> None:
    x, qkv = grouped
    assert torch.equal(F.lora_qkv(x, *qkv, 0.5, 3)[0], F.lora_qkv(x, *qkv, 0.5, torch.tensor(3))[0])
    torch.manual_seed(0)
    first = F.lora_qkv(x, *qkv, 0.5)[0]
    assert not torch.equal(first, F.lora_qkv(x, *qkv, 0.5)[0])
    torch.manual_seed(0)
    assert torch.equal(first, F.lora_qkv(x, *qkv, 0.5)[0])
    # Adding to the largest seed wraps around, as int64 always does.
    largest = torch.tensor(2**63 - 1)
    expected = F.lora_linear(x, *qkv[1][:4], dropout_p=0.5, seed=largest + 1)
    assert torch.equal(F.lora_qkv(x, *qkv, 0.5, largest)[1], expected)


@pytest.mark.parametrize("shape", [(0, 96), (2, 0, 96)])
def test_an_empty_batch_gives_empty_results(
    backend: str, device: str, grouped: Any, tensors_of: TensorsOf, shape: tuple[int, ...]
) -> None:
    _, qkv = grouped
    x = torch.zeros(shape, device=device, requires_grad=True)
    outputs = F.lora_qkv(x, *qkv, 0.5)
    assert [tuple(y.shape) for y in outputs] == [(*shape[:-1], size) for size in (70, 32, 32)]
    for gradient in torch.autograd.grad(sum(y.sum() for y in outputs), [x, *tensors_of(*qkv)]):
        assert not gradient.any()


def test_leading_dimensions_and_strides_change_no_value(
    backend: str, device: str, grouped: Any, check: Check
) -> None:
    _, qkv = grouped
    x = torch.randn(96, 3, 5, device=device).permute(2, 1, 0).requires_grad_()
    strided = qkv[0].lora_A.detach().t().contiguous().t().requires_grad_()
    qkv[0] = qkv[0]._replace(lora_A=strided)
    outputs = F.lora_qkv(x, *qkv)
    assert [tuple(y.shape) for y in outputs] == [(5, 3, 70), (5, 3, 32), (5, 3, 32)]
    check(x, qkv, p=0.2)


def test_only_the_gradients_asked_for_are_computed(backend: str, grouped: Any) -> None:
    """Biases and dense weights are frozen, x needs no gradient, or a projection is not used."""
    x, qkv = grouped
    frozen = [
        p._replace(
            weight=p.weight.detach() if isinstance(p.weight, Tensor) else p.weight,
            bias=None if p.bias is None else p.bias.detach(),
        )
        for p in qkv
    ]
    wanted = [frozen[0].lora_A, frozen[0].lora_B, frozen[1].lora_A, frozen[1].lora_B]
    outputs = F.lora_qkv(x.detach(), *frozen, 0.1, 5)
    grads = [torch.randn_like(y) for y in outputs]
    gradients = torch.autograd.grad(outputs, wanted, grads)
    expected = torch.autograd.grad(F.lora_qkv(x, *qkv, 0.1, 5), wanted, grads)
    assert all(map(torch.equal, gradients, expected))
    (only_q,) = torch.autograd.grad(F.lora_qkv(x, *qkv, 0.1, 5)[0].sum(), [qkv[1].lora_A])
    assert not only_q.any()


def test_results_repeat_bit_for_bit(backend: str, grouped: Any, tensors_of: TensorsOf) -> None:
    x, qkv = grouped

    def run() -> list[Tensor]:
        outputs = F.lora_qkv(x, *qkv, 0.5, 9)
        gradients = torch.autograd.grad(sum(y.sum() for y in outputs), [x, *tensors_of(*qkv)])
        return [*outputs, *gradients]

    assert all(map(torch.equal, run(), run()))


def test_gradients_pass_gradcheck(make_projection: Make) -> None:
    """Only the reference takes float64."""
    x = torch.randn(2, 18, dtype=torch.float64, requires_grad=True)
    options = {"dtype": torch.float64, "blocksize": 32}
    q = make_projection(4, 18, 2, "nested", has_bias=True, **options)
    k = make_projection(3, 18, 1, "dense", **options)
    v = make_projection(3, 18, None, "dense", has_bias=True, **options)
    parts = [q.lora_A, q.lora_B, q.bias, k.weight, k.lora_A, k.lora_B, v.weight, v.bias]

    def function(x: Tensor, *t: Tensor) -> tuple[Tensor, ...]:
        projections = (
            Projection(q.weight, t[0], t[1], 0.7, t[2]),
            Projection(t[3], t[4], t[5], 1.3),
            Projection(t[6], bias=t[7]),
        )
        return F.lora_qkv(x, *projections, 0.25, 5)

    assert torch.autograd.gradcheck(function, (x, *parts))


def test_op_passes_opcheck(backend: str, grouped: Any) -> None:
    x, qkv = grouped
    args = flat_of(F.CALLS["lora_qkv"](x, *qkv, 0.25, 5))
    torch.library.opcheck(torch.ops.pylora.lora_qkv.default, args)
    detached = [
        [t.detach() if isinstance(t, Tensor) else t for t in arg] if isinstance(arg, list) else arg
        for arg in args
    ]
    detached[0] = x.detach()
    y, h = torch.ops.pylora.lora_qkv(*detached)
    assert h[0].dtype == FP32 and h[2].shape == (0,)
    backward = torch.ops.pylora.lora_qkv_backward.default
    grads = [torch.randn_like(t) for t in y]
    # The mask has x, and then three of each: weights, lora_A, lora_B and biases.
    mask = [True, *[False, True, False], *[True, True, False] * 2, *[True, False, True]]
    for wanted in (mask, [False] * 13):
        torch.library.opcheck(backward, (grads, detached[0], h, *detached[1:], wanted))


def test_a_direct_call_of_the_op_has_gradients(
    backend: str, grouped: Any, tensors_of: TensorsOf
) -> None:
    x, qkv = grouped
    args = flat_of(F.CALLS["lora_qkv"](x, *qkv))
    y, h = torch.ops.pylora.lora_qkv(*args)
    assert all(t.requires_grad for t in y) and not any(t.requires_grad for t in h)
    sum(t.sum() for t in y).backward()
    assert all(t.grad is not None for t in [x, *tensors_of(*qkv)])


def test_a_compiled_function_gives_the_same_bits(
    backend: str, grouped: Any, tensors_of: TensorsOf
) -> None:
    x, qkv = grouped
    seed = torch.tensor(11, device=x.device)
    leaves = [x, *tensors_of(*qkv)]

    # The sums are not compiled: Inductor adds in another order than eager torch, and rounds
    # differently.
    def function(x: Tensor, *qkv: Projection) -> tuple[Tensor, Tensor]:
        q, k, v = F.lora_qkv(x, *qkv, 0.25, seed)
        return q.relu(), k * v

    compiled, expected = torch.compile(function, fullgraph=True)(x, *qkv), function(x, *qkv)
    assert all(map(torch.equal, compiled, expected))
    for a, b in zip(
        torch.autograd.grad(sum(y.sum() for y in compiled), leaves),
        torch.autograd.grad(sum(y.sum() for y in expected), leaves),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_autocast_computes_in_its_dtype(backend: str, device: str, grouped: Any) -> None:
    x, qkv = grouped
    with torch.autocast(device, dtype=BF16):
        outputs = F.lora_qkv(x, *qkv)
    cast = []
    for p in qkv:
        A, B = (None if t is None else t.to(BF16) for t in (p.lora_A, p.lora_B))
        weight = p.weight.to(BF16) if p is qkv[1] else p.weight
        cast.append(p._replace(weight=weight, lora_A=A, lora_B=B))
    assert all(map(torch.equal, outputs, F.lora_qkv(x.to(BF16), *cast)))
    sum(y.sum() for y in outputs).backward()
    assert qkv[0].lora_A.grad.dtype == FP32 and qkv[1].weight.grad.dtype == FP32


def test_explain_says_why_a_dense_base_is_rejected(grouped: Any) -> None:
    x, qkv = grouped
    dense = [qkv[1]] * 3
    assert "dense" in pylora.explain("lora_qkv", x, *dense).rejected.get("cpu", "dense")
    with pylora.use_backend("reference"):
        assert pylora.explain("lora_qkv", x, *qkv).backend == "reference"


def test_meta_tensors_give_the_shapes(make_projection: Make) -> None:
    q = make_projection(70, 96, 6, "nested")
    q = Projection(q.weight.to("meta"), q.lora_A.to("meta"), q.lora_B.to("meta"))
    x = torch.empty(2, 5, 96, device="meta")
    assert [y.shape for y in F.lora_qkv(x, q, q, q, 0.1)] == [(2, 5, 70)] * 3


def test_errors_name_the_argument(make_projection: Make) -> None:
    q, k, v = (make_projection(size, 96, 4, has_bias=True) for size in (48, 32, 32))
    x = torch.zeros(2, 96)
    dense = torch.zeros(32, 96)
    cases: list[tuple[tuple[Any, ...], type, str]] = [
        ((x[:, :7], q, k, v), ValueError, "its last dimension must be in_features = 96"),
        ((x.long(), q, k, v), TypeError, "x has dtype torch.int64"),
        ((x, tuple(q), k, v), TypeError, "q is tuple; it must be a Projection"),
        ((x, q, k._replace(weight="w"), v), TypeError, "k.weight is str"),
        (
            (x, q, k, Projection(dense[:, :64])),
            ValueError,
            r"v.weight has shape \(32, 64\); it must be \[out_features, 96\]",
        ),
        (
            (x, q, Projection(dense.half()), v),
            TypeError,
            "k.weight has dtype torch.float16; it must be x's dtype",
        ),
        ((x, q, Projection(dense.to("meta")), v), ValueError, "k.weight is on meta"),
        (
            (x, q, k, v._replace(lora_B=None)),
            ValueError,
            "v.lora_B is None; lora_A and lora_B must be given together",
        ),
        (
            (x, q, k._replace(lora_A=k.lora_A[:, :5]), v),
            ValueError,
            r"k.lora_A has shape \(4, 5\); it must be \[r, 96\]",
        ),
        (
            (x, q, k._replace(lora_B=q.lora_B), v),
            ValueError,
            r"k.lora_B has shape \(48, 4\); it must be \(32, 4\)",
        ),
        (
            (x, q._replace(lora_B=q.lora_B.half()), k, v),
            TypeError,
            "q.lora_B has dtype torch.float16; it must be q.lora_A's dtype",
        ),
        (
            (x, q, k, v._replace(bias=q.bias)),
            ValueError,
            r"v.bias has shape \(48,\); it must be \(32,\)",
        ),
        ((x, q, k, v, 1.0), ValueError, r"dropout_p is 1.0; it must be in \[0, 1\)"),
        ((x, q, k, v, 0.1, torch.zeros(2)), TypeError, "seed is a"),
    ]
    for args, error, message in cases:
        with pytest.raises(error, match=message):
            F.lora_qkv(*args)
