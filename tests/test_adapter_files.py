"""Adapter files: a model has the same logits under PEFT and here, whichever side trained it."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pylora
from pylora.nn import LoRALinear, NF4Linear
from pylora.testing import assert_as_accurate_as_torch

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
bnb = pytest.importorskip("bitsandbytes")
safetensors_file = pytest.importorskip("safetensors")
safetensors = pytest.importorskip("safetensors.torch")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*checkpointing.*deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed"),
    # PEFT warns so about the shape of a LoRA bias.
    pytest.mark.filterwarnings("ignore:Adapter .* LoRA tensor.* have invalid shape"),
]

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "bias": {"lora_bias": True},
    "dora": {"use_dora": True},
    "hybrid": {"modules_to_save": ["norm", "lm_head"], "target_modules": ["q_proj", "up_proj"]},
}


def tiny_llama(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(11)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        initializer_range=0.1,
    )
    return transformers.LlamaForCausalLM(config).to(dtype)


def nf4_llama(dtype: torch.dtype = torch.float32) -> Any:
    return pylora.quantize_model(tiny_llama(dtype), double_quant=True)


def bitsandbytes_llama(dtype: torch.dtype = torch.float32) -> Any:
    """Returns the model of `nf4_llama` with the same bytes in bitsandbytes' layers."""
    model = nf4_llama(dtype)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, NF4Linear):
            linear = bnb.nn.Linear4bit(
                layer.in_features, layer.out_features, bias=False, quant_type="nf4"
            )
            linear.weight = layer.nf4_weight.to_bitsandbytes()
            model.set_submodule(name, linear)
    model.is_loaded_in_4bit = True
    return model


def dequantized_llama() -> Any:
    """Returns the same model in float64 with the weights that the NF4 bytes stand for."""
    dense, quantized = tiny_llama(torch.float64), nf4_llama()
    for name, layer in quantized.named_modules():
        if isinstance(layer, NF4Linear):
            weight = layer.nf4_weight.dequantize(torch.float64)
            dense.get_submodule(name).weight = nn.Parameter(weight, requires_grad=False)
    return dense


def under_peft(folder: Path, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns PEFT's logits: over bitsandbytes' NF4 base or, in float64, over the exact base."""
    if dtype == torch.float64:
        model = peft.PeftModel.from_pretrained(dequantized_llama(), folder).double()
    else:
        model = peft.PeftModel.from_pretrained(bitsandbytes_llama(dtype), folder)
    model.train()  # bitsandbytes repacks its weights in eval mode
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    with torch.no_grad():
        return model(ids).logits


def train(model: nn.Module, ids: Tensor, steps: int = 3) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 1e-2)
    model.train()
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def our_logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(ids).logits


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(97, (2, 9), generator=torch.Generator().manual_seed(4))


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_adapter_trained_here_gives_the_same_logits_under_peft(
    variant: str, dtype: torch.dtype, tmp_path: Path, ids: Tensor
) -> None:
    model = pylora.add_lora(nf4_llama(dtype), r=4, lora_alpha=8, **VARIANTS[variant])
    before = our_logits(model, ids)
    train(model, ids)
    pylora.save_adapter(model, tmp_path)
    actual = our_logits(model, ids)
    assert (actual - before).abs().max() > 0.1
    assert_as_accurate_as_torch(actual, under_peft, tmp_path, ids, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("variant", [*VARIANTS, "patterns"])
def test_an_adapter_trained_under_peft_gives_the_same_logits_here(
    variant: str, dtype: torch.dtype, tmp_path: Path, ids: Tensor
) -> None:
    options: dict[str, Any] = {"target_modules": "all-linear", **VARIANTS.get(variant, {})}
    if variant == "patterns":
        options["rank_pattern"] = {"q_proj": 2, "layers.1.mlp.up_proj": 7}
        options["alpha_pattern"] = {"^model.layers.0.*.k_proj": 3}
        options["exclude_modules"] = ["o_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=8, **options)
    theirs = peft.get_peft_model(bitsandbytes_llama(dtype), config)
    train(theirs, ids)
    theirs.save_pretrained(tmp_path)
    model = pylora.load_adapter(nf4_llama(dtype), tmp_path)
    assert_as_accurate_as_torch(our_logits(model, ids), under_peft, tmp_path, ids, dtype)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}
    if variant == "patterns":
        assert layers["model.layers.0.self_attn.q_proj"].r == 2
        assert layers["model.layers.1.mlp.up_proj"].r == 7
        assert layers["model.layers.0.self_attn.k_proj"].scaling == 3 / 4
        assert not any("o_proj" in name for name in layers)
        again = tmp_path / "again"
        pylora.save_adapter(model, again)
        expected = safetensors.load_file(tmp_path / "adapter_model.safetensors")
        actual = safetensors.load_file(again / "adapter_model.safetensors")
        assert sorted(actual) == sorted(expected)
        assert all(torch.equal(actual[key], expected[key]) for key in expected)
        assert_as_accurate_as_torch(our_logits(model, ids), under_peft, again, ids, dtype)


@pytest.mark.parametrize("variant", VARIANTS)
def test_keys_and_metadata_are_those_peft_writes(variant: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"target_modules": "all-linear", **VARIANTS[variant]}
    if variant == "hybrid":  # PEFT takes "norm" for the ending of input_layernorm as well
        options["modules_to_save"] = ["model.norm", "lm_head"]
    theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=4, **options))
    theirs.save_pretrained(tmp_path / "theirs")
    pylora.save_adapter(pylora.add_lora(tiny_llama(), r=4, **options), tmp_path / "ours")
    files = []
    for name in ("theirs", "ours"):
        path = tmp_path / name / "adapter_model.safetensors"
        with safetensors_file.safe_open(path, "pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}
            files.append((file.metadata(), shapes))
    assert files[0] == files[1]
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_adapter_is_loaded_bit_for_bit(variant: str, tmp_path: Path, ids: Tensor) -> None:
    model = pylora.add_lora(nf4_llama(), r=4, **VARIANTS[variant])
    train(model, ids)
    pylora.save_adapter(model, tmp_path)
    twin = pylora.load_adapter(nf4_llama(), str(tmp_path))
    expected = adapter_state(model)
    actual = adapter_state(twin)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert torch.equal(our_logits(twin, ids), our_logits(model, ids))


def test_loading_fills_the_lora_layers_that_are_there(tmp_path: Path, ids: Tensor) -> None:
    options = {"r": 4, "target_modules": ["q_proj", "up_proj"]}
    model = pylora.add_lora(nf4_llama(), lora_alpha=8, use_rslora=True, **options)
    train(model, ids)
    pylora.save_adapter(model, tmp_path)
    twin = pylora.add_lora(nf4_llama(), lora_alpha=99, lora_dropout=0.5, **options)
    layer = twin.model.layers[0].mlp.up_proj
    parameter = layer.lora_A
    pylora.load_adapter(twin, tmp_path)
    assert twin.model.layers[0].mlp.up_proj is layer and layer.lora_A is parameter
    assert layer.scaling == 4.0 and layer.lora_dropout == 0.5
    assert torch.equal(our_logits(twin, ids), our_logits(model, ids))


def test_the_dtype_is_saved_and_can_be_chosen_on_load(tmp_path: Path, ids: Tensor) -> None:
    model = pylora.add_lora(nf4_llama(), r=4, dtype=torch.bfloat16)
    train(model, ids)
    pylora.save_adapter(model, tmp_path)
    stored = safetensors.load_file(tmp_path / "adapter_model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}
    assert {
        p.dtype for p in adapter_state(pylora.load_adapter(nf4_llama(), tmp_path)).values()
    } == {torch.float32}
    narrow = pylora.load_adapter(nf4_llama(), tmp_path, dtype=torch.bfloat16)
    assert torch.equal(our_logits(narrow, ids), our_logits(model, ids))


def test_a_tied_head_trained_in_full_leaves_the_embedding(tmp_path: Path, ids: Tensor) -> None:
    """PEFT trains a copy of the head. The embedding that shared its weight stays as it was."""

    def tied() -> Any:
        model = tiny_llama()
        model.lm_head.weight = model.model.embed_tokens.weight
        return model

    model = pylora.add_lora(tied(), r=4, modules_to_save=["lm_head"])
    train(model, ids)
    pylora.save_adapter(model, tmp_path)
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(tied(), tmp_path)(ids).logits
    torch.testing.assert_close(our_logits(model, ids), theirs)
    twin = pylora.load_adapter(tied(), tmp_path)
    assert torch.equal(our_logits(twin, ids), our_logits(model, ids))


def test_layers_of_different_rank_are_saved_as_patterns(tmp_path: Path, ids: Tensor) -> None:
    model = pylora.add_lora(nf4_llama(), r=4, target_modules=["q_proj", "v_proj"])
    pylora.add_lora(model, r=2, lora_alpha=5, target_modules=["layers.1.mlp.up_proj"])
    train(model, ids)
    pylora.save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {r"^model\.layers\.1\.mlp\.up_proj": 2}
    assert config["alpha_pattern"] == {r"^model\.layers\.1\.mlp\.up_proj": 5}
    assert_as_accurate_as_torch(our_logits(model, ids), under_peft, tmp_path, ids, torch.float32)
    twin = pylora.load_adapter(nf4_llama(), tmp_path)
    assert torch.equal(our_logits(twin, ids), our_logits(model, ids))


class Nested(nn.Module):
    """A model in which some names are the endings of other names."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.inner = nn.ModuleDict({"proj": nn.Linear(8, 8), "other": nn.Linear(8, 8)})

    def forward(self, x: Tensor) -> Tensor:
        return self.inner["other"](self.inner["proj"](self.proj(x)))


@pytest.mark.parametrize(
    "targets",
    [{"proj"}, {"inner.proj"}, {"proj", "inner.proj"}, {"proj", "inner.other"}],
    ids=lambda targets: "+".join(sorted(targets)),
)
def test_peft_finds_the_targets_that_were_saved(targets: set[str], tmp_path: Path) -> None:
    model = pylora.add_lora(Nested(), r=2, target_modules="|".join(map(re.escape, targets)))
    pylora.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(Nested(), tmp_path)
    layers = {n for n, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert {name.removeprefix("base_model.model.") for name in layers} == targets
    twin = pylora.load_adapter(Nested(), tmp_path)
    assert {n for n, m in twin.named_modules() if isinstance(m, LoRALinear)} == targets


def test_compiled_models_are_saved_under_plain_names(tmp_path: Path) -> None:
    model = pylora.add_lora(Nested(), r=2)
    pylora.save_adapter(torch.compile(copy.deepcopy(model), backend="eager"), tmp_path)
    loaded = pylora.load_adapter(torch.compile(Nested(), backend="eager"), tmp_path)
    assert torch.equal(loaded.proj.lora_A, model.proj.lora_A)


class Tied(nn.Module):
    """A model whose embedding and head share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mid, self.head = nn.Embedding(16, 8), nn.Linear(8, 8), nn.Linear(8, 16)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.mid(self.embed(ids)))


@pytest.mark.parametrize("differ", [False, True])
def test_a_tied_pair_is_two_parameters_only_if_the_file_says_so(
    tmp_path: Path, differ: bool, caplog: pytest.LogCaptureFixture
) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["mid"], modules_to_save=["embed", "head"])
    trained, ids = peft.get_peft_model(Tied(), config), torch.arange(16)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad and differ:
                parameter.normal_()
    trained.save_pretrained(tmp_path)
    base = Tied()
    base.load_state_dict({k: v for k, v in base.state_dict().items()})
    base.mid.load_state_dict(trained.base_model.model.mid.base_layer.state_dict())
    ours = pylora.load_adapter(base, tmp_path)
    assert torch.allclose(ours(ids), trained(ids), atol=1e-6)
    assert (ours.head.weight is ours.embed.weight) is not differ
    assert ("they are two parameters now" in caplog.text) is differ


@pytest.mark.parametrize("name", ["a+b", "c(d", "[e]", "f*"])
def test_names_with_characters_of_regular_expressions_are_saved(tmp_path: Path, name: str) -> None:
    peft = pytest.importorskip("peft")
    base = nn.Sequential(nn.ModuleDict({name: nn.Linear(8, 8), "g": nn.Linear(8, 8)}))
    base.forward = lambda x: base[0]["g"](base[0][name](x))  # type: ignore[method-assign]
    model = pylora.add_lora(copy.deepcopy(base), r=2, lora_alpha=4, target_modules=["g"])
    lora_of_rank_3 = pylora.add_lora(nn.ModuleDict({"x": nn.Linear(8, 8)}), r=3, lora_alpha=9)["x"]
    lora_of_rank_3.base_layer = model[0][name]
    model[0][name] = lora_of_rank_3
    for layer in (model[0]["g"], lora_of_rank_3):
        nn.init.normal_(layer.lora_B)
    pylora.save_adapter(model, tmp_path)
    reloaded = pylora.load_adapter(copy.deepcopy(base), tmp_path)
    assert (reloaded[0][name].r, reloaded[0][name].scaling) == (3, 3.0)
    by_peft = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).base_model.model
    assert by_peft[0][name].scaling["default"] == 3.0
    assert by_peft[0]["g"].scaling["default"] == 2.0
