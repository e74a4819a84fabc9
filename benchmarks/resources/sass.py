"""Machine code as cuobjdump prints it: kernels, instructions, and the main loop of a kernel."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

MATRIX = ("HMMA", "HGMMA", "UTCHMMA")
_JUMPS = ("BRA", "BSYNC")
_ENDS = (*_JUMPS, "BRX", "EXIT", "RET")  # of a basic block
# To load the next data is a purpose of a main loop, as its matrix products are.
_GLOBAL_LOADS = ("LDG.", "LDGSTS.", "UBLKCP", "UTMALDG")


@dataclass(frozen=True)
class Instruction:
    """One machine instruction.

    guard   the predicate that it depends on, as in "@!P0"; "" without one
    target  the address that a branch jumps to, or at which BSSY's branches join again
    """

    address: int
    opcode: str
    operands: str = ""
    guard: str = ""
    target: int | None = None

    @property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.split(".")[0]

    @property
    def never_runs(self) -> bool:
        return self.guard == "@!PT"


Code = list[Instruction]


def find_cuobjdump() -> Path:
    """It comes with the Triton wheel."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        raise SystemExit("cuobjdump comes with the triton package, which is not installed")
    return Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def cuobjdump(file: Path, *options: str) -> str:
    command = [find_cuobjdump(), *options, file]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


_LINE = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)[ \t]*([^;\n]*);", re.M
)
_TARGET = re.compile(r"0x([0-9a-f]+)\s*$")


def parse(listing: str) -> dict[str, Code]:
    """The instructions of each kernel by its mangled name."""
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
    """Instructions whose opcode begins with one of the prefixes."""
    return sum(instruction.opcode.startswith(prefixes) for instruction in code)


class _Graph:
    """Basic blocks of a kernel: `blocks[i]` goes on to the blocks `next[i]`."""

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
        joins: dict[str, int | None] = {}  # where BSYNC goes on: what BSSY said of its register
        self.next: list[list[int]] = []
        for index, block in enumerate(self.blocks):
            for instruction in block:
                if instruction.name == "BSSY":
                    joins[instruction.operands.split(",")[0]] = instruction.target
            last = block[-1]
            target = joins.get(last.operands) if last.name == "BSYNC" else last.target
            following = {where[target]} if last.name in _JUMPS and target in where else set()
            # A jump can depend on its guard, or on operands before the address.
            conditional = bool(last.guard) or "," in last.operands or ".ANY" in last.opcode
            if (last.name not in _ENDS or conditional) and index + 1 < len(self.blocks):
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
        """Of each block, those that every way to it passes, itself among them."""
        every = set(self.order)
        found = [set(every) for _ in self.blocks]
        found[0] = {0}
        changed = True
        while changed:
            changed = False
            for index in self.order[1:]:
                new = set.intersection(*(found[i] for i in self.before[index])) | {index}
                changed |= new != found[index]
                found[index] = new
        return found

    def loops(self) -> dict[int, set[int]]:
        """The natural loops: the blocks of each by the block at its head."""
        dominators = self.dominators()
        found: dict[int, set[int]] = {}
        for index in self.order:
            for head in self.next[index]:
                if head in dominators[index]:
                    body = found.setdefault(head, {head})
                    waiting = [index]
                    while waiting:
                        block = waiting.pop()
                        if block not in body:
                            body.add(block)
                            waiting += self.before[block]
        return found

    def hot_path(self, head: int, body: set[int]) -> Code:
        """The shortest way once round a loop among those that do the most of its work.

        Work is matrix instructions first, loads from global memory next. What only some turns do,
        such as the step to the next tile or a wait that has to be repeated, is not on this way.
        """
        rank = {block: i for i, block in enumerate(self.order)}
        best: dict[int, tuple[tuple[int, int, int], list[int]]] = {}
        for index in sorted(body, key=rank.__getitem__):
            block = self.blocks[index]
            own = (count(block, *MATRIX), count(block, *_GLOBAL_LOADS), -len(block))
            if index == head:
                best[index] = (own, [index])
                continue
            ways = [best[i] for i in self.before[index] if i in best and rank[i] < rank[index]]
            if ways:
                score, way = max(ways)
                best[index] = (
                    (score[0] + own[0], score[1] + own[1], score[2] + own[2]),
                    [*way, index],
                )
        _, way = max(best[i] for i in best if head in self.next[i])
        return [instruction for index in way for instruction in self.blocks[index]]


def matrix_loops(code: Code) -> list[Code]:
    """Once round each innermost loop that has matrix instructions, on its hot path."""
    if not count(code, *MATRIX):
        return []
    graph = _Graph(code)
    found = {
        head: body
        for head, body in graph.loops().items()
        if any(count(graph.blocks[i], *MATRIX) for i in body)
    }
    return [
        graph.hot_path(head, body)
        for head, body in found.items()
        if not any(other < body for other in found.values())
    ]


def main_loop(code: Code, decoded: Callable[[Code], float]) -> Code:
    """The loop of `matrix_loops` that decodes the most weights; of equals the shortest one.

    [] if none decodes any.
    """
    loops = [loop for loop in matrix_loops(code) if decoded(loop)]
    return max(loops, key=lambda loop: (decoded(loop), -len(loop)), default=[])
