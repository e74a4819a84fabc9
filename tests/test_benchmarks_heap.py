"""`python -m benchmarks run --keep-heap`: glibc keeps freed memory, and the JSON says so.

No test looks at a time: the runs here are dry runs.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import heap, memory, results
from benchmarks.command_line import main
from benchmarks.models import results as models_results
from benchmarks.report import goals
from benchmarks.shapes import TRAINING, Cell

ROOT = Path(__file__).resolve().parent.parent
needs_glibc = pytest.mark.skipif(
    heap.glibc_version() is None, reason="the C library is not glibc, whose settings these are"
)
RUN = "run --op nf4_dequantize --shape 32x64 --against dense --threads 1 --seconds 0 --no-memory"


def in_a_process(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    without = {"PYTHONSAFEPATH", *heap.settings()}
    return subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k not in without} | environment,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Returns the file that a run with a kept heap writes, and the text that it prints."""
    out = tmp_path_factory.mktemp("results")
    done = in_a_process("-m", "benchmarks", *RUN.split(), "--keep-heap", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    return out / "nf4_dequantize_heap_kept.json", done.stdout


@needs_glibc
def test_a_run_with_a_kept_heap_says_so(kept: tuple[Path, str]) -> None:
    run = results.load(kept[0])
    assert run["machine"]["heap"] == heap.KEPT and results.title(run) == "nf4_dequantize, heap kept"
    assert kept[1].count(heap.NOTE) == 1
    assert f"wrote {kept[0]}" in kept[1] and "no CPU goal was measured" in kept[1]


@needs_glibc
def test_the_settings_are_measured_and_not_believed() -> None:
    script = "from benchmarks import heap; print(heap.state())"
    settings = heap.settings()
    assert in_a_process("-c", script).stdout.strip() == heap.DEFAULT
    assert in_a_process("-c", script, **settings).stdout.strip() == heap.KEPT
    trimmed = {k: v for k, v in settings.items() if k != "MALLOC_TRIM_THRESHOLD_"}
    assert in_a_process("-c", script, **trimmed).stdout.strip() == heap.DEFAULT


def test_settings_without_effect_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def restart(*arguments: Any) -> None:
        raise AssertionError("a run must not start anew for ever")

    monkeypatch.setattr(os, "execve", restart)
    monkeypatch.setattr(heap, "is_kept", lambda: False)
    monkeypatch.setattr(heap, "glibc_version", lambda: "glibc 2.1")
    for name, value in heap.settings().items():
        monkeypatch.setenv(name, value)
    assert main(["run", "--keep-heap"]) == 2
    assert "no effect on glibc 2.1" in capsys.readouterr().err


def test_another_c_library_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def confstr(name: str) -> str:
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(os, "confstr", confstr)
    assert not heap.is_kept()
    assert main(["run", "--keep-heap"]) == 2
    assert "the C library is not glibc; it must be glibc" in capsys.readouterr().err


def test_a_run_starts_anew_with_the_same_words(monkeypatch: pytest.MonkeyPatch) -> None:
    class Replaced(Exception):
        pass

    started: list[Any] = []

    def execve(*arguments: Any) -> None:
        started.extend(arguments)
        raise Replaced

    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.setattr(heap, "is_kept", lambda: False)
    monkeypatch.setattr(heap, "glibc_version", lambda: "glibc 2.36")
    for name in heap.settings():
        monkeypatch.delenv(name, raising=False)
    words = [*RUN.split(), "--keep-heap"]
    with pytest.raises(Replaced):
        main(words)
    program, command, environment = started
    assert command == [program, "-m", "benchmarks", *words]
    assert heap.settings().items() <= environment.items() and os.environ.items() <= (
        environment.items()
    )


def test_memory_is_measured_with_the_default_heap(monkeypatch: pytest.MonkeyPatch) -> None:
    """A heap that keeps its memory would hide how much of it a call needs."""
    environments: list[dict[str, str]] = []

    def probe(command: Any, env: dict[str, str], **options: Any) -> Any:
        environments.append(env)
        return subprocess.CompletedProcess(command, 0, stdout="[7]")

    monkeypatch.setattr(memory.subprocess, "run", probe)
    monkeypatch.setattr(memory, "CLEAR_REFS", Path(__file__))  # any file that exists
    for name, value in heap.settings().items():
        monkeypatch.setenv(name, value)
    task = (Cell("lora_linear", TRAINING, 32, 64, 2), results.OURS)
    assert memory.cpu_extra([task], seed=1, threads=1) == {task: 7}
    (environment,) = environments
    assert not heap.settings().keys() & environment.keys() and "PATH" in environment


@pytest.fixture
def run() -> dict[str, Any]:
    """Returns a committed run, which is older than the fact of the heap."""
    path = ROOT / "benchmarks" / "results" / "amd-epyc-zen5" / "lora_linear.json"
    assert "heap" not in json.loads(path.read_text())["machine"]
    return results.load(path)


def test_older_runs_had_the_default_heap(run: dict[str, Any], tmp_path: Path) -> None:
    assert run["machine"]["heap"] == heap.DEFAULT and results.file_stem(run) == "lora_linear"
    models = ROOT / "benchmarks" / "results" / "intel-xeon-amx" / "models.json"
    assert models_results.load(models)["machine"]["heap"] == heap.DEFAULT
    run["machine"]["heap"] = "frozen"
    with pytest.raises(results.InvalidResults, match="heap = 'frozen'; it must be 'kept' or"):
        results.save(tmp_path / "run.json", run)


def test_compare_names_the_heap_and_the_report_keeps_both(
    run: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run["cells"] = run["cells"][:1]  # each has pictures, which take long to draw
    kept = copy.deepcopy(run)
    kept["machine"]["heap"] = heap.KEPT
    paths = []
    for one in (run, kept):
        paths.append(str(tmp_path / f"{results.file_stem(one)}.json"))
        results.save(Path(paths[-1]), one)
    assert Path(paths[1]).name == "lora_linear_heap_kept.json"
    main(["compare", *paths])
    assert "machine differ: heap was default, is kept" in capsys.readouterr().out
    main(["compare", paths[0], paths[0]])
    assert "heap" not in capsys.readouterr().out
    assert main(["report", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "<h2>lora_linear</h2>" in page and "<h2>lora_linear, heap kept</h2>" in page
    pictures = sorted(path.name for path in tmp_path.glob("*-forward-eager-speedup.png"))
    assert pictures == [
        "lora_linear-forward-eager-speedup.png",
        "lora_linear_heap_kept-forward-eager-speedup.png",
    ]
    both = goals.goal_outcomes([run, kept])
    assert both == goals.goal_outcomes([run]) and goals.goal_outcomes([kept]) == []
