"""`make gpu` without a GPU: its steps, their limits, the budget, and what a call leaves.

Commands of one line stand in for the steps. No test measures time. Limits that must not be reached
are generous, and limits that must be reached belong to commands that never end by themselves.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
from tqdm import tqdm

from benchmarks import command_line, registry, results, runner
from benchmarks.gpu import archive, stand_ins
from benchmarks.gpu.run import Runner, run_command
from benchmarks.gpu.steps import (
    BUDGET_S,
    CALLS,
    DRY_PATIENCE,
    FIRST,
    HOPPER_ROWS,
    ROOT,
    Step,
    Target,
    chosen,
    steps,
)
from pylora import __main__ as pylora_main
from pylora import selfcheck
from pylora.backends import extension, limits

FACTS = {"gpu": None, "arch": "80", "python": sys.executable, "commit": None}
ENVIRONMENT = {"PATH": os.environ["PATH"]}


def step(name: str, code: str, seconds: int = 120, **options: Any) -> Step:
    return Step(name, (sys.executable, "-c", code), seconds, **options)


def run(tmp_path: Path, *steps_: Step, budget: float = 1000.0) -> tuple[bool, dict[str, Any]]:
    """Returns whether all steps succeeded, and the summary."""
    runner = Runner(steps_, tmp_path / "out", tmp_path / "work", budget, ENVIRONMENT, FACTS)
    succeeded = runner.run()
    return succeeded, json.loads((tmp_path / "out" / archive.SUMMARY).read_text())


def archived(tmp_path: Path) -> dict[str, bytes]:
    with tarfile.open(tmp_path / "out" / archive.ARCHIVE) as packed:
        return {name: packed.extractfile(name).read() for name in packed.getnames()}


def alive(pid: int) -> bool:
    """Returns False also for a process that has ended and that nobody has waited for."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


# The steps and the calls


@pytest.fixture
def target(tmp_path: Path) -> Target:
    return Target("python", "90a", tmp_path / "work", tmp_path / "site", 16)


def test_the_limits_of_a_call_fit_its_budget(target: Target):
    known = steps(target)
    assert set(known) >= {name for call in CALLS.values() for name in (*FIRST, *call)}
    for call in CALLS:
        limits = [planned.seconds for planned in chosen(target, call, [])]
        # Only the first call has to compile. Later calls keep the build, which takes seconds.
        slack = 0 if call == "1" else known["build"].seconds - 30
        assert sum(limits) - slack < BUDGET_S - 10


def test_a_call_or_names_choose_the_steps(target: Target, tmp_path: Path):
    names = [planned.name for planned in chosen(target, "1", [])]
    assert names == ["build", "machine", "info", "check-cuda", "tests"]
    everything = [planned.name for planned in chosen(target, None, [])]
    assert everything == ["build", *(name for call in CALLS.values() for name in call)]
    picked = chosen(target, None, ["tests=400", "racecheck-cuda"])
    assert [(planned.name, planned.seconds) for planned in picked][1:] == [
        ("tests", 400),
        ("racecheck-cuda", 300),
    ]
    wheel = Target("python", "90a", target.work, target.site, 16, wheels=(tmp_path / "a.whl",))
    assert [planned.name for planned in chosen(wheel, "3", [])] == [
        "wheels",
        "build",
        "sweep",
        "hopper-racecheck",
    ]


@pytest.mark.parametrize(
    ("call", "names", "message"),
    [
        (None, ["tests", "nonsense"], r"the step is 'nonsense'; it must be one of wheels, build"),
        (None, ["tests=soon"], "the limit of tests is 'soon'; it must be whole seconds"),
        (None, ["tests=0"], "the limit of tests is '0'; it must be whole seconds"),
        ("9", [], "the call is '9'; it must be one of 1, 2, 3, 4, 5"),
        ("1", ["tests"], r"a call \(1\) and steps \(tests\) are given; give only one"),
    ],
)
def test_unknown_names_are_refused(target: Target, call, names, message: str):
    with pytest.raises(ValueError, match=message):
        chosen(target, call, names)


def test_commands_have_the_options_of_their_tools(target: Target):
    known = steps(target)
    tests = " ".join(known["tests"].command)
    assert "-m gpu -n 12" in tests
    hopper = known["hopper-racecheck"]
    assert hopper.arch == "90a"
    assert "--tool racecheck" in " ".join(hopper.command)
    assert known["memcheck-cuda"].environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
    assert known["build"].command[-2:] == ("--arch", "90a")


def test_a_dry_run_has_the_same_steps_and_more_patience(target: Target, tmp_path: Path):
    dry = Target("python", "", target.work, target.site, 16, is_dry=True)
    real = {name: planned.seconds * DRY_PATIENCE for name, planned in steps(target).items()}
    assert real == {name: planned.seconds for name, planned in steps(dry).items()}
    for planned in steps(dry).values():
        assert "cuda" not in planned.command


def test_the_check_reaches_the_kernels_for_many_tokens():
    if extension.load()[0] is None:
        pytest.skip("pylora was installed without its extension")
    hard = extension.hard_limits("cuda")
    token_counts = [int(word) for word in HOPPER_ROWS.split(",")]
    shapes = [shape for shape in selfcheck.SHAPES if shape[0] in token_counts]
    assert len(shapes) == 3
    for m, _, in_features, blocksize in shapes:
        assert m >= limits.CUDA_HOPPER_FROM
        columns = hard["hopper_columns"]
        assert in_features % columns == blocksize % columns == 0
    many = [shape for shape in selfcheck.SHAPES if shape[0] >= limits.CUDA_MANY_ROWS_FROM]
    assert many and all(shape[2] % hard["many_rows_columns"] == 0 for shape in many)
    picked = list(selfcheck.cases(token_counts=[1, 9]))
    assert {case.description.split("x")[0] for case in picked} == {"1", "9"}
    assert len(picked) == 2 * len(list(selfcheck.cases(token_counts=[1])))
    with pytest.raises(argparse.ArgumentTypeError, match="'7' is no number of tokens of the check"):
        pylora_main._token_counts("1,7")


def test_benchmarks_save_each_cell(tmp_path: Path):
    """A run that is cut off in the second of three cells has kept the first."""
    committed = results.load(ROOT / "benchmarks/results/amd-epyc-zen5/lora_linear.json")

    class Harness:
        seed, roofline = 1, committed["roofline"]

        def __init__(self) -> None:
            self.measured = 0

        def measure_limits(self) -> None:
            pass

        def run(self, *_: Any) -> list[dict[str, Any]]:
            self.measured += 1
            if self.measured == 2:
                raise KeyboardInterrupt
            return committed["cells"][:1]

    bench = registry.bench_of("lora_linear")
    words = [
        "run",
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
        "--shape",
        "32x64",
        "--tokens",
        "1,2,3",
    ]
    arguments = command_line.parser().parse_args(words)
    suite = runner._suite(arguments)
    cells = runner._cells(bench, suite, True)[:3]
    facts = {name: committed[name] for name in ("machine", "versions", "commit")}
    with pytest.raises(KeyboardInterrupt), tqdm(disable=True) as bar:
        runner._run_bench(Harness(), bench, cells, suite, arguments, facts, bar)
    kept = results.load(tmp_path / "lora_linear.json")
    assert kept["cells"] == committed["cells"][:1] and kept["cells_left"] == 2


# One call


def test_a_call_leaves_a_summary_and_an_archive(tmp_path: Path):
    result = tmp_path / "work" / "results" / "lora_linear.json"
    write = f"import pathlib; p = pathlib.Path({str(result)!r}); p.parent.mkdir(); "
    write += """p.write_text('{"cells": [1, 2], "cells_left": 3}'); print("hello")"""
    succeeded, summary = run(tmp_path, step("first", write), step("second", "print('there')"))
    assert succeeded
    assert [entry["status"] for entry in summary["steps"]] == ["ok", "ok"]
    assert [entry["exit_code"] for entry in summary["steps"]] == [0, 0]
    assert summary["steps"][0]["last_lines"] == ["hello"]
    assert summary["arch"] == "80" and summary["budget_s"] == 1000
    where = "results/lora_linear.json"
    assert list(summary["json"]) == [where]
    assert summary["json"][where].endswith("3 cells were not measured")
    result.write_text('{"cells": [1,')
    _, summary = run(tmp_path, step("second", "print('there')"))
    assert summary["json"][where].startswith("not complete: ")
    files = archived(tmp_path)
    assert files[where] == result.read_bytes()
    assert files["logs/second.log"].endswith(b"there\n")
    assert sorted(os.listdir(tmp_path / "out")) == [archive.ARCHIVE, archive.SUMMARY]


def test_a_failed_step_does_not_end_the_run(tmp_path: Path):
    bad = "import sys; print('\\n'.join(map(str, range(40))), flush=True); sys.exit('it broke')"
    succeeded, summary = run(tmp_path, step("bad", bad), step("good", "print('fine')"))
    assert not succeeded
    entries = {entry["step"]: entry for entry in summary["steps"]}
    assert entries["bad"]["status"] == "failed" and entries["bad"]["exit_code"] == 1
    assert len(entries["bad"]["last_lines"]) == archive.TAIL_LINES
    assert "it broke" in entries["bad"]["last_lines"]
    assert entries["good"]["status"] == "ok"
    assert b"it broke" in archived(tmp_path)["logs/bad.log"]


def test_without_a_build_nothing_else_is_started(tmp_path: Path):
    build = step("build", "raise SystemExit(3)", is_vital=True)
    succeeded, summary = run(tmp_path, build, step("after", "print('never')"))
    assert not succeeded
    after = summary["steps"][1]
    assert after["status"] == "not started" and after["note"] == "build did not succeed"
    assert "logs/after.log" not in archived(tmp_path)


def test_what_does_not_fit_the_budget_is_listed(tmp_path: Path):
    long, short = step("long", "print(1)", seconds=500), step("short", "print(2)", seconds=60)
    succeeded, summary = run(tmp_path, long, short, budget=300)
    assert not succeeded
    first, second = summary["steps"]
    assert first["status"] == "not started" and first["note"].startswith("its limit is 500 s, and ")
    assert first["note"].endswith("s of 300 are left")
    assert second["status"] == "ok"


def test_what_cannot_run_here_is_listed(tmp_path: Path):
    other = step("other", "print(1)", arch="90a")
    lacking = step("lacking", "print(1)", needs=("json", "no_such_package"))
    absent = Step("absent", ("no-such-program",), 10)
    succeeded, summary = run(tmp_path, other)
    assert succeeded and summary["steps"][0]["status"] == "not for this GPU"
    assert summary["steps"][0]["note"] == "it needs sm_90a, and this GPU is sm_80"
    succeeded, summary = run(tmp_path, lacking, absent)
    assert not succeeded
    assert summary["steps"][0]["status"] == "not started"
    assert summary["steps"][0]["note"].startswith("it needs no_such_package, ")
    assert summary["steps"][1]["status"] == "not found"
    assert summary["steps"][1]["last_lines"][-1] == "no-such-program was not found on PATH"


def test_a_step_over_its_limit_is_ended_with_its_whole_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A grandchild that ignores SIGTERM is killed, and what was printed before is kept."""
    monkeypatch.setattr("benchmarks.gpu.run.GRACE_S", 0.2)
    monkeypatch.setattr("benchmarks.gpu.run.SAVE_EVERY_S", 0.5)
    pids = tmp_path / "pids"
    grandchild = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    grandchild += "print('grandchild', flush=True); time.sleep(1000)"
    child = f"""
import os, pathlib, subprocess, sys, time
process = subprocess.Popen([sys.executable, "-c", {grandchild!r}], stdout=subprocess.PIPE)
process.stdout.readline()
print("started", flush=True)
pathlib.Path({str(pids)!r}).write_text(f"{{os.getpid()}} {{process.pid}}")
time.sleep(1000)
"""
    log = tmp_path / "log"
    kept: list[str] = []
    command = [sys.executable, "-c", child]
    # The limit doubles until a slow machine has started both processes in time.
    for seconds in (2, 4, 8, 16, 32):
        kept.clear()
        keep = lambda: kept.append(log.read_text())  # noqa: E731
        status, code = run_command(command, log, seconds, ENVIRONMENT, keep)
        assert status == f"over its limit of {seconds} s" and code is None
        if pids.exists():
            break
    # The step's output was saved while the step was running.
    assert len(kept) > 1 and "started" in kept[-1]
    both = [int(word) for word in pids.read_text().split()]
    assert len(both) == 2 and not any(map(alive, both))


def test_a_process_that_a_step_leaves_running_is_ended(tmp_path: Path):
    """The step itself succeeds at once, and the process that it started must not outlive it."""
    code = "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', "
    code += "'import time; time.sleep(1000)']); print(p.pid)"
    log = tmp_path / "log"
    assert run_command([sys.executable, "-c", code], log, 120, ENVIRONMENT) == ("ok", 0)
    assert not alive(int(log.read_text().splitlines()[-1]))


def test_a_runner_that_is_ended_leaves_a_summary(tmp_path: Path):
    """SIGTERM ends the runner and the step in progress, and the summary names the step."""
    begun = tmp_path / "begun"
    code = f"""
import signal, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from benchmarks.gpu.run import Runner
from benchmarks.gpu.steps import Step
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
sleep = "import os, pathlib, time; print('half', flush=True); "
sleep += "pathlib.Path({str(begun)!r}).write_text(str(os.getpid())); time.sleep(1000)"
done = Step("done", (sys.executable, "-c", "print(1)"), 120)
cut = Step("cut", (sys.executable, "-c", sleep), 120)
never = Step("never", (sys.executable, "-c", "print(1)"), 120)
facts = {FACTS!r}
out, work = Path({str(tmp_path / "out")!r}), Path({str(tmp_path / "work")!r})
Runner([done, cut, never], out, work, 1000, {ENVIRONMENT!r}, facts).run()
"""
    runner = subprocess.Popen([sys.executable, "-c", code])
    while not (begun.exists() and begun.read_text()):
        assert runner.poll() is None
        time.sleep(0.05)
    runner.terminate()
    assert runner.wait() == 128 + 15
    assert not alive(int(begun.read_text()))
    summary = json.loads((tmp_path / "out" / archive.SUMMARY).read_text())
    statuses = [entry["status"] for entry in summary["steps"]]
    assert statuses == ["ok", "interrupted", "not started"]
    assert archived(tmp_path)["logs/cut.log"].endswith(b"half\n")


def test_a_long_log_is_packed_without_its_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(archive, "MAX_LOG_BYTES", 20)
    (tmp_path / "a.log").write_bytes(b"0123456789" + b"x" * 100 + b"9876543210")
    (tmp_path / "a.json").write_text("[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]")
    (tmp_path / ".half-written").write_text("")
    (tmp_path / "packed.tgz").write_bytes(archive.pack(tmp_path))
    with tarfile.open(tmp_path / "packed.tgz") as packed:
        assert packed.getnames() == ["a.json", "a.log"]
        log = packed.extractfile("a.log").read()
    assert log == b"0123456789\n[... 100 bytes left out ...]\n9876543210"


def test_stand_ins_record_and_run(tmp_path: Path):
    folder = stand_ins.write(tmp_path / "bin", tmp_path)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}"}
    command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "1"]
    command += [sys.executable, "-c", "raise SystemExit(7)"]
    assert run_command(command, tmp_path / "log", 120, environment) == ("failed", 7)
    assert run_command(["nvidia-smi"], tmp_path / "log", 120, environment) == ("ok", 0)
    calls = (tmp_path / stand_ins.CALLS).read_text().splitlines()
    assert calls[0].startswith("compute-sanitizer --tool memcheck --error-exitcode 1 ")
    assert calls[1].startswith("nvidia-smi")


def make(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = ["make", "--no-print-directory", "gpu", f"PYTHON={sys.executable}", *words]
    environment = {k: v for k, v in os.environ.items() if k not in ("OUT", "MAKEFLAGS")}
    return subprocess.run(
        command, cwd=ROOT, env=environment | variables, capture_output=True, text=True
    )


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_make_gpu_runs_dry(tmp_path: Path):
    """The command runs the installation, a stand-in, and a stand-in for a sanitizer."""
    pytest.importorskip("pylora._C", reason="pylora was installed without its extension")
    words = ["DRY=1", "STEPS=machine hopper-racecheck", "BUDGET=5000"]
    words.append(f"WORK={tmp_path / 'work'}")
    done = make(*words, OUT=str(tmp_path), PYLORA_COMMIT="abc-dirty")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kept the installed extension" in done.stdout
    summary = json.loads((tmp_path / "steps" / archive.SUMMARY).read_text())
    assert summary["commit"] == {"hash": "abc", "dirty": True} and summary["dry"]
    names = ["build", "machine", "hopper-racecheck"]
    assert [entry["step"] for entry in summary["steps"]] == names
    assert "right by the numerics rule" in summary["steps"][-1]["last_lines"][-1]
    with tarfile.open(tmp_path / "steps" / archive.ARCHIVE) as packed:
        calls = packed.extractfile(stand_ins.CALLS).read().decode()
        facts = json.loads(packed.extractfile("machine.json").read())
    assert "nvidia-smi" in calls and "compute-sanitizer --tool racecheck" in calls
    assert "torch" in facts["packages"]


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_make_gpu_names_a_wrong_argument(tmp_path: Path):
    done = make("DRY=1", "STEPS=nonsense", OUT=str(tmp_path))
    assert done.returncode != 0 and "the step is 'nonsense'; it must be one of" in done.stderr
    done = make("DRY=1", f"WHEELS={tmp_path}", OUT=str(tmp_path))
    assert done.returncode != 0 and "it must be a folder with wheels" in done.stderr
    with (tmp_path / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = make("DRY=1", f"WORK={tmp_path}", OUT=str(tmp_path))
    assert done.returncode != 0 and "which another run is using" in done.stderr
