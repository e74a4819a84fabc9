"""NF4 quantization: the same bits as bitsandbytes, on every backend."""

from __future__ import annotations

import hashlib
import math

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import pylora
from pylora import reference
from pylora.nf4 import BLOCKSIZES, NF4_CODE, dynamic_code, nf4_midpoints

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def adversarial(pattern: str, count: int) -> torch.Tensor:
    """Returns values that test rounding: ties, denormals, huge ranges, zero blocks, outliers."""
    values = torch.randn(count)
    code = torch.tensor(NF4_CODE)
    if pattern == "ties":
        values = nf4_midpoints(torch.device("cpu"))[torch.randint(15, (count,))]
        values[:: max(count // 7, 1)] = 1.0
    elif pattern == "codes":
        values = code[torch.randint(16, (count,))] * 3.7
    elif pattern == "denormal":
        values = values * 1e-40
    elif pattern == "tiny":
        values = values * 1.2e-38
    elif pattern == "huge":
        values = values * torch.exp(40 * torch.randn(count)).clamp(1e-30, 1e30)
    elif pattern == "zeros":
        values = torch.where(torch.rand(count) < 0.9, torch.zeros(count), values)
        values[: count // 2] = 0.0
    elif pattern == "outlier":
        values = values * 1e-3
        values[:: max(count // 3, 1)] = -1e4
    return values


def dequantized_by_bitsandbytes(packed: torch.Tensor, state: bnb.QuantState) -> torch.Tensor:
    """Uses bitsandbytes' kernel or, where that is wrong on a CPU, its PyTorch code.

    Its CPU kernel is wrong if blocks straddle rows: bitsandbytes 0.50.2 on AVX-512 with blocksize
    64 returns [3, 96] with another block's absmax. On a CPU with AVX-512 BF16 it makes zeros of
    bf16 denormals, also of those that round up to a normal number.
    """
    if packed.is_cuda:
        return bnb.dequantize_4bit(packed, state)
    absmax = state.absmax
    if state.nested:
        absmax = bnb.dequantize_blockwise(absmax, state.state2) + state.offset
    exact = _dequantize_4bit_compute(
        packed.view(-1), absmax, state.code, state.blocksize, state.shape, state.dtype
    )
    tiny = (exact != 0) & (exact.abs() <= torch.finfo(exact.dtype).tiny)
    flushes = exact.dtype == torch.bfloat16 and bnb.has_avx512bf16() and bool(tiny.any())
    if state.shape[-1] % state.blocksize or flushes:
        return exact
    return bnb.dequantize_4bit(packed, state)


@torch.compiler.set_stance("force_eager")  # bitsandbytes compiles parts of its CPU code
def assert_same_as_bitsandbytes(weight: torch.Tensor, blocksize: int, double_quant: bool) -> None:
    """The bits are those of bitsandbytes on a CPU, also if ours are made on a GPU.

    On a GPU bitsandbytes rounds otherwise near ties.
    """
    packed, state = bnb.quantize_4bit(
        weight.cpu(), blocksize=blocksize, quant_type="nf4", compress_statistics=double_quant
    )
    packed = packed.to(weight.device)
    state.to(weight.device)
    w = pylora.quantize_nf4(weight, blocksize, double_quant)
    assert torch.equal(w.qweight.view(-1), packed.view(-1))
    assert torch.equal(w.absmax.view(-1), state.absmax)
    assert w.shape == state.shape and w.dtype == state.dtype
    if double_quant:
        assert w.nested_absmax is not None and w.nested_code is not None and w.offset is not None
        assert torch.equal(w.nested_absmax, state.state2.absmax)
        assert torch.equal(w.nested_code, state.state2.code)
        assert torch.equal(w.offset, state.offset)
    assert torch.equal(w.dequantize(), dequantized_by_bitsandbytes(packed, state))


@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 300),
    blocksize=st.sampled_from(BLOCKSIZES),
    dtype=st.sampled_from(DTYPES),
    pattern=st.sampled_from(
        ["normal", "ties", "codes", "denormal", "tiny", "huge", "zeros", "outlier"]
    ),
    double_quant=st.booleans(),
    seed=st.integers(0, 2**31),
)
@example(1, 32, 32, torch.bfloat16, "tiny", False, 0)
def test_bits_equal_bitsandbytes(
    device: str,
    rows: int,
    columns: int,
    blocksize: int,
    dtype: torch.dtype,
    pattern: str,
    double_quant: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    limit = 6e4 if dtype == torch.float16 else 1e38
    weight = adversarial(pattern, rows * columns).clamp(-limit, limit).to(dtype).view(rows, columns)
    weight = weight.to(device)
    assert_same_as_bitsandbytes(weight, blocksize, double_quant)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_weight_equals_bitsandbytes(
    device: str, dtype: torch.dtype, double_quant: bool
) -> None:
    weight = torch.randn(512, 1024, device=device).to(dtype) * 0.02
    assert_same_as_bitsandbytes(weight, 64, double_quant)


@pytest.mark.parametrize("shape", [(0, 64), (64, 0), (0,)])
@pytest.mark.parametrize("double_quant", [False, True])
def test_an_empty_weight_gives_empty_results(
    backend: str, shape: tuple[int, ...], double_quant: bool
) -> None:
    w = pylora.quantize_nf4(torch.empty(shape), double_quant=double_quant)
    assert w.qweight.numel() == 0 and w.absmax.numel() == 0
    assert w.dequantize().shape == shape


def test_a_non_contiguous_weight_gives_the_same_bits(backend: str) -> None:
    weight = torch.randn(256, 96).t()
    assert not weight.is_contiguous()
    assert torch.equal(
        pylora.quantize_nf4(weight).qweight, pylora.quantize_nf4(weight.contiguous()).qweight
    )


def test_rows_of_a_three_dimensional_weight_stay_dimensions(backend: str) -> None:
    """Stacked experts keep their dimensions if no block straddles a row."""
    weight = torch.randn(3, 8, 128)
    w = pylora.quantize_nf4(weight)
    assert w.qweight.shape == (3, 8, 64) and w.absmax.shape == (3, 8, 2)
    assert torch.equal(
        w.dequantize().view(24, 128), pylora.quantize_nf4(weight.view(24, 128)).dequantize()
    )


def test_dynamic_code_is_bitsandbytes_code() -> None:
    code = dynamic_code(torch.device("cpu"))
    digest = hashlib.sha256(code.numpy().astype("<f4").tobytes()).hexdigest()
    assert digest == "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"
    assert torch.equal(code, bnb.create_dynamic_map())


@pytest.mark.parametrize("pattern", ["uniform", "constant", "two values", "tiny"])
def test_absmax_codes_equal_bitsandbytes(pattern: str) -> None:
    absmax = torch.rand(70_000) * 3
    if pattern == "constant":
        absmax = torch.full((700,), 0.7)
    elif pattern == "two values":
        absmax = torch.tensor([0.5, 1.5]).repeat(500)
    elif pattern == "tiny":
        absmax = torch.rand(1000) * 1e-39
    codes, nested_absmax, _, offset = reference.quantize_absmax(absmax)
    expected, state = bnb.quantize_blockwise(absmax - absmax.mean(), blocksize=256)
    assert torch.equal(codes, expected)
    assert torch.equal(nested_absmax, state.absmax)
    assert torch.equal(offset, absmax.mean())


def test_bits_for_each_weight_are_those_of_qlora() -> None:
    """At blocksize 64, QLoRA counts 4.5 bits a weight, or 4.127 with double quantization."""
    weight = torch.randn(1024, 1024)
    plain, double = pylora.quantize_nf4(weight), pylora.quantize_nf4(weight, double_quant=True)
    assert 8 * plain.nbytes / weight.numel() == 4.5
    assert math.isclose(8 * double.nbytes / weight.numel(), 4.127 + 8 * 1028 / 2**20, abs_tol=1e-3)
    assert "4.50 bit" in repr(plain) and "double_quant" in repr(double)


@pytest.mark.parametrize(
    ("weight", "kwargs", "error", "message"),
    [
        (torch.zeros(4, 4, dtype=torch.int32), {}, TypeError, "weight has dtype torch.int32"),
        (torch.zeros(4, 4, dtype=torch.float64), {}, TypeError, "must be float32, float16 or"),
        ([[1.0]], {}, TypeError, "weight is list"),
        (torch.zeros(4, 4), {"blocksize": 48}, ValueError, "blocksize is 48; it must be one of 32"),
    ],
)
def test_errors_name_the_argument(
    weight: object, kwargs: dict[str, int], error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        pylora.quantize_nf4(weight, **kwargs)  # type: ignore[arg-type]


def test_non_finite_elements_are_counted_and_located() -> None:
    weight = torch.zeros(8, 64)
    weight[3, 5], weight[7, 1] = float("nan"), float("inf")
    with pytest.raises(ValueError, match=r"2 non-finite elements, the first at index \(3, 5\)"):
        pylora.quantize_nf4(weight)


def test_op_passes_opcheck(backend: str) -> None:
    torch.library.opcheck(torch.ops.pylora.nf4_quantize.default, (torch.randn(6, 70), 64))
