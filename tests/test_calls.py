"""Call records are turned into the flat arguments of torch's schemas and back without loss."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor

import pylora
from pylora import calls, selfcheck
from pylora.ops.registration import OPS
from pylora.ops.spec import SPECS

CASES = {case.op: case for case in selfcheck.cases()}  # the last case of each op, which has dropout


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_every_record_has_a_spec_and_a_case() -> None:
    assert {spec.record for spec in SPECS.values()} == set(get_args(calls.Call)) == set(OPS)
    assert CASES.keys() == SPECS.keys()


@pytest.mark.parametrize("op", SPECS)
def test_flat_arguments_survive_the_way_to_a_record_and_back(op: str) -> None:
    spec, flat = SPECS[op], CASES[op].args
    again = spec.flatten(spec.read(flat))
    assert len(again) == len(flat) and all(map(same, again, flat))
    arguments = getattr(torch.ops.pylora, op).default._schema.arguments
    assert len(arguments) == len(flat)


def test_each_layer_of_a_call_draws_its_own_mask() -> None:
    w = pylora.quantize_nf4(torch.randn(8, 64))
    A, B = torch.randn(2, 64), torch.randn(8, 2)
    projection = pylora.functional.Projection(w, A, B)
    call = pylora.functional.CALLS["lora_qkv"](
        torch.randn(3, 64), projection, projection, projection, 0.5, 7
    )
    read = SPECS["lora_qkv"].read(SPECS["lora_qkv"].flatten(call))
    for layers in (call.layers, read.layers):
        drawn = [layer.low_rank.dropout for layer in layers if layer.low_rank is not None]
        assert [int(d.layer_seed) for d in drawn if d is not None] == [7, 8, 9]


def test_the_intermediate_size_is_read_from_the_layer_before() -> None:
    """lora_mlp has no argument for down's in_features."""
    F = pylora.functional
    gate, down = (pylora.quantize_nf4(torch.randn(size)) for size in ((48, 128), (96, 48)))
    call = F.CALLS["lora_mlp"](
        torch.randn(2, 128), F.Projection(gate), F.Projection(gate), F.Projection(down)
    )
    read = SPECS["lora_mlp"].read(SPECS["lora_mlp"].flatten(call))
    assert [layer.weight.shape for layer in read.layers] == [(48, 128), (48, 128), (96, 48)]


def test_environment_is_read_again_only_after_a_refresh(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from pylora import dispatch

    assert dispatch.forced_backend() is None
    before = dispatch.generation()
    monkeypatch.setenv("PYLORA_BACKEND", "reference")
    assert dispatch.forced_backend() is None
    pylora.refresh()
    assert dispatch.forced_backend() == "reference" and dispatch.generation() != before


class TestKept:
    """A layer keeps its record and plans between calls, and still sees whatever has changed."""

    @staticmethod
    def layer(r: int = 4) -> pylora.nn.LoRALinear:
        base = pylora.nn.NF4Linear.from_linear(torch.nn.Linear(64, 48))
        layer = pylora.nn.LoRALinear(base, r=r)
        torch.nn.init.normal_(layer.lora_B)
        return layer

    @staticmethod
    def expected(layer: pylora.nn.LoRALinear, x: Tensor) -> Tensor:
        arguments = (layer.base_weight, layer.lora_A, layer.lora_B, layer.scaling)
        return pylora.functional.lora_linear(x, *arguments, layer.base_layer.bias)

    def check(self, layer: pylora.nn.LoRALinear, x: Tensor) -> None:
        assert torch.equal(layer(x), self.expected(layer, x))

    def test_changes_in_place_or_by_assignment_are_seen(self) -> None:
        layer, x = self.layer(), torch.randn(3, 64)
        self.check(layer, x)
        kept = layer._kept
        self.check(layer, x)
        assert layer._kept is kept is not None
        with torch.no_grad():
            layer.lora_A.mul_(2)
        self.check(layer, x)
        layer.lora_A = torch.nn.Parameter(torch.randn(4, 64))
        self.check(layer, x)
        layer.base_layer.set_nf4_weight(pylora.quantize_nf4(torch.randn(48, 64)))
        self.check(layer, x)
        layer.scaling = 3.0
        self.check(layer, x)
        layer.base_layer.bias = None
        self.check(layer, x)
        layer.double()
        self.check(layer, x.double())
        layer.bfloat16()
        self.check(layer, x.bfloat16())

    def test_functional_call_and_parametrizations_are_seen(self) -> None:
        layer, x = self.layer(), torch.randn(3, 64)
        self.check(layer, x)
        A = torch.randn(4, 64)
        y = torch.func.functional_call(layer, {"lora_A": A}, (x,))
        arguments = (layer.base_weight, A, layer.lora_B, layer.scaling, layer.base_layer.bias)
        assert torch.equal(y, pylora.functional.lora_linear(x, *arguments))
        self.check(layer, x)

        class Double(torch.nn.Module):
            def forward(self, value: Tensor) -> Tensor:
                return 2 * value

        torch.nn.utils.parametrize.register_parametrization(layer, "lora_A", Double())
        self.check(layer, x)
        self.check(layer, x)

    def test_bad_input_is_refused_after_a_good_call(self) -> None:
        layer = self.layer()
        layer(torch.randn(3, 64))
        with pytest.raises(ValueError, match="its last dimension must be in_features = 64"):
            layer(torch.randn(3, 63))
        with pytest.raises(TypeError, match="must be a floating-point dtype"):
            layer(torch.ones(3, 64, dtype=torch.int64))

    def test_another_backend_is_used_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from pylora import dispatch

        layer, x = self.layer(), torch.randn(3, 64)
        for _ in range(2):  # the first call checks its arguments, and the second makes the plan
            layer(x)
        chosen: list[str] = []
        choose = dispatch.choose

        def recorded(call: Any) -> Any:
            backend, plan = choose(call)
            chosen.append(backend.name)
            return backend, plan

        monkeypatch.setattr(dispatch, "choose", recorded)
        layer(x)
        assert chosen == []  # the plan was kept
        with pylora.use_backend("reference"):
            layer(x)
        assert chosen == ["reference"]

    def test_copies_keep_nothing_of_the_original(self) -> None:
        import copy

        layer, x = self.layer(), torch.randn(3, 64)
        layer(x)
        twin = copy.deepcopy(layer)
        assert twin._kept is None
        with torch.no_grad():
            twin.lora_B.zero_()
        self.check(twin, x)
        self.check(layer, x)
