"""The cuda backend explains its limits. The tests use fake tensors, so they need no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from flat_calls import refusal_of, run_on
from torch._subclasses.fake_tensor import FakeTensorMode

from pylora import dispatch, nf4
from pylora.backends import cuda, cuda_hopper

pytest.importorskip("pylora._C", reason="the extension knows the limits", exc_type=ImportError)

bf16 = torch.bfloat16


@pytest.fixture(autouse=True)
def ampere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Simulates a GPU of compute capability 8.0 with fake tensors whose memory is aligned."""
    monkeypatch.setattr(cuda, "_has_matrix_instructions", lambda device: True)
    monkeypatch.setattr(cuda, "_is_aligned", lambda tensor: True)
    monkeypatch.setattr(cuda_hopper, "_capability", lambda device: (8, 0))
    with FakeTensorMode():
        yield


def weight(out_features: int, in_features: int, blocksize: int, device: str) -> tuple[Any, ...]:
    shape = (out_features, in_features)
    qweight = torch.empty(nf4.packed_shape(shape, blocksize), dtype=torch.uint8, device=device)
    absmax = torch.empty(nf4.absmax_shape(shape, blocksize), device=device)
    return (qweight, absmax, None, None, None, blocksize, 256)


NOT_HOPPER = "; not the hopper kernel: the hopper kernel needs a GPU of compute capability 9.0"


def linear(
    tokens: int = 4,
    shape: tuple[int, int] = (96, 128),
    dtype: torch.dtype = bf16,
    blocksize: int = 64,
    device: str = "cuda",
    nested_blocksize: int | None = None,
) -> tuple[Any, ...]:
    x = torch.empty(2, tokens // 2, shape[1], dtype=dtype, device="cuda")
    *q, _ = weight(*shape, blocksize, device)
    if nested_blocksize is not None:
        q[2] = torch.empty(1, device="cuda")
    return (x, *q, nested_blocksize or 256, shape[0], None)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"tokens": 8, "dtype": torch.float16, "blocksize": 32}, None),
        ({"tokens": 8}, None),
        ({"tokens": 514, "blocksize": 32, "nested_blocksize": 100}, None),
        ({"tokens": 0}, None),
        ({"nested_blocksize": 128}, None),
        ({"dtype": torch.float32}, "x is torch.float32; the kernel takes float16 and bfloat16"),
        ({"tokens": 66}, f"x has 66 tokens; the small_m kernel takes up to 8{NOT_HOPPER}"),
        ({"shape": (96, 96)}, "in_features is 96, no multiple of the blocksize 64"),
        ({"shape": (0, 64)}, "the weight has no elements"),
        ({"nested_blocksize": 100}, "nested_blocksize is 100, no power of two"),
        ({"device": "cpu"}, "qweight is on cpu, not on a cuda device"),
    ],
)
def test_nf4_linear_explains_its_limits(change: dict[str, Any], reason: str | None):
    assert refusal_of(cuda.BACKEND, "nf4_linear", *linear(**change)) == reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"tokens": 8, "dtype": torch.float16, "blocksize": 128}, None),
        ({"tokens": 10, "shape": (96, 96)}, None),
        ({"dtype": torch.float32}, "grad is torch.float32; the kernel takes float16 and bfloat16"),
        ({"blocksize": 32}, "the blocksize is 32; the kernel takes 64 or more"),
        ({"shape": (96, 96)}, "in_features is 96, no multiple of the blocksize 64"),
        ({"device": "cpu"}, "qweight is on cpu, not on a cuda device"),
    ],
)
def test_nf4_linear_backward_explains_its_limits(change: dict[str, Any], reason: str | None):
    x, *q, out_features, _ = linear(**change)
    grad = x.new_empty(*x.shape[:-1], out_features)
    why_not = partial(refusal_of, cuda.BACKEND, "nf4_linear_backward")
    assert why_not(grad, *q, x.shape[-1]) == reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"lora_dtype": torch.float32, "rank": 37}, None),
        ({"lora_dtype": torch.float16}, "lora_A is torch.float16; the kernel takes torch.bfloat16"),
        ({"rank": 0}, "the rank is 0; the kernel takes 1 to 1024"),
        ({"dense": True}, None),
        (
            {"dense": True, "lora_dtype": torch.float32},
            "lora_A is torch.float32; the products take torch.bfloat16, as x has",
        ),
        ({"tokens": 80}, "x has 80 tokens"),
        ({"tokens": 514, "rank": 37, "blocksize": 128, "shape": (96, 192)}, None),
        ({"tokens": 514, "rank": 0}, "the rank is 0; the kernel takes 1 to 1024"),
        (
            {"tokens": 514, "lora_dtype": torch.float32},
            "lora_A is torch.float32; the many_rows kernel takes torch.bfloat16, as x has",
        ),
        (
            {"tokens": 514, "shape": (96, 96)},
            "in_features is 96; the many_rows kernel needs a multiple of 64",
        ),
        ({"tokens": 2**19}, "x has 524288 tokens; the many_rows kernel takes up to 524280"),
        ({"lora_device": "cpu"}, "lora_A is on cpu, not on a cuda device"),
    ],
)
def test_lora_linear_explains_its_limits(change: dict[str, Any], reason: str | None):
    change = dict(change)
    rank, dense = change.pop("rank", 8), change.pop("dense", False)
    options = {
        "dtype": change.pop("lora_dtype", bf16),
        "device": change.pop("lora_device", "cuda"),
    }
    x, qweight, absmax, *q, out_features, bias = linear(**change)
    lora_A = torch.empty(rank, x.shape[-1], **options)
    lora_B = torch.empty(out_features, rank, **options)
    trailing = (bias, None, None, 1.0, 0.0, None, "identity")
    absmax = None if dense else absmax
    args = (x, qweight, absmax, *q, out_features, lora_A, lora_B, *trailing)
    refusal = refusal_of(cuda.BACKEND, "lora_linear", *args)
    assert (refusal is None) == (reason is None) and (refusal or "").startswith(reason or "")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"lora_dtype": torch.float32, "rank": 37}, None),
        ({"lora_dtype": torch.float16}, "lora_A is torch.float16; the kernel takes torch.bfloat16"),
        ({"rank": 1025}, "the rank is 1025; the kernel takes 1 to 1024"),
        ({"dense": True}, "the base weight is dense"),
        ({"tokens": 80}, "x has 80 tokens"),
        ({"ids_device": "cpu"}, "adapter_ids is on cpu, not on a cuda device"),
    ],
)
def test_multi_lora_linear_explains_its_limits(change: dict[str, Any], reason: str | None):
    change = dict(change)
    rank, dense = change.pop("rank", 8), change.pop("dense", False)
    options = {"dtype": change.pop("lora_dtype", bf16), "device": "cuda"}
    ids_device = change.pop("ids_device", "cuda")
    x, qweight, absmax, *q, out_features, bias = linear(**change)
    lora_A = torch.empty(3, rank, x.shape[-1], **options)
    lora_B = torch.empty(3, out_features, rank, **options)
    ids = torch.empty(x.shape[:-1].numel(), dtype=torch.int64, device=ids_device)
    trailing = (ids, torch.empty(3, device="cuda"), bias)
    args = (x, qweight, None if dense else absmax, *q, out_features, lora_A, lora_B, *trailing)
    refusal = refusal_of(cuda.BACKEND, "multi_lora_linear", *args)
    assert (refusal is None) == (reason is None) and (refusal or "").startswith(reason or "")


def projections(count: int = 3, **change: Any) -> tuple[Any, ...]:
    """Returns arguments of lora_qkv with LoRA on every projection but the last."""
    x, *q, out_features, _ = linear(**change)
    lora_A = torch.empty(8, x.shape[-1], dtype=x.dtype, device="cuda")
    lora_B = torch.empty(out_features, 8, dtype=x.dtype, device="cuda")
    none = x.new_empty(0)
    lists = [[part] * count for part in (*q, out_features)]
    lora = [[lora] * (count - 1) + [none] for lora in (lora_A, lora_B)]
    return (x, *lists, *lora, [none] * count, [0.5] * count, 0.0, None)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"tokens": 66}, "x has 66 tokens; the small_m kernel takes up to 8"),
        ({"tokens": 514}, "x has 514 tokens, and would be copied per projection"),
        ({"device": "cpu"}, "qweight is on cpu, not on a cuda device"),
        ({"dense": True}, "of one projection the base weight is dense"),
    ],
)
def test_lora_qkv_explains_its_limits(change: dict[str, Any], reason: str | None):
    change = dict(change)
    dense = change.pop("dense", False)
    args = projections(**change)
    if dense:
        args[2][1] = None
    refusal = refusal_of(cuda.BACKEND, "lora_qkv", *args)
    assert (refusal is None) == (reason is None) and (refusal or "").startswith(reason or "")


def test_lora_qkv_runs_on_the_single_layer_kernels():
    called = []

    def lora_linear(x: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        called.append("lora_linear")
        out_features, lora_A = args[7:9]
        leading = x.shape[:-1]
        return x.new_empty(*leading, out_features), x.new_empty(*leading, lora_A.shape[0])

    def nf4_linear(x: torch.Tensor, *args: Any) -> torch.Tensor:
        called.append("nf4_linear")
        return x.new_empty(*x.shape[:-1], args[7])

    with torch.library._scoped_library("pylora_C", "IMPL") as library:
        library.impl("lora_linear", lora_linear, "Meta")
        library.impl("nf4_linear", nf4_linear, "Meta")
        args = projections()
        y, h = run_on(cuda.BACKEND, "lora_qkv", *args)
    assert called == ["lora_linear", "lora_linear", "nf4_linear"]
    assert [t.shape for t in y] == [(2, 2, 96)] * 3
    assert [t.shape for t in h] == [(2, 2, 8)] * 2 + [(0,)]


def test_nf4_quantize_explains_its_limits():
    why_not = partial(refusal_of, cuda.BACKEND, "nf4_quantize")
    assert why_not(torch.empty(64, device="cuda"), 64) is None
    assert why_not(torch.empty(64), 64) == "weight is on cpu, not on a cuda device"
    double = torch.empty(64, device="cuda", dtype=torch.float64)
    assert (why_not(double, 64) or "").startswith("weight is torch.float64")


def test_an_old_gpu_and_an_unaligned_address_are_refused(monkeypatch: pytest.MonkeyPatch):
    why_not = partial(refusal_of, cuda.BACKEND, "nf4_linear")
    monkeypatch.setattr(cuda, "_is_aligned", lambda tensor: False)
    assert why_not(*linear()) == "qweight is not aligned to 16 bytes"
    monkeypatch.setattr(cuda, "_has_matrix_instructions", lambda device: False)
    assert why_not(*linear()) == "the kernel needs a GPU of compute capability 8.0 or later"


def test_the_backend_lists_its_ops():
    assert set(dispatch.BACKENDS["cuda"].ops) == {
        "nf4_quantize",
        "nf4_dequantize",
        "nf4_linear",
        "nf4_linear_backward",
        "lora_linear",
        "lora_linear_backward",
        "dora_linear",
        "dora_linear_backward",
        "multi_lora_linear",
        "lora_qkv",
        "lora_qkv_backward",
        "lora_mlp",
        "lora_mlp_backward",
    }
