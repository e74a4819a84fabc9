"""The short examples of other frameworks run on a tiny checkpoint; PEFT loads what they save."""

from __future__ import annotations

import logging
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import pylora

pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
yaml = pytest.importorskip("yaml")

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "drop_in"
STEPS = 3
# The layers of the tiny checkpoint that carry LoRA: seven for each of its two blocks.
LAYERS = 14


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama and a tokenizer of single bytes."""
    folder = tmp_path_factory.mktemp("checkpoint")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "<s>", "</s>", "<pad>"])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=vocabulary["<s>"],
        eos_token_id=vocabulary["</s>"],
        pad_token_id=vocabulary["<pad>"],
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def nothing_stays_patched() -> Iterator[None]:
    yield
    pylora.unpatch()


@pytest.mark.parametrize("script", sorted(FOLDER.glob("*.py")), ids=lambda script: script.stem)
def test_an_example_trains_an_adapter_that_peft_loads(
    script: Path,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip({"with_lightning": "lightning"}.get(script.stem, "torch"))
    if script.stem.startswith("with_trl"):
        pytest.importorskip("trl")
    out = tmp_path / "out"
    given = ["--model", str(checkpoint), "--out", str(out), "--steps", str(STEPS)]
    monkeypatch.setattr(sys, "argv", [str(script), *given])
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().out
    assert f"The adapter is in {out}" in printed
    if script.stem == "with_trl_sft":
        assert "patched  peft.tuners.lora.bnb.Linear4bit" in printed
    elif script.stem != "with_torch":
        assert f"{LAYERS} layers compute through pylora, 0 were left" in printed
    base = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    model = peft.PeftModel.from_pretrained(base, out)
    trained = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert len(trained) == LAYERS and all(p.isfinite().all() and p.any() for p in trained)


def test_the_plugin_of_axolotl_is_where_its_configuration_says(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Axolotl is not installed for the tests; a class in its place is all that the plugin needs."""
    base = ModuleType("axolotl.integrations.base")
    base.BasePlugin = type("BasePlugin", (), {})  # type: ignore[attr-defined]
    for name in ("axolotl", "axolotl.integrations"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, base.__name__, base)
    monkeypatch.delitem(sys.modules, "pylora.integrations.axolotl", raising=False)
    config = yaml.safe_load((FOLDER / "with_axolotl.yml").read_text())
    [entry] = config["plugins"]
    module, _, name = entry.rpartition(".")
    plugin = getattr(__import__(module, fromlist=[name]), name)()
    monkeypatch.delitem(sys.modules, module)
    network = torch.nn.Sequential(torch.nn.Linear(64, 64))
    model = peft.get_peft_model(network, peft.LoraConfig(target_modules=["0"]))
    with caplog.at_level(logging.INFO, logger="axolotl"):
        plugin.post_lora_load(config, model)
    assert re.search(r"1 layers compute through pylora, 0 were left", caplog.text)
