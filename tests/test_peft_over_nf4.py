"""PEFT's methods over NF4 layers compute what they compute over the dequantized weights."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pylora
from pylora.nn import NF4Linear
from pylora.testing import assert_as_accurate_as_torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
from peft_nf4_models import (  # noqa: E402
    IDS,
    adapted,
    dense_twin,
    logits,
    nf4_bytes,
    nf4_model,
    trained,
)

from pylora.integrations.peft import merge_report  # noqa: E402

TARGETS = ["q_proj", "down_proj"]
SQUARE = ["q_proj", "k_proj"]  # some methods share parameters among layers of one shape
# Method -> the configuration's class and arguments.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {"target_modules": "all-linear"}),
    "lora with biases": ("LoraConfig", {"bias": "all"}),
    "lora with a bias of B": ("LoraConfig", {"lora_bias": True, "target_modules": SQUARE}),
    "rslora with dropout": ("LoraConfig", {"use_rslora": True, "lora_dropout": 0.3}),
    "dora": ("LoraConfig", {"use_dora": True}),
    "mica": ("LoraConfig", {"init_lora_weights": "mica"}),
    "orthogonal": ("LoraConfig", {"init_lora_weights": "orthogonal"}),
    "adalora": ("AdaLoraConfig", {"total_step": 10}),
    "ia3": ("IA3Config", {"feedforward_modules": ["down_proj"]}),
    "loha": ("LoHaConfig", {}),
    "lokr": ("LoKrConfig", {}),
    "vera": ("VeraConfig", {"target_modules": SQUARE}),
    "oft": ("OFTConfig", {"oft_block_size": 8}),
    "boft": ("BOFTConfig", {"boft_block_size": 8}),
    "hra": ("HRAConfig", {}),
    "randlora": ("RandLoraConfig", {"r": 8}),
    "fourierft": ("FourierFTConfig", {"n_frequency": 50}),
    "vblora": ("VBLoRAConfig", {"vector_length": 8, "num_vectors": 16}),
    "shira": ("ShiraConfig", {"r": 2}),
    "miss": ("MissConfig", {}),
    "bat": ("MissConfig", {"init_weights": "bat"}),
    "c3a": ("C3AConfig", {"block_size": 32}),
    "road": ("RoadConfig", {"group_size": 8}),
    "waveft": ("WaveFTConfig", {"n_frequency": 50}),
    "delora": ("DeloraConfig", {}),
    "gralora": ("GraloraConfig", {"r": 8}),
    "hira": ("HiraConfig", {}),
    "psoft": ("PsoftConfig", {"r": 8}),
    "deft": ("DeftConfig", {}),
    "frod": ("FrodConfig", {"target_modules": SQUARE}),
    "peanut": ("PeanutConfig", {}),
    "supertuning": ("SupertuningConfig", {}),
    "tinylora": ("TinyLoraConfig", {}),
    "unilora": ("UniLoraConfig", {}),
}
# PEFT can take these out of the model only together with the layers.
NOT_UNMERGED = {
    "osf": ("OSFConfig", {"effective_rank": 8}),
    "lily": ("LilyConfig", {}),
    "beft": ("BeftConfig", {}),
}


def config_of(method: str) -> Any:
    name, options = (METHODS | NOT_UNMERGED)[method]
    if not hasattr(peft, name):
        pytest.skip(f"this PEFT has no {name}")
    return getattr(peft, name)(**{"target_modules": TARGETS, **options})


def adapter_state(model: Any) -> dict[str, Tensor]:
    return dict(peft.get_peft_model_state_dict(model))


@pytest.mark.parametrize("method", [*METHODS, *NOT_UNMERGED])
def test_a_method_equals_itself_over_dense_weights(method: str) -> None:
    base, config = nf4_model(bias=True), config_of(method)

    def over_dense(dtype: torch.dtype) -> list[Tensor]:
        model = adapted(dense_twin(base), config).to(dtype)
        torch.manual_seed(3)
        return trained(model)

    model = adapted(nf4_model(bias=True), config)
    initial, expected = adapter_state(model), adapter_state(adapted(dense_twin(base), config))
    assert initial.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(initial[key], value), key
    torch.manual_seed(3)
    assert_as_accurate_as_torch(trained(model), over_dense, torch.float32)
    assert all(map(torch.equal, nf4_bytes(model), nf4_bytes(base))) or method == "lora with biases"


@pytest.mark.parametrize(
    "method, safe",
    [(method, False) for method in METHODS]
    + [(method, True) for method in ("lora with a bias of B", "dora", "ia3", "boft")],
)
def test_merge_rounds_the_exact_sum_and_unmerge_gives_the_bytes_back(
    method: str, safe: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = adapted(nf4_model(bias=True), config_of(method))
    dense = adapted(dense_twin(nf4_model(bias=True)), config_of(method)).double()
    before, y = nf4_bytes(model), logits(model)
    objects = {name: module for name, module in model.named_modules()}
    dense.merge_adapter(safe_merge=safe)
    for _ in range(2):
        with caplog.at_level(logging.WARNING, "pylora.integrations.peft_install"):
            caplog.clear()
            model.merge_adapter(safe_merge=safe)
        report = merge_report(model)
        assert str(report.total) in caplog.text
        assert {layer.name.rpartition(".")[2] for layer in report.layers} >= {"q_proj"}
        for layer in report.layers:
            module = model.get_submodule(layer.name)
            exact = dense.get_submodule(layer.name).base_layer.weight
            merged = module.get_base_layer().nf4_weight.dequantize(torch.float32)
            error = float(torch.linalg.vector_norm(merged - exact))
            assert layer.error == pytest.approx(error, rel=1e-3) and 0 < layer.error < layer.weight
            assert module.merged
        merged_logits = logits(model)
        assert not torch.equal(merged_logits, y)
        model.unmerge_adapter()
        assert all(map(torch.equal, nf4_bytes(model), before))
        assert torch.equal(logits(model), y)
    with pytest.raises(ValueError, match="no NF4 layer"):
        merge_report(model)
    plain = model.merge_and_unload(safe_merge=safe)
    assert {type(m) for m in plain.modules() if isinstance(m, NF4Linear)} == {NF4Linear}
    assert torch.equal(logits(plain), merged_logits)
    assert plain.model.layers[0].self_attn.q_proj is objects[f"{report.layers[0].name}.base_layer"]


@pytest.mark.parametrize("method", ["lora", "boft", "ia3"])
def test_unload_gives_the_layers_back(method: str) -> None:
    base = nf4_model()
    layers, before, y = list(base.modules()), nf4_bytes(base), logits(base)
    plain = adapted(base, config_of(method)).unload()
    assert plain is base and list(base.modules()) == layers
    assert all(map(torch.equal, nf4_bytes(plain), before)) and torch.equal(logits(plain), y)
    assert {type(m) for m in plain.modules() if isinstance(m, NF4Linear)} == {NF4Linear}


def test_adapters_merged_one_after_another_are_rounded_once() -> None:
    model = adapted(nf4_model(bias=True), config_of("lora with a bias of B"))
    other = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False, lora_bias=True)
    model.add_adapter("other", other)
    before = nf4_bytes(model)
    model.merge_adapter(["default", "other"])
    together = nf4_bytes(model)
    model.unmerge_adapter()
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="additionally merging other"):
        model.merge_adapter(["other"])
    assert all(map(torch.equal, nf4_bytes(model), together))
    assert model.model.model.layers[0].self_attn.q_proj.merged_adapters == ["default", "other"]
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter(["other"])
    model.unmerge_adapter()
    assert all(map(torch.equal, nf4_bytes(model), before))


def test_adapters_of_two_methods_in_one_another() -> None:
    model = adapted(nf4_model(), config_of("lora"), mixed=True)
    model.add_adapter("other", config_of("loha"))
    model.set_adapter(["default", "other"])
    before = nf4_bytes(model)
    model.merge_adapter()
    assert not all(map(torch.equal, nf4_bytes(model), before))
    model.unmerge_adapter()
    assert all(map(torch.equal, nf4_bytes(model), before))
    plain = model.merge_and_unload()
    assert {type(m) for m in plain.modules() if isinstance(m, NF4Linear)} == {NF4Linear}


@pytest.mark.parametrize("safe", [False, True])
def test_a_merge_that_is_not_finite_changes_nothing(safe: bool) -> None:
    model = adapted(nf4_model(bias=True), config_of("lora with a bias of B"))
    layer = model.model.model.layers[0].self_attn.q_proj
    before = nf4_bytes(layer)
    layer.lora_B["default"].weight.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"non-finite|NaNs"):
        layer.merge(safe_merge=safe)
    assert not layer.merged and all(map(torch.equal, nf4_bytes(layer), before))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_initialization_that_changes_the_base_is_rounded_and_reported(
    init: str, caplog: pytest.LogCaptureFixture
) -> None:
    base = nf4_model()
    y = logits(base)
    config = peft.LoraConfig(target_modules=TARGETS, init_lora_weights=init)
    dense = peft.get_peft_model(dense_twin(base), config)
    with caplog.at_level(logging.WARNING):
        model = peft.get_peft_model(base, config)
    assert "rounding it to NF4 lost" in caplog.text
    for name, layer in model.named_modules():
        if name.endswith(".q_proj"):
            exact = dense.get_submodule(name)
            assert torch.equal(layer.lora_A["default"].weight, exact.lora_A["default"].weight)
            expected = pylora.quantize_nf4(exact.base_layer.weight, double_quant=True)
            assert torch.equal(layer.base_layer.packed_weight, expected.qweight)
    assert not torch.equal(logits(model), y) and (logits(model) - y).abs().max() < 0.05


@pytest.mark.parametrize("method", ["lora", "dora", "vera", "oft", "adalora"])
def test_a_saved_adapter_is_loaded_over_a_fresh_model(method: str, tmp_path: Path) -> None:
    model = adapted(nf4_model(), config_of(method))
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(nf4_model(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    lean = peft.PeftModel.from_pretrained(nf4_model(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(lean), logits(model))
    loaded.load_adapter(tmp_path, "again")
    loaded.set_adapter("again")
    assert torch.equal(logits(loaded), logits(model))


def test_transformers_own_adapters(tmp_path: Path) -> None:
    model = nf4_model()
    model.add_adapter(peft.LoraConfig(target_modules=TARGETS, init_lora_weights=False), "one")
    y = logits(model)
    peft_model = adapted(nf4_model(), config_of("lora"))
    peft_model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "two")
    model.set_adapter("two")
    assert torch.equal(logits(model), logits(peft_model)) and not torch.equal(logits(model), y)


def test_adapters_have_the_dtype_that_peft_gives_them() -> None:
    model = nf4_model()
    model = pylora.quantize_model(dense_twin(model).to(torch.bfloat16))
    peft_model = peft.get_peft_model(model, config_of("lora"))
    A = peft_model.model.model.layers[0].mlp.up_proj.lora_A["default"]
    assert A.weight.dtype == torch.float32
    assert peft_model(input_ids=IDS).logits.dtype == torch.bfloat16
    kept = peft.get_peft_model(peft_model.unload(), config_of("lora"), autocast_adapter_dtype=False)
    A = kept.model.model.layers[0].mlp.up_proj.lora_A["default"]
    assert A.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("safe", [False, True])
def test_a_merge_keeps_the_dtypes(safe: bool) -> None:
    model = pylora.quantize_model(dense_twin(nf4_model(bias=True)).to(torch.bfloat16))
    model = adapted(model, config_of("lora with a bias of B"))
    y = logits(model)
    model.merge_adapter(safe_merge=safe)
    base = model.model.model.layers[0].self_attn.q_proj.base_layer
    assert base.bias.dtype == base.weight.dtype == logits(model).dtype == torch.bfloat16
    model.unmerge_adapter()
    assert torch.equal(logits(model), y)


def test_all_linear_leaves_the_head_out() -> None:
    model = peft.get_peft_model(nf4_model(), config_of("lora"))
    layers = [m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear)]
    assert len(layers) == 7 and type(model.model.lm_head) is nn.Linear


def test_gpt2s_conv1d() -> None:
    config = transformers.GPT2Config(
        vocab_size=96, n_embd=64, n_head=4, n_layer=1, n_positions=32, bos_token_id=1
    )
    torch.manual_seed(0)
    base = pylora.quantize_model(transformers.GPT2LMHeadModel(config))
    dense = dense_twin(base)
    model = adapted(base, peft.LoraConfig(target_modules="all-linear", use_dora=True))
    assert_as_accurate_as_torch(
        logits(model),
        lambda dtype: logits(
            adapted(
                dense_twin(dense), peft.LoraConfig(target_modules="all-linear", use_dora=True)
            ).to(dtype)
        ),
        torch.float32,
    )
    assert type(model.unload().transformer.h[0].mlp.c_fc) is NF4Linear
