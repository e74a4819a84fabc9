"""The runner of the microbenchmarks keeps every other result if a program fails, dies or hangs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.primitives import build, command_line, host_calls, products, runner
from benchmarks.primitives.table import results_table

STAND_IN = """
import json, os, sys, time

names = ["good", "wrong", "error", "dies", "hangs", "quiet", "skipped", "last"]
described = {"parameters": {"warps": 4}, "unit": "cycles", "ideal": 2.0, "note": "a note"}

def say(**fields):
    print(json.dumps(fields), flush=True)

if sys.argv[1:] == ["--list"]:
    for name in names:
        say(name=name, **described)
    sys.exit(0)
with open(os.environ["STARTS"], "a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
for name in sys.argv[1:]:
    say(begin=name)
    print("a warning of some library", flush=True)
    if name == "error":
        say(name=name, error="cudaMalloc: cudaErrorMemoryAllocation (out of memory)")
        sys.exit(3)
    if name == "dies":
        print("what it said last", file=sys.stderr, flush=True)
        os.abort()
    if name == "hangs":
        time.sleep(600)
    if name == "quiet":
        sys.exit(0)
    if name == "skipped":
        say(name=name, skipped="not for this GPU", **described)
        continue
    wrong = {"error": "wrong result"} if name == "wrong" else {}
    say(name=name, samples=[3.0, 1.0, 2.0], derived={"per_cycle": 0.5}, **described, **wrong)
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> runner.Program:
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    starts = {"STARTS": str(tmp_path / "starts")}
    return runner.Program("stand-in", [sys.executable, str(script)], starts)


def run(program: runner.Program, **options) -> dict[str, runner.Record]:
    experiments = runner.describe(program, 60)
    records: list[runner.Record] = []
    runner.run(program, experiments, 3.0, records.append, **options)
    assert [r["name"] for r in records] == [e["name"] for e in experiments]
    return {record["name"]: record for record in records}


def test_one_failure_does_not_lose_the_others(stand_in: runner.Program):
    records = run(stand_in)
    statuses = {name: record["status"] for name, record in records.items()}
    assert statuses == {
        "good": "ok",
        "wrong": "error",
        "error": "error",
        "dies": "error",
        "hangs": "error",
        "quiet": "error",
        "skipped": "skipped",
        "last": "ok",
    }
    assert records["good"] == {
        "group": "stand-in",
        "name": "good",
        "parameters": {"warps": 4},
        "unit": "cycles",
        "status": "ok",
        "reason": "",
        "samples": [3.0, 1.0, 2.0],
        "median": 2.0,
        "ideal": 2.0,
        "derived": {"per_cycle": 0.5},
        "note": "a note",
    }
    # A wrong result keeps its samples, which may show what happened.
    assert records["wrong"]["samples"] and records["wrong"]["reason"] == "wrong result"
    assert "cudaErrorMemoryAllocation" in records["error"]["reason"]
    assert records["dies"]["reason"] == "the program was ended by SIGABRT: what it said last"
    assert records["hangs"]["reason"] == "killed after 3 s without a result"
    assert records["quiet"]["reason"] == "the program ended with code 0 without a result"
    assert records["skipped"]["reason"] == "not for this GPU"
    starts = Path(stand_in.environment["STARTS"]).read_text().splitlines()
    assert [start.split()[0] for start in starts] == ["good", "dies", "hangs", "quiet", "skipped"]


def test_experiments_are_skipped_once_the_time_is_over(stand_in: runner.Program):
    times = iter([60.0, 60.0, 60.0, 60.0, 60.0])
    records = run(stand_in, time_left=lambda: next(times, 0.0))
    assert records["good"]["status"] == "ok"
    assert records["last"]["status"] == "skipped"
    assert records["last"]["reason"] == "the time for the whole run was over"


def test_a_missing_program_is_reported(stand_in: runner.Program, tmp_path: Path):
    absent = runner.Program("absent", [str(tmp_path / "absent")])
    with pytest.raises(RuntimeError, match="absent does not list its experiments"):
        runner.describe(absent, 60)
    records: list[runner.Record] = []
    runner.run(absent, runner.describe(stand_in, 60), 3.0, records.append)
    assert len(records) == 8 and {r["status"] for r in records} == {"error"}
    assert "does not start" in records[0]["reason"]


def test_the_file_is_whole_after_each_experiment(
    stand_in: runner.Program, tmp_path: Path, monkeypatch, capsys
):
    """The run is cut off after the second experiment, and the file on disk is read."""
    monkeypatch.setattr(
        command_line, "_programs", lambda *_: ({"host": stand_in}, {"dram": "none"})
    )
    out = tmp_path / "primitives.json"
    write, written = command_line.write_atomically, []

    def cut_off(path: Path, text: str) -> None:
        write(path, text)
        written.append(text)
        if len(json.loads(text)["experiments"]) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(command_line, "write_atomically", cut_off)
    with pytest.raises(KeyboardInterrupt):
        command_line.main(["--out", str(out), "--limit", "3"])
    document = json.loads(out.read_text())
    assert not document["complete"] and len(written) == 3
    assert [record["name"] for record in document["experiments"]] == ["good", "wrong"]
    assert document["problems"] == {"dram": "none"} and document["versions"]["torch"]

    monkeypatch.setattr(command_line, "write_atomically", write)
    assert command_line.main(["--out", str(out), "--limit", "3"]) == 1
    document = json.loads(out.read_text())
    assert document["complete"] and len(document["experiments"]) == 8
    assert "dram: none" in capsys.readouterr().out


def test_the_table_has_results_and_errors(stand_in: runner.Program):
    table = results_table(list(run(stand_in).values()))
    [good] = [line for line in table.splitlines() if line.startswith("good")]
    assert good.split() == ["good", "2", "60.0%", "2", "cycles", "(per_cycle", "0.5)"]
    [hangs] = [line for line in table.splitlines() if line.startswith("hangs")]
    assert hangs.split(maxsplit=1)[1] == "error: killed after 3 s without a result"
    assert table.endswith("2 ok, 5 error, 1 skipped")


def test_a_compiled_program_reports_cuda_errors(tmp_path: Path):
    """Without a GPU, each experiment of a real program ends with an error that CUDA names."""
    if build.find_nvcc() is None:
        pytest.skip("there is no nvcc")
    program = runner.Program(
        "launches", [str(build.built(build.PROGRAMS["launches"], "90a", tmp_path))]
    )
    experiments = runner.describe(program, 60)
    assert len({experiment["name"] for experiment in experiments}) == len(experiments) == 8
    records: list[runner.Record] = []
    runner.run(program, experiments[:2], 60.0, records.append)
    if torch.cuda.is_available():
        assert {record["status"] for record in records} <= {"ok", "skipped"}
    else:
        assert {record["status"] for record in records} == {"error"}
        assert all("cudaError" in record["reason"] for record in records)
    # A second build reuses what the first build made.
    made = build.built(build.PROGRAMS["launches"], "90a", tmp_path)
    assert str(made) == program.command[0] and len(list(tmp_path.iterdir())) == 1


def test_a_failed_build_is_reported(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    with pytest.raises(build.BuildError, match="dram: there is no nvcc, and no dram-sm_90a-"):
        build.built(build.PROGRAMS["dram"], "90a", tmp_path)
    failing = tmp_path / "nvcc"
    failing.write_text("#!/bin/sh\necho 'dram.cu(1): error: what is wrong' >&2\nexit 1\n")
    failing.chmod(0o755)
    monkeypatch.setattr(build, "find_nvcc", lambda: failing)
    with pytest.raises(build.BuildError, match=r"dram: nvcc failed: dram.cu\(1\): error: what is"):
        build.built(build.PROGRAMS["dram"], "90a", tmp_path)


def test_products_run_on_small_shapes():
    """The calls are real. The clock is a stand-in that runs them."""
    taken = iter(range(1, 1000))

    def seconds(calls) -> float:
        for call in calls:
            assert torch.is_tensor(call())
        return float(next(taken))

    device = torch.device("cpu")
    small = products.experiments(device, seconds, (8, 16), (24,), (4,), 32, 64)
    assert [e.name for e in small] == [
        "matmul_large",
        "copy",
        "linear_m4_n24_k8",
        "linear_m4_n24_k16",
    ]
    assert [len(e.run().samples) for e in small] == [7, 7, 7, 7]
    # The clock gives this K 3, 5, ... seconds and the first K 4, 6, ... seconds.
    taken = iter(range(1, 1000))
    measured = small[3].run()
    assert measured.samples[0] == pytest.approx(2e-12 * 4 * 24 * 16 / 3)
    assert measured.derived["time_over_first_k"] == pytest.approx(9 / 10)


def test_host_calls_run_in_a_process_of_the_runner():
    """Two real experiments run in a process that the runner starts."""
    command = [sys.executable, "-m", "benchmarks.primitives", "serve", "host", ""]
    names = [e.name for e in host_calls.experiments(torch.device("cpu"), None)]
    assert len(set(names)) == len(names) == 9
    program = runner.Program("host", command, {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    experiments = runner.describe(program, 120)
    assert [experiment["name"] for experiment in experiments] == names
    wanted = [e for e in experiments if e["name"] in ("host_torch_empty", "host_lora_linear_grad")]
    records: list[runner.Record] = []
    runner.run(program, wanted, 120.0, records.append)
    assert [record["status"] for record in records] == ["ok", "ok"], records
    assert all(len(record["samples"]) == 25 for record in records)


def test_help_names_the_groups():
    command = [sys.executable, "-m", "benchmarks.primitives", "--help"]
    done = subprocess.run(command, cwd=runner.ROOT, env=runner._environment(
        runner.Program("", [])), capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0 and all(group in done.stdout for group in command_line.GROUPS)
