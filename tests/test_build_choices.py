"""setup.py chooses the GPUs for which the extension is compiled; if there are none, it says why."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
KNOWN = ["80", "86", "89", "90a", "100+PTX", "120"]


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT))
    import setup

    return setup


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Sets up a toolkit whose nvcc knows all archs but 12.0, and GPUs of the given capabilities."""

    def program(name: str, script: str) -> None:
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def make(*gpus: str) -> Path:
        known = "\\n".join(f"sm_{arch}" for arch in (80, 86, 89, 90, 100))
        program(
            "nvcc",
            f"""case $1 in
            --version) echo 'Cuda compilation tools, release 12.9, V12.9.1';;
            --list-gpu-code) printf '{known}';;
            --dryrun) echo '#$ _HERE_={tmp_path}/bin' >&2;;
            esac""",
        )
        program("nvidia-smi", "\n".join(f"echo {gpu}" for gpu in gpus) or "exit 9")
        monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        monkeypatch.delenv("PYLORA_CUDA_ARCHS", raising=False)
        return tmp_path

    return make


def test_the_gpus_of_this_machine_decide(build, machine):
    home = machine("9.0", "8.6", "9.0")
    cuda = build.Cuda.find()
    assert (cuda.archs, cuda.home, cuda.version) == (["86", "90a"], home, "12.9")
    assert "arch=compute_90a,code=[sm_90a]" in cuda.gencode()


@pytest.mark.parametrize(
    ("gpus", "listed"), [((), "no GPU;"), (("7.5",), "a GPU of 7.5, which is too old;")]
)
def test_no_gpu_means_no_gpu_code(build, machine, gpus: tuple[str, ...], listed: str):
    machine(*gpus)
    reason = build.Cuda.find()
    assert f"nvcc 12.9 is here, but nvidia-smi lists {listed}" in reason
    assert "set PYLORA_CUDA_ARCHS to a list such as 80;90a, or to all" in reason


@pytest.mark.parametrize(
    ("asked", "archs"),
    [
        ("all", ["80", "86", "89", "90a", "100+PTX"]),  # this nvcc does not know 12.0
        ("8.0; 90a", ["80", "90a"]),
        ("100+PTX", ["100+PTX"]),
    ],
)
def test_the_archs_asked_for_are_compiled(
    build, machine, monkeypatch, asked: str, archs: list[str]
):
    machine()
    monkeypatch.setenv("PYLORA_CUDA_ARCHS", asked)
    assert build.Cuda.find().archs == archs


@pytest.mark.parametrize(("home", "reason"), [("", "CUDA_HOME is empty"), (".", "not found")])
def test_a_missing_toolkit_is_the_reason(build, monkeypatch, home: str, reason: str):
    monkeypatch.setenv("CUDA_HOME", home)
    assert reason in build.Cuda.find()


@pytest.mark.parametrize(
    ("capability", "arch"),
    [
        ("7.5", None),
        ("8.0", "80"),
        ("8.7", "86"),
        ("8.9", "89"),
        ("9.0", "90a"),
        ("10.3", "100+PTX"),
        ("11.0", "100+PTX"),  # PTX, because no binary has its major version
        ("12.1", "120"),
        ("13.0", "100+PTX"),
    ],
)
def test_a_gpu_gets_code_that_it_runs(build, capability: str, arch: str | None):
    assert build.arch_for(capability, KNOWN) == arch


def test_only_ptx_serves_a_gpu_newer_than_an_arch_specific_binary(build):
    assert build.arch_for("9.1", ["90a"]) is None
    assert build.arch_for("9.1", ["80+PTX", "90a"]) == "80+PTX"
