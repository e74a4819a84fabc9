"""The Hopper kernel for many tokens, which is off by default: its limits, and its results on a GPU.

tests/test_host_cuda_many.py runs the same kernel on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from flat_calls import chosen, reference_op

import pylora
from pylora import dispatch
from pylora.backends import cuda, cuda_hopper, extension, limits
from pylora.backends.backend import Plan, Refusal
from pylora.calls import Layer, LoraLinearCall, LowRank, Nf4LinearCall, Weight
from pylora.testing import assert_as_accurate_as_torch


def unavailable() -> str | None:
    """Returns why the kernel cannot run here, or None if it can."""
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
    """Runs the op on the kernel twice, judges the result, and checks that both are equal."""
    assert chosen(op, *args) == "cuda"
    result = getattr(torch.ops.pylora, op)(*args)
    assert_as_accurate_as_torch(result, reference_op(op), *args)
    again = getattr(torch.ops.pylora, op)(*args)
    results, results_again = ((r if isinstance(r, tuple) else (r,)) for r in (result, again))
    assert all(map(torch.equal, results, results_again))
    return result


def arguments(
    tokens: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
    blocksize: int = 64,
    nested: bool = False,
) -> tuple[Any, ...]:
    """Returns arguments of nf4_linear on the GPU."""
    weight = torch.randn(shape, device="cuda") / shape[1] ** 0.5
    w = pylora.quantize_nf4(weight, blocksize, nested)
    x = torch.randn(tokens, shape[1], device="cuda").to(dtype)
    bias = torch.randn(shape[0], device="cuda").to(dtype)
    return (x, *w.op_arguments(), shape[0], bias)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "shape", "blocksize", "nested"),
    [
        (128, (128, 64), 64, False),
        (300, (200, 640), 64, True),
        (131, (133, 576), 128, False),  # blocks straddle rows, and outputs end at odd addresses
        (256, (1024, 4096), 4096, True),
        (2048, (4096, 4096), 64, False),  # both tile sizes, and several tiles for each SM
        (4096, (1024, 1024), 64, False),
    ],
)
@on_hopper
def test_nf4_linear_obeys_the_numerics_rule(turned_on, tokens, shape, blocksize, nested, dtype):
    run("nf4_linear", arguments(tokens, shape, dtype, blocksize, nested))


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
def test_lora_linear_obeys_the_numerics_rule(
    turned_on, dtype, lora_dtype, rank, dropout_p, activation
):
    for tokens in (129, 1024):
        x, *q, out_features, bias = arguments(tokens, (720, 1024), dtype, nested=True)
        factors = [torch.randn(rank, 1024) / 32, torch.randn(out_features, rank)]
        biases = [torch.randn(rank), torch.randn(out_features)]
        A, B, A_bias, B_bias = (t.to("cuda", lora_dtype) for t in (*factors, *biases))
        seed = torch.tensor(-1234567890123, device="cuda") if dropout_p else None
        trailing = (0.5, dropout_p, seed, activation)
        run("lora_linear", (x, *q, out_features, A, B, bias, A_bias, B_bias, *trailing))


@on_hopper
def test_a_cuda_graph_gives_the_same_result(turned_on):
    x, *weight_and_bias = arguments(256, (512, 512), torch.bfloat16)
    expected = torch.ops.pylora.nf4_linear(x, *weight_and_bias)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = torch.ops.pylora.nf4_linear(x, *weight_and_bias)
    y.fill_(float("nan"))
    graph.replay()
    assert torch.equal(y, expected)


# The limits, on fake tensors: these tests need no GPU.


class Calls:
    """Asks the cuda backend about calls on a GPU whose capability a test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        if extension.load()[0] is None:
            pytest.skip("pylora was installed without its extension, which knows the limits")
        self._monkeypatch = monkeypatch
        monkeypatch.setattr(cuda, "_has_matrix_instructions", lambda device: True)
        monkeypatch.setattr(cuda, "_is_aligned", lambda tensor: True)
        self.on(9, 0)

    def on(self, *capability: int, compiled: bool = True) -> None:
        self._monkeypatch.setattr(cuda_hopper, "_capability", lambda device: capability)
        self._monkeypatch.setattr(cuda_hopper, "_is_compiled", lambda: compiled)

    def ask(
        self, tokens: int = 128, columns: int = 192, blocksize: int = 64, has_lora: bool = False
    ) -> Plan | Refusal:
        numel = 96 * columns
        qweight = torch.empty(numel // 2, dtype=torch.uint8, device="cuda")
        absmax = torch.empty(-(-numel // blocksize), device="cuda")
        x = torch.empty(tokens, columns, dtype=torch.bfloat16, device="cuda")
        weight = Weight(qweight, absmax, None, None, None, blocksize, 256, (96, columns))
        if not has_lora:
            return cuda.BACKEND.plan(Nf4LinearCall(x, Layer(weight)))
        low = LowRank(x.new_empty(8, columns), x.new_empty(96, 8))
        return cuda.BACKEND.plan(LoraLinearCall(x, Layer(weight, None, low)))

    def plan(self, **options: Any) -> Plan:
        reply = self.ask(**options)
        assert isinstance(reply, Plan), reply.reason
        return reply

    def refusal(self, **options: Any) -> str:
        reply = self.ask(**options)
        assert isinstance(reply, Refusal), reply.variant
        return reply.reason


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    monkeypatch.delenv("PYLORA_HOPPER", raising=False)
    pylora.refresh()
    with torch._subclasses.fake_tensor.FakeTensorMode():
        yield Calls(monkeypatch)


NEEDS = "the hopper kernel needs a multiple of 64"


@pytest.mark.parametrize("has_lora", [False, True])
@pytest.mark.parametrize("tokens", [9, 128, 513, 4096])
def test_the_hopper_kernel_is_preferred_if_it_can_run(calls: Calls, tokens: int, has_lora: bool):
    assert calls.plan(tokens=tokens, has_lora=has_lora).variant == cuda.HOPPER
    straddling = calls.plan(tokens=tokens, blocksize=128, has_lora=has_lora)
    assert straddling.variant == cuda.HOPPER


CANNOT_RUN = [
    ((8, 0), True, {}, "the hopper kernel needs a GPU of compute capability 9.0"),
    ((10, 0), True, {}, "the hopper kernel needs a GPU of compute capability 9.0"),
    ((9, 0), False, {}, "the hopper kernel was not compiled: PYLORA_CUDA_ARCHS had no 90a"),
    ((9, 0), True, {"blocksize": 32}, f"blocksize is 32; {NEEDS}"),
    ((9, 0), True, {"columns": 224}, f"in_features is 224; {NEEDS}"),
]


@pytest.mark.parametrize(("capability", "compiled", "options", "reason"), CANNOT_RUN)
@pytest.mark.parametrize("tokens", [513, 4096])
def test_many_tokens_take_the_dense_product_if_the_kernel_cannot_run(
    calls: Calls,
    tokens: int,
    capability: tuple[int, int],
    compiled: bool,
    options: dict[str, int],
    reason: str,
):
    calls.on(*capability, compiled=compiled)
    plan = calls.plan(tokens=tokens, **options)
    assert plan.variant == cuda.MANY_ROWS and plan.note == f"not the hopper kernel: {reason}"


@pytest.mark.parametrize(("capability", "compiled", "options", "reason"), CANNOT_RUN)
def test_a_middle_number_of_tokens_is_refused_with_the_reason(
    calls: Calls,
    capability: tuple[int, int],
    compiled: bool,
    options: dict[str, int],
    reason: str,
):
    calls.on(*capability, compiled=compiled)
    assert calls.refusal(tokens=128, **options).endswith(f"not the hopper kernel: {reason}")


def test_the_kernel_is_for_a_middle_number_of_tokens(calls: Calls):
    plan = calls.plan(tokens=limits.CUDA_HOPPER_TO)
    assert plan.variant == cuda.MANY_ROWS
    assert plan.note == "not the hopper kernel: from 8192 tokens on the dense product is faster"
    plan = calls.plan(tokens=8 * 65536)
    assert plan.variant == cuda.MANY_ROWS
    reason = "x has 524288 tokens; the hopper kernel takes up to 524280"
    assert plan.note == f"not the hopper kernel: {reason}"
    assert calls.plan(tokens=8).variant == cuda.SMALL_M


def test_an_environment_variable_turns_the_kernel_off(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PYLORA_HOPPER", "0")
    pylora.refresh()
    plan, reason = calls.plan(tokens=513), calls.refusal(tokens=128)
    assert plan.variant == cuda.MANY_ROWS
    for text in (plan.note, reason):
        assert "PYLORA_HOPPER=0 turns the hopper kernel off" in text


def test_the_compiled_op_refuses_cpu_tensors():
    """The op is called directly here, and it has no CPU kernel."""
    if extension.load()[0] is None:
        pytest.skip("pylora was installed without its extension")
    w = pylora.quantize_nf4(torch.randn(64, 64))
    with pytest.raises(NotImplementedError, match="nf4_linear_hopper"):
        torch.ops.pylora_C.nf4_linear_hopper(torch.randn(128, 64), *w.op_arguments(), 64, None)
