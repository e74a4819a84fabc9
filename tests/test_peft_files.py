"""Less usual adapter files of PEFT load as PEFT loads them, and pylora's do not mislead PEFT."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import pylora

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

TOKENS = torch.arange(12).view(2, 6)
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def llama(vocabulary: int = 24, tied: bool = False) -> Any:
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, **sizes, **heads, tie_word_embeddings=tied
    )
    return transformers.LlamaForCausalLM(config).eval()


def saved_by_peft(folder: Path, model: Any, change_embeddings: bool = False, **options: Any) -> Any:
    save = {key: options.pop(key) for key in ("save_embedding_layers",) if key in options}
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=2, **options)).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
            if change_embeddings and ("embed_tokens" in name or "lm_head" in name):
                parameter.mul_(1.25)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(folder, **save)
    return theirs


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("tied", [False, True])
def test_lora_of_the_output_head_loads(
    tied: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = saved_by_peft(tmp_path, llama(tied=tied), target_modules=["v_proj", "lm_head"])
    assert "base_model.model.lm_head.base_layer.weight" in load_file(tmp_path / WEIGHTS)
    with caplog.at_level(logging.WARNING):
        ours = pylora.load_adapter(llama(tied=tied), tmp_path)
    assert torch.equal(logits(ours), logits(theirs))
    assert not caplog.text  # the saved weight is the one that the model has
    pylora.save_adapter(ours, tmp_path / "again")
    again = peft.PeftModel.from_pretrained(llama(tied=tied), str(tmp_path / "again")).eval()
    assert torch.equal(logits(again), logits(theirs))


def test_saved_embeddings_are_copied_and_the_log_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = llama()
    model.resize_token_embeddings(40)
    theirs = saved_by_peft(
        tmp_path, model, True, target_modules=["v_proj"], save_embedding_layers=True
    )
    with pytest.raises(ValueError, match=r"\(40, 32\); it must be \(24, 32\).*resize_token_emb"):
        pylora.load_adapter(llama(), tmp_path)
    other = llama()
    other.resize_token_embeddings(40)
    with caplog.at_level(logging.WARNING):
        ours = pylora.load_adapter(other, tmp_path)
    assert torch.equal(logits(ours), logits(theirs))
    for place in ("model.embed_tokens.weight", "lm_head.weight"):
        assert f"{place} has the values that were saved beside the adapter" in caplog.text
    assert not ours.lm_head.weight.requires_grad


def rewritten(folder: Path, **tensors: Tensor) -> None:
    """Changes tensors of the adapter file in `folder`, given by the ends of their keys."""
    held = load_file(folder / WEIGHTS)
    for end, value in tensors.items():
        (key,) = [key for key in held if key.endswith(end.replace("__", "."))]
        held[key] = value
    save_file(held, folder / WEIGHTS)


def test_saved_embeddings_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    options = {"target_modules": ["v_proj"], "save_embedding_layers": True}
    saved_by_peft(tmp_path, llama(tied=True), **options)
    good = load_file(tmp_path / WEIGHTS)["base_model.model.lm_head.weight"]
    for value, message in [
        (good * 2, "lm_head.weight' and the value of model.embed_tokens.weight differ"),
        (good.long(), "has dtype torch.int64; it must be floating point"),
        (good.clone().fill_(torch.inf), "must hold finite numbers of torch.float32"),
    ]:
        rewritten(tmp_path, lm_head__weight=value)
        model = llama(tied=True)
        before = logits(model)
        with pytest.raises(ValueError, match=message):
            pylora.load_adapter(model, tmp_path)
        assert torch.equal(logits(model), before)
    rewritten(tmp_path, lm_head__weight=good)
    quantized = pylora.quantize_model(llama(), skip_modules=())
    with pytest.raises(ValueError, match="is a dense weight, but lm_head is quantized"):
        pylora.load_adapter(quantized, tmp_path)


def test_modules_to_save_keep_their_weights_as_before(tmp_path: Path) -> None:
    options = {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    theirs = saved_by_peft(tmp_path, llama(), True, **options)
    ours = pylora.load_adapter(llama(), tmp_path)
    assert torch.equal(logits(ours), logits(theirs))
    assert ours.lm_head.weight.requires_grad


def test_an_adapter_that_began_with_mica_loads(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = saved_by_peft(tmp_path, llama(), target_modules=["v_proj"], init_lora_weights="mica")
    with caplog.at_level(logging.WARNING):
        ours = pylora.load_adapter(llama(), tmp_path)
    assert torch.equal(logits(ours), logits(theirs))
    assert "PEFT keeps lora_B frozen under MiCA" in caplog.text


@pytest.mark.parametrize("start", ["pissa", "PISSA", "olora", "corda"])
def test_an_adapter_over_changed_weights_loads_once_it_is_converted(
    start: str, tmp_path: Path
) -> None:
    theirs = saved_by_peft(tmp_path, llama(), target_modules=["v_proj"])
    config = json.loads((tmp_path / CONFIG).read_text("utf-8"))
    settings = {"corda_method": "kpm"} if start == "corda" else None
    for initialization in (start, True):  # PEFT writes True when it converts, and the settings stay
        changed = {**config, "init_lora_weights": initialization, "corda_config": settings}
        (tmp_path / CONFIG).write_text(json.dumps(changed), "utf-8")
        if initialization is True:
            assert torch.equal(logits(pylora.load_adapter(llama(), tmp_path)), logits(theirs))
        else:
            with pytest.raises(ValueError, match="changes the base weights; convert"):
                pylora.load_adapter(llama(), tmp_path)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(2, 8, 8))


class Block(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.experts = Experts() if fused else nn.Identity()
        self.shared = nn.ModuleDict({"down_proj": nn.Linear(8, 8), "up_proj": nn.Linear(8, 8)})
        self.o_proj = nn.Linear(8, 8)


@pytest.mark.parametrize(
    ("fused", "targets", "warns"),
    [
        (True, ["down_proj", "up_proj", "o_proj"], True),
        (True, ["o_proj"], False),
        (False, ["down_proj", "o_proj"], False),
    ],
)
def test_lora_that_peft_takes_for_lora_of_experts_is_named(
    fused: bool,
    targets: list[str],
    warns: bool,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = pylora.add_lora(nn.Sequential(Block(fused)), r=2, target_modules=targets)
    with caplog.at_level(logging.WARNING):
        pylora.save_adapter(model, tmp_path)
    expected = "PEFT may not read the LoRA of 0.shared.down_proj and 1 more from this adapter"
    assert (expected in caplog.text) == warns
    assert ("experts" in caplog.text) == warns


def test_peft_leaves_out_the_lora_that_the_warning_names(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def deepseek() -> Any:
        torch.manual_seed(0)
        sizes = {"vocab_size": 16, "hidden_size": 32, "intermediate_size": 32}
        attention = {"num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 8}
        heads = {"kv_lora_rank": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8}
        experts = {"moe_intermediate_size": 16, "n_shared_experts": 1, "n_routed_experts": 4}
        routing = {"num_experts_per_tok": 2, "first_k_dense_replace": 0, "num_hidden_layers": 1}
        groups = {"n_group": 1, "topk_group": 1}
        config = transformers.DeepseekV3Config(
            **sizes, **attention, **heads, **experts, **routing, **groups
        )
        return transformers.DeepseekV3ForCausalLM(config).eval()

    model = pylora.add_lora(deepseek(), r=2, target_modules=["o_proj", "down_proj"])
    with caplog.at_level(logging.WARNING):
        pylora.save_adapter(model, tmp_path)
    name = "model.layers.0.mlp.shared_experts.down_proj"
    assert f"PEFT may not read the LoRA of {name} from this adapter" in caplog.text
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(deepseek(), str(tmp_path))
    layer = theirs.base_model.model.get_submodule(name)
    assert type(layer) is nn.Linear
