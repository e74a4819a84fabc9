"""Bottleneck adapters in AdapterHub's format: files of the `adapters` library, and round trips."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pylora
from pylora.models.slots import slots

safetensors = pytest.importorskip("safetensors.torch")
transformers = pytest.importorskip("transformers")

GOLDEN = Path(__file__).parent / "data" / "adapterhub"
X = torch.arange(3, 19).view(2, 8)
MODELS = {"bert": "BertForMaskedLM", "llama": "LlamaForCausalLM"}


def golden_model(name: str) -> Any:
    return getattr(transformers, MODELS[name]).from_pretrained(GOLDEN / name).eval()


@pytest.mark.parametrize(
    ("model", "adapter"),
    [
        ("bert", "houlsby"),
        ("bert", "pfeiffer"),
        ("bert", "parallel"),
        ("llama", "houlsby"),
        ("llama", "pfeiffer"),
    ],
)
def test_an_adapter_of_the_library_computes_what_it_does_there(
    model: str, adapter: str, tmp_path: Path
) -> None:
    """tests/data/export_adapterhub.py has made the files."""
    ours = pylora.load_adapter(golden_model(model), GOLDEN / model / adapter)
    assert pylora.adapter_names(ours) == (adapter,)
    stored = safetensors.load_file(GOLDEN / model / adapter / "expected.safetensors")["logits"]
    logits = ours(X).logits
    torch.testing.assert_close(logits, stored)
    with pylora.adapters_disabled(ours):
        assert (ours(X).logits - stored).abs().max() > 0.05
    # What pylora writes has the same tensors under the same keys.
    pylora.save_adapter(ours, tmp_path)
    written = safetensors.load_file(tmp_path / "adapter.safetensors")
    expected = safetensors.load_file(GOLDEN / model / adapter / "adapter.safetensors")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[key], expected[key]) for key in expected)
    config, theirs = (
        json.loads((folder / "adapter_config.json").read_text())
        for folder in (tmp_path, GOLDEN / model / adapter)
    )
    for key, value in config["config"].items():
        assert theirs["config"][key] == value, key
    assert {k: v for k, v in config.items() if k != "config" and k != "model_name"} == {
        k: v for k, v in theirs.items() if k != "config" and k != "model_name"
    }


def test_the_library_and_pylora_read_other_inputs_of_a_parallel_adapter() -> None:
    with pytest.raises(ValueError, match=r"model\.layers\.0 normalizes before its sub-layers"):
        pylora.load_adapter(golden_model("llama"), GOLDEN / "llama" / "parallel")
    model = golden_model("llama")
    pylora.add_adapter(model, "a", pylora.ParallelConfig())
    with pytest.raises(ValueError, match="has no file format"):
        pylora.save_adapter(model, "unused")


CONFIGS = {
    "norms": pylora.HoulsbyConfig(
        reduction_factor=4, norm_before="layer_norm", norm_after="layer_norm", scaling=0.5
    ),
    "mlp": pylora.HoulsbyConfig(where=["mlp"], activation="gelu_tanh", dropout=0.1),
    "pfeiffer": pylora.PfeifferConfig(reduction_factor=2, activation="identity"),
}


@pytest.mark.parametrize("config", CONFIGS)
def test_a_round_trip_restores_the_adapter_bit_by_bit(config: str, tmp_path: Path) -> None:
    model = golden_model("llama")
    pylora.add_adapter(model, "task", CONFIGS[config])
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    pylora.add_adapter(model, "other", CONFIGS["pfeiffer"])
    pylora.save_adapter(model, tmp_path / "active")
    pylora.set_active_adapters(model, "other")
    pylora.save_adapter(model, tmp_path / "named", adapter_name="task")
    pylora.set_active_adapters(model, "task")
    files = ["adapter.safetensors", "adapter_config.json"]
    assert sorted(os.listdir(tmp_path / "active")) == files
    for name in files:
        first, second = (tmp_path / folder / name for folder in ("active", "named"))
        assert first.read_bytes() == second.read_bytes()
    twin = pylora.load_adapter(golden_model("llama"), tmp_path / "active", adapter_name="renamed")
    assert torch.equal(twin(X).logits, model(X).logits)
    assert pylora.active_adapter(twin) == "renamed"
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    pylora.load_adapter(twin, tmp_path / "active", adapter_name="renamed")
    assert torch.equal(twin(X).logits, model(X).logits)


def test_lora_and_adapters_go_to_their_own_formats(tmp_path: Path) -> None:
    model = golden_model("llama")
    pylora.add_lora(model, r=2, adapter_name="lora")
    pylora.add_adapter(model, "task", CONFIGS["pfeiffer"])
    pylora.set_active_adapters(model, pylora.Stack("lora", "task"))
    for name in ("lora", "task"):
        pylora.save_adapter(model, tmp_path / name, adapter_name=name)
    twin = pylora.load_adapter(golden_model("llama"), tmp_path / "lora", adapter_name="lora")
    pylora.load_adapter(twin, tmp_path / "task")
    assert pylora.adapter_names(twin) == ("lora", "task")
    pylora.set_active_adapters(twin, pylora.Stack("lora", "task"))
    assert torch.equal(twin(X).logits, model(X).logits)
    pylora.set_active_adapters(model, pylora.Stack("task"))
    with pytest.raises(ValueError, match=r"the active composition is Stack\('task'\)"):
        pylora.save_adapter(model, tmp_path / "none")


def test_an_adapter_of_another_head_and_a_pickled_one_are_loaded(tmp_path: Path) -> None:
    source = GOLDEN / "bert" / "houlsby"
    tensors = safetensors.load_file(source / "adapter.safetensors")
    shutil.copy(source / "adapter_config.json", tmp_path)
    torch.save(
        {key.removeprefix("bert."): value for key, value in tensors.items()},
        tmp_path / "pytorch_adapter.bin",
    )
    model = pylora.load_adapter(golden_model("bert"), tmp_path)
    expected = pylora.load_adapter(golden_model("bert"), source)
    assert torch.equal(model(X).logits, expected(X).logits)


def changed(folder: Path, **values: Any) -> Path:
    facts = json.loads((folder / "adapter_config.json").read_text())
    facts["config"].update(values)
    (folder / "adapter_config.json").write_text(json.dumps(facts))
    return folder


def with_tensors(folder: Path, change: Any) -> Path:
    tensors = safetensors.load_file(folder / "adapter.safetensors")
    change(tensors)
    safetensors.save_file(tensors, folder / "adapter.safetensors")
    return folder


KEY = "bert.encoder.layer.0.output.adapters.houlsby.adapter_up.weight"
DAMAGES: dict[str, tuple[Any, str]] = {
    "phm": (lambda f: changed(f, phm_layer=True), "phm_layer is True, which pylora does not"),
    "scaling": (lambda f: changed(f, scaling="learned"), "scaling is 'learned'"),
    "lora": (lambda f: changed(f, architecture="lora"), "architecture is 'lora'"),
    "new key": (lambda f: changed(f, something=3), "something is 3, which pylora does not support"),
    "mapping": (lambda f: changed(f, reduction_factor={"default": 2}), "reduction_factor is {"),
    "missing": (lambda f: with_tensors(f, lambda t: t.pop(KEY)), f"key '{KEY}' is missing"),
    "extra": (
        lambda f: with_tensors(f, lambda t: t.update(x=t[KEY] + 1)),
        "key 'x' is for a place",
    ),
    "shape": (
        lambda f: with_tensors(f, lambda t: t.update({KEY: torch.zeros(1)})),
        r"has shape \(1,\); it must be \(16, 4\)",
    ),
    "nan": (lambda f: with_tensors(f, lambda t: t[KEY].fill_(float("nan"))), "finite numbers"),
    "cut": (
        lambda f: (f / "adapter.safetensors").write_bytes(b"1234") and f,
        "is damaged or no safetensors file",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_does_not_fit_changes_nothing(damage: str, tmp_path: Path) -> None:
    change, message = DAMAGES[damage]
    folder = tmp_path / "adapter"
    shutil.copytree(GOLDEN / "bert" / "houlsby", folder)
    change(folder)
    model = golden_model("bert")
    with pytest.raises(ValueError, match=message):
        pylora.load_adapter(model, folder)
    assert not slots(model) and all(p.requires_grad for p in model.parameters())


def test_another_configuration_needs_another_name() -> None:
    model = golden_model("bert")
    pylora.add_adapter(model, "houlsby", pylora.HoulsbyConfig(reduction_factor=2))
    with pytest.raises(ValueError, match=r"delete_adapter\(model, 'houlsby'\)"):
        pylora.load_adapter(model, GOLDEN / "bert" / "houlsby")
    pylora.load_adapter(model, GOLDEN / "bert" / "houlsby", adapter_name="theirs")
    assert pylora.adapter_names(model) == ("houlsby", "theirs")
