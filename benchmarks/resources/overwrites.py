"""Finds products on Hopper whose operands may be overwritten while the matrix unit reads them.

The matrix unit of Hopper runs on by itself, and a compiled loop may start the next turn before the
products of this turn are finished. Meanwhile the loop copies tiles of later turns to a ring of
slots in shared memory. The copies run ahead of the products by a number of turns, so a product that
runs on needs a slot more than this number. Triton leaves this slot out if a tile is also loaded to
registers (its issue 6691). The last copies of a loop have nothing to load and fill their slots with
zeros at once, so the product reads zeros. An operand in registers is no safer: older versions of
ptxas use its registers again too early (Triton's issue 9433).
"""

from __future__ import annotations

import re
from typing import NamedTuple

_RING = re.compile(r"(%[\w-]+) = ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x\d+x")
_SLOT = re.compile(r"(%[\w-]+) = ttg\.memdesc_index (%[\w-]+)\[")
_VIEW = re.compile(r"(%[\w-]+) = ttg\.memdesc_(?!index)\w+ (%[\w-]+)")
_COPY = re.compile(r"ttg\.async_copy_global_to_local [^,]+, (%[\w-]+)")
_PRODUCT = re.compile(r"ttng\.warp_group_dot (%[\w-]+)\S*, (%[\w-]+)\S*, .*isAsync = true")
_WAIT = re.compile(r"ttng\.warp_group_dot_wait .*pendings = (\d+)")
_NAME = re.compile(r"%[\w-]+")


class _Product(NamedTuple):
    turn: int
    operands: tuple[str, ...]


def overwrites(ttgir: str) -> list[str]:
    """Returns a sentence for each way in which a running product may lose an operand.

    ttgir    Triton's last representation of a kernel before LLVM's
    """
    lines = ttgir.splitlines()
    found: dict[str, None] = {}
    for first, line in enumerate(lines):
        if " scf.for " in line:
            indent = _indent(line)
            end = first + 1
            while _indent(lines[end]) > indent:
                end += 1
            before = [text for text in lines[:first] if _indent(text) <= indent]
            body = [text for text in lines[first + 1 : end] if _indent(text) == indent + 2]
            found |= dict.fromkeys(_in_loop(before, body))
    return list(found)


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _in_loop(before: list[str], body: list[str]) -> list[str]:
    """Follows two turns of a loop.

    before    the lines in front of the loop that its operands can come from
    body      the lines of the loop, without those of loops inside it
    """
    slots = {m[1]: int(m[2]) for line in before if (m := _RING.search(line))}
    rings = _rings([*before, *body])
    copies = [rings[m[1]] for line in before if (m := _COPY.search(line))]
    made_here = {n for line in body if " = " in line for n in _NAME.findall(line.split(" = ")[0])}
    problems: list[str] = []
    running: list[_Product] = []
    for turn in range(2):
        for line in body:
            if product := _PRODUCT.search(line):
                running.append(_Product(turn, product.groups()))
            elif wait := _WAIT.search(line):
                running = running[max(0, len(running) - int(wait[1])) :]
            elif copy := _COPY.search(line):
                ring = rings[copy[1]]
                for product in running:
                    reads = ring in (rings.get(operand) for operand in product.operands)
                    if reads and (copies.count(ring) + turn - product.turn) % slots[ring] == 0:
                        problems.append(
                            f"a copy to the {slots[ring]} slots of {ring} overwrites the operand "
                            "of a product that may be running"
                        )
        problems += [
            f"{operand}, which each turn makes anew, is an operand of a product that may be running"
            for product in running
            for operand in product.operands
            if operand in made_here and operand not in rings
        ]
    return problems


def _rings(lines: list[str]) -> dict[str, str]:
    """Returns the ring in shared memory that each slot, or view of a slot, belongs to."""
    rings: dict[str, str] = {}
    for line in lines:
        if slot := _SLOT.search(line):
            rings[slot[1]] = slot[2]
        elif (view := _VIEW.search(line)) and view[2] in rings:
            rings[view[1]] = rings[view[2]]
    return rings
