"""The Hopper kernel for many rows, off by default: its limits in words, and on a GPU its results.

tests/test_host_cuda_many.py runs the same kernel on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from flat_calls import answer, chosen, reference_op
from torch import Tensor

import pylora
from pylora import dispatch
from pylora.backends import cuda, cuda_hopper, extension
from pylora.backends.backend import Refusal
from pylora.testing import assert_as_accurate_as_torch


def unavailable() -> str | None:
    """None where the kernel can run here, else the reason."""
    reason = dispatch.BACKENDS["cuda"].unavailable()
    if reason is not None:
        return reason
    if torch.cuda.get_device_capability() != (9, 0):
        return "the GPU is not of compute capability 9.0"
    module, _ = extension.load()
    assert module is not None
    return None if "90a" in module.build_info()["cuda_archs"] else "built without 90a"


def on_hopper(test: Callable[..., None]) -> Callable[..., None]:
    reason = unavailable()
    return pytest.mark.gpu(pytest.mark.skipif(reason is not None, reason=reason or "")(test))


@pytest.fixture
def turned_on(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PYLORA_HOPPER", "1")
    pylora.refresh()
    with dispatch.use_backend("cuda"):
        yield


def run(op: str, args: tuple[Any, ...]) -> Any:
    """The op's result from the kernel, judged by the numerics rule; again, it is the same."""
    assert chosen(op, *args) == "cuda"
    result = getattr(torch.ops.pylora, op)(*args)
    assert_as_accurate_as_torch(result, reference_op(op), *args)
    again = getattr(torch.ops.pylora, op)(*args)
    results, others = ((r if isinstance(r, tuple) else (r,)) for r in (result, again))
    assert all(map(torch.equal, results, others))
    return result


def arguments(
    rows: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
    blocksize: int = 64,
    nested: bool = False,
) -> tuple[Any, ...]:
    """Of nf4_linear, on the GPU."""
    weight = torch.randn(shape, device="cuda") / shape[1] ** 0.5
    w = pylora.quantize_nf4(weight, blocksize, nested)
    x = torch.randn(rows, shape[1], device="cuda").to(dtype)
    bias = torch.randn(shape[0], device="cuda").to(dtype)
    return (x, *w.op_arguments(), shape[0], bias)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "shape", "blocksize", "nested"),
    [
        (128, (128, 64), 64, False),
        (300, (200, 640), 64, True),
        (131, (133, 576), 128, False),  # blocks straddle rows, outputs end at odd addresses
        (256, (1024, 4096), 4096, True),
        (2048, (4096, 4096), 64, False),  # both tile sizes, several tiles an SM
        (4096, (1024, 1024), 64, False),
    ],
)
@on_hopper
def test_nf4_linear(turned_on, rows, shape, blocksize, nested, dtype):
    run("nf4_linear", arguments(rows, shape, dtype, blocksize, nested))


@pytest.mark.parametrize(
    ("dtype", "lora_dtype", "rank", "dropout_p", "activation"),
    [
        (torch.bfloat16, torch.bfloat16, 16, 0.0, "identity"),
        (torch.bfloat16, torch.float32, 37, 0.1, "identity"),
        (torch.float16, torch.float16, 1, 0.0, "gelu"),
        (torch.float16, torch.float32, 64, 0.5, "silu"),
    ],
)
@on_hopper
def test_lora_linear(turned_on, dtype, lora_dtype, rank, dropout_p, activation):
    for rows in (129, 1024):
        x, *q, out_features, bias = arguments(rows, (720, 1024), dtype, nested=True)
        factors = [torch.randn(rank, 1024) / 32, torch.randn(out_features, rank)]
        biases = [torch.randn(rank), torch.randn(out_features)]
        A, B, A_bias, B_bias = (t.to("cuda", lora_dtype) for t in (*factors, *biases))
        seed = torch.tensor(-1234567890123, device="cuda") if dropout_p else None
        last = (0.5, dropout_p, seed, activation)
        run("lora_linear", (x, *q, out_features, A, B, bias, A_bias, B_bias, *last))


@on_hopper
def test_in_a_cuda_graph(turned_on):
    x, *rest = arguments(256, (512, 512), torch.bfloat16)
    expected = torch.ops.pylora.nf4_linear(x, *rest)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = torch.ops.pylora.nf4_linear(x, *rest)
    y.fill_(float("nan"))
    graph.replay()
    assert torch.equal(y, expected)


# In words, on fake tensors: no GPU is needed.


@pytest.fixture
def why_not(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str | None]]:
    if extension.load()[0] is None:
        pytest.skip("pylora was installed without its extension, which knows the limits")
    monkeypatch.setattr(cuda, "_has_matrix_instructions", lambda device: True)
    monkeypatch.setattr(cuda, "_is_aligned", lambda tensor: True)
    monkeypatch.setattr(cuda_hopper, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(cuda_hopper, "_is_compiled", lambda: True)
    monkeypatch.setenv("PYLORA_HOPPER", "1")
    pylora.refresh()

    def ask(rows: int = 128, columns: int = 192, blocksize: int = 64) -> str | None:
        """Why it does not take the call, or what it notes if another of its kernels does."""
        numel = 96 * columns
        qweight = torch.empty(numel // 2, dtype=torch.uint8, device="cuda")
        absmax = torch.empty(-(-numel // blocksize), device="cuda")
        x = torch.empty(rows, columns, dtype=torch.bfloat16, device="cuda")
        args: tuple[Tensor | int | None, ...] = (x, qweight, absmax, None, None, None)
        got = answer(cuda.BACKEND, "nf4_linear", *args, blocksize, 256, 96, None)
        return got.reason if isinstance(got, Refusal) else got.note or None

    with torch._subclasses.fake_tensor.FakeTensorMode():
        yield ask


def test_limits_in_words(why_not: Callable[..., str | None], monkeypatch: pytest.MonkeyPatch):
    assert why_not() is None
    assert why_not(blocksize=128) is None  # a block straddles rows
    assert why_not(rows=127) == "x has 127 rows; the kernel for few rows takes up to 64"
    many = "not hopper: x has 524288 rows; the Hopper kernel takes up to 524280"
    assert why_not(rows=8 * 65536) == many
    needs = "the Hopper kernel needs a multiple of 64"
    assert why_not(columns=224) == f"in_features is 224; {needs}"
    assert why_not(blocksize=32) == f"blocksize is 32; {needs}"
    monkeypatch.setattr(cuda_hopper, "_is_compiled", lambda: False)
    assert why_not() == "the Hopper kernel was not compiled: PYLORA_CUDA_ARCHS had no 90a"
    monkeypatch.setattr(cuda_hopper, "_capability", lambda device: (10, 0))
    assert why_not() == "the Hopper kernel needs a GPU of compute capability 9.0"


@pytest.mark.parametrize("value", [None, "", "0"])
def test_off_by_default(why_not, monkeypatch: pytest.MonkeyPatch, value: str | None):
    if value is None:
        monkeypatch.delenv("PYLORA_HOPPER")
        pylora.refresh()
    else:
        monkeypatch.setenv("PYLORA_HOPPER", value)
        pylora.refresh()
    reason = why_not()
    assert reason is not None and "has not been measured" in reason and "PYLORA_HOPPER=1" in reason


def test_the_op_refuses_what_it_cannot_run():
    """Called past dispatch: without a CUDA tensor there is no kernel to go to."""
    if extension.load()[0] is None:
        pytest.skip("pylora was installed without its extension")
    w = pylora.quantize_nf4(torch.randn(64, 64))
    with pytest.raises(NotImplementedError, match="nf4_linear_hopper"):
        torch.ops.pylora_C.nf4_linear_hopper(torch.randn(128, 64), *w.op_arguments(), 64, None)
