"""`pylora.NF4Config`: transformers quantizes a checkpoint while it loads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import pylora
from pylora.nn import LoRALinear, NF4Linear

transformers = pytest.importorskip("transformers")

IDS = torch.arange(3, 23).view(2, 10)
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "llama with biases": ("LlamaConfig", {**SIZES, "attention_bias": True}),
    "qwen3 with tied embeddings": (
        "Qwen3Config",
        {**SIZES, "head_dim": 16, "num_key_value_heads": 2, "tie_word_embeddings": True},
    ),
    "gpt2": (
        "GPT2Config",
        {"vocab_size": 96, "n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 32}
        | {"bos_token_id": 1, "eos_token_id": 2},
    ),
}


def saved(folder: Path, name: str = "llama with biases", dtype: Any = torch.bfloat16) -> Path:
    torch.manual_seed(0)
    config, settings = CONFIGS[name]
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, config)(**settings), dtype=dtype
    )
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_()
    model.save_pretrained(folder)
    return folder


def load(folder: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_loading_gives_what_quantize_model_gives(
    tmp_path: Path, name: str, double_quant: bool
) -> None:
    folder = saved(tmp_path, name)
    model = load(folder, quantization_config=pylora.NF4Config(32, double_quant))
    expected = pylora.quantize_model(load(folder), blocksize=32, double_quant=double_quant)
    assert [type(m) for m in model.modules()] == [type(m) for m in expected.modules()]
    actual, wanted = model.state_dict(), expected.state_dict()
    assert actual.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(actual[key], value), key
    assert torch.equal(model(IDS).logits, expected(IDS).logits)
    for ours, theirs in zip(model.modules(), expected.modules(), strict=True):
        if isinstance(ours, NF4Linear):
            assert repr(ours) == repr(theirs) and ours.weight_dtype == theirs.weight_dtype
            assert not ours.weight.requires_grad


def test_a_loaded_model_is_trained_saved_and_loaded_again(tmp_path: Path) -> None:
    model = load(saved(tmp_path / "dense"), quantization_config=pylora.NF4Config())
    model.save_pretrained(tmp_path / "nf4")
    pytest.importorskip("bitsandbytes")
    again = load(tmp_path / "nf4")
    weight = pylora.NF4Weight.from_bitsandbytes(again.model.layers[0].mlp.up_proj)
    assert torch.equal(weight.qweight, model.model.layers[0].mlp.up_proj.weight)
    pylora.add_lora(model, r=4)
    model(input_ids=IDS, labels=IDS).loss.backward()
    layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
    assert len(layers) == 14 and all(layer.lora_B.grad.any() for layer in layers)
    model.half()
    assert model.dtype == torch.float16


def test_skipped_modules_stay_dense(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    config = pylora.NF4Config(skip_modules=["lm_head", "down_proj"])
    model = load(folder, quantization_config=config)
    kinds = {n.rpartition(".")[2]: type(m) for n, m in model.named_modules()}
    assert kinds["down_proj"] is torch.nn.Linear and kinds["up_proj"] is NF4Linear
    assert torch.equal(
        model.model.layers[0].mlp.down_proj.weight,
        load(folder).get_parameter("model.layers.0.mlp.down_proj.weight"),
    )


def test_a_quantized_checkpoint_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = load(saved(tmp_path / "dense"), quantization_config=pylora.NF4Config())
    model.save_pretrained(tmp_path / "nf4")
    with pytest.raises(ValueError, match="quantized with BitsAndBytesConfig"):
        load(tmp_path / "nf4", quantization_config=pylora.NF4Config())


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"blocksize": 48}, ValueError, "blocksize is 48"),
        ({"skip_modules": 3}, TypeError, "skip_modules is 3"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        pylora.NF4Config(**arguments)
