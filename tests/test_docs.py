"""The code of the documents for users runs as it is printed, from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import pylora
import pylora.functional as F

ROOT = Path(__file__).resolve().parent.parent
pytest.importorskip("bitsandbytes")
pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A tiny random Llama, in the place of a model from a hub."""
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def run(document: str, checkpoint: Path) -> dict[str, Any]:
    """Runs the Python blocks of a document, in which a model id stands for the checkpoint."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
    code, count = re.subn(r'model_id = ".*"', f"model_id = {str(checkpoint)!r}", "\n".join(blocks))
    assert count == 1
    names: dict[str, Any] = {}
    exec(compile(code, document, "exec"), names)
    return names


def test_drop_in_page_runs(checkpoint: Path) -> None:
    names = run("docs/drop-in.md", checkpoint)
    assert len(names["report"].swapped) == 14 and not names["report"].left
    assert len(names["nf4_report"].swapped) == 14 and not names["nf4_report"].left
    assert sum(type(m) is pylora.nn.LoRALinear for m in names["model"].modules()) == 14
    assert pylora.patch().patched  # the page leaves nothing patched that this would not undo
    pylora.unpatch()


def test_adapters_page_runs(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the page writes an adapter
    names = run("docs/adapters.md", checkpoint)
    assert pylora.active_adapter(names["model"]) == "chat"
    assert set(pylora.adapter_names(names["model"])) == {"chat", "code"}
    assert (tmp_path / "adapters" / "chat" / "adapter.safetensors").exists()


def test_adapters_and_merging_page_runs(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the page writes adapters and a checkpoint
    names = run("docs/adapters-and-merging.md", checkpoint)
    assert len(names["report"].layers) == 14
    assert names["report"].total.error_of_output is not None
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert merged.dtype == torch.bfloat16
    assert names["model"].model.layers[0].mlp.up_proj.merged


def test_readme_runs(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its blocks run one after the other, with a model and tensors in the places of "..."."""
    monkeypatch.chdir(tmp_path)  # it writes adapters
    text = (ROOT / "README.md").read_text()
    code, count = re.subn(
        r"^model = \.\.\..*$",
        f"import transformers\nmodel = transformers.AutoModelForCausalLM.from_pretrained("
        f"{str(checkpoint)!r})",
        "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)),
        flags=re.MULTILINE,
    )
    assert count == 1
    weight, lora_A, lora_B = torch.randn(96, 64), torch.randn(4, 64), torch.randn(96, 4)
    up = F.Projection(pylora.quantize_nf4(weight), lora_A, lora_B, 0.5)
    down = F.Projection(pylora.quantize_nf4(weight.t()), lora_B.t(), lora_A.t(), 0.5)
    adapter = F.AdapterTensors(torch.randn(4, 64), None, torch.randn(64, 4), None)
    names = dict(
        x=torch.randn(8, 64),
        weight=weight,
        bias=torch.randn(96),
        lora_A=lora_A,
        lora_B=lora_B,
        scaling=0.5,
        projections=[up, up, up],
        gate=up,
        up=up,
        down=down,
        lora_As=lora_A.expand(2, 4, 64),
        lora_Bs=lora_B.expand(2, 96, 4),
        scalings=torch.ones(2),
        adapters=[adapter, adapter],
        adapter_ids=torch.arange(8) % 2,
    )
    exec(compile(code, "README.md", "exec"), names)
    assert set(pylora.adapter_names(names["model"])) == {"default", "summary", "chat"}
    assert pylora.active_adapter(names["model"]) == pylora.Stack("summary", "chat")
    assert (tmp_path / "adapters" / "chat").is_dir()
    assert names["y"].shape == (8, 64)
