"""Where the examples come from: the standard library's docstrings, a JSON Lines or a text file.

Everything here is a deterministic function of the files read: the same files give the same examples
in the same order and the same split. Standard-library sources are parsed, never imported.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from _errors import UserError

DOCSTRING_SYSTEM = "Say in one sentence what this Python code does."

# Tests and demos document themselves, not an interface; the others are generated or bundled code.
SKIPPED_FOLDERS = frozenset(
    "__pycache__ ensurepip idlelib lib2to3 pydoc_data site-packages dist-packages "
    "test tests turtledemo".split()
)

SENTENCE_END = re.compile(r"(?<=[a-z0-9)'`\"])(?<!\be\.g)(?<!\bi\.e)[.:;](?:\s|$)")


@dataclass(frozen=True)
class Example:
    """The loss counts the completion only; with an empty prompt that is all there is."""

    prompt: str
    completion: str
    system: str = ""


def load_examples(path: str | Path | None) -> list[Example]:
    """Examples of `path`, or the standard library's docstrings when it is None."""
    if path is None:
        return list(dict.fromkeys(stdlib_docstrings()))
    path = Path(path)
    if path.is_dir():
        raise UserError(f"--data {path}: is a folder, must be a JSON Lines or text file")
    if not path.is_file():
        raise UserError(f"--data {path}: no such file")
    lines = read_lines(path)
    first = next((line for line in lines if line.strip()), "")
    if not first:
        raise UserError(f"--data {path}: the file is empty")
    is_json = path.suffix in {".jsonl", ".ndjson", ".json"} or first.lstrip().startswith("{")
    examples = list(dict.fromkeys(parse_jsonl(lines, path) if is_json else parse_text(lines)))
    if len(examples) < 2:
        raise UserError(
            f"--data {path}: has {len(examples)} distinct example(s), must have at least 2: "
            "one to train on and one to validate with"
        )
    return examples


def split_examples(
    examples: list[Example], validation_share: float = 0.05
) -> tuple[list[Example], list[Example]]:
    """(train, validation). An example's side depends on its own text alone, so that adding data
    never moves an old example across, and equal prompts never end up on both sides."""

    def position(example: Example) -> float:
        key = example.prompt or example.completion
        return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64

    train = [e for e in examples if position(e) >= validation_share]
    # In an order that has nothing to do with the file's, so that its first n are a fair sample.
    validation = sorted(
        (e for e in examples if position(e) < validation_share),
        key=lambda e: (position(e), e.prompt),
    )
    if not validation or not train:  # a handful of examples: give one to the empty side
        ranked = sorted(examples, key=position)
        validation, train = ranked[:1], ranked[1:]
    return train, validation


def fingerprint(examples: list[Example]) -> str:
    """A short name for exactly these examples in this order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example.system, example.prompt, example.completion]).encode())
    return digest.hexdigest()[:16]


# --- files ----------------------------------------------------------------------------------------


def read_lines(path: Path) -> list[str]:
    lines = []
    for number, raw in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        try:
            lines.append(raw.decode("utf-8").rstrip("\r"))
        except UnicodeDecodeError as error:
            raise UserError(
                f"--data {path}, line {number}: is not UTF-8 ({error.reason})"
            ) from None
    return lines


def parse_jsonl(lines: list[str], path: Path) -> Iterator[Example]:
    """instruction/input/output, prompt/completion or text; each line may be of another kind."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"--data {path}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: is not JSON ({error.msg} at column {error.colno})") from None
        if not isinstance(record, dict):
            kind = type(record).__name__
            raise UserError(f"{where}: is a JSON {kind}, must be an object, one on each line")
        yield _example_from_record(record, where)


def _example_from_record(record: dict[str, object], where: str) -> Example:
    def text(field: str) -> str:
        value = record.get(field, "")
        if not isinstance(value, str):
            kind = type(value).__name__
            raise UserError(f"{where}: {field!r} is a {kind}, must be a string")
        return value.strip()

    if "output" in record and "instruction" in record:
        prompt, answer = "\n\n".join(filter(None, (text("instruction"), text("input")))), "output"
    elif "completion" in record and "prompt" in record:
        prompt, answer = text("prompt"), "completion"
    elif "text" in record:
        prompt, answer = "", "text"
    else:
        raise UserError(
            f"{where}: has the fields {sorted(record)}, must have instruction and output "
            "(input optional), prompt and completion, or text"
        )
    if not text(answer):
        raise UserError(f"{where}: {answer!r} is empty, must be the text to learn")
    return Example(prompt, text(answer), text("system"))


def parse_text(lines: list[str]) -> Iterator[Example]:
    """Plain text: each paragraph is an example, all of it to be learnt."""
    for paragraph in re.split(r"\n\s*\n", "\n".join(lines)):
        if paragraph.strip():
            yield Example("", paragraph.strip())


# --- the standard library -------------------------------------------------------------------------


def stdlib_docstrings(root: Path | None = None) -> Iterator[Example]:
    """`shutil.copy(src, dst)` -> the first sentence of its docstring, in order of file and line.

    A sentence that many functions share is kept once, so that none is in both halves of the split.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    seen: set[str] = set()
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.intersection(relative.parts) or "-" in relative.parts[0]:
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue  # templates and files for other versions of Python are no examples
        module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        for title, docstring in _documented(tree, module):
            sentence = first_sentence(docstring)
            if sentence and len(title) <= 100 and sentence not in seen:
                seen.add(sentence)
                yield Example(title, sentence, DOCSTRING_SYSTEM)


def _documented(scope: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """(title, docstring) of the public functions, classes and methods of a module or class."""
    for node in ast.iter_child_nodes(scope):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        if node.name.startswith("_"):
            continue
        qualified = f"{name}.{node.name}"
        docstring = ast.get_docstring(node)
        if isinstance(node, ast.ClassDef):
            if docstring:
                yield f"class {qualified}", docstring
            yield from _documented(node, qualified)
        elif docstring:
            signature = re.sub(r"^(self|cls)\b(, )?", "", ast.unparse(node.args))
            yield f"{qualified}({signature})", docstring


def first_sentence(docstring: str) -> str | None:
    """The first sentence, or None where a docstring opens with something that is not prose."""
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    sentence = SENTENCE_END.split(paragraph)[0].strip()
    is_prose = re.fullmatch(r"[A-Z][a-z]*\b[\x20-\x7e]*", sentence) and "<==>" not in sentence
    if not is_prose or not 4 <= len(sentence.split()) <= 30:
        return None
    return sentence.rstrip(".") + "."
