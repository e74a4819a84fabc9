"""tools/kept_objects.py makes an object once for its content, and again if the content changes."""

from __future__ import annotations

import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import kept_objects
import pytest

CXX = shutil.which("g++") or shutil.which("c++")
pytestmark = pytest.mark.skipif(CXX is None, reason="no C++ compiler")


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A C++ file that includes a header, which includes another header."""
    monkeypatch.setattr(kept_objects, "ROOT", tmp_path)
    monkeypatch.setenv("PYLORA_BUILD_CACHE", str(tmp_path / "kept"))
    (tmp_path / "include" / "deep").mkdir(parents=True)
    (tmp_path / "main.cpp").write_text("#include <outer.h>\nint main() { return kInner; }\n")
    (tmp_path / "include/outer.h").write_text('#if 0\n#endif\n  #  include "deep/inner.h"\n')
    (tmp_path / "include/deep/inner.h").write_text("constexpr int kInner = 0;\n")
    return tmp_path / "main.cpp"


def make(source: Path, *flags: str) -> tuple[Path, bool]:
    assert CXX is not None
    folder = source.parent / "include"
    return kept_objects.kept_object([CXX, "-Iinclude", *flags], source, [folder], [CXX])


def test_all_headers_of_a_file_are_found(source: Path):
    included = kept_objects.with_includes(source, [source.parent / "include"])
    names = [str(path.relative_to(source.parent)) for path in included]
    assert names == ["include/deep/inner.h", "include/outer.h", "main.cpp"]


def test_an_object_is_made_once(source: Path):
    path, was_there = make(source)
    assert path.exists() and not was_there
    assert make(source) == (path, True)
    source.touch()
    assert make(source) == (path, True)


def test_a_change_anywhere_makes_another_object(source: Path, monkeypatch: pytest.MonkeyPatch):
    paths = [make(source)[0], make(source, "-O1")[0]]
    (source.parent / "include/deep/inner.h").write_text("constexpr int kInner = 2;\n")
    paths.append(make(source)[0])
    monkeypatch.setattr(kept_objects, "tool_version", lambda tool: "another compiler")
    paths.append(make(source)[0])
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-O0")
    paths.append(make(source)[0])
    assert len(set(paths)) == len(paths) == 5


def test_a_file_that_changes_while_it_is_compiled_makes_no_object(source: Path, tmp_path: Path):
    compiler = tmp_path / "compiler"
    compiler.write_text(f"#!/bin/sh\necho '// edited' >> {source}\nexec {CXX} \"$@\"\n")
    compiler.chmod(0o755)
    folders = [tmp_path / "include"]
    with pytest.raises(SystemExit, match=r"main\.cpp was changed while it was compiled"):
        kept_objects.kept_object([str(compiler), "-Iinclude"], source, folders, [str(CXX)])
    assert not list((tmp_path / "kept").glob("*.o"))


def test_a_compiler_error_is_reported(source: Path):
    source.write_text("int main() { return nothing; }\n")
    with pytest.raises(SystemExit, match=r"main\.cpp did not compile"):
        make(source)


def test_one_thread_makes_an_object_and_the_others_wait(source: Path):
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: make(source), range(4)))
    assert len({path for path, _ in made}) == 1
    assert sorted(was_there for _, was_there in made) == [False, True, True, True]


def test_a_program_is_kept_for_its_objects_and_flags(source: Path):
    assert CXX is not None
    path, _ = make(source)
    program = kept_objects.kept_program([CXX], [path])
    assert os.access(program, os.X_OK)
    assert kept_objects.kept_program([CXX], [path]) == program
    assert kept_objects.kept_program([CXX, "-g"], [path]) != program


def test_an_object_that_nobody_uses_is_removed(source: Path):
    path, _ = make(source)
    long_ago = time.time() - (kept_objects.KEEP_DAYS + 1) * kept_objects.DAY
    os.utime(path, (long_ago, long_ago))
    assert make(source) == (path, True)  # each use renews its time
    assert path.stat().st_mtime > long_ago + kept_objects.DAY
    os.utime(path, (long_ago, long_ago))
    make(source, "-O1")
    assert not path.exists()
