"""`make gpu-wheels`: a stripped wheel can be installed, and what is left out is reported."""

from __future__ import annotations

import base64
import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.gpu import wheels


@pytest.fixture
def make_wheel(tmp_path: Path) -> Callable[..., Path]:
    def make(name: str, files: dict[str, bytes], requires: tuple[str, ...] = ()) -> Path:
        info = f"{name}-1.0.dist-info"
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
        metadata += "".join(f"Requires-Dist: {requirement}\n" for requirement in requires)
        tag = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        whole = {
            **files,
            f"{info}/METADATA": metadata.encode(),
            f"{info}/WHEEL": tag.encode(),
        }
        lines = []
        for path, content in whole.items():
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=")
            lines.append(f"{path},sha256={digest.decode()},{len(content)}")
        whole[f"{info}/RECORD"] = "\n".join([*lines, f"{info}/RECORD,,", ""]).encode()
        wheel = tmp_path / f"{name}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive_:
            for path, content in whole.items():
                archive_.writestr(path, content)
        return wheel

    return make


BITSANDBYTES = {
    "bitsandbytes/__init__.py": b"VALUE = 5\n",
    "bitsandbytes/libbitsandbytes_cpu.so": b"cpu",
    "bitsandbytes/libbitsandbytes_cuda128.so": b"128" * 1000,
    "bitsandbytes/libbitsandbytes_cuda130.so": b"130",
    "bitsandbytes/libbitsandbytes_rocm72.so": b"rocm",
}


def test_a_stripped_wheel_can_be_installed(make_wheel: Callable[..., Path], tmp_path: Path):
    wheel = make_wheel("bitsandbytes", BITSANDBYTES)
    kept = wheels.strip(wheel, ["cuda130", "cpu"], tmp_path / "out")
    assert kept.name == wheel.name
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--target", str(tmp_path / "site"), str(kept)], check=True)
    installed = {path.name for path in (tmp_path / "site" / "bitsandbytes").glob("*.so")}
    assert installed == {"libbitsandbytes_cpu.so", "libbitsandbytes_cuda130.so"}
    record = tmp_path / "site" / "bitsandbytes-1.0.dist-info" / "RECORD"
    assert "cuda130" in record.read_text() and "cuda128" not in record.read_text()


def test_a_wheel_without_the_library_is_refused(make_wheel: Callable[..., Path], tmp_path: Path):
    wheel = make_wheel("bitsandbytes", BITSANDBYTES)
    with pytest.raises(ValueError, match=r"for cpu, cuda128, cuda130, rocm72; cuda999 is wanted"):
        wheels.strip(wheel, ["cuda999", "cpu"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_only_wheels_that_are_needed_are_fetched(
    make_wheel: Callable[..., Path], tmp_path: Path, monkeypatch
):
    """bitsandbytes is stripped, tqdm brings its dependencies, and wheels not found are reported."""
    made = {
        "bitsandbytes": make_wheel("bitsandbytes", BITSANDBYTES, ("torch", "numpy")),
        "tqdm": make_wheel("tqdm", {}, ("rich>1", "colorama; extra == 'all'")),
        "rich": make_wheel("rich", {}),
    }
    asked = {}

    def get(pin: str, tags: list[str], into: Path) -> Path | None:
        name = pin.split("==")[0]
        asked[name] = tags
        return made.get(name)

    names = {"torch", "tqdm", "bitsandbytes", "matplotlib", "unheard_of", "peft"}
    monkeypatch.setattr(wheels, "imported", lambda: names)
    out = tmp_path / "out"
    left_out = wheels.fetch(["peft"], "3.12", "manylinux_2_24_x86_64", "130", out, get)
    assert {path.name.split("-")[0] for path in out.iterdir()} == {"bitsandbytes", "tqdm", "rich"}
    assert left_out == [
        "matplotlib: it has no wheel of pure Python",
        "unheard-of: requirements.lock does not have it",
    ]
    assert asked["bitsandbytes"][-2:] == ["--platform", "manylinux_2_24_x86_64"]
    assert asked["tqdm"][-4:] == ["--platform", "any", "--abi", "none"]


def test_imported_names_are_those_of_other_packages():
    assert wheels.imported() >= {"torch", "tqdm", "matplotlib", "bitsandbytes", "peft"}
    assert not wheels.imported() & {"json", "benchmarks", "pylora"}


def test_names_are_read_from_the_facts_of_a_machine(tmp_path: Path):
    facts = tmp_path / "machine.json"
    facts.write_text('{"packages": ["peft", "tqdm"]}')
    assert wheels.names_of(["torch", str(facts)]) == ["torch", "peft", "tqdm"]
