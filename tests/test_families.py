"""`pylora.accelerate` on the model families of transformers: loss and gradients stay right.

Each row is a tiny random model. Its linear layers carry PEFT's LoRA, over dense weights or over
bitsandbytes' NF4.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pylora

bnb = pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
from peft_models import assert_right, in_4bit, outcome  # noqa: E402

IDS = torch.arange(3, 23).view(2, 10)
CLASSES = torch.tensor([0, 1])
TEXT = {"input_ids": IDS, "labels": IDS}
IMAGES = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)}
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "max_position_embeddings": 64,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
VISION = {"image_size": 32, "patch_size": 8}
ENCODER_DECODER = {
    "vocab_size": 96,
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
}
WITHOUT_DROPOUT = (
    "attention_dropout",
    "attention_probs_dropout_prob",
    "hidden_dropout_prob",
    "hidden_dropout",
    "activation_dropout",
    "dropout",
    "dropout_rate",
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
)


# The heads, and what a model declares as float32-only.
DENSE = r"(lm_head|classifier|cls|proj_out|embed_out)\b|.*\.wo$"


@dataclass(frozen=True)
class Family:
    """A row of the table.

    model       the class of the model in transformers
    config      the class of its configuration
    settings    the arguments of the configuration
    batch       the arguments of its forward
    swapped     how many layers compute through pylora
    left        why others are left
    output      the attribute of what its forward returns that is trained
    """

    model: str
    config: str
    settings: dict[str, Any]
    swapped: int
    batch: dict[str, Tensor] = field(default_factory=lambda: TEXT)
    left: frozenset[str] = frozenset()
    output: str = "loss"


def causal(name: str, swapped: int, *left: str, sizes: Any = GROUPED, **settings: Any) -> Family:
    model, config = f"{name}ForCausalLM", f"{name.removesuffix('Text')}Config"
    if name == "Gemma3":
        config = "Gemma3TextConfig"
    return Family(model, config, {**sizes, **settings}, swapped, left=frozenset(left))


EXPERTS = "pylora does not compute PEFT's lora.ParamWrapper"
FAMILIES = {
    "llama": causal("Llama", 7),
    "mistral": causal("Mistral", 7),
    "qwen2": causal("Qwen2", 7),
    "qwen3": causal("Qwen3", 7, head_dim=16),
    "gemma2": causal("Gemma2", 7, head_dim=16),
    "gemma3": causal("Gemma3", 7, head_dim=16),
    "phi3": causal("Phi3", 4),
    "gpt-neox": causal("GPTNeoX", 4, sizes=SIZES),
    "falcon": causal("Falcon", 4, sizes=SIZES, ffn_hidden_size=96),
    "opt": causal("OPT", 6, sizes=SIZES, ffn_dim=96, word_embed_proj_dim=64),
    "gpt2": Family(
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 96, "n_embd": 64, "n_head": 4, "n_layer": 1, "n_positions": 64},
        4,
    ),
    "mixtral": causal("Mixtral", 4, EXPERTS, num_local_experts=4),
    "qwen3-moe": causal(
        "Qwen3Moe",
        4,
        EXPERTS,
        head_dim=16,
        num_experts=4,
        moe_intermediate_size=32,
        num_experts_per_tok=2,
    ),
    "gpt-oss": causal("GptOss", 4, head_dim=16, num_local_experts=4),
    "bert": Family("BertForMaskedLM", "BertConfig", SIZES, 7),
    "roberta": Family(
        "RobertaForSequenceClassification",
        "RobertaConfig",
        SIZES,
        8,
        {"input_ids": IDS, "labels": CLASSES},
    ),
    "t5": Family(
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": 96,
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 96,
            "num_layers": 1,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
        16,
    ),
    "bart": Family(
        "BartForConditionalGeneration",
        "BartConfig",
        {**ENCODER_DECODER, "max_position_embeddings": 64, "forced_eos_token_id": None},
        16,
    ),
    "whisper": Family(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {**ENCODER_DECODER, "num_mel_bins": 8, "max_source_positions": 20, "bos_token_id": 1},
        16,
        {"input_features": torch.linspace(-1, 1, 2 * 8 * 40).view(2, 8, 40), "labels": IDS},
    ),
    "vit": Family(
        "ViTForImageClassification",
        "ViTConfig",
        {**SIZES, **VISION},
        7,
        {**IMAGES, "labels": CLASSES},
    ),
    "clip": Family(
        "CLIPModel",
        "CLIPConfig",
        {
            "text_config": {**SIZES, "eos_token_id": 22},
            "vision_config": {**SIZES, **VISION},
            "projection_dim": 32,
        },
        14,
        {"input_ids": IDS, **IMAGES},
        output="logits_per_image",  # the loss compares two images, and rounding decides it
    ),
}


def without_dropout(settings: dict[str, Any]) -> dict[str, Any]:
    return {**dict.fromkeys(WITHOUT_DROPOUT, 0.0), **settings}


def gradients(model: nn.Module, family: Family) -> Tensor:
    """All gradients in one row, in the dtype of the model."""
    dtype = next(model.parameters()).dtype
    floating = {k: v.to(dtype) for k, v in family.batch.items() if v.is_floating_point()}
    _, row = outcome(model, output=family.output, **family.batch | floating)
    return row


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_of_a_family_are_right(family: str, base: str) -> None:
    row = FAMILIES[family]
    settings = {
        key: without_dropout(value) if isinstance(value, dict) else value
        for key, value in without_dropout(row.settings).items()
    }
    torch.manual_seed(0)
    config = getattr(transformers, row.config)(**settings)
    config._experts_implementation = "eager"  # torch's grouped product does not take float64
    model = getattr(transformers, row.model)(config).float()
    if base == "nf4":
        model = in_4bit(model, DENSE)
    lora = peft.LoraConfig(r=4, lora_alpha=2, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(model, lora).train()
    report = pylora.accelerate(model, verify=1)
    assert len(report.swapped) == row.swapped
    assert {layer.reason for layer in report.left} == row.left
    for _ in range(2):
        assert_right(model, lambda model: gradients(model, row))
