"""as_peft_model gives TRL, transformers' Trainer and Accelerate a PeftModel of pylora's layers."""

from __future__ import annotations

import copy
import logging
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pylora
from pylora.nn import LoRALinear

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
accelerate = pytest.importorskip("accelerate")

from pylora.integrations.peft import as_peft_model  # noqa: E402  (it imports peft)

TOKENS = torch.arange(20).view(2, 10)


def gemma(quantized: bool = True) -> Any:
    config = transformers.GemmaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
    )
    torch.manual_seed(0)
    model = transformers.GemmaForCausalLM(config)
    return pylora.quantize_model(model) if quantized else model


def train_a_little(model: Any) -> None:
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def reference_of_trl(model: Any) -> None:
    """What TRL does with a PeftModel before training."""
    assert accelerate.utils.is_peft_model(model)
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            other = model.get_parameter(name.replace(".default.", ".ref."))
            other.data.copy_(parameter.data)


@pytest.mark.parametrize(
    ("options", "trained_before"),
    [
        ({}, False),
        ({}, True),
        ({"use_dora": True}, True),
        ({"lora_bias": True}, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["norm"]}, True),
    ],
    ids=["fresh", "trained", "dora", "bias", "modules-to-save"],
)
def test_the_reference_is_the_model_as_it_was(
    options: dict[str, Any], trained_before: bool
) -> None:
    inner = pylora.add_lora(gemma(), r=4, **options)
    if trained_before:
        train_a_little(inner)
    model = as_peft_model(inner)
    before = logits(inner)
    reference_of_trl(model)
    train_a_little(inner)
    trained = logits(model)
    assert not torch.allclose(trained, before)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    for _ in range(2):
        previous = model.active_adapter
        model.set_adapter("ref")
        assert torch.equal(logits(model), before)
        assert not [p for p in inner.parameters() if p.requires_grad and p.grad is not None]
        model.set_adapter(previous)
        assert torch.equal(logits(model), trained)
        assert [name for name, p in model.named_parameters() if p.requires_grad] == names


def test_a_disabled_adapter_leaves_the_base() -> None:
    base = logits(gemma())
    inner = pylora.add_lora(gemma(), r=4)
    train_a_little(inner)
    model = as_peft_model(inner)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert not torch.allclose(logits(model), base)


def test_the_wrapper_shares_everything() -> None:
    inner = pylora.add_lora(gemma(), r=4)
    model = as_peft_model(inner)
    assert isinstance(model, peft.PeftModel)
    assert model.get_base_model() is inner and model.config is inner.config
    assert [name.removeprefix("base_model.model.") for name, _ in model.named_parameters()] == [
        name for name, _ in inner.named_parameters()
    ]
    assert model.active_adapters == ["default"]
    trainable, everything = model.get_nb_trainable_parameters()
    assert 0 < trainable < everything
    generated = model.eval().generate(TOKENS[:, :4], max_new_tokens=3, do_sample=False)
    assert generated.shape == (2, 7)
    twin = copy.deepcopy(model)
    train_a_little(twin)
    assert not torch.equal(logits(twin), logits(model))


def test_the_adapter_is_saved_and_loaded_as_by_peft(tmp_path: Path) -> None:
    inner = pylora.add_lora(gemma(quantized=False), r=4)
    train_a_little(inner)
    model = as_peft_model(inner)
    reference_of_trl(model)
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(gemma(quantized=False), str(tmp_path))
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=1e-5)
    again = as_peft_model(pylora.add_lora(gemma(quantized=False), r=4))
    again.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(logits(again), logits(model))
    pylora.save_adapter(model, tmp_path / "ours")  # the functions of pylora take the wrapper
    assert (tmp_path / "ours" / "adapter_model.safetensors").exists()
    expected = logits(model)
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)
    plain = model.merge_and_unload()
    assert plain is inner and not any(isinstance(m, LoRALinear) for m in plain.modules())
    torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=1e-5)


def test_a_trainer_saves_and_resumes_the_adapter(tmp_path: Path) -> None:
    data = [{"input_ids": row, "labels": row} for row in torch.arange(48).view(6, 8)]

    def trained(folder: Path, resume: str | None) -> Any:
        arguments = transformers.TrainingArguments(
            folder,
            max_steps=4,
            save_steps=2,
            learning_rate=1e-2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        torch.manual_seed(3)
        model = as_peft_model(pylora.add_lora(gemma(), r=4))
        transformers.Trainer(model, arguments, train_dataset=data).train(
            resume_from_checkpoint=resume
        )
        return model

    whole = trained(tmp_path, None)
    files = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files
    resumed = trained(tmp_path / "again", str(tmp_path / "checkpoint-2"))
    torch.testing.assert_close(logits(resumed), logits(whole), rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"pylora\.add_lora"):
        as_peft_model(gemma())
    with pytest.raises(ValueError, match="output head"):
        as_peft_model(pylora.add_lora(gemma(), target_modules=["lm_head", "q_proj"]))
    model = as_peft_model(pylora.add_lora(gemma(), r=4))
    with pytest.raises(ValueError, match="with PEFT adapters"):
        as_peft_model(
            peft.get_peft_model(
                nn.Sequential(nn.Linear(4, 4)), peft.LoraConfig(target_modules=["0"])
            )
        )
    with pytest.raises(ValueError, match="differs from that of the model"):
        model.add_adapter("other", peft.LoraConfig(r=3))
    with pytest.raises(ValueError, match="has an adapter of it"):
        model.add_adapter("default", model.peft_config["default"])
    with pytest.raises(ValueError, match="it must be in"):
        model.set_adapter("ref")
    reference_of_trl(model)
    model.set_adapter("ref")
    with pytest.raises(ValueError, match="inactive copy"):
        model.delete_adapter("ref")
    model.set_adapter("default")
    model.delete_adapter("ref")
    assert list(model.peft_config) == ["default"]


def trainers_of_trl(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Stand-ins for a trainer that takes a reference, and for one that loads it by itself."""

    class DPOTrainer:
        def __init__(self, model: Any, ref_model: Any = None, args: Any = None) -> None:
            self.model, self.ref_model, self.args = model, ref_model, args

    class GRPOTrainer:
        def __init__(self, model: Any, reward: Any, args: Any = None) -> None:
            self.model, self.args = model, args
            self.ref_model = modules[1].create_model_from_path("its name")

    modules: list[Any] = []
    for trainer in (DPOTrainer, GRPOTrainer):
        name = f"trl.trainer.{trainer.__name__.removesuffix('Trainer').lower()}_trainer"
        module: Any = types.ModuleType(name)
        setattr(module, trainer.__name__, trainer)
        module.create_model_from_path = lambda name: f"loaded from {name}"
        modules.append(module)
        monkeypatch.setitem(sys.modules, name, module)
    return [lambda model, **rest: DPOTrainer(model, **rest), lambda m, **r: GRPOTrainer(m, 1, **r)]


@pytest.mark.parametrize("which", [0, 1], ids=["ref_model is an argument", "it is loaded"])
def test_a_trainer_of_trl_gets_the_base_as_its_reference(
    monkeypatch: pytest.MonkeyPatch, which: int
) -> None:
    make = trainers_of_trl(monkeypatch)[which]
    model = pylora.quantize_model(gemma(quantized=False))
    pylora.add_lora(model, r=2, target_modules=["up_proj"])
    pylora.add_lora(model, r=2, target_modules=["q_proj"])  # the trainers are prepared only once
    train_a_little(model)
    trainer = make(model, args=3)
    assert trainer.model is model and trainer.args == 3
    with pylora.disable_adapter(model):
        expected = logits(model)
    assert torch.equal(logits(trainer.ref_model), expected)
    assert not torch.equal(logits(model), expected)
    own = {id(p) for p in model.parameters()}
    assert all(id(p) in own for p in trainer.ref_model.parameters())
    without = [None, "loaded from its name"][which]
    assert make(nn.Linear(2, 2)).ref_model == without
    assert make("the name of a model").ref_model == without


def test_under_fsdp_a_trainer_of_trl_warns(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make, _ = trainers_of_trl(monkeypatch)
    model = pylora.add_lora(gemma(), r=2)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with caplog.at_level(logging.WARNING, "pylora.integrations"):
        assert make(model).ref_model is None
    (record,) = caplog.records
    assert "DPOTrainer" in record.getMessage() and "as_peft_model" in record.getMessage()


def test_the_base_follows_the_model_and_nothing_else_is_shared() -> None:
    from pylora.models.disabling import base_of

    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 8))
    pylora.add_lora(model, r=2, target_modules=["0", "2"])
    base = base_of(model.train()).eval()
    assert model[1].training and not base[1].training
    with torch.no_grad():
        model[0].base_layer.weight.zero_()
    assert base[0] is model[0].base_layer and not base[0].weight.any()
    pylora.merge(model)
    with pytest.raises(ValueError, match="0 is merged"):
        base_of(model)
