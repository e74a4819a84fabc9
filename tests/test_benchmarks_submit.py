"""A user's runs are packed for a pull request, and only if others can repeat them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft", reason="the results of whole models name its contenders")

from benchmarks import command_line
from benchmarks.machine import ROOT
from benchmarks.report import cpu_table
from benchmarks.results import InvalidResults, load, load_all
from benchmarks.submit import is_ancestor, submit

AMX = ROOT / "benchmarks/results/intel-xeon-amx/lora_linear.json"


def git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


# The first results were committed after so many commits. An export of the files, which was made a
# repository of its own, has fewer.
COMMITS = 50

pytestmark = pytest.mark.skipif(
    git("rev-parse", "--is-shallow-repository") != "false"
    or int(git("rev-list", "--count", "HEAD")) < COMMITS,
    reason="the history is not here: no git, a shallow clone, or an export of the files",
)


def changed(tmp_path: Path, **fields: Any) -> Path:
    """A copy of a committed run with other fields."""
    path = tmp_path / "lora_linear.json"
    path.write_text(json.dumps(json.loads(AMX.read_text()) | fields))
    return path


def test_runs_are_copied_as_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / AMX.name).write_text(AMX.read_text())
    (copy,) = submit([folder], "my-machine", tmp_path / "results")
    assert copy == tmp_path / "results" / "my-machine" / AMX.name
    assert copy.read_text() == AMX.read_text()
    assert submit([folder], "my-machine", tmp_path / "results") == [copy]


@pytest.mark.parametrize(
    ("commit", "message"),
    [
        (None, "names no commit"),
        ({"hash": git("rev-parse", "HEAD"), "dirty": True}, "were not committed"),
        ({"hash": "0" * 40, "dirty": False}, "commit 0000.* is not in the history"),
    ],
)
def test_a_run_that_nobody_can_repeat_is_refused(tmp_path: Path, commit: Any, message: str) -> None:
    with pytest.raises(InvalidResults, match=message):
        submit([changed(tmp_path, commit=commit)], "my-machine", tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_two_machines_do_not_share_a_folder(tmp_path: Path) -> None:
    submit([AMX], "my-machine", tmp_path / "results")
    machine = load(AMX)["machine"] | {"cpu": "another"}
    other = changed(tmp_path, machine=machine).rename(tmp_path / "lora_qkv.json")
    with pytest.raises(InvalidResults, match=r"lora_qkv.json is of a machine with cpu 'another'"):
        submit([other], "my-machine", tmp_path / "results")


@pytest.mark.parametrize("name", ["", "..", "a/b"])
def test_a_name_that_is_no_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="--name is"):
        submit([AMX], name, tmp_path / "results")


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = str(tmp_path / "gone.json")
    assert command_line.main(["submit", missing, "--name", "my-machine"]) == 2
    assert "gone.json cannot be read" in capsys.readouterr().err


def test_the_readme_shows_times_of_code_in_its_history() -> None:
    runs = load_all([cpu_table.RESULTS])
    assert {run["op"] for run in runs} >= set(cpu_table.TABLES)
    for run in runs:
        commit = run["commit"]
        assert commit is not None and not commit["dirty"] and is_ancestor(commit["hash"]), run["op"]
