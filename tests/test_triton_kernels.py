"""The Triton kernels in cases where they take other branches than in the tests of the ops.

The cases are the regimes, split sums, masks, unaligned weights and activations. The tests run in
Triton's interpreter (TRITON_INTERPRET=1) or on a GPU. There the tests of the ops run too, with the
variant "triton" of their backend.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from flat_calls import chosen, reference_op
from torch import Tensor

import pylora
from pylora import reference, selfcheck
from pylora.backends.triton import BACKEND
from pylora.reference.activation import ACTIVATIONS
from pylora.reference.dropout import dropout_mask
from pylora.testing import assert_as_accurate_as_torch

if BACKEND.unavailable() is not None:
    pytest.skip(f"no Triton kernels here: {BACKEND.unavailable()}", allow_module_level=True)

from pylora.calls import Dropout
from pylora.kernels import configs, launch
from pylora.kernels.epilogue import Epilogue, Term
from pylora.kernels.linear_expand import linear_expand
from pylora.kernels.lora_hidden import lora_hidden, lora_hidden_backward
from pylora.kernels.lora_shrink import lora_shrink
from pylora.kernels.lora_weight_grad import lora_weight_grad
from pylora.kernels.philox import mask_of
from pylora.kernels.precision import fp32_precision, lora_operands, output_operands

DEVICE = BACKEND.device()
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ops = torch.ops.pylora


@pytest.fixture(autouse=True)
def on_triton(poisoned_buffers: None) -> Iterator[None]:
    with pylora.use_backend("triton"):
        yield


def normal(*shape: int, dtype: torch.dtype = FP32, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).to(DEVICE, dtype)


def quantized(out_features: int, in_features: int, blocksize: int, nested: bool) -> tuple[Any, ...]:
    weight = torch.randn(out_features, in_features) / in_features**0.5
    with pylora.use_backend("reference"):
        return pylora.quantize_nf4(weight, blocksize, nested).to(DEVICE).op_arguments()


def check_lora(
    tokens: int,
    out_features: int,
    in_features: int,
    rank: int,
    dtype: torch.dtype,
    base: tuple[Any, ...],
    lora_dtype: torch.dtype | None = None,
    p: float = 0.0,
    activation: str = "identity",
    biases: bool = True,
) -> None:
    """Judges the forward and backward of lora_linear on Triton by the numerics rule."""
    lora_dtype = lora_dtype or dtype
    x, grad = normal(tokens, in_features, dtype=dtype), normal(tokens, out_features, dtype=dtype)
    A = normal(rank, in_features, dtype=lora_dtype, scale=in_features**-0.5)
    B = normal(out_features, rank, dtype=lora_dtype)
    vectors: tuple[Tensor | None, ...] = (None, None, None)
    if biases:
        vectors = (
            normal(out_features, dtype=dtype),
            normal(rank, dtype=lora_dtype),
            normal(out_features, dtype=lora_dtype),
        )
    seed = torch.tensor(2**40 + 12345, device=DEVICE) if p else None
    trailing = (0.75, p, seed, activation)
    forward = (x, *base, out_features, A, B, *vectors, *trailing)
    backend = chosen("lora_linear", *forward)
    assert backend == "triton"
    assert_as_accurate_as_torch(ops.lora_linear(*forward), reference_op("lora_linear"), *forward)
    h = reference_op("lora_linear")(*forward)[1]
    mask = [True, False, True, True, biases, biases, biases]
    backward = (grad, x, h, *base, A, B, *trailing, mask)
    assert_as_accurate_as_torch(
        ops.lora_linear_backward(*backward), reference_op("lora_linear_backward"), *backward
    )


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize(
    ("p", "lora_dtype", "biases"), [(0.0, None, True), (0.3, None, False), (0.0, FP32, True)]
)
def test_large_m_obeys_the_numerics_rule(
    dtype: torch.dtype, p: float, lora_dtype: torch.dtype | None, biases: bool
) -> None:
    """The dense product is extended by LoRA's columns, or the expand kernel finishes it."""
    tokens = 530 if dtype.itemsize == 2 else 70
    assert configs.is_large(tokens, dtype.itemsize)
    base = quantized(48, 128, 64, True)
    check_lora(tokens, 48, 128, 20, dtype, base, lora_dtype, p, "silu", biases)
    x = normal(tokens, 128, dtype=dtype)
    args = (x, *base, 48, normal(48, dtype=dtype))
    assert_as_accurate_as_torch(ops.nf4_linear(*args), reference_op("nf4_linear"), *args)
    args = (normal(tokens, 48, dtype=dtype), *base, 128)
    assert_as_accurate_as_torch(
        ops.nf4_linear_backward(*args), reference_op("nf4_linear_backward"), *args
    )


def test_large_m_takes_dense_and_straddling_weights() -> None:
    dense = (normal(40, 100, dtype=BF16, scale=0.1), None, None, None, None, 0, 0)
    for base in (dense, quantized(40, 100, 64, False)):
        check_lora(530, 40, 100, 9, BF16, base, p=0.25, activation="relu")


@pytest.mark.parametrize("dtype", [FP16, FP32])
@pytest.mark.parametrize(("tokens", "nested"), [(1, True), (20, False)])
def test_split_sums_obey_the_numerics_rule(tokens: int, nested: bool, dtype: torch.dtype) -> None:
    """Few tiles have a long K or N, so partial sums go into a workspace and are added in order."""
    long = 1088
    q = quantized(40, long, 64, nested)
    size = dtype.itemsize
    facts = launch.facts(normal(1))
    assert configs.forward_plan(tokens, [40], long, size, 64, facts).splits > 1
    assert configs.backward_plan(tokens, [long], 64, size, 64, facts).splits > 1
    check_lora(tokens, 40, long, 17, dtype, q, p=0.2, activation="gelu")
    check_lora(tokens, long, 64, 17, dtype, quantized(long, 64, 64, nested), p=0.2)


@pytest.mark.parametrize(
    ("out_features", "in_features", "blocksize", "nested"),
    [
        (65, 576, 64, True),
        (1, 192, 32, False),
        (33, 512, 256, True),
        (3, 4096, 4096, False),  # one block in each row
        (20, 3420, 64, False),  # blocks that straddle rows
        (7, 45, 32, True),  # an odd width
    ],
)
def test_every_weight_shape_obeys_the_numerics_rule(
    out_features: int, in_features: int, blocksize: int, nested: bool
) -> None:
    q = quantized(out_features, in_features, blocksize, nested)
    for tokens in (1, 37):
        x = normal(tokens, in_features, dtype=FP16)
        forward = (x, *q, out_features, normal(out_features, dtype=FP16))
        assert_as_accurate_as_torch(ops.nf4_linear(*forward), reference_op("nf4_linear"), *forward)
        backward = (normal(tokens, out_features, dtype=FP16), *q, in_features)
        assert_as_accurate_as_torch(
            ops.nf4_linear_backward(*backward), reference_op("nf4_linear_backward"), *backward
        )


def test_no_tokens_give_empty_results() -> None:
    """The cases are those of `python -m pylora check` that have no tokens."""
    outcomes = list(selfcheck.run(chosen=lambda case: case.description.startswith("0x")))
    assert {outcome.case.op for outcome in outcomes if outcome.backend == "triton"} == set(
        BACKEND.ops
    )
    assert [outcome.failure for outcome in outcomes if outcome.failure] == []


def test_other_nested_blocksizes_and_unaligned_bytes_are_taken() -> None:
    """absmax is quantized in groups of 32, and the bytes begin inside an allocation."""
    with pylora.use_backend("reference"):
        qweight, absmax = ops.nf4_quantize(torch.randn(24, 256), 64)
    codes, *nested = reference.quantize_absmax(absmax, 32)
    storage = torch.empty(qweight.numel() + 3, dtype=torch.uint8)
    storage[3:] = qweight
    parts = [t.to(DEVICE) for t in (storage, codes, *nested)]
    q = (parts[0][3:].view(24, 128), *parts[1:], 64, 32)
    x = normal(9, 256)
    assert_as_accurate_as_torch(
        ops.nf4_linear(x, *q, 24, None), reference_op("nf4_linear"), x, *q, 24, None
    )
    dense = ops.nf4_dequantize(*q, [24, 256], FP32)
    assert torch.equal(dense, reference_op("nf4_dequantize")(*q, [24, 256], FP32))


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_strided_x_is_taken(dtype: torch.dtype) -> None:
    """If each row of x is contiguous, x is read in place. Other layouts are copied."""
    q = quantized(24, 128, 64, False)
    wide = normal(5, 7, 300, dtype=dtype)
    for x in (wide[..., 100:228], wide[:, ::2, :128], wide.transpose(0, 1)[..., :128]):
        assert not x.is_contiguous()
        args = (x, *q, 24, None)
        assert_as_accurate_as_torch(ops.nf4_linear(*args), reference_op("nf4_linear"), *args)
    grad = normal(1, dtype=dtype).expand(5, 24)
    args = (grad, *q, 128)
    assert_as_accurate_as_torch(
        ops.nf4_linear_backward(*args), reference_op("nf4_linear_backward"), *args
    )


@pytest.mark.parametrize("columns", [64, 52, 45])
def test_mask_is_the_references_bit_for_bit(columns: int) -> None:
    """Each kernel that regenerates the mask multiplies by the identity, which leaves the mask."""
    tokens, p = 21, 0.4
    seed = torch.tensor(2**61 + 98765, device=DEVICE)
    keep = dropout_mask(torch.Size((tokens, columns)), p, seed)
    mask = mask_of(Dropout(p, seed))
    operands = lora_operands(FP32, FP32)
    ones = torch.ones(tokens, columns, device=DEVICE)
    eye = torch.eye(columns, device=DEVICE)
    (shrunk,) = lora_shrink(ones, [eye], operands, masks=[mask])
    assert torch.equal(shrunk.sum(0), keep.float())
    eye = torch.eye(tokens, device=DEVICE)
    (gradient,) = lora_weight_grad(ones, [eye], operands, [mask])
    assert torch.equal(gradient != 0, keep)
    out = torch.zeros_like(ones)
    epilogue = Epilogue(terms=[Term(eye[None], ones.t(), mask=mask)], operands=operands)
    linear_expand(out[None], out, epilogue)
    assert torch.equal(out != 0, keep)
    assert torch.equal(out[keep], gradient[keep])
    # The tile kernel of the backward pass has a weight of zeros here.
    base = (torch.zeros(tokens, columns, device=DEVICE), None, None, None, None, 0, 0)
    dx = ops.lora_linear_backward(
        torch.eye(tokens, device=DEVICE),
        ones,
        torch.zeros(tokens, tokens, device=DEVICE),
        *base,
        torch.ones(tokens, columns, device=DEVICE),
        torch.eye(tokens, device=DEVICE),
        *(1.0, p, seed, "identity"),
        [True] + [False] * 6,
    )[0]
    assert torch.equal(dx != 0, keep)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_obey_the_numerics_rule(activation: str) -> None:
    """The inputs cover the whole range that matters, which random hidden values do not reach."""
    h = torch.linspace(-30, 30, 4096, device=DEVICE).view(64, 64)
    h = torch.cat([h, h / 100])
    out = torch.empty(128, 80, device=DEVICE)
    stored = lora_hidden(h[None] / 2, 2.0, None, 1.0, activation, out)
    assert torch.equal(stored, h) and not out[:, 64:].any()
    function = ACTIVATIONS[activation]
    assert_as_accurate_as_torch(out[:, :64], function.forward, h)
    grad = normal(128, 64)
    dh, activated = lora_hidden_backward(grad[None], h, 1.0, activation)
    assert_as_accurate_as_torch(dh, function.backward, grad, h)
    assert torch.equal(activated, out[:, :64])


def test_repeats_are_equal() -> None:
    """Splits are added in order, without float atomics."""
    q = quantized(40, 1088, 64, True)
    x, grad = normal(37, 1088, dtype=FP16), normal(37, 40, dtype=FP16)
    A, B = normal(8, 1088), normal(40, 8)
    seed = torch.tensor(5, device=DEVICE)
    forward = (x, *q, 40, A, B, None, None, None, 0.5, 0.1, seed, "gelu")
    first, second = ops.lora_linear(*forward), ops.lora_linear(*forward)
    assert all(map(torch.equal, first, second))
    mask = [True, False, True, True, True, True, True]
    backward = (grad, x, first[1], *q, A, B, 0.5, 0.1, seed, "gelu", mask)
    first, second = ops.lora_linear_backward(*backward), ops.lora_linear_backward(*backward)
    assert all(map(torch.equal, first, second))


def test_fp16_keeps_the_range_of_fp32_lora_weights() -> None:
    """Hidden values are above 65504, but their products are small again."""
    q = quantized(16, 64, 64, False)
    for tokens in (9, 530):
        x = torch.full((tokens, 64), 8.0, dtype=FP16, device=DEVICE)
        A = torch.full((4, 64), 1e4, device=DEVICE)
        B = normal(16, 4, scale=1e-6)
        args = (x, *q, 16, A, B, None, None, None, 1.0, 0.0, None, "identity")
        y, h = ops.lora_linear(*args)
        assert h.max() > 65504 and y.isfinite().all()
        assert_as_accurate_as_torch((y, h), reference_op("lora_linear"), *args)


def test_autocast_changes_nothing_inside_an_op() -> None:
    """torch computes the dense product of large M, and autocast would cast it."""
    q, x = quantized(48, 128, 64, False), normal(70, 128)
    assert configs.is_large(70, 4)
    A, B = normal(4, 128), normal(48, 4)
    args = (x, *q, 48, A, B, None, None, None, 0.5, 0.0, None, "identity")
    expected = ops.lora_linear(*args)
    with torch.autocast(DEVICE, BF16):
        assert all(map(torch.equal, ops.lora_linear(*args), expected))
        assert ops.nf4_linear(x, *q, 48, None).dtype == FP32


def test_precision_follows_torchs_switch() -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for allowed, precision in ((True, "tf32"), (False, "ieee")):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            assert fp32_precision() == precision
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert lora_operands(BF16, BF16).dtype.name == "bf16"
    assert lora_operands(BF16, FP32) == lora_operands(FP32, FP32)
    assert lora_operands(BF16, FP16).precision == "tf32"
    assert output_operands(BF16, FP32).dtype.name == "fp32"


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
def test_a_cuda_graph_gives_the_same_result() -> None:
    q = quantized(256, 512, 64, True)
    A, B = normal(16, 512, dtype=BF16), normal(256, 16, dtype=BF16)
    x, seed = normal(8, 512, dtype=BF16), torch.tensor(3, device=DEVICE)
    args = (x, *q, 256, A, B, None, None, None, 0.5, 0.1, seed, "identity")
    expected = ops.lora_linear(*args)[0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.lora_linear(*args)[0]
    y.zero_()
    graph.replay()
    assert torch.equal(y, expected)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_second_device_obeys_the_numerics_rule() -> None:
    q = [t.to("cuda:1") if isinstance(t, Tensor) else t for t in quantized(64, 128, 64, True)]
    x = normal(5, 128).to("cuda:1")
    args = (x, *q, 64, None)
    assert_as_accurate_as_torch(ops.nf4_linear(*args), reference_op("nf4_linear"), *args)
