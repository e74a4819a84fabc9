"""`pylora.accelerate`: models of PEFT and bitsandbytes compute through pylora."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pylora
from pylora import dispatch
from pylora.calls import LoraLinearCall
from pylora.testing import assert_as_accurate_as_torch

bnb = pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")
from peft_models import assert_right as assert_run_right  # noqa: E402
from peft_models import outcome, with_dense_bases  # noqa: E402

from benchmarks.models.bitsandbytes_layers import linear4bit  # noqa: E402

IDS = torch.arange(3, 23).view(2, 10)
BASES = ["dense", "nf4", "nf4 doubly quantized"]


class TinyModel(nn.Module):
    """Two residual blocks of linear layers with and without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 64)
        self.up = nn.ModuleList(nn.Linear(64, 128) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(128, 64, bias=False) for _ in range(2))
        self.head = nn.Linear(64, 32, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(torch.tanh(up(x)))
        return self.head(x)


def base_model(base: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = TinyModel().to(dtype)
    if base != "dense":
        for layers in (model.up, model.down):
            for index, dense in enumerate(layers):
                layers[index] = linear4bit(dense, "doubly" in base)
        model.is_loaded_in_4bit = True  # PEFT takes its layers for bitsandbytes by this mark
    return model


def peft_model(base: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    settings = {"r": 4, "target_modules": r".*(up|down)\.\d+", **settings}
    config = peft.LoraConfig(init_lora_weights=False, **settings)
    return peft.get_peft_model(base_model(base, dtype), config).train()


def assert_right(
    model: nn.Module,
    dtype: torch.dtype = torch.float32,
    run: Callable[[nn.Module], Any] = lambda model: outcome(model, IDS),
) -> None:
    assert_run_right(model, run, dtype)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("base", BASES)
def test_output_and_gradients_are_right(base: str, dtype: torch.dtype) -> None:
    model = peft_model(base, dtype)
    report = pylora.accelerate(model)
    assert len(report.swapped) == 4 and not report.left
    for _ in range(3):  # the second call keeps its plan, the third uses it
        assert_right(model, dtype)
    with torch.no_grad():
        assert_right(model.eval(), dtype, lambda model: model(IDS))


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_bias": True},
        {"use_rslora": True, "lora_alpha": 3},
        {"rank_pattern": {"up.0": 7}, "alpha_pattern": {"up.0": 5}},
        {"use_dora": True},
        {"modules_to_save": ["head"]},
        {"bias": "all"},
    ],
    ids=str,
)
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_every_option_of_lora_is_right(base: str, settings: dict[str, Any]) -> None:
    model = peft_model(base, **settings)
    pylora.accelerate(model, strict=True)
    for _ in range(2):
        assert_right(model)


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_several_adapters_are_added_switched_disabled_and_deleted(base: str) -> None:
    model = peft_model(base)
    config = peft.LoraConfig(r=3, target_modules=r".*up\.\d+", init_lora_weights=False)
    model.add_adapter("other", config)
    pylora.accelerate(model, strict=True)
    for choose in (
        lambda: model.base_model.set_adapter("other"),
        lambda: model.base_model.set_adapter(["default", "other"]),
        lambda: model.base_model.set_adapter("default"),
    ):
        choose()
        for _ in range(2):
            assert_right(model)
    with model.disable_adapter():
        assert_right(model, run=lambda model: model(IDS).detach())
    assert_right(model)
    model.delete_adapter("other")
    assert_right(model)


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_merge_and_unmerge_are_those_of_peft(base: str) -> None:
    model = peft_model(base).eval()
    twin = copy.deepcopy(model)
    pylora.accelerate(model)
    for change in ("merge_adapter", "unmerge_adapter"):
        for m in (model, twin):
            getattr(m, change)()
        assert_right(model, run=lambda model: model(IDS).detach())
        for ours, theirs in zip(model.state_dict().items(), twin.state_dict().items(), strict=True):
            assert ours[0] == theirs[0] and torch.equal(ours[1], theirs[1]), ours[0]
    assert not any("pylora" in type(m).__module__ for m in model.merge_and_unload().modules())


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_every_row_may_have_its_own_adapter(base: str) -> None:
    model = peft_model(base).eval()
    config = peft.LoraConfig(r=3, target_modules=r".*up\.\d+", init_lora_weights=False)
    model.add_adapter("other", config)
    pylora.accelerate(model)
    names = ["other", "__base__"]
    assert_right(model, run=lambda model: model(IDS, adapter_names=names).detach())


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_dropout_is_drawn_anew_and_checked(base: str) -> None:
    model = peft_model(base, lora_dropout=0.5)
    pylora.accelerate(model, verify=2)
    outputs = [model(IDS) for _ in range(4)]  # the first two calls of each layer are verified
    assert not any(torch.equal(outputs[0], other) for other in outputs[1:])
    torch.manual_seed(5)
    first = outcome(model, IDS)
    torch.manual_seed(5)
    assert all(map(torch.equal, first, outcome(model, IDS)))
    assert_right(model.eval())


def test_verify_names_the_layer_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    from pylora.integrations import peft_layers

    model = peft_model("nf4")
    pylora.accelerate(model, verify=1)
    right = peft_layers.run_output
    monkeypatch.setattr(peft_layers, "run_output", lambda call: 1.01 * right(call))
    with pytest.raises(AssertionError, match=r"base_model.model.up.0 is not as accurate as torch"):
        model(IDS)


def test_autocast_with_fp32_lora_is_right() -> None:
    model = peft_model("nf4", torch.bfloat16)
    pylora.accelerate(model)

    def run(model: nn.Module) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=model.head.weight.itemsize < 8):
            return model(IDS).detach()

    for _ in range(2):
        assert_right(model, torch.bfloat16, run)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_is_right(use_reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    model = peft_model("nf4")
    pylora.accelerate(model)

    def run(model: nn.Module) -> tuple[Tensor, Tensor]:
        inner = model.base_model.model
        inner.embed.weight.requires_grad_(True)
        whole = nn.ModuleDict({"model": inner})
        whole.forward = lambda ids: inner.head(
            checkpoint(
                lambda x: inner.down[0](torch.tanh(inner.up[0](x))),
                inner.embed(ids),
                use_reentrant=use_reentrant,
            )
        )
        return outcome(whole, IDS)

    assert_right(model, run=run)


def test_a_hook_on_a_part_is_called() -> None:
    model = peft_model("nf4")
    pylora.accelerate(model)
    layer, seen = model.base_model.model.up[0], []
    for part in (layer, layer.lora_A["default"], layer.base_layer):
        part.register_forward_hook(lambda module, x, y: seen.append(type(module)))
    assert_right(model)
    assert {nn.Linear, bnb.nn.Linear4bit, type(layer)} <= set(seen)


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_compiled_models_are_right(base: str) -> None:
    torch.compiler.reset()
    model = peft_model(base)
    pylora.accelerate(model)
    compiled = torch.compile(model, backend="aot_eager")
    (y, *gradients), (expected, *others) = outcome(compiled, IDS), outcome(model, IDS)
    assert torch.equal(y, expected)
    for gradient, other in zip(gradients, others, strict=True):
        # Over a dense weight the eager backward is autograd's own, which adds in another order.
        tolerance = 0.0 if base == "nf4" else 1e-5
        torch.testing.assert_close(gradient, other, rtol=tolerance, atol=tolerance)


def test_copies_and_pickles_compute_on_their_own() -> None:
    model = peft_model("nf4")
    pylora.accelerate(model)
    before = model(IDS)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    assert torch.equal(model(IDS), before)
    assert not torch.equal(twin(IDS), before)
    assert_right(twin)
    layer = model.base_model.model.up[0]
    x = torch.randn(2, 64)
    unpickled = pickle.loads(pickle.dumps(layer.lora_A))
    assert torch.equal(unpickled["default"](x), layer.lora_A["default"](x))


def test_restore_gives_back_what_was_there() -> None:
    model = peft_model("nf4 doubly quantized").eval()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    expected = model(IDS)
    for _ in range(2):
        pylora.accelerate(model)
    model(IDS)
    pylora.restore(model)
    after = {name: dict(vars(module)) for name, module in model.named_modules()}
    assert before == after
    assert torch.equal(model(IDS), expected)


def test_layers_that_change_later_are_seen() -> None:
    """A new adapter, a new weight and a cast must not meet a plan that was kept."""
    model = peft_model("nf4")
    pylora.accelerate(model)
    layer = model.base_model.model.up[0]
    for _ in range(2):
        model(IDS)
    with torch.no_grad():
        layer.base_layer.weight.data = layer.base_layer.weight.flip(0).contiguous()
    assert_right(model)
    layer.base_layer.weight = linear4bit(nn.Linear(64, 128), False).weight
    assert_right(model)
    model.set_scale("default", 0.25) if hasattr(model, "set_scale") else layer.set_scale(
        "default", 0.25
    )
    assert_right(model)


def test_evaluating_does_not_repack_the_weights_of_bitsandbytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On AVX-512, bitsandbytes repacks a layer in its first eval forward, which breaks training."""
    model = peft_model("nf4")
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = True
    before = {name: p.clone() for name, p in model.named_parameters()}
    pylora.accelerate(model, strict=True)
    with torch.no_grad():
        model.eval()(IDS)
        with model.disable_adapter():
            model(IDS)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert_right(model.train())


def test_plain_4bit_layers_compute_in_their_compute_dtype() -> None:
    model = base_model("nf4", torch.bfloat16)
    report = pylora.accelerate(model, strict=True)
    assert [layer.name for layer in report.swapped] == ["up.0", "up.1", "down.0", "down.1"]
    assert_right(model, torch.bfloat16, lambda model: model(IDS).detach())
    layer = model.up[0]
    assert layer(torch.randn(2, 64)).dtype == torch.float32


def test_what_is_left_is_reported_with_its_reason() -> None:
    model = base_model("nf4")
    model.up[0] = bnb.nn.Linear4bit(64, 128, quant_type="fp4").to("cpu")
    model.down[1].forward = lambda x: x[..., :64]
    report = pylora.accelerate(model)
    left = {layer.name: layer.reason for layer in report.left}
    assert left.keys() == {"up.0", "down.1"}
    assert "quant_type 'fp4'" in left["up.0"] and "replaced its forward" in left["down.1"]
    assert "2 layers compute through pylora, 2 were left" in str(report)
    pylora.restore(model)
    with pytest.raises(ValueError, match=r"2 layers cannot .* the first is up.0, because"):
        pylora.accelerate(model, strict=True)
    assert not any("_pylora_swap" in vars(module) for module in model.modules())


def test_another_method_of_peft_is_left_and_unharmed() -> None:
    config = peft.IA3Config(target_modules=["up.0"], feedforward_modules=[])
    model = peft.get_peft_model(base_model("nf4"), config)
    expected = outcome(model, IDS)
    report = pylora.accelerate(model)
    assert [layer.reason for layer in report.left] == [
        "pylora does not compute PEFT's ia3.Linear4bit"
    ]
    assert len(report.swapped) == 4  # its base is one of them
    for ours, theirs in zip(outcome(model, IDS), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_call_that_computes_as_before_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    model = peft_model("dense")
    pylora.accelerate(model)
    model.base_model.model.up[0].lora_B.default.register_forward_hook(lambda *_: None)
    with caplog.at_level(logging.INFO, "pylora.integrations.swaps"):
        for _ in range(2):
            model(IDS)
    why = "a hook must see the calls of its parts"
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [f"base_model.model.up.0 computes as before: {why}"]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_dora_is_fused_and_verified(base: str, dropout: float, caplog: Any) -> None:
    model = peft_model(base, use_dora=True, lora_dropout=dropout)
    pylora.accelerate(model, verify=2)
    with caplog.at_level(logging.INFO, "pylora.integrations.swaps"):
        for _ in range(2):
            outcome(model, IDS)
    assert not caplog.records
    layer = model.base_model.model.up[0]
    layer.base_layer.weight = (
        nn.Parameter(torch.randn(128, 64), False)
        if base == "dense"
        else linear4bit(nn.Linear(64, 128), True).weight
    )
    assert_right(model.eval())  # the norm of the rows is that of the new weight


@pytest.fixture
def patched() -> Iterator[pylora.PatchReport]:
    yield pylora.patch()
    pylora.unpatch()


@pytest.mark.parametrize("base", BASES)
def test_patched_classes_compute_through_pylora(
    base: str, patched: pylora.PatchReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(patched.patched) == 5 and not patched.left
    model, calls, choose = peft_model(base), [], dispatch.choose
    monkeypatch.setattr(dispatch, "choose", lambda call: calls.append(type(call)) or choose(call))
    actual = [outcome(model, IDS) for _ in range(2)]
    assert calls.count(LoraLinearCall) >= 4
    plain = with_dense_bases(model)
    pylora.unpatch()
    assert not any("forward" in vars(module) for module in model.modules())
    for result in actual:
        assert_as_accurate_as_torch(
            result,
            lambda dtype: outcome(copy.deepcopy(plain).to(dtype), IDS),
            torch.float32,
        )


def test_patch_is_idempotent_and_unpatch_undoes_it() -> None:
    from peft.tuners.lora import layer

    own = (bnb.nn.Linear4bit.forward, layer.Linear.forward)
    for _ in range(2):
        pylora.patch()
    assert bnb.nn.Linear4bit.forward is not own[0] and layer.Linear.forward is not own[1]
    pylora.unpatch()
    assert (bnb.nn.Linear4bit.forward, layer.Linear.forward) == own
    report = pylora.patch(peft=False)
    assert layer.Linear.forward is own[1]
    assert report.patched == ("bitsandbytes.nn.Linear4bit",)
    assert report.left["peft.tuners.lora.layer.Linear"] == "peft is False"
    pylora.unpatch()


def test_patched_layers_that_pylora_cannot_compute_go_on(
    patched: pylora.PatchReport, caplog: pytest.LogCaptureFixture
) -> None:
    layer, x = bnb.nn.Linear4bit(64, 128, quant_type="fp4").to("cpu").train(), torch.randn(2, 64)
    with caplog.at_level(logging.INFO, "pylora.integrations.swaps"):
        y = layer(x)
    assert "a Linear4bit computes as before: source has quant_type 'fp4'" in caplog.text
    pylora.unpatch()
    assert torch.equal(layer(x), y)


def test_patch_verifies(patched: pylora.PatchReport, monkeypatch: pytest.MonkeyPatch) -> None:
    from pylora.integrations import peft_layers

    model = peft_model("nf4")
    model(IDS)
    pylora.patch(verify=1)
    right = peft_layers.run_output
    monkeypatch.setattr(peft_layers, "run_output", lambda call: 1.01 * right(call))
    with pytest.raises(AssertionError, match="a Linear4bit is not as accurate as torch"):
        model(IDS)


def test_the_callback_accelerates_the_model_of_a_trainer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    PyloraCallback = pylora.integrations.transformers.PyloraCallback
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    lora = peft.LoraConfig(r=4, target_modules="all-linear")
    losses = []
    for callbacks in ([], [PyloraCallback(strict=True, verify=1)]):
        torch.manual_seed(0)
        model = peft.get_peft_model(transformers.LlamaForCausalLM(config), lora)
        trainer = transformers.Trainer(
            model,
            transformers.TrainingArguments(
                str(tmp_path), max_steps=3, use_cpu=True, report_to=[], disable_tqdm=True
            ),
            train_dataset=[{"input_ids": row, "labels": row} for row in IDS],
            callbacks=callbacks,
        )
        losses.append(trainer.train().training_loss)
    assert len(callbacks[0].report.swapped) == 7
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"fuse": ["heads"]}, ValueError, "fuse has 'heads'; it must have only qkv, mlp"),
        ({"verify": -1}, ValueError, "verify is -1"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        pylora.accelerate(nn.Linear(2, 2), **arguments)
    with pytest.raises(TypeError, match=r"model is str; it must be an nn\.Module"):
        pylora.accelerate("gpt2")


def test_variants_that_pylora_does_not_compute_are_reported_and_right() -> None:
    blocks = peft.BdLoraConfig(target_modules_bd_a=["down"], target_modules_bd_b=["up"], nblocks=2)
    model = peft_model("dense", use_bdlora=blocks)
    expected = outcome(model, IDS)
    report = pylora.accelerate(model)
    assert {layer.reason for layer in report.left} == {"adapter default is BdLoraLinearVariant"}
    assert all(map(torch.equal, outcome(model, IDS), expected))
    model.add_adapter("plain", peft.LoraConfig(r=3, target_modules=r".*up\.\d+"))
    model.set_adapter("plain")
    assert not pylora.accelerate(model, strict=True).left


def test_adapters_without_values_yet_are_taken(tmp_path: Path) -> None:
    model = peft_model("nf4")
    model.save_pretrained(tmp_path)
    config = peft.LoraConfig(r=4, target_modules=r".*(up|down)\.\d+")
    empty = peft.get_peft_model(base_model("nf4"), config, low_cpu_mem_usage=True)
    assert "on cpu, meta" in str(pylora.accelerate(empty, strict=True))
    empty.load_adapter(tmp_path, "default", low_cpu_mem_usage=True)
    assert_right(empty.train())
