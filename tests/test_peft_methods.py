"""Each public method of PEFT's models and LoRA layers does after `accelerate` what it did before.

The methods are found by inspection, so that a new one without a case below makes a test fail.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pylora

pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
from peft.tuners.lora import LoraModel, bnb, layer  # noqa: E402
from peft_models import tiny_llama  # noqa: E402

IDS = torch.arange(3, 23).view(2, 10)
NAMES = ["other", "__base__"]
HIDDEN = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1))
LAYER = "base_model.model.model.layers.0.self_attn.q_proj"

Case = Callable[[Any, Path], Any]


def config(**settings: Any) -> Any:
    settings = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, **settings}
    return peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", **settings)


def peft_model(base: str) -> Any:
    model = peft.get_peft_model(tiny_llama(base, 1), config()).eval()
    model.add_adapter("other", config(r=3))
    return model


def saved(path: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file()}


def save(model: Any, path: Path, **kwargs: Any) -> dict[str, bytes]:
    model.save_pretrained(path, **kwargs)
    return saved(path)


def load_again(model: Any, path: Path) -> Tensor:
    model.save_pretrained(path)
    return peft.PeftModel.from_pretrained(model.unload(), path)(IDS).logits


def load_beside(model: Any, path: Path, name: str = "third") -> Tensor:
    model.save_pretrained(path)
    model.load_adapter(path, adapter_name=name)
    model.set_adapter(name)
    return model(IDS).logits


def without_adapter(model: Any, path: Path) -> Tensor:
    with model.disable_adapter():
        return model(IDS).logits


def card(model: Any, path: Path) -> dict[str, bytes]:
    model.create_or_update_model_card(path)
    return saved(path)


def generate(model: Any, path: Path, **kwargs: Any) -> Tensor:
    return model.generate(input_ids=IDS, max_new_tokens=3, do_sample=False, **kwargs)


def trained(model: Any, path: Path) -> Tensor:
    loss = model.train()(IDS, labels=IDS).loss
    loss.backward()
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return torch.cat([loss.detach().view(1), *grads])


MODEL_CASES: dict[str, list[Case]] = {
    "add_adapter": [
        lambda m, _: m.add_adapter("third", config()),
        lambda m, _: m.add_adapter("other", config()),
        lambda m, _: m.add_adapter("third", peft.IA3Config()),
    ],
    "create_or_update_model_card": [card],
    "delete_adapter": [
        lambda m, _: m.delete_adapter("other"),
        lambda m, _: m.delete_adapter("default"),
        lambda m, _: m.delete_adapter("none"),
    ],
    "disable_adapter": [without_adapter],
    "forward": [
        trained,
        lambda m, _: m(IDS).logits,
        lambda m, _: m(IDS, adapter_names=NAMES).logits,
        lambda m, _: m(IDS, adapter_names=["none", "other"]),
        lambda m, _: m(IDS, adapter_names=["other"]),
        lambda m, _: m(inputs_embeds=HIDDEN, labels=IDS[:, :5]).loss,
        lambda m, _: m(inputs_embeds=HIDDEN[..., :60]),
        lambda m, _: m(IDS, task_ids=IDS).logits,
    ],
    "from_pretrained": [load_again, lambda m, path: type(m).from_pretrained(m.unload(), path)],
    "generate": [
        generate,
        lambda m, path: generate(m, path, adapter_names=NAMES, num_beams=2),
        lambda m, path: generate(m, path, no_such_argument=1),
    ],
    "get_base_model": [lambda m, _: m.get_base_model()(IDS).logits],
    "get_layer_status": [lambda m, _: m.get_layer_status()],
    "get_model_status": [lambda m, _: m.get_model_status()],
    "get_nb_trainable_parameters": [lambda m, _: m.get_nb_trainable_parameters()],
    "get_prompt": [lambda m, _: m.get_prompt(2)],
    "get_prompt_embedding_to_save": [lambda m, _: m.get_prompt_embedding_to_save("default")],
    "load_adapter": [
        load_beside,
        lambda m, path: load_beside(m, path, "other"),
        lambda m, path: m.load_adapter(path, "third"),
    ],
    "prepare_inputs_for_generation": [
        lambda m, _: m.prepare_inputs_for_generation(IDS, attention_mask=torch.ones_like(IDS)),
        lambda m, _: m.prepare_inputs_for_generation(),
    ],
    "prepare_model_for_gradient_checkpointing": [
        lambda m, _: m.prepare_model_for_gradient_checkpointing(m.get_base_model())
    ],
    "print_trainable_parameters": [lambda m, _: m.print_trainable_parameters()],
    "push_to_hub": [lambda m, _: m.push_to_hub("not a/name")],
    "save_pretrained": [
        save,
        lambda m, path: save(m, path, selected_adapters=["other"], safe_serialization=False),
        lambda m, path: save(m, path, selected_adapters=["none"]),
    ],
    "set_adapter": [
        lambda m, _: m.set_adapter("other"),
        lambda m, _: m.set_adapter("none"),
        lambda m, path: (m.set_adapter("other"), trained(m, path)),
    ],
    "set_requires_grad": [
        lambda m, path: (m.set_requires_grad(["default", "other"]), trained(m, path)),
        lambda m, _: m.set_requires_grad("default", False),
        lambda m, _: m.set_requires_grad(["none"]),
    ],
    "supports_lora_conversion": [
        lambda m, _: m.supports_lora_conversion(),
        lambda m, _: m.supports_lora_conversion("none"),
    ],
}


TUNER_CASES: dict[str, list[Case]] = {
    "add_weighted_adapter": [
        lambda t, _: t.add_weighted_adapter(["default", "other"], [0.5, 2], "mix", "cat"),
        lambda t, _: t.add_weighted_adapter(["default", "other"], [0.5, 2], "mix", "svd"),
        lambda t, _: t.add_weighted_adapter(["default", "other"], [0.5, 2], "mix", "linear"),
        lambda t, _: t.add_weighted_adapter(["default", "none"], [0.5, 2], "mix"),
    ],
    "delete_adapter": [
        lambda t, _: t.delete_adapter("default"),
        lambda t, _: t.delete_adapter("none"),
    ],
    "disable_adapter_layers": [lambda t, _: t.disable_adapter_layers()],
    "enable_adapter_layers": [lambda t, _: (t.disable_adapter_layers(), t.enable_adapter_layers())],
    "forward": [lambda t, _: t(IDS).logits, lambda t, _: t()],
    "get_model_config": [lambda t, _: t.get_model_config(t.model)],
    "inject_adapter": [
        lambda t, _: (t.peft_config.update(third=config()), t.inject_adapter(t.model, "third")),
        lambda t, _: t.inject_adapter(t.model, "third"),
    ],
    "merge_adapter": [
        lambda t, _: t.merge_adapter(),
        lambda t, _: t.merge_adapter(["default", "other"], safe_merge=True),
        lambda t, _: t.merge_adapter(["none"]),
        lambda t, _: (t.merge_adapter(), t.merge_adapter()),
    ],
    "merge_and_unload": [
        lambda t, _: t.merge_and_unload()(IDS).logits,
        lambda t, _: t.merge_and_unload(safe_merge=True, adapter_names=["other"])(IDS).logits,
    ],
    "set_adapter": [
        lambda t, path: (t.set_adapter(["default", "other"]), trained(t, path)),
        lambda t, _: t.set_adapter("none"),
    ],
    "set_requires_grad": [lambda t, _: t.set_requires_grad("other")],
    "subtract_mutated_init": [lambda t, _: t.subtract_mutated_init({}, "default")],
    "supports_lora_conversion": [lambda t, _: t.supports_lora_conversion()],
    "unload": [lambda t, _: t.unload()(IDS).logits],
    "unmerge_adapter": [
        lambda t, _: (t.merge_adapter(), t.unmerge_adapter()),
        lambda t, _: t.unmerge_adapter(),
    ],
}


def initialized(name: str, *args: Any) -> list[Case]:
    """A method of a layer that sets its weights anew, for a known and an unknown adapter."""
    return [
        lambda layer, _: getattr(layer, name)("default", *args),
        lambda layer, _: getattr(layer, name)("none", *args),
    ]


LAYER_CASES: dict[str, list[Case]] = {
    "corda_init": initialized("corda_init", "corda"),
    "delete_adapter": [
        lambda m, _: m.delete_adapter("default"),
        lambda m, _: m.delete_adapter("none"),
    ],
    "enable_adapters": [
        lambda m, _: m.enable_adapters(False),
        lambda m, _: (m.enable_adapters(False), m.enable_adapters(True)),
    ],
    "forward": [
        lambda m, _: m(HIDDEN),
        lambda m, _: m(HIDDEN[..., :60]),
        lambda m, _: m(HIDDEN, adapter_names=NAMES),
        lambda m, _: m(HIDDEN, adapter_names=["other"]),
        lambda m, _: m(HIDDEN, no_such_argument=1),
        lambda m, _: m("text"),
    ],
    "get_base_layer": [lambda m, _: m.get_base_layer()(HIDDEN)],
    "get_base_weight": [lambda m, _: m.get_base_weight()],
    "get_delta_weight": initialized("get_delta_weight"),
    "loftq_init": initialized("loftq_init", config(loftq_config={"loftq_bits": 4})),
    "lora_ga_init": initialized("lora_ga_init", None),
    "merge": [
        lambda m, _: m.merge(),
        lambda m, _: m.merge(safe_merge=True, adapter_names=["other", "default"]),
        lambda m, _: m.merge(adapter_names=["none"]),
    ],
    "mica_init": initialized("mica_init"),
    "olora_init": initialized("olora_init"),
    "orthogonal_init": initialized("orthogonal_init"),
    "pissa_init": [*initialized("pissa_init", "pissa"), *initialized("pissa_init", "no")],
    "reset_lora_parameters": [
        lambda m, _: m.reset_lora_parameters("default", "gaussian"),
        lambda m, _: m.reset_lora_parameters("default", "no"),
    ],
    "resolve_lora_variant": [
        lambda m, _: m.resolve_lora_variant(config=config()),
        lambda m, _: m.resolve_lora_variant(config=config(use_dora=True)),
    ],
    "scale_layer": [lambda m, _: m.scale_layer(0.5), lambda m, _: m.scale_layer(1)],
    "set_adapter": [
        lambda m, _: m.set_adapter(["other"]),
        lambda m, _: m.set_adapter(["none"]),
        lambda m, _: m.set_adapter(["default", "other"]),
    ],
    "set_base_weight": [lambda m, _: m.set_base_weight(2 * m.get_base_weight())],
    "set_requires_grad": [lambda m, _: m.set_requires_grad(["other"], True)],
    "set_scale": [lambda m, _: m.set_scale("default", 3.0), lambda m, _: m.set_scale("none", 3.0)],
    "supports_lora_conversion": [lambda m, _: m.supports_lora_conversion("default")],
    "unmerge": [lambda m, _: (m.merge(), m.unmerge()), lambda m, _: m.unmerge()],
    "unscale_layer": [
        lambda m, _: (m.scale_layer(0.5), m.unscale_layer(0.25)),
        lambda m, _: (m.scale_layer(0.5), m.unscale_layer()),
    ],
    "update_layer": [
        lambda m, _: m.update_layer("third", 5, 2, config()),
        lambda m, _: m.update_layer("default", 5, 2, config(use_dora=True)),
        lambda m, _: m.update_layer("third", 0, 2, config()),
    ],
}

CLASSES = {
    (peft.PeftModelForCausalLM, "dense"): MODEL_CASES,
    (peft.PeftModelForCausalLM, "nf4"): MODEL_CASES,
    (LoraModel, "dense"): TUNER_CASES,
    (LoraModel, "nf4"): TUNER_CASES,
    (layer.Linear, "dense"): LAYER_CASES,
    (bnb.Linear4bit, "nf4"): LAYER_CASES,
}


def public_names(cls: type) -> dict[str, Any]:
    """The public methods and properties that PEFT and transformers give a class."""
    found: dict[str, Any] = {}
    for each in reversed(cls.__mro__):
        if each.__module__.partition(".")[0] in ("peft", "transformers"):
            found.update((k, v) for k, v in vars(each).items() if not k.startswith("_"))
    kinds = (classmethod, staticmethod, property)
    return {k: v for k, v in found.items() if inspect.isfunction(v) or isinstance(v, kinds)}


def cases_of(cls: type, cases: dict[str, list[Case]], name: str, member: Any) -> list[Case]:
    if name in cases:
        return cases[name]
    assert isinstance(member, property), f"{cls.__name__}.{name} has no case in this file"
    return [lambda model, _: getattr(model, name)]


METHODS = [
    pytest.param(cls, base, name, id=f"{cls.__name__}.{name}-{base}")
    for cls, base in CLASSES
    for name in public_names(cls)
]


def shown(value: Any) -> Any:
    """A value as tensors and things that can be compared."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, nn.Module):
        return [type(value).__name__, dict(value.state_dict())]
    if dataclasses.is_dataclass(value) and not isinstance(value, (type, dict)):
        return shown({f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
    if isinstance(value, dict):
        return {key: shown(held) for key, held in value.items()}
    if isinstance(value, (list, tuple)):
        return [shown(held) for held in value]
    return value if isinstance(value, (int, float, str, bytes, type(None))) else str(type(value))


def result(call: Callable[[], Any]) -> Any:
    """What the call returns, or the type and the message of its error."""
    torch.manual_seed(3)
    try:
        return shown(call())
    except Exception as error:  # whatever PEFT raises must be raised with pylora as well
        return [type(error).__name__, str(error)]


def assert_same(ours: Any, theirs: Any, where: str) -> None:
    assert type(ours) is type(theirs), f"{where}: {ours!r} instead of {theirs!r}"
    if isinstance(theirs, Tensor):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=lambda m: where + m)
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs), where
        for key, value in theirs.items():
            assert_same(ours[key], value, f"{where}[{key!r}]")
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs), where
        for index, value in enumerate(theirs):
            assert_same(ours[index], value, f"{where}[{index}]")
    else:
        assert ours == theirs, where


@pytest.fixture(scope="module")
def originals() -> dict[str, Any]:
    return {base: peft_model(base) for base in ("dense", "nf4")}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cls, base, name", METHODS)
def test_a_public_method_does_the_same(
    cls: type,
    base: str,
    name: str,
    originals: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    cases = cases_of(cls, CLASSES[cls, base], name, public_names(cls)[name])
    for number, case in enumerate(cases):
        outcomes = []
        for accelerated in (True, False):
            model = copy.deepcopy(originals[base])
            if accelerated:
                pylora.accelerate(model, strict=True)
            model(IDS)  # so that what an accelerated layer keeps is there
            target = {LoraModel: model.base_model}.get(cls)
            if target is None:
                target = model if isinstance(model, cls) else model.get_submodule(LAYER)
            assert isinstance(target, cls)
            path = tmp_path / f"{number}" / str(accelerated) / "adapter"
            path.mkdir(parents=True)
            monkeypatch.chdir(path)
            returned = result(lambda: case(target, Path(".")))  # noqa: B023
            printed = capsys.readouterr().out
            state = result(model.state_dict)
            logits = result(lambda: model(IDS).logits)  # noqa: B023
            outcomes.append([returned, printed, state, logits])
        assert_same(*outcomes, f"{name}, case {number}: ")


def test_an_outcome_that_differs_is_seen() -> None:
    theirs = {"y": torch.ones(2), "error": ["ValueError", "no"]}
    assert_same(copy.deepcopy(theirs), theirs, "")
    for ours in ({**theirs, "y": torch.ones(2) * 1.001}, {**theirs, "error": ["TypeError", "no"]}):
        with pytest.raises(AssertionError):
            assert_same(ours, theirs, "")
    with pytest.raises(AssertionError, match=r"Linear\.new has no case"):
        cases_of(layer.Linear, LAYER_CASES, "new", lambda self: None)
