"""Models that transformers loaded in 4 bits train, cast and save; its names are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import linear

import pylora
import pylora.functional as F
from pylora.functional import Projection
from pylora.nn import NF4Linear

transformers = pytest.importorskip("transformers")
bnb = pytest.importorskip("bitsandbytes")
pytest.importorskip("accelerate")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    path = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


def load(folder: Path, quantized: bool = True) -> Any:
    arguments: dict[str, Any] = {"device_map": "cpu"}
    if quantized:
        arguments["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4"
        )
    # In eval mode bitsandbytes would repack its weights in the first forward.
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **arguments).train()


@pytest.mark.parametrize(
    "name", ["relu", "gelu", "gelu_pytorch_tanh", "gelu_new", "silu", "swish", "tanh", "sigmoid"]
)
def test_activations_have_the_names_of_transformers(name: str) -> None:
    function = transformers.activations.ACT2FN[name]
    x, weight = torch.randn(5, 64), torch.randn(32, 64)
    A, B = torch.randn(4, 64), torch.randn(32, 4)
    expected = linear(x, weight) + linear(function(linear(x, A)), B)
    torch.testing.assert_close(F.lora_linear(x, weight, A, B, 1.0, activation=name), expected)
    if name in ("relu", "tanh", "sigmoid"):
        return  # no model uses these as the activation of a gate
    gate, up = (Projection(torch.randn(48, 64) / 8) for _ in range(2))
    down = Projection(torch.randn(64, 48) / 8)
    hidden = function(linear(x, gate.weight)) * linear(x, up.weight)
    y = F.lora_mlp(x, gate, up, down, activation=name)
    torch.testing.assert_close(y, linear(hidden, down.weight), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target_modules", ["all-linear", ["q_proj"]], ids=str)
def test_trainer_changes_only_the_adapters(
    folder: Path, tmp_path: Path, target_modules: Any
) -> None:
    model = pylora.add_lora(load(folder), r=4, target_modules=target_modules)
    before = {name: value.clone() for name, value in model.named_parameters()}
    tokens = torch.randint(64, (8, 16))
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=2, learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True
    )
    data = [{"input_ids": row, "labels": row} for row in tokens]
    transformers.Trainer(model, arguments, train_dataset=data).train()
    changed = {n for n, value in model.named_parameters() if not torch.equal(value, before[n])}
    assert changed == {name for name in before if "lora_" in name}


def test_quantized_model_can_be_cast(folder: Path) -> None:
    model = pylora.quantize_model(load(folder))
    expected = model.model.layers[0].mlp.up_proj.nf4_weight.dequantize(torch.float32)
    for cast in (model.half(), model.to(torch.bfloat16)):
        up_proj = cast.model.layers[0].mlp.up_proj
        assert torch.equal(up_proj.nf4_weight.dequantize(torch.float32), expected)
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_model_with_bitsandbytes_layers_left_is_not_cast(folder: Path) -> None:
    model = pylora.quantize_model(load(folder), skip_modules=["q_proj", "lm_head"])
    assert isinstance(model.model.layers[0].self_attn.q_proj, bnb.nn.Linear4bit)
    assert isinstance(model.model.layers[0].self_attn.k_proj, NF4Linear)
    with pytest.raises(ValueError, match="bitsandbytes"):
        model.to(torch.bfloat16)


def test_save_pretrained_writes_a_bitsandbytes_checkpoint(folder: Path, tmp_path: Path) -> None:
    model = pylora.quantize_model(load(folder))
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path, quantized=False)
    theirs = loaded.model.layers[0].mlp.up_proj
    assert isinstance(theirs, bnb.nn.Linear4bit)
    ours = model.model.layers[0].mlp.up_proj.weight
    assert torch.equal(theirs.weight.reshape(-1), ours.reshape(-1))
    tokens = torch.randint(64, (2, 8))
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-5)
