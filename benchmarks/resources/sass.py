"""Reads the machine code (SASS) that cuobjdump prints, and finds the main loop of a kernel."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

MATRIX = ("HMMA", "HGMMA", "UTCHMMA")
_JUMPS = ("BRA", "BSYNC")
_ENDS = (*_JUMPS, "BRX", "EXIT", "RET")  # the last instruction of a basic block
# A main loop multiplies matrices and loads the next data; the turn that does most of both is taken.
_GLOBAL_LOADS = ("LDG.", "LDGSTS.", "UBLKCP", "UTMALDG")


@dataclass(frozen=True)
class Instruction:
    """One machine instruction.

    guard   the predicate that decides if it runs, such as "@!P0"; "" if it always runs
    target  the address that a branch jumps to, or at which the branches behind BSSY join again
    """

    address: int
    opcode: str
    operands: str = ""
    guard: str = ""
    target: int | None = None

    @property
    def name(self) -> str:
        """Returns the opcode without its modifiers, such as "LDG" for "LDG.E.128"."""
        return self.opcode.split(".")[0]

    @property
    def never_runs(self) -> bool:
        return self.guard == "@!PT"


Code = list[Instruction]


def find_cuobjdump() -> Path:
    """Returns the cuobjdump of the Triton wheel."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        raise SystemExit("cuobjdump comes with the triton package, which is not installed")
    return Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def cuobjdump(file: Path, *options: str) -> str:
    """Returns what cuobjdump prints about a file."""
    command = [find_cuobjdump(), *options, file]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


_LINE = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)[ \t]*([^;\n]*);", re.M
)
_TARGET = re.compile(r"0x([0-9a-f]+)\s*$")


def parse(listing: str) -> dict[str, Code]:
    """Returns the instructions of each kernel by its mangled name."""
    kernels = {}
    for function in listing.split("Function : ")[1:]:
        code = []
        for address, guard, opcode, operands in _LINE.findall(function):
            target = _TARGET.search(operands) if opcode.startswith(("BRA", "BSSY")) else None
            code.append(
                Instruction(
                    int(address, 16),
                    opcode,
                    operands.strip(),
                    guard,
                    int(target[1], 16) if target else None,
                )
            )
        kernels[function.split()[0]] = code
    return kernels


def count(code: Iterable[Instruction], *prefixes: str) -> int:
    """Counts the instructions whose opcode begins with one of the prefixes."""
    return sum(instruction.opcode.startswith(prefixes) for instruction in code)


class _Graph:
    """The basic blocks of a kernel. Execution goes from blocks[i] to one of the blocks next[i].

    before  the blocks from which execution can come to blocks[i]
    order   the blocks that execution can reach, in reverse postorder
    """

    def __init__(self, code: Code) -> None:
        starts = {i.target for i in code}
        self.blocks: list[Code] = []
        ended = True
        for instruction in code:
            if ended or instruction.address in starts:
                self.blocks.append([])
            self.blocks[-1].append(instruction)
            ended = instruction.name in _ENDS
        where = {block[0].address: i for i, block in enumerate(self.blocks)}
        joins: dict[str, int | None] = {}  # register of BSSY -> where its BSYNC goes on
        self.next: list[list[int]] = []
        for index, block in enumerate(self.blocks):
            for instruction in block:
                if instruction.name == "BSSY":
                    joins[instruction.operands.split(",")[0]] = instruction.target
            end = block[-1]
            target = joins.get(end.operands) if end.name == "BSYNC" else end.target
            following = {where[target]} if end.name in _JUMPS and target in where else set()
            # A jump can depend on its guard, or on operands before the address.
            conditional = bool(end.guard) or "," in end.operands or ".ANY" in end.opcode
            if (end.name not in _ENDS or conditional) and index + 1 < len(self.blocks):
                following.add(index + 1)
            self.next.append(sorted(following))
        self.order = self._reverse_postorder()
        self.before: list[list[int]] = [[] for _ in self.blocks]
        for index in self.order:
            for later in self.next[index]:
                self.before[later].append(index)

    def _reverse_postorder(self) -> list[int]:
        seen, order, stack = {0}, [], [(0, iter(self.next[0]))]
        while stack:
            index, rest = stack[-1]
            following = next((i for i in rest if i not in seen), None)
            if following is None:
                order.append(index)
                stack.pop()
            else:
                seen.add(following)
                stack.append((following, iter(self.next[following])))
        return order[::-1]

    def dominators(self) -> list[set[int]]:
        """Returns, for each block, the blocks that every way to it passes, and the block itself."""
        reachable = set(self.order)
        dominators = [set(reachable) for _ in self.blocks]
        dominators[0] = {0}
        changed = True
        while changed:
            changed = False
            for index in self.order[1:]:
                shared = set.intersection(*(dominators[i] for i in self.before[index]))
                changed |= shared | {index} != dominators[index]
                dominators[index] = shared | {index}
        return dominators

    def loops(self) -> dict[int, set[int]]:
        """Returns the natural loops: the block at the head of each -> all blocks of the loop."""
        dominators = self.dominators()
        loops: dict[int, set[int]] = {}
        for index in self.order:
            for head in self.next[index]:
                if head in dominators[index]:
                    body = loops.setdefault(head, {head})
                    waiting = [index]
                    while waiting:
                        block = waiting.pop()
                        if block not in body:
                            body.add(block)
                            waiting += self.before[block]
        return loops

    def hot_path(self, head: int, body: set[int]) -> Code:
        """Returns the instructions of a typical turn of a loop.

        Of all ways through the loop it is the one with the most matrix instructions, then the most
        loads from global memory, then the fewest instructions. So it leaves out what only some
        turns do, such as the step to the next tile, or waiting again for a barrier.
        """
        rank = {block: i for i, block in enumerate(self.order)}
        best: dict[int, tuple[tuple[int, int, int], list[int]]] = {}
        for index in sorted(body, key=rank.__getitem__):
            block = self.blocks[index]
            gain = (count(block, *MATRIX), count(block, *_GLOBAL_LOADS), -len(block))
            if index == head:
                best[index] = (gain, [index])
                continue
            ways = [best[i] for i in self.before[index] if i in best and rank[i] < rank[index]]
            if ways:
                score, way = max(ways)
                best[index] = (
                    (score[0] + gain[0], score[1] + gain[1], score[2] + gain[2]),
                    [*way, index],
                )
        _, way = max(best[i] for i in best if head in self.next[i])
        return [instruction for index in way for instruction in self.blocks[index]]


def matrix_loops(code: Code) -> list[Code]:
    """Returns a typical turn of each innermost loop that has matrix instructions."""
    if not count(code, *MATRIX):
        return []
    graph = _Graph(code)
    bodies = {
        head: body
        for head, body in graph.loops().items()
        if any(count(graph.blocks[i], *MATRIX) for i in body)
    }
    return [
        graph.hot_path(head, body)
        for head, body in bodies.items()
        if not any(other < body for other in bodies.values())
    ]


def main_loop(code: Code, decoded: Callable[[Code], float]) -> Code:
    """Returns the loop of `matrix_loops` that decodes the most weights, and of two that decode as
    many the shorter one. Returns [] if no loop decodes weights.

    decoded  a turn of a loop -> a number that grows with the weights that it decodes
    """
    loops = [loop for loop in matrix_loops(code) if decoded(loop)]
    return max(loops, key=lambda loop: (decoded(loop), -len(loop)), default=[])
