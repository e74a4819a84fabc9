"""add_lora wraps the layers that PEFT would, freezes the rest, and checks before any change."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pylora
from pylora.nn import LoRALinear, NF4Linear

transformers = pytest.importorskip("transformers")
# Not every version of transformers that pylora allows has the newer name for checkpointing.
pytestmark = pytest.mark.filterwarnings("ignore:.*checkpointing.*deprecated:FutureWarning")


def tiny_llama(**overrides: Any) -> nn.Module:
    config = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
        **overrides,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))


def wrapped(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def snapshot(model: nn.Module) -> list[Any]:
    """Records which objects the modules and parameters are, and which parameters are trainable."""
    parameters = [(n, id(p), p.requires_grad) for n, p in model.named_parameters()]
    return [[(n, id(m)) for n, m in model.named_modules()], parameters]


TARGETS: list[Any] = [
    "all-linear",
    "ALL-LINEAR",
    ["q_proj", "v_proj"],
    ["model.layers.1.mlp.up_proj"],
    ["self_attn.o_proj", "down_proj"],
    ["lm_head"],
    r".*\.(gate|up)_proj",
    r"model\.layers\.0\..*proj",
    ["proj"],
    r"q_proj",
]


@pytest.mark.parametrize("targets", TARGETS, ids=str)
@pytest.mark.parametrize("modules_to_save", [[], ["lm_head"], ["layers.1.mlp"]], ids=str)
def test_wraps_the_layers_that_peft_wraps(targets: Any, modules_to_save: list[str]) -> None:
    peft = pytest.importorskip("peft")
    model = tiny_llama()
    config = peft.LoraConfig(r=3, target_modules=targets, modules_to_save=modules_to_save or None)
    theirs = copy.deepcopy(model)
    try:
        theirs = peft.get_peft_model(theirs, config).base_model.model
    except ValueError:
        with pytest.raises(ValueError, match="which no module of the model matches"):
            pylora.add_lora(model, r=3, target_modules=targets, modules_to_save=modules_to_save)
        return
    pylora.add_lora(model, r=3, target_modules=targets, modules_to_save=modules_to_save)
    layer_type = peft.tuners.lora.LoraLayer
    assert wrapped(model) == {n for n, m in theirs.named_modules() if isinstance(m, layer_type)}
    theirs_trainable = {
        n.replace("modules_to_save.default.", "").replace("lora_A.default.weight", "lora_A")
        for n in trainable(theirs)
    }
    assert trainable(model) == {
        n.replace("lora_B.default.weight", "lora_B") for n in theirs_trainable
    }


@pytest.mark.parametrize("quantized", [False, True])
def test_starts_as_the_base_and_trains(quantized: bool) -> None:
    model = tiny_llama()
    if quantized:
        pylora.quantize_model(model, double_quant=True)
    ids = torch.randint(97, (2, 9))
    expected = model(ids).logits.detach()
    assert pylora.add_lora(model, r=4) is model
    torch.testing.assert_close(model(ids).logits, expected)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("when", ["before", "after"])
def test_gradient_checkpointing_changes_no_gradient(use_reentrant: bool, when: str) -> None:
    model = pylora.quantize_model(tiny_llama(), double_quant=True)
    if when == "before":
        enable_checkpointing(model, use_reentrant)
    pylora.add_lora(model, r=4, lora_dropout=0.2)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, 0, 0.02)
    plain = copy.deepcopy(model)
    if when == "before":
        plain.gradient_checkpointing_disable()
    else:
        enable_checkpointing(model, use_reentrant)
    ids = torch.randint(97, (2, 9))
    gradients = []
    for llama in (plain, model):
        torch.manual_seed(3)  # the recomputed forward must draw the same dropout mask
        llama.train()(input_ids=ids, labels=ids).loss.backward()
        gradients.append({n: p.grad for n, p in llama.named_parameters() if p.requires_grad})
    assert gradients[1].keys() == gradients[0].keys()
    for name, gradient in gradients[1].items():
        assert gradient is not None and gradient.any(), name
        assert torch.equal(gradient, gradients[0][name]), name


def enable_checkpointing(model: Any, use_reentrant: bool) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})


def test_options_reach_the_layers() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    pylora.add_lora(model, 3, 12, ["0"], 0.25, use_rslora=True, use_dora=True, dtype=torch.bfloat16)
    layer = model[0]
    assert (layer.r, layer.lora_alpha, layer.lora_dropout) == (3, 12, 0.25)
    assert layer.use_rslora and layer.lora_magnitude is not None
    assert layer.lora_A.dtype == torch.bfloat16
    other = pylora.add_lora(nn.Sequential(nn.Linear(8, 8)), lora_bias=True)
    assert other[0].lora_B_bias is not None and other[0].lora_A.dtype == torch.float32


def test_modules_to_save_are_trained_in_full_beside_lora_over_nf4() -> None:
    model = pylora.quantize_model(tiny_llama(), double_quant=True).bfloat16()
    packed = model.model.layers[1].mlp.up_proj
    expected = packed.nf4_weight.dequantize()
    pylora.add_lora(model, r=4, modules_to_save=["layers.1.mlp", "norm"])
    mlp = model.model.layers[1].mlp
    assert type(mlp.up_proj) is nn.Linear
    assert torch.equal(mlp.up_proj.weight, expected)
    full = {f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    full |= {"model.norm.weight"}
    assert {n for n in trainable(model) if ".lora_" not in n} == full
    assert isinstance(model.model.layers[0].mlp.up_proj.base_layer, NF4Linear)
    assert not any(name.startswith("model.layers.1.mlp.") for name in wrapped(model))


def test_a_tied_head_trained_in_full_gets_its_own_weight() -> None:
    model = tiny_llama(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    pylora.add_lora(model, r=4, modules_to_save=["lm_head"])
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert model.lm_head.weight.requires_grad
    assert not model.model.embed_tokens.weight.requires_grad


def test_a_tied_head_and_embedding_trained_in_full_stay_tied() -> None:
    model = tiny_llama(tie_word_embeddings=True)
    pylora.add_lora(model, r=4, modules_to_save=["lm_head", "embed_tokens"])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.requires_grad


def test_a_second_call_adds_to_the_first() -> None:
    model = tiny_llama()
    pylora.add_lora(model, r=8, target_modules=["q_proj"], modules_to_save=["lm_head"])
    first = trainable(model)
    pylora.add_lora(model, r=2, target_modules=["up_proj"])
    added = {n for n in trainable(model) if ".up_proj." in n}
    assert trainable(model) == first | added and len(added) == 4
    assert model.model.layers[0].self_attn.q_proj.r == 8
    assert model.model.layers[0].mlp.up_proj.r == 2


def test_a_layer_at_two_places_is_wrapped_once() -> None:
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": shared, "b": shared})
    pylora.add_lora(model, r=2)
    assert model["a"] is model["b"] and isinstance(model["a"], LoRALinear)


def test_hooks_and_mode_are_kept() -> None:
    model = nn.Sequential(nn.Linear(8, 8)).eval()
    seen: list[type] = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(type(module)))
    pylora.add_lora(model, r=2)
    assert not model[0].training
    model(torch.randn(1, 8))
    assert seen == [LoRALinear]


def test_takes_over_bitsandbytes_layers() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(bnb.nn.Linear4bit(64, 32, quant_type="nf4").to("cpu").train())
    pointer = model[0].weight.data_ptr()
    pylora.add_lora(model, r=2)
    assert isinstance(model[0].base_layer, NF4Linear)
    assert model[0].weight.data_ptr() == pointer


def test_the_head_named_outright_is_wrapped() -> None:
    model = tiny_llama()
    pylora.add_lora(model, r=2, target_modules=["lm_head"])
    assert wrapped(model) == {"lm_head"}


class WithConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 1)
        self.up = nn.Linear(4, 4)
        self.embed = nn.Embedding(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"target_modules": ["nothing"]}, r"target_modules is \['nothing'\].* such as up"),
        ({"target_modules": "nothing"}, "target_modules is 'nothing'"),
        ({"target_modules": ["up", "uq"]}, "target_modules is 'uq', which no module"),
        ({"target_modules": []}, r"target_modules is \[\]"),
        (
            {"target_modules": ["up", "conv"]},
            "conv is Conv1d; .* an NF4Linear or a Conv1D",
        ),
        ({"target_modules": ["up", "embed"]}, "embed is Embedding"),
        ({"modules_to_save": ["heads"]}, "modules_to_save is 'heads'"),
        ({"r": 0}, "r is 0"),
        ({"lora_dropout": 1.5}, "lora_dropout is 1.5"),
        ({"use_dora": True, "lora_bias": True}, "lora_bias is True"),
        ({"target_modules": "all-linear", "modules_to_save": ["up"]}, "no module of the model"),
    ],
)
def test_errors_change_nothing(arguments: dict[str, Any], message: str) -> None:
    model = WithConvolution()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        pylora.add_lora(model, **arguments)
    assert snapshot(model) == before


def test_wrapped_already_is_refused() -> None:
    model = pylora.add_lora(tiny_llama(), r=2, target_modules=["q_proj"])
    before = snapshot(model)
    for targets in ("all-linear", ["k_proj", "q_proj"]):
        with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj is wrapped already"):
            pylora.add_lora(model, r=2, target_modules=targets)
        assert snapshot(model) == before
    with pytest.raises(ValueError, match="self_attn has LoRA layers inside"):
        pylora.add_lora(model, target_modules=["up_proj"], modules_to_save=["self_attn"])
    assert snapshot(model) == before


def test_a_bare_linear_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="no module of the model"):
        pylora.add_lora(nn.Linear(4, 4))


def test_a_peft_model_is_refused() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"])
    model = peft.get_peft_model(tiny_llama(), config)
    for peft_model in (model, model.base_model.model):
        for helper in (pylora.add_lora, pylora.quantize_model, pylora.merge):
            with pytest.raises(ValueError, match="PEFT adapters"):
                helper(peft_model)


def test_a_last_component_as_a_string_is_explained() -> None:
    with pytest.raises(ValueError, match=r"regular expression for whole names.* \['q_proj'\]"):
        pylora.add_lora(tiny_llama(), target_modules="q_proj")


def test_none_stands_for_the_defaults() -> None:
    by_none = pylora.add_lora(tiny_llama(), r=2, target_modules=None, modules_to_save=None)
    by_default = pylora.add_lora(tiny_llama(), r=2)
    names = [n for n, p in by_default.named_parameters() if p.requires_grad]
    assert names == [n for n, p in by_none.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("family, head", [("Llama", "score"), ("Bert", "classifier")])
def test_the_head_of_a_classifier_is_trained_in_full(family: str, head: str) -> None:
    config = getattr(transformers, f"{family}Config")(
        vocab_size=48,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        pad_token_id=0,
    )
    kind = getattr(transformers, f"{family}ForSequenceClassification")
    model = pylora.quantize_model(kind(config))
    assert type(getattr(model, head)) is nn.Linear
    trained = pylora.add_lora(copy.deepcopy(model), r=2)
    assert getattr(trained, head).weight.requires_grad
    assert not isinstance(getattr(trained, head), LoRALinear)
    without = pylora.add_lora(copy.deepcopy(model), r=2, modules_to_save=())
    assert isinstance(getattr(without, head), LoRALinear)
    targeted = pylora.add_lora(copy.deepcopy(model), r=2, target_modules=[head])
    assert isinstance(getattr(targeted, head), LoRALinear)
