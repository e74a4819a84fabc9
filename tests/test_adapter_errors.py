"""Adapter files that are refused: one error names what does not fit, and nothing changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pylora
from pylora.nn import LoRALinear

safetensors = pytest.importorskip("safetensors.torch")


class Nested(nn.Module):
    """A model in which some names are the endings of other names."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.inner = nn.ModuleDict({"proj": nn.Linear(8, 8), "other": nn.Linear(8, 8)})

    def forward(self, x: Tensor) -> Tensor:
        return self.inner["other"](self.inner["proj"](self.proj(x)))


def test_layers_that_one_configuration_cannot_describe_are_not_saved(tmp_path: Path) -> None:
    model = pylora.add_lora(Nested(), r=2, target_modules=["other"])
    pylora.add_lora(model, r=2, target_modules=r"proj", use_dora=True)
    with pytest.raises(ValueError, match=r"use_dora is False in inner.other but True in proj"):
        pylora.save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_modules_that_peft_would_confuse_are_not_saved(tmp_path: Path) -> None:
    """PEFT matches endings of names, so "norm" would match "inner.other_norm" too."""
    model = Nested()
    model.inner["other_norm"] = nn.LayerNorm(8)
    pylora.add_lora(model, r=2, modules_to_save=["norm"])
    with pytest.raises(ValueError, match=r"for 'inner.other_norm' as well"):
        pylora.save_adapter(model, tmp_path)


def test_trainable_parameters_that_are_not_saved_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = pylora.add_lora(Nested(), r=2, target_modules=["other"])
    model.proj.weight.requires_grad_(True)
    pylora.save_adapter(model, tmp_path)
    assert "proj.weight is trainable but not saved" in caplog.text


def test_a_failed_save_leaves_the_old_files(tmp_path: Path, monkeypatch: Any) -> None:
    model = pylora.add_lora(Nested(), r=2)
    pylora.save_adapter(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(*args: Any, **kwargs: Any) -> None:
        raise OSError("No space left on device")

    nn.init.normal_(model.proj.lora_B)
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_text", full_disk)
        with pytest.raises(OSError, match="No space left"):
            pylora.save_adapter(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def snapshot(model: nn.Module) -> Any:
    parameters = [(n, id(p), p.requires_grad, p._version) for n, p in model.named_parameters()]
    return [(n, id(m)) for n, m in model.named_modules()], parameters


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    model = pylora.add_lora(Nested(), r=2, target_modules=["inner.proj", "other"])
    pylora.save_adapter(model, tmp_path)
    return tmp_path


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = safetensors.load_file(path)
    change(tensors)
    safetensors.save_file(tensors, path, {"format": "pt"})


def assert_refused(model: nn.Module, folder: Path, message: str, error: Any = ValueError) -> None:
    before = snapshot(model)
    with pytest.raises(error, match=message):
        pylora.load_adapter(model, folder)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; it must be 'LORA'"),
        ({"peft_type": None}, "peft_type is None"),
        ({"bias": "all"}, "bias is 'all', which pylora does not support; it must be 'none'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the base"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
        ({"layer_replication": [[0, 1]]}, r"layer_replication is \[\[0, 1\]\]"),
        ({"target_parameters": ["experts.w"]}, "target_parameters is"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is"),
        ({"use_qalora": True}, "use_qalora is True"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is"),
        ({"something_new": {"a": 1}}, "something_new is {'a': 1}, which pylora does not support"),
        ({"r": "4"}, "r is '4'; it must be int"),
        ({"r": None}, "r is missing"),
        ({"r": True}, "r is True; it must be int"),
        ({"r": 3}, r"'base_model.model.inner.*' has shape \(2, 8\); it must be \(3, 8\)"),
        ({"lora_dropout": 2.0}, r"adapter_config.json: lora_dropout is 2.0"),
        (
            {"alpha_pattern": {"other": "x"}},
            r"adapter_config.json: alpha_pattern holds 'x'; it must hold int or float only",
        ),
        ({"rank_pattern": {"other": 2.0}}, r"rank_pattern holds 2.0; it must hold int only"),
        ({"rank_pattern": {"other": True}}, r"rank_pattern holds True"),
        ({"rank_pattern": {"ot[her": 2}}, r"rank_pattern holds 'ot\[her', which is no regular"),
        ({"target_modules": "*"}, r"target_modules holds '\*', which is no regular expression"),
        ({"target_modules": ["proj", 3]}, r"target_modules holds 3; it must hold str only"),
        ({"exclude_modules": "(proj"}, r"exclude_modules holds '\(proj', which is no regular"),
        ({"layers_to_transform": [0, "1"]}, r"layers_to_transform holds '1'"),
        ({"layers_pattern": ["la)yers"]}, r"layers_pattern holds 'la\)yers', which is no regular"),
        ({"modules_to_save": [None]}, r"modules_to_save holds None"),
        ({"use_dora": True}, r"'base_model.model.*lora_magnitude_vector' is missing"),
        ({"lora_bias": True}, r"lora_B.bias' is missing"),
        ({"target_modules": ["other"]}, r"LoRA for 'inner.proj', but adapter_config.json does not"),
        (
            {"target_modules": "all-linear"},
            r"key .*'base_model.model.proj.lora_A.weight' is missing",
        ),
        ({"modules_to_save": ["proj"]}, r"'base_model.model.*proj.* is (missing|not supported)"),
    ],
)
def test_bad_configurations_are_refused(
    adapter: Path, changes: dict[str, Any], message: str
) -> None:
    edit_config(adapter, **changes)
    assert_refused(Nested(), adapter, message)


def test_harmless_configuration_is_accepted(adapter: Path) -> None:
    edit_config(
        adapter,
        peft_version="9.9",
        task_type="CAUSAL_LM",
        init_lora_weights="gaussian",
        eva_config={},
    )
    pylora.load_adapter(Nested(), adapter)


def rename(tensors: dict[str, Tensor], old: str, new: str) -> None:
    tensors[new] = tensors.pop(old)


A = "base_model.model.inner.proj.lora_A.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(A), "lora_A.weight' is missing"),
        (lambda t: t.update({A: torch.zeros(2, 9)}), r"shape \(2, 9\); it must be \(2, 8\)"),
        (lambda t: t.update({A: torch.zeros(2, 8, dtype=torch.int64)}), "dtype torch.int64"),
        (lambda t: t.update({A: torch.full((2, 8), -torch.inf)}), "must hold finite numbers"),
        (
            lambda t: t.update({A: torch.full((2, 8), 1e39, dtype=torch.float64)}),
            "finite numbers of torch.float32, but holds",
        ),
        (
            lambda t: rename(t, A, A.removeprefix("base_model.")),
            "must start with 'base_model.model.'",
        ),
        (lambda t: rename(t, A, A.replace("lora_A.weight", "lora_embedding_A")), "of an embedding"),
        (lambda t: rename(t, A, A.replace("proj", "gone")), "the model has no such module"),
        (lambda t: rename(t, A, A.replace("lora_A", "lora_C")), "lora_C.weight' is not supported"),
        (lambda t: t.clear() or t.update(x=torch.zeros(1)), "key 'x'"),
        (lambda t: t.clear(), "holds no LoRA"),
        (
            lambda t: t.update({A.replace("A.weight", "B.bias"): torch.zeros(8)}),
            "is there, which contradicts",
        ),
    ],
)
def test_bad_tensors_are_refused(adapter: Path, change: Any, message: str) -> None:
    edit_tensors(adapter, change)
    assert_refused(Nested(), adapter, message)


class WithCounter(Nested):
    """A model with a module to save that holds integers beside its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)


COUNTER = "base_model.model.norm.num_batches_tracked"
WEIGHT = "base_model.model.norm.weight"


@pytest.mark.parametrize(
    "key, value, message",
    [
        (WEIGHT, torch.ones(8, dtype=torch.int8), "dtype torch.int8; it must be floating point"),
        (WEIGHT, torch.ones(8, dtype=torch.bool), "dtype torch.bool"),
        (WEIGHT, torch.ones(8, dtype=torch.complex64), "dtype torch.complex64"),
        (WEIGHT, torch.tensor([torch.nan] * 8), "must hold finite numbers of torch.float32"),
        (COUNTER, torch.tensor(1.0), "dtype torch.float32; it must be torch.int64"),
    ],
)
def test_bad_tensors_of_fully_trained_modules_are_refused(
    tmp_path: Path, key: str, value: Tensor, message: str
) -> None:
    model = pylora.add_lora(
        WithCounter(), r=2, target_modules=["inner.proj"], modules_to_save=["norm"]
    )
    pylora.save_adapter(model, tmp_path)
    pylora.load_adapter(WithCounter(), tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.update({key: value}))
    assert_refused(WithCounter(), tmp_path, message)


def test_numbers_that_half_precision_cannot_hold_are_refused(adapter: Path) -> None:
    edit_tensors(adapter, lambda tensors: tensors.update({A: torch.full((2, 8), 1e5)}))
    pylora.load_adapter(Nested(), adapter)
    with pytest.raises(ValueError, match=r"finite numbers of torch.float16"):
        pylora.load_adapter(Nested(), adapter, dtype=torch.float16)


def test_damaged_and_missing_files_are_named(adapter: Path) -> None:
    weights, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    whole, text = weights.read_bytes(), config.read_text()
    model = Nested()
    for size in (0, 5, 40, len(whole) - 1):
        weights.write_bytes(whole[:size])
        assert_refused(model, adapter, r"adapter_model.safetensors is damaged")
    weights.unlink()
    assert_refused(model, adapter, r"adapter_model.safetensors is missing", FileNotFoundError)
    (adapter / "adapter_model.bin").write_bytes(b"anything")
    assert_refused(model, adapter, r"adapter_model.bin is a pickle")
    weights.write_bytes(whole)
    for content, message in (("{", "is not JSON"), ("[]", "holds a list"), ('"a"', "holds a str")):
        config.write_text(content)
        assert_refused(model, adapter, message)
    config.write_text('{"r": ' + "[" * 100_000)
    assert_refused(model, adapter, "is not JSON")
    config.write_bytes(b"\xff\xfe\x00")
    assert_refused(model, adapter, "is not JSON")
    config.unlink()
    assert_refused(model, adapter, r"adapter_config.json is missing", FileNotFoundError)
    config.write_text(text)
    pylora.load_adapter(model, adapter)
    assert_refused(Nested(), adapter / "nowhere", "is missing", FileNotFoundError)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"r": 3, "target_modules": ["inner.proj", "other"]},
            r"shape \(2, 8\); it must be \(3, 8\)",
        ),
        ({"r": 2, "target_modules": ["other"]}, "'inner.proj' has LoRA in the file only"),
        ({"r": 2}, "'proj' has LoRA in the model only"),
        (
            {"r": 2, "target_modules": ["inner.proj", "other"], "use_dora": True},
            "lora_magnitude_vector' is in the model only",
        ),
        (
            {"r": 2, "target_modules": ["inner.proj", "other"], "modules_to_save": ["norm"]},
            "'norm' has weights in the model only",
        ),
    ],
)
def test_layers_that_do_not_fit_the_file_are_not_filled(
    adapter: Path, options: dict[str, Any], message: str
) -> None:
    assert_refused(pylora.add_lora(Nested(), **options), adapter, message)


def test_a_merged_model_is_not_loaded_into(adapter: Path) -> None:
    model = pylora.load_adapter(Nested(), adapter)
    pylora.merge(model)
    assert_refused(model, adapter, r"is merged; pylora.unmerge must be called")
    pylora.save_adapter(model, adapter)  # the LoRA parameters are still there


def test_another_model_is_refused(adapter: Path) -> None:
    assert_refused(nn.Linear(8, 8), adapter, "the model has no such module")
    model = Nested()
    model.inner["proj"] = nn.Conv1d(8, 8, 1)  # type: ignore[assignment]
    assert_refused(model, adapter, r"inner.proj is Conv1d; it must be an nn.Linear")
    model = Nested().to("meta")
    assert_refused(model, adapter, "is on the meta device")


def test_a_model_without_lora_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no LoRALinear"):
        pylora.save_adapter(Nested(), tmp_path)
    with pytest.raises(ValueError, match="a LoRALinear itself"):
        pylora.save_adapter(LoRALinear(nn.Linear(4, 4)), tmp_path)
