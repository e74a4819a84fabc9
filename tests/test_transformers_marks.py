"""What transformers knows of a model that pylora changed: training, casts, copies, dtypes."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pylora
from pylora.nn import NF4Linear

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")


def mistral() -> Any:
    config = transformers.MistralConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    return transformers.MistralForCausalLM(config)


def trainer(model: Any, folder: Path, **changes: Any) -> Any:
    rows = torch.arange(64).view(4, 16)
    arguments = transformers.TrainingArguments(
        folder,
        **{"max_steps": 2, "learning_rate": 1e-2, **changes},
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    data = [{"input_ids": row, "labels": row} for row in rows]
    return transformers.Trainer(model, arguments, train_dataset=data)


def test_a_quantized_model_without_lora_is_not_trained(tmp_path: Path) -> None:
    model = pylora.quantize_model(mistral())
    with pytest.raises(ValueError, match=r"embed_tokens\.weight would be trained.*add_lora"):
        trainer(model, tmp_path)
    copied = copy.deepcopy(model)
    pylora.add_lora(model, r=4)
    trainer(model, tmp_path).train()
    with pytest.raises(ValueError, match="add_lora"):  # the copy still has no LoRA
        trainer(copied, tmp_path)
    trainer(copied.requires_grad_(False), tmp_path)  # evaluation and prediction need no adapters
    pylora.unload(model)
    trainer(model, tmp_path)  # everything is frozen
    model.lm_head.requires_grad_()
    with pytest.raises(ValueError, match=r"lm_head\.weight would be trained"):
        trainer(model, tmp_path)


def test_a_quantized_model_with_adapters_of_peft_is_trained(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    for config in (
        peft.LoraConfig(r=2, target_modules=["lm_head"]),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ):
        trainer(peft.get_peft_model(pylora.quantize_model(mistral()), config), tmp_path).train()


@pytest.mark.parametrize("base", ["dense", "nf4", "bitsandbytes"])
def test_a_model_with_bottleneck_adapters_is_trained(tmp_path: Path, base: str) -> None:
    model = mistral()
    if base == "nf4":
        pylora.quantize_model(model)
    elif base == "bitsandbytes":
        pytest.importorskip("bitsandbytes")
        from benchmarks.models.bitsandbytes_layers import in_4bit

        in_4bit(model).is_quantized = True  # as transformers marks what it has loaded
        with pytest.raises(ValueError, match="purely quantized"):
            trainer(model, tmp_path)
    pylora.add_adapter(model, "task", pylora.PfeifferConfig(reduction_factor=4))
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    trainer(model, tmp_path).train()
    assert trained and not any(map(torch.equal, trained, before))
    if base != "dense":
        pylora.delete_adapter(model, "task")
        model.lm_head.requires_grad_()
        with pytest.raises(ValueError, match=r"purely quantized|would be trained"):
            trainer(model, tmp_path)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_trains(tmp_path: Path, reentrant: bool) -> None:
    model = pylora.add_lora(pylora.quantize_model(mistral()), r=4)
    before = model.model.layers[0].mlp.up_proj.lora_B.detach().clone()
    trainer(
        model,
        tmp_path,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    ).train()
    assert not torch.equal(model.model.layers[0].mlp.up_proj.lora_B, before)


@pytest.mark.parametrize("lora", [False, True], ids=["nf4", "lora"])
def test_a_quantized_model_is_cast_counted_and_generates(lora: bool) -> None:
    model = mistral()
    dense = model.num_parameters(only_trainable=True)
    pylora.quantize_model(model)
    if lora:
        pylora.add_lora(model, r=4)
    assert 0 < model.num_parameters(only_trainable=True) < dense
    layer = model.model.layers[0].mlp.down_proj
    layer = layer.base_layer if lora else layer
    expected = layer.nf4_weight.dequantize(torch.float32)
    for cast in (model.half(), model.to(torch.bfloat16), model.float(), model.to("cpu")):
        assert torch.equal(layer.nf4_weight.dequantize(torch.float32), expected)
        assert cast is model
    tokens = torch.arange(6)[None]
    generated = model.eval().generate(tokens, max_new_tokens=4, do_sample=False)
    assert generated.shape == (1, 10)


def test_copies_and_pickles_have_marks_of_their_own(tmp_path: Path) -> None:
    model = pylora.add_lora(pylora.quantize_model(mistral()), r=4)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        for mark in ("hf_quantizer", "save_pretrained", "_apply"):
            assert vars(twin)[mark].model is twin
        twin.half()
        assert twin.dtype == torch.float16 and model.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("cast_first", [False, True])
def test_flash_attention_finds_the_dtype_of_a_quantized_attention(
    dtype: torch.dtype, cast_first: bool
) -> None:
    from transformers.integrations.flash_attention import get_target_dtype

    query = torch.zeros(1)
    for change in (pylora.quantize_model, lambda m: pylora.add_lora(pylora.quantize_model(m))):
        model = mistral().to(dtype) if cast_first else mistral()
        change(model)
        if not cast_first:
            model.to(dtype)
        for attention in (layer.self_attn for layer in model.model.layers):
            assert get_target_dtype(query, attention) == dtype
        if change is pylora.quantize_model:
            model.dequantize()
        assert get_target_dtype(query, model.model.layers[0].self_attn) == dtype


def test_dequantize_gives_a_dense_model() -> None:
    model = mistral()
    pylora.quantize_model(model)
    weight = model.model.layers[1].self_attn.q_proj.nf4_weight.dequantize(torch.float32)
    tokens = torch.arange(8)[None]
    expected = model(tokens).logits
    pylora.add_lora(model, r=2)
    with pytest.raises(ValueError, match=r"pylora\.unload"):
        model.dequantize()
    pylora.unload(model).dequantize()
    assert torch.equal(model.model.layers[1].self_attn.q_proj.weight, weight)
    assert not any(isinstance(module, NF4Linear) for module in model.modules())
    assert not {"hf_quantizer", "save_pretrained", "_apply"} & set(vars(model))
    assert not hasattr(model.config, "_is_quantized")
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_model_inside_another_module_is_marked(tmp_path: Path) -> None:
    outer = nn.Module()
    outer.inner = mistral()
    pylora.quantize_model(outer)
    with pytest.raises(ValueError, match="add_lora"):
        trainer(outer.inner, tmp_path)
    pylora.add_lora(outer, r=2)
    trainer(outer.inner, tmp_path).train()
