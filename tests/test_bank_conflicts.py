"""Bank conflicts of the CUDA kernels, counted by the executor of host_cuda/ from real addresses.

A conflict is a wavefront beyond the fewest that an access can take. The numbers here are conflicts
per 1000 accesses of a warp. Every access that is not named has no conflicts.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from host_cuda import BACKWARD_KERNELS, DRIVER, HOPPER_KERNELS, SMALL_M_KERNELS, start
from host_cuda.linear import check_linear, check_linear_backward

Access = tuple[str, str]  # the function of the kernel; the operation and its bytes per lane


class Counts:
    """The counts in a program's report, with all accesses of a function added up."""

    def __init__(self, path: Path) -> None:
        self.accesses: Counter[Access] = Counter()
        self.conflicts: Counter[Access] = Counter()
        for site in json.loads(path.read_text())["accesses"]:
            # Take the name before the first parameter list: a lambda counts for the function around
            # it.
            function = re.search(r"(\w+)(<[^<>]*>)?\(", site["function"])
            assert function is not None
            access = function[1], f"{site['operation']} {site['bytes']}"
            self.accesses[access] += site["accesses"]
            self.conflicts[access] += site["wavefronts"] - site["least"]

    def per_thousand(self) -> dict[Access, int]:
        """Returns the conflicts per 1000 accesses, for the accesses that have conflicts."""
        return {
            access: round(1000 * conflicts / self.accesses[access])
            for access, conflicts in self.conflicts.items()
            if conflicts
        }


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], Counts]:
    path = tmp_path / "report.json"
    monkeypatch.setenv("HOST_CUDA_REPORT", str(path))
    return lambda: Counts(path)


# Each pattern of host_cuda/mutants_banks.cpp: the wavefronts that one access takes, and the fewest
# that it can take.
PATTERNS = {
    "words beside each other": (1, 1),
    "every other word": (2, 1),
    "every 32nd word": (32, 1),
    "every 33rd word": (1, 1),
    "the same word": (1, 1),
    "a word of one lane": (1, 1),
    "bytes beside each other": (1, 1),
    "8 bytes beside each other": (2, 2),
    "16 bytes beside each other": (4, 4),
    "16 bytes of every 32": (8, 4),
    "the same 16 bytes": (4, 4),
    "rows of ldmatrix beside each other": (4, 4),
    "rows of ldmatrix 128 bytes apart": (32, 4),
    "rows of ldmatrix 256 bytes apart": (32, 4),
    "rows of ldmatrix 144 bytes apart": (4, 4),
    "rows of ldmatrix in a swizzled tile": (4, 4),
    "rows of stmatrix 64 bytes apart": (16, 4),
    "copies 16 bytes apart": (4, 4),
    "copies 512 bytes apart": (32, 4),
    "a column of words stored": (32, 1),
    "lanes that skip an access, and meet": (1, 1),
}


def totals(path: Path) -> tuple[int, int, int]:
    (site,) = json.loads(path.read_text())["accesses"]
    return site["accesses"], site["wavefronts"], site["least"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_known_patterns_have_their_wavefronts(compiled, counts, tmp_path: Path, pattern: str):
    """The program makes each access three times."""
    ran = start(compiled("mutants_banks"), pattern)
    assert ran.returncode == 0, ran.stderr.decode()
    wavefronts, least = PATTERNS[pattern]
    assert totals(tmp_path / "report.json") == (3, 3 * wavefronts, 3 * least)


def test_lanes_that_do_not_meet_are_counted_wrongly(compiled, counts, tmp_path: Path):
    """This is the limit of the count: half of the lanes skip an access, and no barrier joins them.

    The access would take 3 wavefronts if the lanes met after each one.
    """
    ran = start(compiled("mutants_banks"), "lanes that skip an access")
    assert ran.returncode == 0, ran.stderr.decode()
    assert totals(tmp_path / "report.json") == (3, 5, 3)


# The accesses in the main loop of each kernel. Each of them must occur.
SMALL_LOOP = [
    ("decode_pair", "load 4"),
    ("fetch", "cp.async 16"),
    ("lora_linear_small_m", "ldmatrix 16"),
    ("lora_linear_small_m", "load 16"),
]
BACKWARD_LOOP = [
    ("decode_pair", "load 4"),
    ("fetch", "cp.async 16"),
    ("nf4_linear_backward_small_m", "load 4"),
    ("nf4_linear_backward_small_m", "load 16"),
]
HOPPER_LOOP = [("decode_pair", "load 4"), ("decode_k_tile", "load 16")]


# Two accesses outside the main loop: x is stored in shared memory, and the sums of the warps are
# read.
STAGING = ("lora_linear_small_m", "store 16")
SUMS = ("lora_linear_small_m", "load 4")


@pytest.mark.parametrize(
    ("M", "expected"),
    [
        (1, {}),
        (2, {}),
        # x_pitch(3) is 3, not 2 modulo 4.
        (3, {("lora_linear_small_m", "load 16"): 1000, SUMS: 667}),
        (4, {STAGING: 4000, SUMS: 667}),
        (8, {SUMS: 667}),
        (16, {SUMS: 667}),
        (24, {SUMS: 667}),
        (33, {STAGING: 848, SUMS: 667}),
        (64, {SUMS: 667}),
    ],
)
def test_small_m_has_only_the_known_conflicts(
    compiled, counts, M: int, expected: dict[Access, int]
):
    program = compiled("lora_linear", *SMALL_M_KERNELS)
    check_linear(program, (M, 70, 512), processors=2)
    counted = counts()
    assert all(counted.accesses[access] for access in SMALL_LOOP)
    assert counted.per_thousand() == expected


STAGING_GRAD = ("stage_grad", "store 16")


@pytest.mark.parametrize(
    ("M", "expected"),
    [
        (1, {STAGING_GRAD: 500}),
        (2, {STAGING_GRAD: 1500}),
        # The pitch of 3 tokens is 3, not 2 modulo 4.
        (3, {STAGING_GRAD: 500, ("nf4_linear_backward_small_m", "load 16"): 1000}),
        (4, {STAGING_GRAD: 1000}),
        (8, {}),
        (16, {}),
        (24, {}),
        (33, {STAGING_GRAD: 667}),
        (64, {}),
    ],
)
def test_small_m_backward_has_only_the_known_conflicts(
    compiled, counts, M: int, expected: dict[Access, int]
):
    program = compiled("nf4_linear_backward", *BACKWARD_KERNELS)
    check_linear_backward(program, (M, 136, 320))
    counted = counts()
    assert all(counted.accesses[access] for access in BACKWARD_LOOP)
    assert counted.per_thousand() == expected


@pytest.mark.parametrize(
    ("shape", "processors"),
    [((300, 120, 640), 1), ((250, 200, 384), 1), ((130, 70, 1088), 5)],
)
def test_hopper_has_no_conflicts(
    compiled, counts, tmp_path: Path, shape: tuple[int, int, int], processors: int
):
    """There are no conflicts at all. wgmma reads what TMA writes, so no fence is needed."""
    program = compiled("lora_linear_hopper", *HOPPER_KERNELS, twins=DRIVER)
    check_linear(program, shape, torch.bfloat16, processors=processors)
    counted = counts()
    assert all(counted.accesses[access] for access in HOPPER_LOOP)
    assert counted.accesses["store_turn", "stmatrix 16"] > 0
    assert counted.per_thousand() == {}
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["async_reads"] > 0 and report["async_writes"] > 0
    assert report["async_fences"] == 0
