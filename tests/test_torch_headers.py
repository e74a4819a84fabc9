"""`make headers` takes the right releases of torch, and finds an error in a file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def torch_headers(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from tools import torch_headers

    return torch_headers


def test_the_oldest_torch_is_the_same_everywhere(torch_headers):
    """setup.py sets it for the build. pyproject.toml and README.md must name the same release."""
    oldest = "{}.{}".format(*torch_headers.setup.TORCH_TARGET)
    dependencies = (ROOT / "pyproject.toml").read_text().split("\ndependencies = ")[1]
    assert re.match(r'\["torch>=(.*?)"', dependencies)[1] == oldest
    assert f"{oldest} or later" in (ROOT / "README.md").read_text()


def test_takes_the_newest_patch_of_each_minor(torch_headers):
    listed = "3.0.0 2.15.0rc1 2.14.1 2.14.0 2.13.0+cpu 2.13.0 2.12.9 2.12.10 2.11.0 2.10.0 2.9.1"
    newest = torch_headers.newest_of_each_minor([*map(Version, listed.split())], (2, 10))
    assert [*map(str, newest)] == ["2.10.0", "2.11.0", "2.12.10", "2.13.0", "2.14.1", "3.0.0"]


def test_an_oldest_torch_that_is_not_on_the_index_is_an_error(torch_headers):
    with pytest.raises(SystemExit, match=r"no torch 2\.10"):
        torch_headers.newest_of_each_minor([Version("2.11.0")], (2, 10))


def test_an_index_that_does_not_answer_is_an_error(torch_headers, monkeypatch, tmp_path):
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "no-index").as_uri())
    message = r"(?s)`pip index versions torch .*` failed:.*No matching distribution found for torch"
    with pytest.raises(SystemExit, match=message):
        torch_headers.released()


def test_sees_every_file_that_includes_torch(torch_headers):
    sources = [p for p in ROOT.glob("csrc/**/*") if p.suffix in (".cpp", ".cu")]
    facing = [p for p in sources if re.search(r"#include [<\"](torch/|.*bind\.h)", p.read_text())]
    assert sorted(p.relative_to(ROOT) for p in facing) == torch_headers.torch_facing_files()


def test_finds_what_a_torch_lacks(torch_headers, tmp_path):
    setup = torch_headers.setup
    compiler = setup.find_compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")
    compilation = setup.Compilation(compiler, tmp_path, None, "0")
    error = torch_headers.compile_error(compilation, Path("csrc/cpu/bind.cpp"))
    assert error is not None and "torch/csrc/stable/" in error


def test_the_build_finds_pybind11_before_that_of_torch(torch_headers, tmp_path):
    pytest.importorskip("pybind11")
    command = torch_headers.setup.Compilation(["c++"], tmp_path, None, "0").command(
        Path("csrc/bindings.cpp")
    )
    import pybind11

    assert command.index(pybind11.get_include()) < command.index(str(tmp_path))


def test_a_file_that_cannot_be_compiled_is_left_out(torch_headers, tmp_path):
    compilation = torch_headers.setup.Compilation(["c++"], tmp_path, None, "0")
    left_out = [p for p in torch_headers.torch_facing_files() if compilation.command(p) is None]
    assert left_out == [Path("csrc/cuda/bind.cpp"), Path("csrc/cuda/bind_linear.cpp")]
