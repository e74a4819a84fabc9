"""Fragments, swizzles and descriptors of the CUDA kernels agree with CUTLASS's definitions.

data/cutlass_layouts.json has CUTLASS's numbers and says how to print them again. The program
host_cuda/layouts.cpp prints ours: the maps that the kernels use, and what the executor's twins of
the instructions do.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from host_cuda import DRIVER, ROOT, start
from torch import Tensor

Tables = dict[str, Any]
CUTLASS: Tables = json.loads((ROOT / "tests/data/cutlass_layouts.json").read_text())


@pytest.fixture(scope="module")
def ours(compiled) -> Tables:
    program: Path = compiled("layouts", "hopper/tensor_map", twins=DRIVER)
    ran = start(program)
    assert ran.returncode == 0, ran.stderr.decode()
    return json.loads(ran.stdout)


def fragment(cutlass: Tables, name: str) -> Tensor:
    """Returns [threads, values]: the number of the element that each thread holds as each value."""
    table = cutlass["fragments"][name]
    return torch.tensor(table["thread"])[:, None] + torch.tensor(table["value"])


def same(got: Any, expected: Tensor) -> None:
    assert torch.equal(torch.tensor(got), expected)


def weights(ours: Tables, cutlass: Tables) -> None:
    """Compares the fragments of W that the Hopper kernel decodes in each step along k."""
    for name in ("wgmma A fp16", "wgmma A bf16"):
        for step in ours["weights"]:
            same(step, fragment(cutlass, name))


def lora_b(ours: Tables, cutlass: Tables) -> None:
    """Compares the TF32 fragments of lora_B."""
    for step in ours["lora_B"]:
        same(step, fragment(cutlass, "wgmma A tf32"))


def accumulators(ours: Tables, cutlass: Tables) -> None:
    """Compares the row and token of each sum. A tile with fewer tokens holds the first sums."""
    sums = torch.tensor(ours["sums"])
    for tokens in (16, 32, 64, 128, 256):
        table = fragment(cutlass, f"wgmma D {tokens}")
        assert table.shape == (128, tokens // 2)
        assert torch.equal(sums[:, : tokens // 2], table)


def staged_outputs(ours: Tables, cutlass: Tables) -> None:
    """Compares the places of stmatrix: each sum must land at its row and token of the tile."""
    stored = fragment(cutlass, "stmatrix transposed")  # [lane, element]: 8 * (lane of row) + column
    sums = fragment(cutlass, "wgmma D 256")
    rows, tokens = sums % 64, sums // 64
    staged_sums, staged_tokens = torch.tensor(ours["staged sums"]), ours["staged tokens"]
    units = torch.tensor(ours["staged units"])
    for pair, lane_tokens in enumerate(staged_tokens):
        for warp in range(4):
            mine = slice(32 * warp, 32 * warp + 32)
            assert torch.equal(
                torch.tensor(lane_tokens)[stored // 8], tokens[mine, staged_sums[pair]]
            )
            assert torch.equal(
                8 * units[warp][stored // 8] + stored % 8, rows[mine, staged_sums[pair]]
            )


def packed_tile(ours: Tables, cutlass: Tables) -> None:
    """Compares where the kernel reads qweight's units, and where the copy's twin puts them."""
    offsets = torch.tensor(cutlass["tiles"]["32 bytes, bytes"]["offset"]).view(-1, 2)
    same(ours["packed tile"], offsets)
    same(ours["copy, 32 bytes"], offsets)


def token_tile(ours: Tables, cutlass: Tables) -> None:
    """Compares where the copy's twin puts the units of the tiles of x and low."""
    for name in ("128 bytes, 16-bit elements", "128 bytes, tf32"):
        same(ours["copy, 128 bytes"], torch.tensor(cutlass["tiles"][name]["offset"]).view(-1, 8))


def descriptors(ours: Tables, cutlass: Tables) -> None:
    """Compares shared_operand() at several addresses in each step along k."""
    for name in ("fp16", "bf16", "tf32"):
        assert ours["descriptors"] == cutlass["descriptors"][name]["by_start"]


def descriptor_fields(ours: Tables, cutlass: Tables) -> None:
    """Compares each field of our descriptors by itself, so that a wrong field is named."""

    def fields(descriptor: str) -> dict[str, int]:
        bits = int(descriptor, 16)
        table = cutlass["descriptor fields"].items()
        return {name: bits >> low & (1 << count) - 1 for name, (low, count) in table}

    for start_address, steps in ours["descriptors"].items():
        for step, descriptor in enumerate(steps):
            assert fields(descriptor) == {
                "start_address": (int(start_address) + 32 * step) // 16,
                "leading_byte_offset": 1,
                "stride_byte_offset": 1024 // 16,
                "base_offset": 0,
                "layout_type": 1,
            }


def moved_matrices(ours: Tables, cutlass: Tables) -> None:
    """Compares the twins of ldmatrix and stmatrix."""
    for name in ("ldmatrix", "ldmatrix transposed", "stmatrix transposed"):
        same(ours[name], fragment(cutlass, name))


def matrix(values: Tensor, table: Tensor, shape: list[int]) -> Tensor:
    """Assembles a matrix [rows, columns] from each thread's values."""
    flat = torch.zeros(shape[0] * shape[1], dtype=torch.int64)
    flat[table.flatten()] = values.flatten()
    return flat.view(shape[1], shape[0]).t()


def warp_products(ours: Tables, cutlass: Tables) -> None:
    """Compares the twin of mma.sync: D is A B if each lane's values are where CUTLASS has them."""
    for name in ("mma fp16", "mma bf16"):
        A, B, D = (
            matrix(
                torch.tensor(ours[name][which]),
                fragment(cutlass, f"mma {which}"),
                cutlass["fragments"][f"mma {which}"]["shape"],
            )
            for which in "ABD"
        )
        assert torch.equal(D, A @ B.t())


def group_products(ours: Tables, cutlass: Tables) -> None:
    """Compares the twin of wgmma over four steps along k. B's words are in memory order."""
    for dtype, tokens, tile in (
        ("fp16", 128, "128 bytes, 16-bit elements"),
        ("bf16", 256, "128 bytes, 16-bit elements"),
        ("tf32", 128, "128 bytes, tf32"),
    ):
        product = {name: torch.tensor(x) for name, x in ours[f"wgmma {dtype}"].items()}
        table = fragment(cutlass, f"wgmma A {dtype}")
        shape = cutlass["fragments"][f"wgmma A {dtype}"]["shape"]
        fragments = product["A"].view(128, ours["steps"], -1)
        A = torch.cat([matrix(step, table, shape) for step in fragments.unbind(1)], dim=1)
        # The table has 64 tokens. Every 8 of them take up a pattern of 1024 bytes.
        offsets = torch.tensor(cutlass["tiles"][tile]["offset"]).view(-1, 8)
        pattern = 128 * len(offsets)
        more = torch.arange(tokens // len(offsets)) * pattern
        item = 4 if dtype == "tf32" else 2
        first = (more[:, None, None] + offsets).view(tokens, 8, 1) // item
        B = product["B"][first + torch.arange(16 // item)].view(tokens, -1)
        D = matrix(product["D"], fragment(cutlass, f"wgmma D {tokens}"), [64, tokens])
        assert torch.equal(D, A @ B.t())


# Each comparison, and the tables that it reads: if one of them is permuted, it must fail.
COMPARISONS: list[tuple[Callable[[Tables, Tables], None], list[tuple[str, str]]]] = [
    (weights, [("fragments", "wgmma A fp16"), ("fragments", "wgmma A bf16")]),
    (lora_b, [("fragments", "wgmma A tf32")]),
    (accumulators, [("fragments", f"wgmma D {n}") for n in (16, 32, 64, 128, 256)]),
    (staged_outputs, [("fragments", "stmatrix transposed"), ("fragments", "wgmma D 256")]),
    (packed_tile, [("tiles", "32 bytes, bytes")]),
    (token_tile, [("tiles", "128 bytes, 16-bit elements"), ("tiles", "128 bytes, tf32")]),
    (descriptors, [("descriptors", name) for name in ("fp16", "bf16", "tf32")]),
    (descriptor_fields, [("descriptor fields", name) for name in CUTLASS["descriptor fields"]]),
    (
        moved_matrices,
        [("fragments", f"{name}") for name in CUTLASS["fragments"] if "ldmatrix" in name]
        + [("fragments", "stmatrix transposed")],
    ),
    (warp_products, [("fragments", f"mma {which}") for which in "ABD"]),
    (
        group_products,
        [("fragments", f"wgmma A {name}") for name in ("fp16", "bf16", "tf32")]
        + [("fragments", f"wgmma D {tokens}") for tokens in (128, 256)]
        + [("tiles", "128 bytes, 16-bit elements"), ("tiles", "128 bytes, tf32")],
    ),
]


def permuted(table: Any) -> list[Any]:
    """Returns copies of the table; in each copy one of the lists is rotated by one place."""
    if isinstance(table, list):
        return [[*table[1:], table[0]]]
    results = []
    for key, value in table.items():
        if isinstance(value, (list, dict)) and key != "shape":
            results += [table | {key: other} for other in permuted(value)]
    return results


def named(comparison: tuple[Callable[..., None], Any]) -> str:
    return comparison[0].__name__


@pytest.mark.parametrize("comparison", COMPARISONS, ids=named)
def test_layouts_are_those_of_cutlass(ours: Tables, comparison):
    compare, _ = comparison
    compare(ours, CUTLASS)


@pytest.mark.parametrize("comparison", COMPARISONS, ids=named)
def test_each_comparison_can_fail(ours: Tables, comparison):
    compare, tables = comparison
    for group, name in tables:
        others = permuted(CUTLASS[group][name])
        assert others
        for other in others:
            wrong = CUTLASS | {group: CUTLASS[group] | {name: other}}
            with pytest.raises(AssertionError):
                compare(ours, wrong)


def test_every_table_is_compared():
    used = {table for _, tables in COMPARISONS for table in tables}
    groups = ("fragments", "tiles", "descriptor fields", "descriptors")
    assert used == {(group, name) for group in groups for name in CUTLASS[group]}
