"""The report of the compiled CUDA kernels: its committed table has no spill, and it can fail."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.resources import cuda as resources
from benchmarks.resources import cycle_model, sources

CYCLES = {"issue": 41.5, "arithmetic": 30.5, "shared": 30.0, "tensor": 12.9, "memory": 64.4}
BEFORE = {
    "registers": 122,
    "shared": 1024,
    "stack": 0,
    "local": 0,
    "loads_16": 8,
    "stores_16": 4,
    "matrix": 16,
    "cycles": CYCLES,
    "binds": "memory",
}


def problems(after: dict[str, Any], before: dict[str, Any] = BEFORE) -> list[str]:
    return resources.problems({"sm_90a": {"kernel": after}}, {"sm_90a": {"kernel": before}})


def test_committed_table_holds_no_spill() -> None:
    table = json.loads(resources.TABLE.read_text())["kernels"]
    assert table.keys() == {"sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120"}
    assert resources.problems(table, table) == []


def test_committed_table_says_what_binds() -> None:
    """Every kernel that decodes weights for products has a row, and its slowest column binds."""
    table = json.loads(resources.TABLE.read_text())["kernels"]
    for arch, kernels in table.items():
        loops = {name: numbers for name, numbers in kernels.items() if "cycles" in numbers}
        assert {resources.base_name(name) for name in loops} == {
            name for name in resources.DECODERS if name != "lora_linear_hopper" or arch == "sm_90a"
        }
        for numbers in loops.values():
            assert numbers["cycles"].keys() == set(cycle_model.COLUMNS)
            assert numbers["cycles"][numbers["binds"]] == max(numbers["cycles"].values())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("registers", 129),
        ("shared", 1025),
        ("loads_16", 7),
        ("stores_16", 3),
        ("matrix", 15),
    ],
)
def test_numbers_worse_than_the_table_are_reported(key: str, value: int) -> None:
    assert problems(BEFORE | {key: value}) == [f"sm_90a kernel: {key} {BEFORE[key]} -> {value}"]


@pytest.mark.parametrize("column", ["issue", "arithmetic", "shared", "tensor"])
def test_more_cycles_of_the_slowest_part_are_reported(column: str) -> None:
    before = BEFORE | {"cycles": CYCLES | {column: 50.0}}
    after = BEFORE | {"cycles": CYCLES | {column: 51.0}}
    expected = f"sm_90a kernel: {column} 50 -> {column} 51 cycles for 2048 weights"
    assert problems(after, before) == [expected]
    assert problems(before, after) == problems(before, before) == []


def test_work_may_move_to_a_part_that_has_time() -> None:
    assert problems(BEFORE | {"cycles": CYCLES | {"shared": 41.5}}) == []
    expected = ["sm_90a kernel: issue 41.5 -> shared 43 cycles for 2048 weights"]
    assert problems(BEFORE | {"cycles": CYCLES | {"issue": 20.0, "shared": 43.0}}) == expected


def test_a_kernel_whose_main_loop_is_not_found_is_reported() -> None:
    without = {key: value for key, value in BEFORE.items() if key not in ("cycles", "binds")}
    assert problems(without) == ["sm_90a kernel: no main loop found, see DECODERS"]
    table = {"sm_90a": {"lora_shrink_many_rows<bf16, 16, true>": without}}
    assert resources.problems(table, table) == []


@pytest.mark.parametrize("key", ["local", "stack"])
def test_a_spill_is_reported(key: str) -> None:
    assert any("spills" in problem for problem in problems(BEFORE | {key: 8}))


def test_a_kernel_that_is_gone_is_reported() -> None:
    reported = resources.problems({"sm_90a": {}}, {"sm_90a": {"kernel": BEFORE}})
    assert reported == ["sm_90a kernel is gone"]


def test_registers_within_one_allocation_unit_are_the_same() -> None:
    assert problems(BEFORE | {"registers": 123}) == problems(BEFORE | {"registers": 128}) == []


def test_better_numbers_are_no_problem() -> None:
    better = {"registers": 96, "shared": 0, "loads_16": 16, "cycles": CYCLES | {"issue": 35.0}}
    assert problems(BEFORE | better) == []


def test_decoder_counts_the_weights_of_a_warp() -> None:
    """Eight products read 8 weights in each lane, for two tiles of tokens: 1,024 weights."""
    listing = "\n".join(
        [
            "Function : kernel",
            *[f"/*{16 * i:04x}*/ HMMA.16816.F32.BF16 R4, R8, R12, R4 ;" for i in range(8)],
            "/*0080*/ @!P0 BRA 0x0 ;",
            "/*0090*/ EXIT ;",
        ]
    )
    code = resources.sass.parse(listing)["kernel"]
    decoder = resources.DECODERS["nf4_linear_backward_small_m"]
    loop = decoder.loop("nf4_linear_backward_small_m<bf16, 2>", code)
    assert loop is not None and loop.weights == 1024
    assert decoder.loop("nf4_linear_backward_small_m<bf16, 2>", code[:8]) is None


ROW = BEFORE | {"instructions": 100}


@pytest.fixture
def toolkit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """Simulates two CUDA files, and returns the lists of files that are compiled.

    b.cu has changed since the table was made.
    """
    compiled: list[list[str]] = []

    class Files:
        missing = None
        toolkit = SimpleNamespace(version="13.0")

        def keys(self) -> dict[str, str]:
            return {"a.cu": "1", "b.cu": "3"}

        def objects(self, files: Any) -> dict[str, Path]:
            compiled.append(list(files))
            return {file: Path(file) for file in compiled[-1]}

    rows = {f"kernel of {file}": ROW | {"file": file} for file in ("a.cu", "b.cu")}
    table = {"cuda": "13.0", "sources": {"a.cu": "1", "b.cu": "2"}, "kernels": {"sm_80": rows}}
    monkeypatch.setattr(resources, "TABLE", tmp_path / "table.json")
    resources.TABLE.write_text(json.dumps(table))
    monkeypatch.setattr(resources, "CudaFiles", Files)
    monkeypatch.setattr(resources, "measure", lambda path: {"sm_80": {f"kernel of {path}": ROW}})
    monkeypatch.setattr(sys, "argv", ["cuda"])
    monkeypatch.delenv("CI_FULL", raising=False)
    return compiled


def test_only_a_changed_file_is_compiled(toolkit, capsys) -> None:
    assert resources.main() == 0
    assert toolkit == [["b.cu"]]
    printed = capsys.readouterr().out
    assert "compiled: b.cu\n" in printed
    assert "not compiled, since the table was made from the same sources: a.cu\n" in printed


def test_all_files_are_compiled_if_asked(toolkit, monkeypatch, capsys) -> None:
    monkeypatch.setenv("CI_FULL", "1")
    assert resources.main() == 0
    assert toolkit == [["a.cu", "b.cu"]] and "not compiled" not in capsys.readouterr().out


def test_a_changed_file_is_compared_with_its_rows(toolkit, monkeypatch, capsys) -> None:
    worse = ROW | {"registers": 200}
    monkeypatch.setattr(resources, "measure", lambda path: {"sm_80": {"kernel of b.cu": worse}})
    assert resources.main() == 1
    assert "WORSE sm_80 kernel of b.cu: registers 122 -> 200\n" in capsys.readouterr().out
    monkeypatch.setattr(resources, "measure", lambda path: {"sm_80": {}})
    assert resources.main() == 1
    printed = capsys.readouterr().out
    assert "kernel of b.cu is gone" in printed and "kernel of a.cu" not in printed


def test_a_written_table_holds_the_keys_of_its_sources(toolkit, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["cuda", "--write"])
    assert resources.main() == 0
    assert toolkit == [["a.cu", "b.cu"]]
    written = json.loads(resources.TABLE.read_text())
    assert written["sources"] == {"a.cu": "1", "b.cu": "3"}
    assert written["kernels"]["sm_80"]["kernel of a.cu"]["file"] == "a.cu"
    monkeypatch.setattr(sys, "argv", ["cuda"])
    assert resources.main() == 0 and len(toolkit) == 1


def test_a_missing_toolkit_is_reported(monkeypatch, capsys) -> None:
    monkeypatch.setenv("CUDA_HOME", "")
    monkeypatch.setattr(sys, "argv", ["cuda"])
    assert resources.main() == 0
    assert capsys.readouterr().out == "no CUDA kernel was checked: CUDA_HOME is empty\n"


def test_a_key_depends_on_the_source_and_the_compiler(monkeypatch) -> None:
    files = sources.CudaFiles()
    files.toolkit = SimpleNamespace(flags=lambda: ["-O3"], nvcc="nvcc")
    monkeypatch.setattr(files.setup, "tool_version", lambda tool: "release 13.0")
    keys = files.keys()
    assert keys == files.keys() and len(set(keys.values())) == len(keys) > 5
    monkeypatch.setattr(files.setup, "tool_version", lambda tool: "release 13.1")
    assert not set(keys.values()) & set(files.keys().values())


def test_a_kernel_in_two_files_is_an_error(monkeypatch) -> None:
    monkeypatch.setattr(resources, "measure", lambda path: {"sm_80": {"kernel": ROW}})
    with pytest.raises(SystemExit, match=r"b\.cu: kernel is in another CUDA file as well"):
        resources.measure_files({"a.cu": Path("a"), "b.cu": Path("b")})
