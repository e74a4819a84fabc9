"""Several named adapters on one model: switching, training, state dicts, files and deletion."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import OTHERS, base, randomize, two_adapters
from torch import Tensor, nn

import pylora
from pylora.nn import LoRALinear

safetensors = pytest.importorskip("safetensors.torch")


def tensors(model: nn.Module) -> dict[int, Tensor]:
    """A copy of each parameter, by its id; the ids hold while the model lives."""
    return {id(p): p.detach().clone() for p in model.parameters()}


def unchanged(model: nn.Module, before: dict[int, Tensor]) -> set[str]:
    return {n for n, p in model.named_parameters() if torch.equal(p, before[id(p)])}


@pytest.mark.parametrize("second", OTHERS)
@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
def test_each_adapter_computes_what_it_computes_alone(quantized: bool, second: str) -> None:
    model = two_adapters(base(quantized), **OTHERS[second])
    x = torch.randn(3, 64)
    assert pylora.adapter_names(model) == ("default", "b")
    outputs = {}
    for name in ("default", "b", "default", "b"):
        pylora.set_active_adapters(model, name)
        assert pylora.active_adapter(model) == name
        y = model(x)
        assert torch.equal(y, outputs.setdefault(name, y))
    assert not torch.equal(outputs["default"], outputs["b"])
    alone = pylora.add_lora(base(quantized), **{"target_modules": ["q", "up"], **OTHERS[second]})
    values = {n: p for n, p in model.named_parameters() if p.requires_grad}
    expected = {n: p for n, p in alone.named_parameters() if p.requires_grad}
    assert values.keys() == expected.keys()
    with torch.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(values[name])
    assert torch.equal(alone(x), outputs["b"])


@pytest.mark.parametrize("second", OTHERS)
def test_training_one_adapter_changes_nothing_of_the_other(second: str) -> None:
    model = two_adapters(base(), **OTHERS[second])
    x = torch.randn(8, 64)
    own = {}
    for name in ("default", "b"):
        pylora.set_active_adapters(model, name)
        own[name] = {id(p) for p in model.parameters() if p.requires_grad}
    assert not own["default"] & own["b"]
    # One optimizer for each adapter, made while it is active, goes on after a switch away and back.
    optimizers = {}
    for name in ("default", "b"):
        pylora.set_active_adapters(model, name)
        optimizers[name] = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for name in ("default", "b", "default"):
        pylora.set_active_adapters(model, name)
        before = tensors(model)
        model(x).square().sum().backward()
        optimizers[name].step()
        optimizers[name].zero_grad()
        still = unchanged(model, before)
        moved = {id(p) for n, p in model.named_parameters() if n not in still}
        assert moved == own[name]


def test_a_switched_adapter_trains_as_if_it_had_stayed() -> None:
    x = torch.randn(8, 64)

    def trained(switches: bool) -> dict[str, Tensor]:
        torch.manual_seed(3)
        model = two_adapters(base(), r=5)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
        for _ in range(3):
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if switches:
                pylora.set_active_adapters(model, "b")
                model(x)
                pylora.set_active_adapters(model, "default")
        return model.state_dict()

    expected, actual = trained(False), trained(True)
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


@pytest.mark.parametrize("loaded", ["default", "b"])
@pytest.mark.parametrize("saved", ["default", "b"])
@pytest.mark.parametrize("second", OTHERS)
def test_a_state_dict_restores_all_adapters(second: str, saved: str, loaded: str) -> None:
    """Whichever adapter is active in the model that is saved and in the one that loads."""
    model = two_adapters(base(), **OTHERS[second])
    twin = two_adapters(base(), **OTHERS[second])
    x = torch.randn(3, 64)
    expected = {}
    for name in ("default", "b"):
        expected[name] = pylora.set_active_adapters(model, name)(x)
    pylora.set_active_adapters(model, saved)
    pylora.set_active_adapters(twin, loaded)
    twin.load_state_dict(model.state_dict())
    for name in ("default", "b"):
        assert torch.equal(pylora.set_active_adapters(twin, name)(x), expected[name]), name


def test_one_adapter_has_the_keys_of_a_model_that_knows_no_others() -> None:
    model = pylora.add_lora(base(), r=4, target_modules=["q"], modules_to_save=["head"])
    keys = set(model.state_dict())
    assert {key for key in keys if key.startswith(("q.lora", "head"))} == {
        "q.lora_A",
        "q.lora_B",
        "head.weight",
        "head.bias",
    }
    pylora.add_lora(model, r=2, target_modules=["up"], adapter_name="b")
    pylora.delete_adapter(model, "b")
    assert set(model.state_dict()) == keys
    assert type(model.up) is not LoRALinear


def test_a_state_dict_of_one_adapter_misses_the_other() -> None:
    state = pylora.add_lora(base(), r=4, target_modules=["q", "up"]).state_dict()
    model = two_adapters(base())
    with pytest.raises(RuntimeError, match=r"inactive_adapters\.b\.lora_A"):
        model.load_state_dict(state)
    pylora.set_active_adapters(model, "b")
    with pytest.raises(RuntimeError, match=r"inactive_adapters\.default\.lora_A"):
        model.load_state_dict(state)


def test_a_new_adapter_is_inactive_and_starts_as_the_base() -> None:
    plain = base()
    x = torch.randn(3, 64)
    expected = plain(x)
    model = copy.deepcopy(plain)
    pylora.add_lora(model, r=4, target_modules=["q", "up"], modules_to_save=["norm"])
    randomize(model)
    before, trainable = model(x), [n for n, p in model.named_parameters() if p.requires_grad]
    pylora.add_lora(model, r=2, modules_to_save=["norm", "head"], adapter_name="b")
    assert torch.equal(model(x), before)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == trainable
    torch.testing.assert_close(pylora.set_active_adapters(model, "b")(x), expected)
    assert model.norm.weight.requires_grad and model.head.weight.requires_grad
    assert torch.equal(pylora.set_active_adapters(model, "default")(x), before)
    assert not model.head.weight.requires_grad
    with pylora.disable_adapter(model):
        assert torch.equal(model(x), expected)


def test_a_block_gives_everything_back() -> None:
    model = two_adapters(base(), **OTHERS["hybrid"])
    model.q.lora_A.requires_grad_(False)
    before = [(n, id(p), p.requires_grad) for n, p in model.named_parameters()]
    with pytest.raises(RuntimeError, match="inside"), pylora.active_adapters(model, "b"):
        assert pylora.active_adapter(model) == "b" and model.q.lora_A.requires_grad
        raise RuntimeError("inside")
    assert [(n, id(p), p.requires_grad) for n, p in model.named_parameters()] == before


def test_deleting_activates_another_and_the_last_leaves_the_plain_model() -> None:
    plain = base()
    expected = plain.state_dict()
    model = two_adapters(copy.deepcopy(plain), **OTHERS["hybrid"])
    x = torch.randn(3, 64)
    other = pylora.set_active_adapters(model, "b")(x)
    pylora.set_active_adapters(model, "default")
    pylora.delete_adapter(model, "default")
    assert pylora.adapter_names(model) == ("b",)
    assert torch.equal(model(x), other) and model.q.lora_A.requires_grad
    assert not isinstance(model.up, LoRALinear)
    assert pylora.delete_adapter(model, "b") is model
    assert pylora.adapter_names(model) == () and pylora.active_adapter(model) is None
    state = model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    pylora.add_lora(model, r=2)  # the name is free again


@pytest.mark.parametrize("second", [name for name in OTHERS if name != "bf16"])
def test_files_hold_one_adapter_each(second: str, tmp_path: Path) -> None:
    model = two_adapters(base(), **OTHERS[second])
    x = torch.randn(3, 64)
    pylora.save_adapter(model, tmp_path / "b", adapter_name="b")
    assert pylora.active_adapter(model) == "default"
    pylora.save_adapter(model, tmp_path / "default")
    expected = {n: pylora.set_active_adapters(model, n)(x) for n in ("default", "b")}
    loaded = pylora.load_adapter(base(), tmp_path / "default")
    pylora.load_adapter(loaded, tmp_path / "b", adapter_name="b")
    assert pylora.adapter_names(loaded) == ("default", "b")
    assert torch.equal(loaded(x), expected["default"])
    assert torch.equal(pylora.set_active_adapters(loaded, "b")(x), expected["b"])
    with torch.no_grad():
        loaded.q.lora_B.zero_()
    pylora.load_adapter(loaded, tmp_path / "b")  # into the active one
    assert torch.equal(loaded(x), expected["b"])


def test_another_rank_is_loaded_beside_or_in_place_of_the_old_one(tmp_path: Path) -> None:
    model = two_adapters(base(), r=7)
    pylora.save_adapter(model, tmp_path, adapter_name="b")
    expected = pylora.set_active_adapters(model, "b")(torch.ones(1, 64))
    one = pylora.add_lora(base(), r=4, target_modules=["q", "up"])
    with pytest.raises(ValueError, match=r"delete_adapter\(model, 'default'\)"):
        pylora.load_adapter(one, tmp_path)
    assert pylora.adapter_names(one) == ("default",) and one.q.r == 4
    pylora.delete_adapter(one, "default")
    pylora.load_adapter(one, tmp_path)
    assert one.q.r == 7 and torch.equal(one(torch.ones(1, 64)), expected)


def test_peft_reads_each_adapter(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = two_adapters(base(quantized=False), **OTHERS["hybrid"])
    x = torch.randn(3, 64)
    theirs: Any = None
    for name in ("default", "b"):
        pylora.save_adapter(model, tmp_path / name, adapter_name=name)
        if theirs is None:
            theirs = peft.PeftModel.from_pretrained(base(False), tmp_path / name, name)
        else:
            theirs.load_adapter(tmp_path / name, name)
    for name in ("b", "default"):
        theirs.set_adapter(name)
        expected = theirs(x)
        torch.testing.assert_close(pylora.set_active_adapters(model, name)(x), expected)


def test_merging_takes_the_active_adapter(caplog: pytest.LogCaptureFixture) -> None:
    model = two_adapters(base(quantized=False), r=2, target_modules=["q"])
    x = torch.randn(3, 64)
    pylora.set_active_adapters(model, "b")
    expected = model(x)
    assert [row.name for row in pylora.merge(model).layers] == ["q"]
    torch.testing.assert_close(model(x), expected)
    for refused in (
        lambda: pylora.set_active_adapters(model, "default"),
        lambda: pylora.delete_adapter(model, "default"),
        lambda: pylora.add_lora(model, adapter_name="c"),
    ):
        with pytest.raises(ValueError, match=r"q is merged; pylora\.unmerge"):
            refused()
    pylora.unmerge(model)
    assert torch.equal(model(x), expected)
    pylora.merge(model, keep_base=False)
    assert type(model.q) is nn.Linear and type(model.up) is nn.Linear
    assert "inactive adapters 'default' are dropped" in caplog.text


def test_what_does_not_fit_changes_nothing() -> None:
    model = two_adapters(base(), **OTHERS["hybrid"])
    before = [(n, id(p), p.requires_grad) for n, p in model.named_parameters()]
    for call, message in (
        (lambda: pylora.set_active_adapters(model, "c"), "adapters: 'default', 'b'"),
        (lambda: pylora.delete_adapter(model, "c"), "adapter_name is 'c'"),
        (lambda: pylora.save_adapter(model, "x", adapter_name="c"), "adapter_name is 'c'"),
        (lambda: pylora.add_lora(model, adapter_name="a.b"), "without a dot"),
        (lambda: pylora.add_lora(model, adapter_name="keys"), "adapter_name is 'keys'"),
        (
            lambda: pylora.add_lora(model, adapter_name="c", target_modules=["head"]),
            "head must not be a target of LoRA: another adapter trains it in full",
        ),
        (
            lambda: pylora.add_lora(model, adapter_name="b", target_modules=["q"]),
            "q is wrapped already and has an adapter 'b'",
        ),
        (
            lambda: pylora.add_lora(model, adapter_name="c", r=0, target_modules=["q"]),
            "r is 0",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
        assert [(n, id(p), p.requires_grad) for n, p in model.named_parameters()] == before


def test_names_of_peft_say_what_to_use_instead() -> None:
    from pylora.models.peft_names import _INSTEAD

    for name, instead in _INSTEAD.items():
        with pytest.raises(AttributeError, match=f"{name}', which is PEFT's: "):
            getattr(pylora, name)
        for ours in re.findall(r"pylora\.(\w+)", instead):
            assert hasattr(pylora, ours), ours
    with pytest.raises(AttributeError, match=r"attribute 'nothing'$"):
        pylora.nothing  # noqa: B018
    with pytest.raises(TypeError, match=r"name of one adapter.*peft\.PeftModel"):
        pylora.set_active_adapters(two_adapters(base()), ["default", "b"])


def test_all_linear_leaves_out_what_another_adapter_trains_in_full() -> None:
    model = two_adapters(base(), **OTHERS["hybrid"])
    pylora.add_lora(model, adapter_name="c")
    assert "c" in model.up.adapter_names and type(model.head) is nn.Linear


def test_a_single_layer_switches_but_keeps_its_last_adapter() -> None:
    layer = LoRALinear(nn.Linear(8, 8), r=2)
    layer.add_adapter("b", r=3)
    pylora.set_active_adapters(layer, "b")
    assert layer.r == 3 and "r=3" in repr(layer)
    pylora.delete_adapter(layer, "default")
    with pytest.raises(ValueError, match="is the only adapter"):
        pylora.delete_adapter(layer, "b")
