"""The cuda backend computes calls with many tokens by dense products.

The tests run on a GPU and, with stand-ins for the two kernels, on the CPU.
tests/test_host_cuda_many.py runs the kernels themselves on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from flat_calls import call_of, chosen, reference_op
from torch import Tensor

import pylora
from pylora import dispatch, reference
from pylora.backends import cuda_many_rows, extension, limits
from pylora.calls import Dropout
from pylora.testing import assert_as_accurate_as_torch

TOKENS = limits.CUDA_MANY_ROWS_FROM
ACTIVATION_NAMES = list(extension.ACTIVATION_CODES)

NO_GPU = dispatch.BACKENDS["cuda"].unavailable()
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(NO_GPU is not None, reason=NO_GPU or "")]


def on_gpu(test: Callable[..., None]) -> Callable[..., None]:
    for mark in ON_GPU:
        test = mark(test)
    return test


def lora_extend(
    x: Tensor,
    lora_A: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    activation: int,
) -> tuple[Tensor, Tensor]:
    """Returns [x | scaling * act(h) | 0] and h. The zeros fill each row to whole 16 bytes."""
    drop = None if seed is None else Dropout(dropout_p, seed)
    dropped = reference.dropout.dropout(x, drop).float()
    h = torch.nn.functional.linear(dropped, lora_A.float(), None if bias is None else bias.float())
    low = scaling * reference.activation.ACTIVATIONS[ACTIVATION_NAMES[activation]].forward(h)
    wide = torch.cat([x, low.to(x.dtype)], dim=-1)
    return torch.nn.functional.pad(wide, (0, -lora_A.shape[0] % 8)), h


def nf4_dequantize_into(*args: Any) -> None:
    *q, out = args
    out.copy_(reference_op("nf4_dequantize")(*q, list(out.shape), out.dtype))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=ON_GPU)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "cuda":
        yield "cuda"
        return
    if extension.load()[0] is None:
        pytest.skip("pylora was installed without its extension")
    with torch.library._scoped_library("pylora_C", "IMPL") as library:
        library.impl("lora_extend", lora_extend, "CPU")
        library.impl("nf4_dequantize_into", nf4_dequantize_into, "CPU")
        yield "cpu"


def by_products(op: str, *args: Any) -> Any:
    """Runs the backend's dense products directly, because its planner refuses CPU tensors."""
    return getattr(cuda_many_rows, op)(call_of(op, *args))


def check(op: str, args: tuple[Any, ...]) -> None:
    """Judges the op by the numerics rule. On a GPU the cuda backend must be the one chosen."""
    if args[0].is_cuda:
        assert chosen(op, *args) == "cuda"
    result = by_products(op, *args)
    assert_as_accurate_as_torch(result, reference_op(op), *args)


def weight(
    shape: tuple[int, int], device: str, blocksize: int = 64, nested: bool = False
) -> tuple[Any, ...]:
    values = torch.randn(shape, device=device) / shape[1] ** 0.5
    return pylora.quantize_nf4(values, blocksize, nested).op_arguments()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "blocksize", "nested"),
    [((96, 192), 64, True), ((37, 45), 32, False), ((40, 192), 128, True)],
)
def test_nf4_linear_obeys_the_numerics_rule(device, shape, blocksize, nested, dtype):
    """In the last two shapes, blocks straddle rows."""
    q = weight(shape, device, blocksize, nested)
    x = torch.randn(3, TOKENS // 3, shape[1], device=device).to(dtype)
    bias = torch.randn(shape[0], device=device)
    check("nf4_linear", (x, *q, shape[0], bias))
    check("nf4_linear", (x, *q, shape[0], None))
    grad = torch.randn(3, TOKENS // 3, shape[0], device=device).to(dtype)
    check("nf4_linear_backward", (grad, *q, shape[1]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("rank", "dropout_p", "activation", "biases"),
    [
        (16, 0.0, "identity", ()),
        (8, 0.25, "identity", ("bias",)),
        (37, 0.0, "gelu", ("bias", "lora_A", "lora_B")),
        (1, 0.5, "silu", ("lora_B",)),
    ],
)
def test_lora_linear_obeys_the_numerics_rule(device, rank, dropout_p, activation, biases, dtype):
    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device=device).to(dtype)

    n, k = 104, 1088
    x = normal(2, -(-TOKENS // 2), k)
    sizes = {"bias": n, "lora_A": rank, "lora_B": n}
    bias, A_bias, B_bias = (normal(sizes[name]) if name in biases else None for name in sizes)
    seed = torch.tensor(-1234567890123, device=device) if dropout_p else None
    low_rank = (normal(rank, k) / k**0.5, normal(n, rank), bias, A_bias, B_bias)
    q = weight((n, k), device, nested=rank == 8)
    check("lora_linear", (x, *q, n, *low_rank, 0.5, dropout_p, seed, activation))


def test_autocast_changes_nothing(device):
    x = torch.randn(TOKENS, 64, device=device).to(torch.bfloat16)
    args = (x, *weight((40, 64), device), 40, None)
    with torch.autocast(device, dtype=torch.float16):
        y = by_products("nf4_linear", *args)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, by_products("nf4_linear", *args))


def test_the_compiled_ops_refuse_cpu_tensors():
    """The ops are called directly here, and they have no CPU kernel."""
    if extension.load()[0] is None:
        pytest.skip("pylora was installed without its extension")
    out = torch.empty(40, 72, dtype=torch.bfloat16)[:, :64]
    with pytest.raises(NotImplementedError, match="nf4_dequantize_into"):
        torch.ops.pylora_C.nf4_dequantize_into(*weight((40, 64), "cpu"), out)
    x, lora_A = torch.randn(4, 64), torch.randn(8, 64)
    with pytest.raises(NotImplementedError, match="lora_extend"):
        torch.ops.pylora_C.lora_extend(x, lora_A, None, 1.0, 0.0, None, 0)


@on_gpu
@pytest.mark.parametrize(
    ("out", "message"),
    [
        (torch.empty(40, 64, dtype=torch.float64), "out must be float32, float16 or bfloat16"),
        (torch.empty(40 * 64), "out must have 2 dimensions"),
        (torch.empty(64, 40).t(), "out must have rows of contiguous elements"),
        (torch.empty(1, 64).expand(40, 64), "out must have rows of contiguous elements"),
        (torch.empty(40, 65), "qweight must have 1300 elements"),
    ],
)
def test_nf4_dequantize_into_names_a_wrong_argument(out: Tensor, message: str):
    strided = torch.empty_strided(out.shape, out.stride(), dtype=out.dtype, device="cuda")
    with pytest.raises(RuntimeError, match=message):
        torch.ops.pylora_C.nf4_dequantize_into(*weight((40, 64), "cuda"), strided)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("shape", "columns"), [((300, 1096), 1112), ((37, 45), 64)])
def test_nf4_dequantize_into_is_the_reference_bit_for_bit(shape, columns, dtype):
    """The elements beside the weight in each row of `out` stay as they were."""
    q = weight(shape, "cuda", 32, nested=True)
    out = torch.full((shape[0], columns), -3.0, dtype=dtype, device="cuda")
    torch.ops.pylora_C.nf4_dequantize_into(*q, out[:, : shape[1]])
    assert torch.equal(out[:, : shape[1]], reference_op("nf4_dequantize")(*q, list(shape), dtype))
    assert (out[:, shape[1] :] == -3.0).all()


@on_gpu
@pytest.mark.parametrize(
    ("columns", "dtype", "lora_dtype", "message"),
    [
        (64, torch.float32, torch.float32, "x must be float16 or bfloat16"),
        (72, torch.bfloat16, torch.bfloat16, "x must have a multiple of 64 columns, got 72"),
        (64, torch.bfloat16, torch.float32, "lora_A must have dtype BFloat16, got Float"),
    ],
)
def test_lora_extend_names_a_wrong_argument(columns, dtype, lora_dtype, message):
    x = torch.zeros(4, columns, device="cuda", dtype=dtype)
    lora_A = torch.zeros(8, columns, device="cuda", dtype=lora_dtype)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.pylora_C.lora_extend(x, lora_A, None, 1.0, 0.0, None, 0)


@on_gpu
def test_training_gives_gradients_and_a_cuda_graph_the_same_result():
    """The forward uses dense products. The backward runs on whichever backend is chosen for it."""
    q = weight((96, 128), "cuda")
    x = torch.randn(TOKENS, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    A = torch.randn(8, 128, device="cuda", dtype=torch.bfloat16) / 11
    B = torch.randn(96, 8, device="cuda", dtype=torch.bfloat16)
    A.requires_grad_(), B.requires_grad_()
    args = (x, *q, 96, A, B, None, None, None, 0.5, 0.0, None, "identity")
    y, _ = torch.ops.pylora.lora_linear(*args)
    y.sum().backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in (x, A, B))
    frozen = tuple(t.detach() if isinstance(t, Tensor) else t for t in args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again, _ = torch.ops.pylora.lora_linear(*frozen)
    again.fill_(float("nan"))
    graph.replay()
    assert torch.equal(again, y.detach())
