"""Layers keep calls: a kept call gives the same bits as a call that keeps nothing."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from pylora import dispatch
from pylora.backends import extension
from pylora.nn import LoRALinear, NF4Linear
from pylora.nn import kept as kept_module

NO_GPU = dispatch.BACKENDS["cuda"].unavailable()
IN, OUT, RANK = 128, 80, 4


def nf4_layer() -> NF4Linear:
    return NF4Linear(IN, OUT, blocksize=64)


def lora_layer() -> LoRALinear:
    layer = LoRALinear(nf4_layer(), r=RANK, lora_bias=True)
    with torch.no_grad():
        for parameter in (layer.lora_B, layer.lora_B_bias):
            parameter.normal_()
    return layer


@pytest.fixture(params=[nf4_layer, lora_layer], ids=["nf4", "lora"])
def layer(request: pytest.FixtureRequest) -> Iterator[nn.Module]:
    with dispatch.use_backend("cpu"):
        yield request.param()


def without_kept_call(layer: nn.Module, x: Tensor) -> Tensor:
    for module in layer.modules():
        if hasattr(module, "_kept"):
            module._kept = None
    return layer(x)


def gradients(y: Tensor, layer: nn.Module, x: Tensor) -> list[Tensor]:
    trained = [p for p in layer.parameters() if p.requires_grad]
    return list(torch.autograd.grad(y.square().sum(), [x, *trained]))


@pytest.mark.parametrize("shape", [(1, IN), (IN,), (2, 3, IN), (0, IN)])
def test_a_kept_call_gives_the_same_bits(layer: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    expected = without_kept_call(layer, x)
    layer(x)
    y = layer(x)
    assert layer._kept.call_with(x) is not None
    assert torch.equal(y, expected)
    for kept, fresh in zip(gradients(y, layer, x), gradients(expected, layer, x), strict=True):
        assert torch.equal(kept, fresh)
    with torch.no_grad():
        assert torch.equal(layer(x), expected)


@pytest.mark.gpu
@pytest.mark.skipif(NO_GPU is not None, reason=NO_GPU or "")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 40, 600])
def test_a_kept_call_gives_the_same_bits_on_a_gpu(tokens: int, dtype: torch.dtype) -> None:
    for layer in (nf4_layer().cuda(), lora_layer().cuda()):
        memory = torch.randn(tokens * IN + 1, device="cuda", dtype=dtype)
        for x in (
            memory[:-1].view(tokens, IN),
            memory[1:].view(tokens, IN),
        ):  # the second is not aligned
            expected = without_kept_call(layer, x)
            layer(x)
            assert torch.equal(layer(x), expected)
            with torch.no_grad():
                assert torch.equal(layer(x), expected)


def test_each_call_has_its_own_results(layer: nn.Module) -> None:
    first_x, second_x = torch.randn(2, 3, IN).unbind()
    first_x.requires_grad_(), second_x.requires_grad_()
    layer(first_x)
    first, second = layer(first_x), layer(second_x)
    assert torch.equal(first, without_kept_call(layer, first_x))
    (dx,) = torch.autograd.grad(first.sum(), first_x)
    (expected,) = torch.autograd.grad(without_kept_call(layer, first_x).sum(), first_x)
    assert torch.equal(dx, expected) and not torch.equal(first, second)


def test_the_profiler_sees_the_op(layer: nn.Module) -> None:
    x = torch.randn(2, IN)
    layer(x)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        layer(x)
    assert any(event.key.startswith("pylora::") for event in recorded.key_averages())


def test_memory_given_to_a_parameter_in_place_is_used(layer: nn.Module) -> None:
    x = torch.randn(3, IN)
    layer(x)
    changed = layer.lora_A if isinstance(layer, LoRALinear) else layer.bias
    changed.data = torch.randn_like(changed)
    y = layer(x)
    assert torch.equal(y, without_kept_call(layer, x))
    transposed = torch.randn(*reversed(changed.shape))
    changed.data = transposed.t() if transposed.dim() == 2 else transposed[:]
    assert torch.equal(layer(x), without_kept_call(layer, x))


def test_memory_taken_from_a_parameter_is_an_error() -> None:
    layer, x = lora_layer(), torch.randn(3, IN)
    with dispatch.use_backend("cpu"):
        layer(x)
        layer(x)
        layer.lora_A.data = torch.empty(0)
        with pytest.raises(RuntimeError, match="lora_A must have 2 dimensions"):
            layer(x)


def test_a_weight_changed_before_the_backward_is_an_error() -> None:
    layer, x = lora_layer(), torch.randn(3, IN, requires_grad=True)
    layer(x)
    y = layer(x)
    with torch.no_grad():
        layer.lora_A.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_an_x_with_a_pending_negation_is_read_right(layer: nn.Module) -> None:
    x = torch.imag(torch.conj(torch.randn(1, IN, dtype=torch.complex64)))
    x = torch._neg_view(torch.randn(3, IN)) if not x.is_neg() else x
    assert x.is_neg()
    layer(torch.randn_like(x))
    assert torch.equal(layer(x), without_kept_call(layer, x.resolve_neg()))


def test_an_x_without_memory_is_read_as_zeros(layer: nn.Module) -> None:
    x = torch._efficientzerotensor(3, IN)
    layer(torch.randn(3, IN))
    assert torch.equal(layer(x), without_kept_call(layer, torch.zeros(3, IN)))


@pytest.mark.parametrize("autocast", [False, True])
def test_the_memory_of_a_call_is_not_kept(autocast: bool) -> None:
    layer = lora_layer()
    for _ in range(3):
        x = torch.randn(7, IN, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = layer(x)
        y.sum().backward()
        dead = weakref.ref(x)
        del x, y
        assert dead() is None
    (call,) = layer._kept._calls.values()
    kept = {t.data_ptr() for t in call._gradient._constants if t is not None}
    assert kept <= {t.data_ptr() for t in (*layer.parameters(), *layer.buffers())}


def test_old_plans_are_forgotten(layer: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_module, "_MOST_CALLS", 2)
    for tokens in range(1, 8):
        x = torch.randn(tokens, IN)
        layer(x)
        assert torch.equal(layer(x), without_kept_call(layer, x))
        layer(x)
        assert len(layer._kept._calls) <= 2


@pytest.mark.parametrize("name", ["weight", "absmax_bytes", "bias"])
def test_a_replaced_tensor_is_seen(name: str) -> None:
    layer, x = nf4_layer(), torch.randn(3, IN)
    layer(x)
    other_layer = nf4_layer()
    layer._parameters[name] = getattr(other_layer, name)
    assert layer._kept.call_with(x) is None
    assert torch.equal(layer(x), without_kept_call(layer, x))


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("base", ["nf4", "dense"])
def test_a_call_under_autocast_keeps_no_cast_of_a_parameter(base: str, use_dora: bool) -> None:
    """The cast would not change with the parameter, and the next call would use the old values."""
    linear = nn.Linear(IN, OUT, dtype=torch.bfloat16)
    layer = LoRALinear(
        NF4Linear.from_linear(linear) if base == "nf4" else linear, r=RANK, use_dora=use_dora
    )
    x = torch.randn(3, IN, dtype=torch.bfloat16)
    for context in (torch.no_grad(), torch.enable_grad()):
        with context:
            with torch.autocast("cpu", torch.bfloat16):
                layer(x)
            with torch.no_grad():
                layer.lora_B.normal_()
            fresh = copy.deepcopy(layer)
            assert torch.equal(layer(x), fresh(x))


@pytest.mark.parametrize("base", ["nf4", "dense"])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_a_kept_call_under_autocast_gives_the_same_bits(base: str, x_dtype: torch.dtype) -> None:
    linear = nn.Linear(IN, OUT, dtype=torch.bfloat16)
    base_layer = NF4Linear.from_linear(linear) if base == "nf4" else linear
    layer = LoRALinear(base_layer, r=RANK, lora_dropout=0.5, lora_bias=True)
    x = torch.randn(2, 3, IN, dtype=x_dtype, requires_grad=True)
    for training in (False, True):
        layer.train(training)
        for _ in range(2):  # an optimizer step lies between the calls
            with torch.no_grad():
                for parameter in (layer.lora_A, layer.lora_B, layer.lora_B_bias):
                    parameter.normal_()
            results = []
            for call in (without_kept_call, lambda layer, x: layer(x)):
                with torch.autocast("cpu", torch.bfloat16):
                    torch.manual_seed(0)  # that of the dropout
                    y = call(layer, x)
                    assert layer._kept.call_with(x) is not None
                results.append((y, *gradients(y, layer, x)))
            assert all(map(torch.equal, *results))
            assert results[0][0].dtype == torch.bfloat16
            assert [t.dtype for t in results[0][2:]] == [torch.float32] * 3


def test_a_call_kept_under_autocast_is_for_the_same_autocast_alone() -> None:
    layer, x = LoRALinear(nf4_layer(), r=RANK), torch.randn(3, IN)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
        kept = layer._kept
        assert kept.call_with(x) is not None
        assert kept.call_with(x.double()) is None
    assert kept.call_with(x) is None
    with torch.autocast("cpu", torch.float16):
        assert kept.call_with(x) is None
        assert layer(x).dtype == torch.float16
    assert layer(x).dtype == torch.float32


def test_a_layer_whose_weight_autocast_casts_keeps_no_call() -> None:
    layer = LoRALinear(nn.Linear(IN, OUT), r=RANK)
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(3, IN))
    assert layer._kept is None


def test_the_first_call_with_gradients_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of many lengths make many first calls."""
    layer, count = lora_layer(), 0
    with dispatch.use_backend("cpu"):
        layer(torch.randn(2, IN))
        prepare = extension.prepare_lora_linear

        def counted(call: object) -> object:
            forward = prepare(call)

            def run(*args: object) -> object:
                nonlocal count
                count += 1
                return forward(*args)

            return run

        monkeypatch.setattr(extension, "prepare_lora_linear", counted)
        for tokens in (3, 4, 4):
            y = layer(torch.randn(tokens, IN))
            assert y.requires_grad
        assert count == 3
