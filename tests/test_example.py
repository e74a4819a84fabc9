"""The demo runs from end to end on a tiny Llama: every method, resuming, Ctrl-C, bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))

import finetune_qlora
from _data import IGNORED, completion_collator
from _options import METHODS, parse_options

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("matplotlib")

SCRIPT = Path(finetune_qlora.__file__)
STEPS = 6


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a two-layer Llama with random weights and a tokenizer of single bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-llama")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    lines = [json.dumps({"prompt": f"{i} + 1", "completion": f"is {i + 1}"}) for i in range(80)]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def arguments(model_folder: Path, data: Path, tmp_path: Path) -> list[str]:
    return [
        *("--model", str(model_folder), "--data", str(data), "--out", str(tmp_path / "out")),
        *("--batch-size", "4", "--max-length", "48", "--learning-rate", "0.01"),
        *("--r", "4", "--sample-tokens", "4", "--threads", "1"),
    ]


def summary(out: Path) -> dict[str, Any]:
    return json.loads((out / "summary.json").read_text())


def assert_no_leftovers(out: Path) -> None:
    assert not [path for path in out.rglob(".*")], "a temporary file was left behind"


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_and_writes_what_it_promises(
    method: str, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if method == "peft":
        pytest.importorskip("bitsandbytes")
    out = tmp_path / "out"
    words = ["--method", method, "--steps", "12", "--measure-switch"]
    status = finetune_qlora.main([*arguments, *words])
    printed = capsys.readouterr().out
    assert status == 0, printed
    result = summary(out)
    assert result["finished"] and len(result["losses"]) == 12
    # A prompt changes little in a model with random weights, and AdaLoRA learns slowly at first.
    least = 0.15 if method in ("adalora", "prompt") else 0.3
    assert result["after"]["loss"] < result["before"]["loss"] - least
    assert result["tokens_per_second"] > 0 < result["step_seconds"]
    assert result["switch_seconds"] > 0
    assert result["memory_bytes"]["peak"] > result["memory_bytes"]["libraries"] > 0
    assert len(result["before"]["samples"]) == len(result["after"]["samples"]) == 3
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "validation loss" in printed and str(out / "summary.json") in printed
    folder = out / ("model" if method == "full" else "adapter")
    (weights,) = folder.glob("*.safetensors")
    assert result["saved_bytes"] == weights.stat().st_size
    if method == "full":
        assert "lm_head.weight" not in load_file(weights), "the tied head is in the file twice"
    if method in ("qlora", "lora", "dora", "hybrid"):
        assert result["peft_check"]["agrees"], result["peft_check"]
    assert_no_leftovers(out)


def test_hybrid_also_trains_whole_modules(arguments: list[str], tmp_path: Path) -> None:
    name = "model.layers.0.mlp.down_proj"
    options = ["--method", "hybrid", "--steps", "2", "--samples", "0", "--full-modules", name]
    assert finetune_qlora.main([*arguments, *options]) == 0
    checkpoint = tmp_path / "out" / "checkpoints" / "checkpoint-2"
    for folder in (checkpoint, tmp_path / "out" / "adapter"):
        saved = load_file(folder / "adapter_model.safetensors")
        whole = [key for key, value in saved.items() if value.shape == (64, 128)]
        assert len(whole) == 1 and name in whole[0]
        assert saved[whole[0]].dtype == torch.float32


@pytest.mark.parametrize("method", ["qlora", "full", "adapter", "prompt"])
def test_a_resumed_run_gives_the_losses_of_an_uninterrupted_one(
    method: str, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = [*arguments, "--method", method, "--steps", str(STEPS), "--samples", "0", "--no-check"]
    if method == "qlora":
        common += ["--dropout", "0.3"]  # dropout makes the losses depend on the random state
    assert finetune_qlora.main(common) == 0
    whole = summary(tmp_path / "out")

    stop_after(3, monkeypatch)
    parts = [*common, "--out", str(tmp_path / "parts")]
    assert finetune_qlora.main(parts) == 130
    assert len(summary(tmp_path / "parts")["losses"]) == 3
    monkeypatch.undo()
    # All options but the folders come from the checkpoint.
    folders = [*arguments[:4], "--out", str(tmp_path / "parts")]
    assert finetune_qlora.main([*folders, "--resume", "--no-check", "--samples", "0"]) == 0
    resumed = summary(tmp_path / "parts")
    assert resumed["losses"] == whole["losses"]
    assert resumed["after"]["loss"] == whole["after"]["loss"]
    assert resumed["before"] == whole["before"]
    # A finished run does not train any further.
    assert finetune_qlora.main([*folders, "--resume", "--no-check", "--samples", "0"]) == 0
    assert summary(tmp_path / "parts")["losses"] == whole["losses"]
    assert summary(tmp_path / "parts")["after"]["loss"] == whole["after"]["loss"]


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the Trainer send this process SIGINT during step `step`."""
    from transformers import Trainer

    training_step = Trainer.training_step

    def interrupting(trainer: Any, *rest: Any) -> torch.Tensor:
        if trainer.state.global_step == step - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return training_step(trainer, *rest)

    monkeypatch.setattr(Trainer, "training_step", interrupting)


def test_resume_refuses_another_job(
    arguments: list[str],
    model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refused(*words: str) -> str:
        assert finetune_qlora.main([*arguments, "--resume", *words]) == 2
        return capsys.readouterr().err

    assert "there is no checkpoint in" in refused()
    quick = ["--steps", "1", "--samples", "0", "--no-check"]
    assert finetune_qlora.main([*arguments, *quick]) == 0
    assert "has method qlora, but --method lora was given" in refused("--method", "lora")
    assert "has steps 1, but --steps 9 was given" in refused("--steps", "9")

    other_data = tmp_path / "other.txt"
    other_data.write_text("one\n\ntwo\n")
    assert "was trained with another data" in refused("--data", str(other_data))
    other_model = tmp_path / "other-model"
    other_model.mkdir()
    for file in model_folder.iterdir():
        (other_model / file.name).write_bytes(file.read_bytes())
    changed = json.loads((model_folder / "config.json").read_text()) | {"rms_norm_eps": 1e-3}
    (other_model / "config.json").write_text(json.dumps(changed))
    assert "was trained with another model" in refused("--model", str(other_model))

    adalora = ["--method", "adalora", "--out", str(tmp_path / "adalora")]
    assert finetune_qlora.main([*arguments, *quick, *adalora]) == 0
    capsys.readouterr()
    assert "adalora cannot be resumed" in refused("--out", str(tmp_path / "adalora"))

    weights = tmp_path / "out" / "checkpoints" / "checkpoint-1" / "optimizer.pt"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert "optimizer.pt is damaged" in refused()


def test_ctrl_c_leaves_an_adapter_that_peft_loads(
    arguments: list[str], model_folder: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    command = [sys.executable, str(SCRIPT), *arguments, "--steps", "100000", "--samples", "0"]
    out = tmp_path / "out"
    with subprocess.Popen(
        [*command, "--save-every", "2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 90
        while not list(out.glob("checkpoints/*/trainer_state.json")):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline, "there was no checkpoint after 90 s"
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        printed, complaints = process.communicate(timeout=60)
    assert process.returncode == 130, complaints
    assert "Traceback" not in complaints
    assert "Stopped after step" in printed and "--resume" in printed
    assert not summary(out)["finished"]
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    adapted = PeftModel.from_pretrained(base, out / "adapter")
    lora_B = [p for name, p in adapted.named_parameters() if "lora_B" in name]
    assert lora_B and all(p.any() for p in lora_B)
    assert_no_leftovers(out)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--data", "absent.jsonl"], "no such file"),
        (["--model", "absent"], "--model absent: no such folder"),
        (["--model", "."], "has no config.json"),
        (["--device", "cuda:99"], "--device cuda:99: cannot be used here"),
        (["--steps", "0"], "--steps is 0, must be at least 1"),
        (["--dropout", "1"], "--dropout is 1.0, must be"),
        (["--learning-rate", "-1"], "--learning-rate is -1.0, must be above 0"),
        (["--max-length", "8"], "fits into --max-length 8"),
        (["--full-modules", "lm_head"], "--full-modules is for --method hybrid"),
        (["--method", "hybrid", "--full-modules", "down"], "such as model, embed_tokens"),
    ],
)
def test_a_bad_option_gives_a_message_of_one_line(
    words: list[str],
    complaint: str,
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert finetune_qlora.main([*arguments, *words]) == 2
    message = capsys.readouterr().err
    assert complaint in message and message.startswith("error: ") and message.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_unknown_method_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        finetune_qlora.main(["--method", "qdora"])
    assert "choose from" in capsys.readouterr().err


def test_logits_are_computed_only_where_they_are_learnt(model_folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    collate = completion_collator(AutoTokenizer.from_pretrained(model_folder, pad_token="</s>"))
    sequences = [torch.randint(2, 200, (length,)) for length in (9, 6)]
    items = [
        {"input_ids": sequence.tolist(), "labels": [IGNORED] * start + sequence[start:].tolist()}
        for sequence, start in zip(sequences, (5, 4), strict=True)
    ]
    output = model(**collate(items))
    assert output.logits.shape == (2, 4 + 1, model.config.vocab_size)
    # The same losses from each example without padding, with all of its logits.
    losses = [
        torch.nn.functional.cross_entropy(
            model(sequence[None]).logits[0, start - 1 : -1], sequence[start:]
        )
        for sequence, start in zip(sequences, (5, 4), strict=True)
    ]
    torch.testing.assert_close(output.loss, (4 * losses[0] + 2 * losses[1]) / 6)


def test_compare_prints_one_table(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    import _compare

    monkeypatch.setattr(_compare, "METHODS", ("qlora", "full"))
    out = tmp_path / "out"
    words = [*arguments, "--compare", "--seeds", "2", "--jobs", "2", "--steps", "2"]
    assert finetune_qlora.main(words) == 0
    printed = capfd.readouterr().out
    table = json.loads((out / "comparison.json").read_text())
    assert [row[0] for row in table["rows"]] == ["qlora", "full"]
    assert all(cell in printed for row in table["rows"] for cell in row)
    assert [(run["method"], run["seed"]) for run in table["runs"]] == [
        *(("qlora", 0), ("qlora", 1)),
        *(("full", 0), ("full", 1)),
    ]
    quantized, other_seed, dense, _ = table["runs"]
    assert quantized["losses"] != other_seed["losses"]
    assert quantized["trained_parameters"] < dense["trained_parameters"] == dense["parameters"]
    assert quantized["frozen_bytes"] > dense["frozen_bytes"]
    assert quantized["saved_bytes"] < dense["saved_bytes"]
    assert min(run["peak_bytes"] for run in table["runs"]) > 0
    assert str(tmp_path) not in json.dumps(table["runs"]), "the numbers name a folder"
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")

    # What has finished is kept.
    (out / "compare" / "seed-1" / "full" / "summary.json").unlink()
    assert finetune_qlora.main([*words, "--resume"]) == 0
    assert capfd.readouterr().out.count("has finished before") == 3 + 2
    again = json.loads((out / "comparison.json").read_text())["runs"]
    assert [run["losses"] for run in again] == [run["losses"] for run in table["runs"]]
    path = out / "compare" / "seed-1" / "qlora" / "summary.json"
    options = summary(path.parent)["options"]
    assert _compare.finished_before(path, options) is not None
    assert _compare.finished_before(path, {**options, "steps": 3}) is None
    path.write_text(json.dumps({**summary(path.parent), "finished": False}))
    assert _compare.finished_before(path, options) is None


def test_the_table_has_the_mean_and_the_spread_of_the_seeds() -> None:
    import _compare

    full, other = ([{"after": {"loss": loss}} for loss in losses] for losses in ((2, 3), (2.5, 4)))
    assert _compare.above_full(full, full) == "-"
    assert _compare.above_full(other, full) == "+0.750"
    assert _compare.with_spread([2.5, 4.0, 3.4]) == "3.300 ± 0.750"
    assert _compare.with_spread([2.5]) == "2.500"


def test_the_validation_loss_of_adalora_has_no_penalty(model_folder: Path) -> None:
    from _methods import build_model, scored_model

    options = parse_options(["--method", "adalora", "--r", "4"])
    model, _ = build_model(model_folder, torch.float32, torch.device("cpu"), options)
    tokens = torch.randint(2, 200, (2, 9))
    output = scored_model(model, "adalora")(input_ids=tokens, labels=tokens)
    expected = torch.nn.functional.cross_entropy(
        output.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    )
    torch.testing.assert_close(output.loss, expected)
    assert model(input_ids=tokens, labels=tokens).loss > expected
