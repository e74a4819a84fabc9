"""The model families of transformers: one small random model each, in any width.

The table serves the tests of `pylora.accelerate` and the benchmark of whole models alike.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor

IDS = torch.arange(3, 23).view(2, 10)
CLASSES = torch.tensor([0, 1])
TEXT = {"input_ids": IDS, "labels": IDS}
# A place for each of the 16 patches of an image, then text.
WITH_IMAGE = torch.cat([torch.ones(2, 16, dtype=torch.int64), IDS], dim=1)
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
WIDTHS = (
    "hidden_size",
    "head_dim",
    "intermediate_size",
    "moe_intermediate_size",
    "ffn_dim",
    "ffn_hidden_size",
    "word_embed_proj_dim",
    "n_embd",
    "d_model",
    "d_kv",
    "d_ff",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "projection_dim",
)
# What stays dense: the heads, what a model declares as float32-only, and a layer of Mamba whose
# weight the model reads itself.
DENSE = r"(lm_head|classifier|cls|proj_out|embed_out)\b|.*\.(wo|dt_proj)$"


@dataclass(frozen=True)
class Family:
    """A row of the table.

    model       the class of the model in transformers
    config      the class of its configuration
    settings    the arguments of the configuration
    batch       the arguments of its forward
    swapped     how many layers with PEFT's LoRA compute through pylora
    left        why `pylora.accelerate` leaves others
    output      the attribute of what its forward returns that is trained
    targets     the layers that carry LoRA, as PEFT names them
    """

    model: str
    config: str
    settings: dict[str, Any]
    swapped: int
    batch: dict[str, Tensor] = field(default_factory=lambda: TEXT)
    left: frozenset[str] = frozenset()
    output: str = "loss"
    targets: str | list[str] = "all-linear"

    def build(self, scale: int = 1) -> Any:
        """The model in float32, with random weights and without dropout.

        scale    the factor of all widths; the smallest model has a hidden size of 64
        """
        config = getattr(transformers, self.config)(**_prepared(self.settings, scale))
        config._experts_implementation = "eager"  # torch's grouped product does not take float64
        return getattr(transformers, self.model)(config).float()

    def inputs(self, dtype: torch.dtype, repeat: int = 1) -> dict[str, Tensor]:
        """The arguments of the forward, with the batch repeated and floats in this dtype."""
        return {
            name: (value.to(dtype) if value.is_floating_point() else value).repeat(
                repeat, *(1 for _ in value.shape[1:])
            )
            for name, value in self.batch.items()
        }


def _prepared(settings: dict[str, Any], scale: int) -> dict[str, Any]:
    """The settings with all widths multiplied, and without dropout."""
    prepared: dict[str, Any] = dict.fromkeys(WITHOUT_DROPOUT, 0.0)
    for name, value in settings.items():
        if isinstance(value, dict):
            value = _prepared(value, scale)
        prepared[name] = value * scale if name in WIDTHS else value
    return prepared


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
    "deepseek-v3": causal(
        "DeepseekV3",
        5,
        EXPERTS,
        sizes=SIZES,
        num_key_value_heads=4,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=16,
        n_routed_experts=4,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=0,
        moe_intermediate_size=32,
    ),
    "mamba": Family(
        "MambaForCausalLM",
        "MambaConfig",
        {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 1, "state_size": 8},
        2,
        targets=["in_proj", "x_proj"],  # its kernels read the weights of the others
    ),
    "bamba": causal(
        "Bamba",
        12,
        num_hidden_layers=2,
        attn_layer_indices=[1],
        mamba_n_heads=8,
        mamba_d_head="auto",
        mamba_d_state=16,
        mamba_n_groups=1,
        mamba_chunk_size=16,
    ),
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
    "llava": Family(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "text_config": {**GROUPED, "model_type": "llama"},
            "vision_config": {**SIZES, **VISION, "model_type": "clip_vision_model"},
            "image_token_index": 1,
            "image_seq_length": 16,
            "vision_feature_layer": -1,
        },
        15,
        {"input_ids": WITH_IMAGE, "labels": WITH_IMAGE, **IMAGES},
    ),
}
