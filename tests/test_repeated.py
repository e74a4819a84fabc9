"""The backward of a kept call: it gives the same bits as that of a call that keeps nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from pylora import dispatch
from pylora.nn import LoRALinear, NF4Linear
from pylora.ops import registration

IN, OUT, RANK = 64, 48, 4


def lora_layer(base: str, use_dora: bool = False) -> LoRALinear:
    linear = nn.Linear(IN, OUT, dtype=torch.bfloat16)
    base_layer = NF4Linear.from_linear(linear) if base == "nf4" else linear
    layer = LoRALinear(base_layer, r=RANK, use_dora=use_dora, lora_bias=not use_dora)
    nn.init.normal_(layer.lora_B)
    return layer


def trained(layer: nn.Module, x: Tensor) -> list[Tensor]:
    return [t for t in (x, *layer.parameters()) if t.requires_grad]


def with_gradients(
    layer: nn.Module,
    x: Tensor,
    autocast: bool,
    backward: Callable[[Tensor, list[Tensor]], Sequence[Tensor]] | None = None,
) -> list[Tensor]:
    """y and the gradients of all that is trained."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x)
    seen = trained(layer, x)
    grads = torch.autograd.grad(y.square().sum(), seen) if backward is None else backward(y, seen)
    return [y, *grads]


def forgetful(layer: nn.Module) -> nn.Module:
    for module in layer.modules():
        if hasattr(module, "_kept"):
            module._kept = None
    return layer


CASES = pytest.mark.parametrize(
    ("base", "autocast", "use_dora"),
    [
        ("nf4", False, False),
        ("nf4", True, False),
        ("dense", True, False),
        ("nf4", False, True),
        ("nf4", True, True),
    ],
)


def tokens(autocast: bool) -> Tensor:
    dtype = torch.bfloat16 if autocast else torch.float32
    return torch.randn(3, IN, dtype=dtype, requires_grad=True)


def layer_of(base: str, autocast: bool, use_dora: bool) -> LoRALinear:
    layer = lora_layer(base, use_dora)
    return layer if autocast else layer.float()


@CASES
@pytest.mark.parametrize("frozen", [(), ("lora_A",), ("lora_A", "lora_B"), ("x",)])
def test_what_is_trained_may_change(
    base: str, autocast: bool, use_dora: bool, frozen: tuple[str, ...]
) -> None:
    layer, x = layer_of(base, autocast, use_dora), tokens(autocast)
    for _ in range(3):
        with_gradients(layer, x, autocast)
    for name in frozen:
        (x if name == "x" else getattr(layer, name)).requires_grad_(False)
    kept = [with_gradients(layer, x, autocast) for _ in range(2)]
    expected = with_gradients(forgetful(layer), x, autocast)
    for results in kept:
        assert len(results) == len(expected)
        assert all(map(torch.equal, results, expected))


@CASES
def test_hooks_on_saved_tensors_give_their_own_tensors(
    base: str, autocast: bool, use_dora: bool
) -> None:
    layer, x = layer_of(base, autocast, use_dora), tokens(autocast)
    expected = [with_gradients(layer, x, autocast) for _ in range(3)][-1]
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        results = with_gradients(layer, x, autocast)
    assert any(tensor is x for tensor in packed)
    assert all(map(torch.equal, results, expected))
    # The backward reads what the hooks return.
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, torch.zeros_like):
        _, of_x, *_ = with_gradients(layer, x, autocast)
    assert not torch.equal(of_x, expected[1])


@CASES
def test_any_gradient_of_y_is_taken(base: str, autocast: bool, use_dora: bool) -> None:
    layer, x = layer_of(base, autocast, use_dora), tokens(autocast)
    for _ in range(2):
        with_gradients(layer, x, autocast)

    def of_sum(y: Tensor, seen: list[Tensor]) -> Sequence[Tensor]:  # an expanded tensor
        return torch.autograd.grad(y.sum(), seen)

    def twice(y: Tensor, seen: list[Tensor]) -> Sequence[Tensor]:
        first = torch.autograd.grad(y.sum(), seen, retain_graph=True)
        second = torch.autograd.grad(y.sum(), seen)
        assert all(map(torch.equal, first, second))
        return second

    results = [with_gradients(layer, x, autocast, how) for how in (of_sum, twice)]
    expected = with_gradients(forgetful(layer), x, autocast, of_sum)
    for kept in results:
        assert all(map(torch.equal, kept, expected))


def test_a_second_derivative_is_refused() -> None:
    layer, x = lora_layer("nf4").float(), tokens(autocast=False)
    for _ in range(2):
        with_gradients(layer, x, autocast=False)
    (dx,) = torch.autograd.grad(layer(x).sum(), [x], create_graph=True)
    with pytest.raises(NotImplementedError, match="lora_linear_backward has no gradient"):
        dx.sum().backward()


def test_the_backend_of_a_block_around_the_backward_is_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer, x = lora_layer("nf4").float(), tokens(autocast=False)
    for _ in range(2):
        with_gradients(layer, x, autocast=False)
    y, asked = layer(x), []
    choose = dispatch.choose

    def noted(call: object) -> object:
        backend, plan = choose(call)
        asked.append(backend.name)
        return backend, plan

    monkeypatch.setattr(registration.dispatch, "choose", noted)
    with dispatch.use_backend("reference"):
        torch.autograd.grad(y.sum(), [x])
    assert asked == ["reference"]


def test_a_factor_changed_before_the_backward_is_an_error() -> None:
    layer, x = lora_layer("nf4").float(), tokens(autocast=False)
    for _ in range(2):
        with_gradients(layer, x, autocast=False)
    y = layer(x)
    with torch.no_grad():
        layer.lora_A.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
