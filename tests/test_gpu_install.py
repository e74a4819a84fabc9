"""The step of `make gpu` that installs pylora keeps and reuses what it can, without a network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import install
from benchmarks.gpu.steps import ROOT

ENVIRONMENT = {"PATH": os.environ["PATH"]}


@pytest.fixture
def info(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(install, "source_digest", lambda: "0123")
    return {"sources": "0123", "cuda_archs": ["80", "90a", "100+PTX"]}


def test_an_extension_is_kept_if_its_sources_and_arch_fit(info: dict[str, Any]):
    assert install.why_not(info, "90a") is None
    assert install.why_not(info, "100") is None
    assert install.why_not(info, None) is None
    reason = install.why_not(info, "120")
    assert reason == "it was built for 80, 90a, 100+PTX, and 120 is wanted".replace("+PTX", "")
    assert "the CPU alone, and 80" in install.why_not({**info, "cuda_archs": []}, "80")
    assert "other sources" in install.why_not({**info, "sources": "4567"}, "80")
    assert install.why_not("it crashed", "80") == "it crashed"


def test_a_carried_extension_is_reused_if_it_fits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys
):
    module = pytest.importorskip("pylora._C", reason="pylora was installed without its extension")
    monkeypatch.setattr(install, "ROOT", tmp_path)
    (tmp_path / "pylora").mkdir()
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    carried_file = tmp_path / "pylora" / f"_C{suffix}"
    monkeypatch.setattr(install, "source_digest", lambda: module.build_info()["sources"])
    assert install.carried(None) is None
    (tmp_path / "pylora" / "_C.other.so").touch()
    assert install.carried(None) is None
    assert "pylora/_C.other.so is not reused: it is not for this Python" in capsys.readouterr().out
    carried_file.write_bytes(b"no library")
    assert install.carried(None) is None
    assert f"pylora/{carried_file.name} is not reused: ImportError" in capsys.readouterr().out
    shutil.copy(module.__file__, carried_file)
    assert install.carried(None) == carried_file
    assert install.carried("999") is None
    assert "and 999 is wanted" in capsys.readouterr().out


def test_the_installation_needs_no_network(tmp_path: Path):
    """A copy of the sources, with the built extension, is installed into a new environment."""
    module = pytest.importorskip("pylora._C", reason="pylora was installed without its extension")
    if module.build_info()["sources"] != install.source_digest():
        pytest.fail("pylora._C is older than its sources: install pylora again")
    checkout = tmp_path / "checkout"
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    for folder in ("pylora", "kernels", "csrc", "tools", "benchmarks/gpu"):
        shutil.copytree(ROOT / folder, checkout / folder, ignore=ignored)
    files = ["setup.py", "pyproject.toml", "README.md", "LICENSE"]
    for file in (*files, "benchmarks/__init__.py", "benchmarks/results.py"):
        shutil.copy(ROOT / file, checkout / file)
    carried = Path(module.__file__)
    shutil.copy(carried, checkout / "pylora" / carried.name)
    # The new environment finds the packages of this one, except pylora.
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = str(environment / "bin" / "python")
    path = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([python, "-c", path], capture_output=True, text=True, check=True).stdout
    here = [p for p in sys.path if p.endswith("site-packages")]
    (Path(site.strip()) / "here.pth").write_text("\n".join(here) + "\n")
    proxy = {"PIP_NO_INDEX": "1", "https_proxy": "http://127.0.0.1:9"}
    done = subprocess.run(
        [python, "-m", "benchmarks.gpu.install"],
        cwd=checkout,
        env=ENVIRONMENT | proxy | {"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"reused pylora/{carried.name}" in done.stdout
    assert "--no-index --no-deps --no-build-isolation --editable" in done.stdout
    where = subprocess.run(
        [python, "-c", "import pylora._C as c; print(c.__file__)"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(where.stdout.strip()).parent == checkout / "pylora"
