"""How PEFT comes to take NF4 layers, and what works on a model that has both."""

from __future__ import annotations

import copy
import importlib.util
import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pylora
from pylora.integrations import imports, peft_install
from pylora.integrations.peft_base_layer import PeftNF4Linear
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
from torch.distributed.fsdp import fully_shard  # noqa: E402

from pylora.integrations.peft import install, uninstall  # noqa: E402

LORA = peft.LoraConfig(target_modules="all-linear")
ADALORA = peft.AdaLoraConfig(target_modules="all-linear", total_step=10)
DORA = peft.LoraConfig(target_modules="all-linear", use_dora=True)


@pytest.fixture
def uninstalled() -> Iterator[None]:
    uninstall()
    yield
    install()


def run(script: str, *arguments: Path) -> str:
    command = [sys.executable, "-W", "ignore", "-c", script, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_model_is_made_before_peft_is_imported() -> None:
    script = """
import sys, torch, pylora
from importlib.util import find_spec
linear = torch.nn.Linear(64, 64)
model = pylora.quantize_model(torch.nn.Sequential(linear, torch.nn.Linear(64, 64)), ())
find_spec("peft")  # so do libraries find out if they may import it
assert "peft" not in sys.modules
import peft
model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"]))
print(type(model.base_model.model[0]).__name__, type(model.base_model.model[1]).__name__)
"""
    assert run(script) == "Linear NF4Linear\n"


def test_the_first_layer_is_unpickled_after_peft_was_imported(tmp_path: Path) -> None:
    model = adapted(nf4_model(), LORA)
    torch.save(model, tmp_path / "model.pt")
    script = """
import sys, torch, peft, pylora
from pylora.integrations import peft_install
assert not peft_install.is_installed()
model = torch.load(sys.argv[1], weights_only=False)
plain = model.merge_and_unload()
print(type(plain.model.layers[0].mlp.up_proj).__name__)
torch.save(plain(torch.arange(3, 23).view(2, 10)).logits, sys.argv[1])
"""
    assert run(script, tmp_path / "model.pt") == "NF4Linear\n"
    assert torch.equal(torch.load(tmp_path / "model.pt"), logits(model.merge_and_unload()))


def test_waiting_for_an_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    told = []
    for name in ("first_library", "second_library"):
        (tmp_path / f"{name}.py").write_text("value = 1")
        imports.when_imported(name, lambda name=name: told.append(name))
    imports.forget("second_library")
    finders = len(sys.meta_path)
    assert importlib.util.find_spec("first_library") is not None and not told
    assert importlib.import_module("first_library").value == 1
    importlib.import_module("second_library")
    assert told == ["first_library"] and len(sys.meta_path) == finders - 1
    imports.when_imported("second_library", lambda: told.append("at once"))
    assert told == ["first_library", "at once"]


def test_install_twice_and_uninstall(uninstalled: None) -> None:
    tuner, layer = peft.tuners.tuners_utils.BaseTuner, peft.tuners.lora.Linear
    own = (tuner.inject_adapter, tuner.__init__, layer.merge, layer.unmerge)
    with pytest.raises(ValueError, match=r"NF4Linear.*is not supported"):
        peft.get_peft_model(nf4_model(), peft.LoraConfig(target_modules=["q_proj"]))
    install()
    replaced = layer.merge
    install()
    assert layer.merge is replaced and peft_install.is_installed()
    model = adapted(nf4_model(), LORA)
    y = logits(model)
    uninstall()
    uninstall()
    assert own == (tuner.inject_adapter, tuner.__init__, layer.merge, layer.unmerge)
    assert torch.equal(logits(model), y)
    with pytest.raises(RuntimeError, match=r"call install\(\) again"):
        model.merge_adapter()
    install()
    model.model.model.layers[0].self_attn.q_proj.merged_adapters.clear()
    model.merge_adapter()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"target_parameters": ["up_proj.weight"]}, "packed weight of the NF4 layer .*up_proj"),
        ({"init_lora_weights": "corda"}, "'corda', for which PEFT analyses dense layers"),
        ({"modules_to_save": ["mlp"]}, "would train the NF4 layer .*mlp.gate_proj"),
    ],
)
def test_what_nf4_cannot_do_is_refused_first(options: dict[str, Any], message: str) -> None:
    model = nf4_model()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], **options))
    assert [type(module) for module in model.modules()] == kinds


def test_glora_is_refused() -> None:
    if not hasattr(peft, "GloraConfig"):
        pytest.skip("this PEFT has no GLoRA")
    model = nf4_model()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="GLoRA does not support this layer"):
        peft.get_peft_model(model, peft.GloraConfig(target_modules=["q_proj"]))
    assert [type(module) for module in model.modules()] == kinds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [LORA, DORA, ADALORA], ids=["lora", "dora", "adalora"])
def test_accelerate_computes_base_and_adapter_in_one_op(
    config: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = pylora.quantize_model(dense_twin(nf4_model(bias=True)).to(dtype))
    model = adapted(base, config)
    twin = dense_twin(model)
    report = pylora.accelerate(model, strict=True, verify=1)
    assert len(report.swapped) == 7 and not report.left
    calls = []
    monkeypatch.setattr(NF4Linear, "forward", lambda *_: calls.append("forward"))
    monkeypatch.setattr(PeftNF4Linear, "dense_weight", lambda *_: calls.append("dense weight"))

    def over_dense(dtype: torch.dtype) -> Any:
        return trained(copy.deepcopy(twin).to(dtype) if dtype == torch.float64 else twin)

    results = trained(model)
    if dtype == torch.bfloat16:  # a sum over all tokens and layers in bf16 has its own noise
        results, over_dense_all = results[:1], over_dense
        over_dense = lambda dtype: over_dense_all(dtype)[:1]  # noqa: E731
    assert_as_accurate_as_torch(results, over_dense, dtype)
    assert not calls
    monkeypatch.undo()
    before = nf4_bytes(model)
    model.merge_adapter()
    merged = logits(model)
    model.unmerge_adapter()
    assert all(map(torch.equal, nf4_bytes(model), before))
    assert torch.equal(logits(model.merge_and_unload()), merged)


def test_rows_of_a_batch_have_adapters_of_their_own() -> None:
    model = adapted(nf4_model(), LORA)
    model.add_adapter("other", peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    expected = []
    for row, name in enumerate(("default", "other")):
        model.set_adapter(name)
        expected.append(logits(model)[row])
    pylora.accelerate(model, strict=True)
    y = model.train()(input_ids=IDS, adapter_names=["default", "other"]).logits
    torch.testing.assert_close(y.detach(), torch.stack(expected))


def test_lora_never_reads_the_dense_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(nf4_model(), LORA)
    expected = trained(copy.deepcopy(model))
    calls = []
    monkeypatch.setattr(PeftNF4Linear, "dense_weight", lambda *_: calls.append(1))
    assert all(map(torch.equal, trained(model), expected)) and not calls


def test_copies_and_casts() -> None:
    model = adapted(nf4_model(), DORA)
    copied = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    y = logits(model)
    for other in (copied, loaded):
        assert torch.equal(logits(other), y)
        other.merge_adapter()
    assert not model.model.model.layers[0].mlp.up_proj.merged and torch.equal(logits(model), y)
    again = copy.deepcopy(copied)  # a copy of a merged model is unmerged by itself
    again.unmerge_adapter()
    assert torch.equal(logits(again), y)
    layer = model.to(torch.bfloat16).model.model.layers[0].mlp.up_proj.base_layer
    assert layer.weight.dtype == torch.bfloat16 and layer.packed_weight.dtype == torch.uint8
    assert logits(model).dtype == torch.bfloat16


def test_a_dense_weight_that_is_assigned_is_quantized() -> None:
    model = adapted(nf4_model(), LORA)
    layer = model.model.model.layers[0].mlp.up_proj.base_layer
    packed = layer.packed_weight
    layer.weight = layer.weight
    assert layer.packed_weight is packed and isinstance(layer, nn.Linear)
    weight = torch.randn(layer.out_features, layer.in_features)
    layer.weight = nn.Parameter(weight)
    expected = pylora.quantize_nf4(weight, double_quant=True)
    assert torch.equal(layer.packed_weight, expected.qweight)
    assert torch.equal(layer.weight, expected.dequantize())
    assert [name for name, _ in layer.named_parameters()] == [
        "weight",
        "absmax_bytes",
        "nested_bytes",
    ]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant: bool) -> None:
    expected = trained(adapted(nf4_model(), LORA).train())
    base = nf4_model()
    base.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    base.config.use_cache = False
    model = adapted(base, LORA).train()
    assert all(map(torch.equal, trained(model), expected))


def test_compiled_without_a_break() -> None:
    model = adapted(nf4_model(), DORA)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled), logits(model))


def test_prompt_tuning_over_nf4() -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    base = nf4_model()
    model, dense = adapted(nf4_model(), config), adapted(dense_twin(base), config)
    torch.testing.assert_close(logits(model), logits(dense))


def test_the_trainer_takes_the_model(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model = adapted(nf4_model(), LORA)
    y, before = logits(model), nf4_bytes(model)
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=2, learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True
    )
    data = [{"input_ids": row, "labels": row} for row in IDS]
    transformers.Trainer(model, arguments, train_dataset=data).train()
    assert not torch.equal(logits(model), y)
    assert all(map(torch.equal, nf4_bytes(model), before))


def test_a_merged_model_is_saved_as_bitsandbytes_loads_it(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    plain = adapted(nf4_model(), LORA).merge_and_unload()
    plain.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    weight = pylora.NF4Weight.from_bitsandbytes(loaded.model.layers[0].mlp.up_proj)
    assert torch.equal(weight.qweight, plain.model.layers[0].mlp.up_proj.weight)


def test_pylora_refuses_and_restores_as_before() -> None:
    model = adapted(nf4_model(), LORA)
    for refused in (pylora.quantize_model, pylora.add_lora, pylora.merge):
        with pytest.raises(ValueError, match="with PEFT adapters"):
            refused(model.get_base_model())
    pylora.add_lora(model.unload(), r=2)


@pytest.mark.skipif(
    not hasattr(torch.distributed, "is_available") or not torch.distributed.is_available(),
    reason="this torch has no distributed",
)
def test_fully_shard(tmp_path: Path) -> None:
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12):
        pytest.skip("fully_shard of torch < 2.12 cannot hold integer parameters")
    model = adapted(nf4_model(), LORA)
    expected = trained(copy.deepcopy(model))
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        for layer in model.model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        y = model(input_ids=IDS).logits
        torch.testing.assert_close(y, expected[0])
        y.square().mean().backward()
        layer = model.model.model.layers[0].mlp.up_proj
        assert layer.lora_B["default"].weight.grad is not None
        model.model.model.layers[0].reshard()
        with pytest.raises(RuntimeError, match="before fully_shard"):
            layer.merge()
        assert not layer.merged
    finally:
        torch.distributed.destroy_process_group()
