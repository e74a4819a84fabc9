"""save_pretrained of a transformers model that pylora changed: from_pretrained loads the same."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pylora
from pylora.nn import LoRALinear, NF4Linear

transformers = pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")
pytest.importorskip("accelerate")
pytest.importorskip("peft")


def qwen(**changes: Any) -> Any:
    """A tiny model whose attention has biases."""
    config = transformers.Qwen2Config(
        vocab_size=80,
        hidden_size=128,  # bitsandbytes misreads rows that end within a block on AVX-512
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **{"tie_word_embeddings": True, **changes},
    )
    torch.manual_seed(0)
    return transformers.Qwen2ForCausalLM(config)


def trained(model: Any, **options: Any) -> Any:
    pylora.add_lora(model, r=4, **options)
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            nn.init.normal_(module.lora_B, std=0.1)
    return model


def logits(model: Any) -> torch.Tensor:
    # bitsandbytes repacks its weights in the first forward in eval mode on a CPU.
    model.train()
    with torch.no_grad():
        return model(torch.arange(24).view(2, 12)).logits


def loaded(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")


def assert_same(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(logits(actual), logits(expected), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("double_quant", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("blocksize", [32, 64, 128])
def test_a_quantized_model(tmp_path: Path, blocksize: int, double_quant: bool) -> None:
    model = pylora.quantize_model(
        qwen(), skip_modules=["lm_head", "v_proj"], blocksize=blocksize, double_quant=double_quant
    )
    model.save_pretrained(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert described["quant_method"] == "bitsandbytes" and described["load_in_4bit"] is True
    assert described["bnb_4bit_use_double_quant"] is double_quant
    assert not hasattr(model.config, "quantization_config")
    assert model.config.dtype == torch.float32
    theirs = loaded(tmp_path)
    assert type(theirs.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    assert type(theirs.model.layers[0].self_attn.v_proj) is nn.Linear
    assert_same(theirs, model)
    again = pylora.quantize_model(loaded(tmp_path))  # the round trip keeps the bytes
    up, same = (m.model.layers[1].mlp.up_proj.nf4_weight for m in (model, again))
    assert torch.equal(up.dequantize(), same.dequantize())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_quantized_model_in_16_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    model = pylora.quantize_model(qwen().to(dtype))
    model.save_pretrained(tmp_path)
    theirs = loaded(tmp_path)
    assert theirs.dtype == dtype
    torch.testing.assert_close(logits(theirs), logits(model), rtol=0.05, atol=0.02)


def test_a_model_in_shards(tmp_path: Path) -> None:
    model = pylora.quantize_model(qwen())
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same(loaded(tmp_path), model)


def test_a_dense_layer_whose_name_is_the_end_of_another(tmp_path: Path) -> None:
    """bitsandbytes skips every layer whose name ends with an entry of its list."""
    model = qwen()
    model.proj = nn.Linear(4, 4)  # "proj" ends "up_proj" too
    pylora.quantize_model(model, skip_modules=["lm_head", "proj"])
    assert isinstance(model.model.layers[0].mlp.up_proj, NF4Linear)
    model.save_pretrained(tmp_path)
    assert_same(loaded(tmp_path), model)


@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("keep_base", [False, True])
def test_a_merged_model(tmp_path: Path, quantized: bool, keep_base: bool) -> None:
    model = qwen(tie_word_embeddings=False)
    if quantized:
        pylora.quantize_model(model, double_quant=True)
    keys = set(qwen(tie_word_embeddings=False).state_dict())
    pylora.merge(trained(model), keep_base=keep_base)
    model.save_pretrained(tmp_path)
    written = transformers.modeling_utils.load_state_dict(tmp_path / "model.safetensors")
    assert set(written) >= keys
    assert not [key for key in written if "lora" in key or "base_layer" in key]
    assert_same(loaded(tmp_path), model)
    if keep_base:
        pylora.unmerge(model)


@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize(
    "options",
    [{}, {"use_dora": True}, {"use_rslora": True, "target_modules": ["q_proj", "down_proj"]}],
    ids=["plain", "dora", "rslora"],
)
def test_lora_is_stored_as_an_adapter_beside_the_base(
    tmp_path: Path, quantized: bool, options: dict[str, Any]
) -> None:
    model = qwen()
    if quantized:
        pylora.quantize_model(model)
    trained(model, **options)
    base = copy.deepcopy(model)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").exists()
    theirs = loaded(tmp_path)
    assert theirs.active_adapters() == ["default"]
    assert_same(theirs, model)
    theirs.disable_adapters()
    assert_same(theirs, pylora.unload(base))


def test_of_several_adapters_the_active_one_is_stored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = trained(pylora.quantize_model(qwen()))
    pylora.add_lora(model, r=2, target_modules=["q_proj"], adapter_name="other")
    for name in ("default", "other"):
        pylora.set_active_adapters(model, name)
        caplog.clear()
        model.save_pretrained(tmp_path / name)
        assert f"will load the adapter {name!r} alone" in caplog.text
        assert_same(loaded(tmp_path / name), model)


def test_an_unloaded_model_is_transformers_own(tmp_path: Path) -> None:
    model = pylora.unload(trained(qwen()))
    assert "save_pretrained" not in vars(model)
    model.save_pretrained(tmp_path)
    assert_same(loaded(tmp_path), qwen())


def test_a_state_dict_that_is_given_is_written(tmp_path: Path) -> None:
    model = trained(pylora.quantize_model(qwen()))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    norm = "model.norm.weight"
    state[norm] *= 3
    model.save_pretrained(tmp_path, state_dict=state)
    model.load_state_dict(state)
    assert_same(loaded(tmp_path), model)


def test_an_inner_model_is_saved(tmp_path: Path) -> None:
    model = pylora.quantize_model(qwen())
    model.model.save_pretrained(tmp_path)
    inner = transformers.AutoModel.from_pretrained(tmp_path, device_map="cpu").train()
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            inner(tokens).last_hidden_state,
            model.model(tokens).last_hidden_state,
            rtol=1e-3,
            atol=1e-4,
        )


def test_what_would_load_as_something_else_is_refused(tmp_path: Path) -> None:
    model = trained(qwen(), lora_bias=True)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            nn.init.normal_(module.lora_B_bias)
    with pytest.raises(ValueError, match="push_to_hub"):
        model.save_pretrained(tmp_path, push_to_hub=True)
    with pytest.raises(ValueError, match="distributed_checkpoint"):
        model.save_pretrained(tmp_path, distributed_checkpoint=True)
    pylora.save_adapter(model, tmp_path)
    pylora.merge(model)
    with pytest.raises(ValueError, match="o_proj a bias"):
        model.save_pretrained(tmp_path)
    model = trained(qwen())
    state = model.state_dict()
    pylora.merge(model)
    with pytest.raises(ValueError, match=r"has an adapter_config\.json"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is merged; state_dict must not be given"):
        model.save_pretrained(tmp_path / "other", state_dict=state)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_a_bias_from_a_merge_is_refused_after_unloading(tmp_path: Path) -> None:
    model = pylora.quantize_model(qwen())
    trained(model, lora_bias=True)
    pylora.merge(model, keep_base=False)
    with pytest.raises(ValueError, match=r"gave model\.layers\.0\.self_attn\.o_proj a bias"):
        model.save_pretrained(tmp_path)


def arguments(folder: Path, **changes: Any) -> Any:
    return transformers.TrainingArguments(
        folder,
        **{"max_steps": 4, "save_steps": 2, "learning_rate": 1e-2, "seed": 0, **changes},
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )


@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
def test_a_trainer_resumes_where_it_was(tmp_path: Path, quantized: bool) -> None:
    data = [{"input_ids": row, "labels": row} for row in torch.arange(64).view(8, 8)]

    def model() -> Any:
        plain = qwen()
        return pylora.add_lora(pylora.quantize_model(plain) if quantized else plain, r=4)

    torch.manual_seed(3)
    whole = model()
    transformers.Trainer(whole, arguments(tmp_path), train_dataset=data).train()
    resumed = model()
    trainer = transformers.Trainer(resumed, arguments(tmp_path / "again"), train_dataset=data)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (name, expected), actual in zip(
        whole.named_parameters(), resumed.parameters(), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5, msg=name)
    assert_same(loaded(tmp_path / "checkpoint-4"), whole)


def test_a_model_without_another_name_is_saved(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pylora.quantize_model(qwen()).save_pretrained(tmp_path)
    transformers.utils.logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            loaded(tmp_path)
    finally:
        transformers.utils.logging.disable_propagation()
    messages = [record.getMessage() for record in caplog.records]
    assert not [m for m in messages if "MISSING" in m or "UNEXPECTED" in m]
