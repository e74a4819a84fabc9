"""The example with three adapters runs on a tiny model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))

import multi_task_adapters  # noqa: E402


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A tiny random Llama and a tokenizer of single bytes."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "</s>"])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", pad_token="</s>"
    ).save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        eos_token_id=vocabulary["</s>"],
        pad_token_id=vocabulary["</s>"],
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path


def test_each_adapter_serves_its_own_task(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--steps 50 --batch-size 4 --validation-examples 16 --reduction-factor 4"
    options += " --learning-rate 3e-2"
    result: Any = multi_task_adapters.main(["--model", str(checkpoint), *options.split()])
    losses = result["losses"]
    for task in multi_task_adapters.TASKS:
        own = losses[task][task]
        assert own < losses["no adapter"][task] - 0.2
        for other in multi_task_adapters.TASKS:
            assert other == task or own < losses[other][task]
        assert losses["Fuse"][task] < losses["no adapter"][task]
    assert len(result["answers"]) == 3 and result["share"] > 0
    printed = capsys.readouterr().out
    assert "copies nothing" in printed and "of the NF4 base" in printed
