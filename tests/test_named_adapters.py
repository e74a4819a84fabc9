"""Several named adapters on one model: switching, training, state dicts, files and deletion."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim.swa_utils import AveragedModel

import pylora
from pylora.nn import LoRALinear

safetensors = pytest.importorskip("safetensors.torch")

# What the second adapter "b" differs in from the first, "default" (r=4 on every layer).
OTHERS: dict[str, dict[str, Any]] = {
    "rank": {"r": 7, "lora_alpha": 5},
    "rslora": {"r": 2, "use_rslora": True},
    "dora": {"r": 3, "use_dora": True},
    "bias": {"r": 3, "lora_bias": True},
    "bf16": {"r": 4, "dtype": torch.bfloat16},
    "targets": {"r": 4, "target_modules": ["q"]},
    "hybrid": {"r": 3, "target_modules": ["q"], "modules_to_save": ["norm", "head"]},
}


class Block(nn.Module):
    """Two linear layers, a norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.up = nn.Linear(64, 64), nn.Linear(64, 64, bias=False)
        self.norm, self.head = nn.LayerNorm(64), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.up(self.q(x).relu())))


def base(quantized: bool = True) -> Block:
    torch.manual_seed(1)
    model = Block()
    return pylora.quantize_model(model, skip_modules=["head"]) if quantized else model


def randomize(model: nn.Module) -> None:
    """Moves every trainable parameter away from its first value."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))


def two_adapters(model: nn.Module, **second: Any) -> nn.Module:
    pylora.add_lora(model, r=4, target_modules=["q", "up"])
    randomize(model)
    pylora.add_lora(model, adapter_name="b", **{"target_modules": ["q", "up"], **second})
    with pylora.active_adapters(model, "b"):
        randomize(model)
    return model


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


def test_casts_and_moves_reach_inactive_adapters_and_bases() -> None:
    model = two_adapters(base(), **OTHERS["hybrid"])
    pylora.set_active_adapters(model, "b")
    model.bfloat16()
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    for name in ("default", "b"):
        assert pylora.set_active_adapters(model, name)(x).dtype == torch.bfloat16
    with pylora.disable_adapter(model):
        assert model(x).dtype == torch.bfloat16


def test_dora_follows_a_cast_made_while_it_was_inactive() -> None:
    model = two_adapters(base(quantized=False), use_dora=True, r=2)
    twin = pylora.set_active_adapters(copy.deepcopy(model), "b").bfloat16()
    model.bfloat16()
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    assert torch.equal(pylora.set_active_adapters(model, "b")(x), twin(x))


def test_a_copy_switches_on_its_own() -> None:
    model = two_adapters(base(), **OTHERS["hybrid"])
    twin = copy.deepcopy(model)
    x = torch.randn(3, 64)
    expected = model(x)
    pylora.set_active_adapters(twin, "b")
    randomize(twin)
    pylora.set_active_adapters(twin, "default")
    assert torch.equal(model(x), expected) and torch.equal(twin(x), expected)
    assert pylora.active_adapter(model) == "default"


def test_compiled_models_follow_a_switch() -> None:
    model = two_adapters(base(), **OTHERS["hybrid"])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = torch.randn(3, 64)
    for name in ("default", "b", "default"):
        pylora.set_active_adapters(compiled, name)
        assert torch.equal(compiled(x), model(x))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_recomputes_with_the_active_adapter(use_reentrant: bool) -> None:
    model = two_adapters(base(), r=3)
    pylora.set_active_adapters(model, "b")
    x = torch.randn(3, 64, requires_grad=True)
    model(x).sum().backward()
    expected = model.q.lora_B.grad
    model.zero_grad()
    torch.utils.checkpoint.checkpoint(model, x, use_reentrant=use_reentrant).sum().backward()
    assert torch.equal(model.q.lora_B.grad, expected)
    held = model.q.adapter("default")
    assert held.lora_B.grad is None


def test_tied_modules_stay_tied_in_each_adapter() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(11, 64), "head": nn.Linear(64, 11, bias=False)})
    model["head"].weight = model["embed"].weight
    model["q"] = nn.Linear(64, 64)
    for name in ("a", "b"):
        saved = ["embed", "head"]
        pylora.add_lora(model, r=2, target_modules=["q"], modules_to_save=saved, adapter_name=name)
    seen = []
    for name in ("a", "b", "a"):
        pylora.set_active_adapters(model, name)
        assert model["head"].weight is model["embed"].weight
        seen.append(id(model["head"].weight))
    assert seen[0] == seen[2] != seen[1]


def test_an_average_must_have_the_same_active_adapter() -> None:
    """An average goes by the order of parameters, which a switch changes."""
    model = two_adapters(base())
    average = AveragedModel(model)
    average.update_parameters(model)
    pylora.set_active_adapters(model, "b")
    with pytest.raises(ValueError, match="'b' is active in the model but 'default' in its average"):
        average.update_parameters(model)
    pylora.set_active_adapters(model, "default")
    average.update_parameters(model)


def test_a_wrapper_that_keeps_parameters_is_not_switched() -> None:
    model = two_adapters(base())
    average = AveragedModel(model)
    pylora.set_active_adapters(average, "default")  # it is active already
    for call in (pylora.set_active_adapters, pylora.delete_adapter):
        with pytest.raises(ValueError, match=f"is an AveragedModel.*pylora.{call.__name__}"):
            call(average, "b")
    with pytest.raises(ValueError, match="save_adapter of an inactive adapter"):
        pylora.save_adapter(average, "x", adapter_name="b")


def test_a_sharded_model_trains_its_active_adapter(tmp_path: Path) -> None:
    """In one process: fully_shard makes every parameter a DTensor, inactive ones too."""
    model = two_adapters(base(quantized=False), r=3, target_modules=["q"])
    pylora.set_active_adapters(model, "b")
    x = torch.randn(3, 64)
    plain = copy.deepcopy(model)
    plain(x).sum().backward()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        model(x).sum().backward()
        gradient = model.q.lora_B.grad.full_tensor()
        assert torch.equal(gradient, plain.q.lora_B.grad)
        state = {key: value.full_tensor() for key, value in model.state_dict().items()}
        assert all(torch.equal(state[k], v) for k, v in plain.state_dict().items())
        pylora.save_adapter(model, tmp_path)
        with pytest.raises(ValueError, match="sharded by fully_shard"):
            pylora.set_active_adapters(model, "default")
    finally:
        dist.destroy_process_group()
    pylora.save_adapter(plain, tmp_path / "plain")
    files = [tmp_path / folder / "adapter_model.safetensors" for folder in ("", "plain")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_what_does_not_fit_changes_nothing() -> None:
    model = two_adapters(base(), **OTHERS["hybrid"])
    before = [(n, id(p), p.requires_grad) for n, p in model.named_parameters()]
    for call, message in (
        (lambda: pylora.set_active_adapters(model, "c"), "adapters: 'default', 'b'"),
        (lambda: pylora.delete_adapter(model, "c"), "adapter is 'c'"),
        (lambda: pylora.save_adapter(model, "x", adapter_name="c"), "adapter is 'c'"),
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


def test_a_model_for_peft_has_the_active_adapter() -> None:
    pytest.importorskip("peft")
    from pylora.integrations.peft import as_peft_model

    model = two_adapters(base(), r=3, target_modules=["q"])
    wrapped = as_peft_model(pylora.set_active_adapters(model, "b"))
    assert wrapped.peft_config["default"].r == 3
    x = torch.randn(3, 64)
    before = wrapped(x)
    wrapped.add_adapter("ref", wrapped.peft_config["default"])
    randomize(model)
    wrapped.set_adapter("ref")
    assert torch.equal(wrapped(x), before)


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
    with pytest.raises(ValueError, match="its only adapter"):
        pylora.delete_adapter(layer, "b")
