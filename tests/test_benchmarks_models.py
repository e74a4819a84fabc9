"""The benchmark of whole models: it finishes, its file is checked, and people can read it.

No test looks at a time.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("bitsandbytes")
pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from benchmarks.command_line import main
from benchmarks.models import results, run, table
from benchmarks.models.contenders import CONTENDERS
from benchmarks.models.measure import model_bytes, tracked_peak
from benchmarks.models.results import ACCELERATED, PEER
from benchmarks.results import InvalidResults

NAMES = [contender.name for contender in CONTENDERS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a run of a small decoder and a small classifier of images."""
    out = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "SCALE", 2)
        patch.setattr(run, "REPEAT", 2)
        models = "--model llama --model vit --dtype float32 --seconds 0 --seed 3"
        assert main(["models", *models.split(), "--out", str(out)]) == 0
    return out


def test_every_contender_is_measured(folder: Path) -> None:
    found = results.load(folder / results.FILE)
    assert [model["model"] for model in found["models"]] == ["llama", "vit"]
    llama, vit = ({r["contender"]: r for r in model["results"]} for model in found["models"])
    assert list(llama) == list(vit) == NAMES
    for result in llama.values():
        assert result["note"] == "" and result["trainable"] == llama[PEER]["trainable"]
        assert 0 < result["step"]["p20"] <= result["step"]["median"] <= result["step"]["p80"]
        assert result["token"]["samples"] == result["step"]["samples"] == 3
    assert llama[ACCELERATED]["peak_bytes"] < llama[PEER]["peak_bytes"]
    assert llama["pylora"]["model_bytes"] < llama["PEFT, dense"]["model_bytes"]
    assert "token" not in vit[PEER]
    assert (
        f"PEFT {vit[PEER]['trainable']}" in vit["pylora"]["note"]
    )  # its classifier is trained in another way


class BrokenDecoding:
    """Stands for a model that some contender cannot decode."""

    broken = PEER
    order: list[str]

    def __init__(self, model: Any, vocabulary: int) -> None:
        self.fails = NAMES[len(self.order)] == self.broken
        self.order.append("")

    def seconds(self) -> float:
        if self.fails:
            raise RuntimeError("its weights cannot be repacked")
        return 1.0


@pytest.mark.parametrize(("broken", "code"), [(PEER, 0), ("pylora", 1)])
def test_a_contender_that_cannot_decode_does_not_end_the_run(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    broken: str,
    code: int,
) -> None:
    monkeypatch.setattr(run, "SCALE", 2)
    monkeypatch.setattr(run, "REPEAT", 1)
    monkeypatch.setattr(run, "Decoding", BrokenDecoding)
    monkeypatch.setattr(BrokenDecoding, "broken", broken)
    monkeypatch.setattr(BrokenDecoding, "order", [], raising=False)
    options = ["--model", "llama", "--dtype", "float32", "--seconds", "0"]
    assert main(["models", *options, "--out", str(tmp_path)]) == code
    (model,) = results.load(tmp_path / results.FILE)["models"]
    decoded = {r["contender"] for r in model["results"] if "token" in r}
    assert decoded == set(NAMES) - {broken}
    assert f"llama, {broken} could not decode: its weights" in capsys.readouterr().out


def test_the_table_and_the_page_show_every_contender(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = results.load(folder / results.FILE)
    text = table.models_table(found)
    assert text.count(f"{PEER}, accelerated") == 2 and "left out" in text
    assert main(["report", str(folder), "--out", str(folder / "page")]) == 0
    page = (folder / "page" / "report.html").read_text()
    assert "Whole models" in page and all(name in page for name in NAMES)
    assert (folder / "page" / "models-1.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: run.pop("rank"), "has no 'rank'"),
        (lambda run: run.update(schema=0), "has schema 0; it must be 1"),
        (lambda run: run["models"][0]["results"][0].pop("peak_bytes"), "has no 'peak_bytes'"),
        (
            lambda run: run["models"][0]["results"][0]["step"].update(median="fast"),
            "has median = 'fast'; it must be",
        ),
        (lambda run: run["machine"].pop("cpu"), "machine has no 'cpu'"),
    ],
)
def test_a_damaged_file_is_refused(folder: Path, tmp_path: Path, change: Any, message: str) -> None:
    found = json.loads((folder / results.FILE).read_text())
    change(found)
    (tmp_path / results.FILE).write_text(json.dumps(found))
    with pytest.raises(InvalidResults, match=message):
        results.load(tmp_path / results.FILE)


def test_an_unknown_model_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--model", "llama9"]) == 2
    assert (
        "--model is 'llama9'; it must be one of smollm2-135m, llama-3-8b-block, llama"
        in capsys.readouterr().err
    )


def test_the_tracked_peak_is_that_of_the_allocations() -> None:
    def allocate() -> None:
        first = torch.empty(1 << 20, dtype=torch.uint8)
        second = torch.empty(2 << 20, dtype=torch.uint8)
        del first, second
        torch.empty(1 << 19, dtype=torch.uint8)

    assert tracked_peak(allocate) == 3 << 20


def test_the_bytes_of_a_model_count_shared_memory_once() -> None:
    layer = torch.nn.Linear(16, 16, bias=False)
    tied = torch.nn.Linear(16, 16, bias=False)
    tied.weight = layer.weight
    assert model_bytes(torch.nn.Sequential(layer, tied)) == 16 * 16 * 4
