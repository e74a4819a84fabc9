"""No C++ name of the extension is defined twice.

Two types or constants with the same name, in two files that never include each other, break the
one-definition rule, and no compiler or linker says so. clang-format puts everything at namespace
scope in column 0, so the sources can be searched for definitions.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NAMESPACES = {"common": "pylora", "cpu": "pylora::cpu", "cuda": "pylora::cuda"}
SUFFIXES = (".h", ".cpp", ".cuh", ".cu")

NAMESPACE = re.compile(r"^namespace(.*?) \{$", re.M)
UNNAMED = re.compile(r"^namespace \{$.*?^\}  // namespace$", re.M | re.S)
TYPE = re.compile(r"^(?:struct|class|union|enum(?: class)?) (\w+)(?: : [^{;]*)? \{", re.M)
ALIAS = re.compile(r"^using (\w+) =", re.M)
CONSTANT = re.compile(
    r"^(?:(?:inline|static|extern) )*const(?:expr)? [^(=;]*?(\w+)(?:\[.*\])* =", re.M
)
FUNCTION = re.compile(
    r"^(?!using|struct|extern)(?=\S)[\w:<>,*& ]+?[ *&]\w+\([^;{}]*\)[^;(){}]* \{", re.M
)


def sources(folder: str) -> dict[Path, str]:
    files = [p for p in sorted((ROOT / "csrc" / folder).rglob("*")) if p.suffix in SUFFIXES]
    return {path.relative_to(ROOT): path.read_text() for path in files}


def definitions(text: str) -> list[str]:
    """Lists what a file defines at namespace scope, except in unnamed namespaces."""
    text = UNNAMED.sub("", text)
    names = [name for pattern in (TYPE, ALIAS, CONSTANT) for name in pattern.findall(text)]
    for match in FUNCTION.finditer(text):
        template = re.search(r"template <[^\n]*>\n\Z", text[: match.start()])
        names.append(" ".join(f"{template[0] if template else ''}{match[0]}".split()))
    return names


def defined_twice(files: dict[Path, str]) -> dict[str, list[str]]:
    where = defaultdict(list)
    for path, text in files.items():
        for name in definitions(text):
            where[name].append(str(path))
    return {name: paths for name, paths in where.items() if len(paths) > 1}


@pytest.mark.parametrize("folder", NAMESPACES)
def test_each_folder_has_its_own_namespace(folder: str):
    for path, text in sources(folder).items():
        opened = {name.strip() for name in NAMESPACE.findall(text)}
        assert opened <= {NAMESPACES[folder], ""}, f"{path} opens {opened}"
        outside = text.split(f"namespace {NAMESPACES[folder]} {{", 1)[0]
        assert not definitions(outside), f"{path} defines {definitions(outside)} outside of it"


@pytest.mark.parametrize("folder", NAMESPACES)
def test_no_name_is_defined_by_two_files(folder: str):
    files = sources(folder)
    assert sum(len(definitions(text)) for text in files.values()) > len(files)
    assert not defined_twice(files)


@pytest.mark.parametrize(
    "code",
    [
        "struct LoraLinear {\n  int x;\n};",
        "template <class T>\nstruct Tile : Base<T> {\n};",
        "enum class Kind { kA };",
        "using Word = int;",
        "inline constexpr int kMaxRank = 256;",
        "constexpr float kTable[2] = {0.0f, 1.0f};",
        "template <int kN>\nPYLORA_INLINE float sum(const float (&x)[kN]) {\n}",
        "inline std::string name(int a,\n                        int b) {\n}",
    ],
)
def test_a_second_definition_is_found(code: str):
    header = f"namespace pylora::cpu {{\n\n{code}\n\n}}  // namespace pylora::cpu\n"
    unnamed = f"namespace pylora::cpu {{\nnamespace {{\n\n{code}\n\n}}  // namespace\n}}\n"
    assert len(defined_twice({Path("a.h"): header, Path("b.h"): header})) == 1
    assert not defined_twice({Path("a.h"): header, Path("b.cpp"): unnamed})


def test_no_function_is_compiled_for_two_instruction_sets(monkeypatch: pytest.MonkeyPatch):
    """The linker keeps one definition of an inline function or template. If it keeps the one
    compiled for AVX-512, the program stops on a processor without AVX-512."""
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    monkeypatch.syspath_prepend(str(ROOT))
    import setup

    build = ROOT / "build" / sys.implementation.cache_tag
    objects = sorted((build / "csrc").glob("c[!u]*/*.cpp.o"))
    if not objects:
        pytest.skip("the extension was not built in this folder")
    flags = defaultdict(set)
    for path in objects:
        command = ["nm", "--demangle", "--defined-only", "--extern-only", str(path)]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        # The compiler uses AMX only for intrinsics, so the AMX flags change no other code.
        isa = [f for f in setup.isa_flags(path.name.split(".")[0]) or [] if "amx" not in f]
        for line in listed.splitlines():
            name = line.split(" ", 2)[2]
            if not name.startswith("DW.ref."):  # a pointer to a function, which holds no code
                flags[name].add((*isa,))
    assert len({isa for sets in flags.values() for isa in sets}) > 1
    assert not [name for name, sets in flags.items() if len(sets) > 1]
