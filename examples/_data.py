"""The data: where the examples come from, and how they become batches of tokens.

The examples are the standard library's docstrings, or the lines of a JSON Lines or text file. The
same files always give the same examples, in the same order, with the same split. The sources of
the standard library are parsed, never imported.
"""

from __future__ import annotations

import ast
import hashlib
import json
import random
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _options import UserError

DOCSTRING_SYSTEM = "Say in one sentence what this Python code does."

# Tests and demos do not document an interface; the other folders hold generated or bundled code.
SKIPPED_FOLDERS = frozenset(
    "__pycache__ ensurepip idlelib lib2to3 pydoc_data site-packages dist-packages "
    "test tests turtledemo".split()
)

SENTENCE_END = re.compile(r"(?<=[a-z0-9)'`\"])(?<!\be\.g)(?<!\bi\.e)[.:;](?:\s|$)")


@dataclass(frozen=True)
class Example:
    """A prompt and its completion. Only the completion is learnt.

    A plain text is a completion with an empty prompt.
    """

    prompt: str
    completion: str
    system: str = ""


def load_examples(path: str | Path | None) -> list[Example]:
    """Loads the examples in the file `path`, or the standard library's docstrings if it is None."""
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
    """Returns the training examples and the validation examples.

    The side of an example depends only on its own text: new data never moves an old example to the
    other side, and equal prompts are always on the same side.
    """

    def position(example: Example) -> float:
        key = example.prompt or example.completion
        return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64

    train = [e for e in examples if position(e) >= validation_share]
    # This order does not follow the file, so that the first n examples are a fair sample.
    validation = sorted(
        (e for e in examples if position(e) < validation_share),
        key=lambda e: (position(e), e.prompt),
    )
    if not validation or not train:  # there are few examples: give one to the empty side
        ranked = sorted(examples, key=position)
        validation, train = ranked[:1], ranked[1:]
    return train, validation


def fingerprint(examples: list[Example]) -> str:
    """Returns a short name that only these examples in this order have."""
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
    """Parses lines with instruction, input and output, with prompt and completion, or with text."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"--data {path}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: is not JSON ({error.msg} at column {error.colno})") from None
        if not isinstance(record, dict):
            type_name = type(record).__name__
            raise UserError(f"{where}: is a JSON {type_name}, must be an object, one on each line")
        yield _example_from_record(record, where)


def _example_from_record(record: dict[str, object], where: str) -> Example:
    def text(field: str) -> str:
        value = record.get(field, "")
        if not isinstance(value, str):
            type_name = type(value).__name__
            raise UserError(f"{where}: {field!r} is a {type_name}, must be a string")
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
    """Makes an example of each paragraph of a plain text. All of it is learnt."""
    for paragraph in re.split(r"\n\s*\n", "\n".join(lines)):
        if paragraph.strip():
            yield Example("", paragraph.strip())


# --- the standard library -------------------------------------------------------------------------


def stdlib_docstrings(root: Path | None = None) -> Iterator[Example]:
    """Makes an example of each function: `shutil.copy(src, dst)` -> the first sentence of its
    docstring.

    A sentence that many functions share is kept once, so that it is in one half of the split only.
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
            continue  # the file is a template, or is written for another version of Python
        module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        for title, docstring in _documented(tree, module):
            sentence = first_sentence(docstring)
            if sentence and len(title) <= 100 and sentence not in seen:
                seen.add(sentence)
                yield Example(title, sentence, DOCSTRING_SYSTEM)


def _documented(scope: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """Yields the title and docstring of each public function, class and method."""
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
    """Returns the first sentence, or None if the docstring does not begin with prose."""
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    sentence = SENTENCE_END.split(paragraph)[0].strip()
    is_prose = re.fullmatch(r"[A-Z][a-z]*\b[\x20-\x7e]*", sentence) and "<==>" not in sentence
    if not is_prose or not 4 <= len(sentence.split()) <= 30:
        return None
    return sentence.rstrip(".") + "."


# --- tokens ---------------------------------------------------------------------------------------

IGNORED = -100  # the loss ignores positions with this label


def prompt_text(tokenizer: Any, example: Example) -> str:
    """Returns the text before the completion, in the model's chat template if there is one."""
    if not example.prompt:
        return ""
    merged = "\n".join(filter(None, (example.system, example.prompt)))
    if not tokenizer.chat_template:
        return (tokenizer.bos_token or "") + merged + "\n"

    def render(*messages: tuple[str, str]) -> str:
        return tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in messages],
            tokenize=False,
            add_generation_prompt=True,
        )

    from jinja2.exceptions import TemplateError

    if example.system:
        try:
            return render(("system", example.system), ("user", example.prompt))
        except TemplateError:
            pass  # this template knows no system role
    return render(("user", merged))


def encode(
    tokenizer: Any, examples: Sequence[Example], max_length: int
) -> tuple[list[dict[str, list[int]]], int]:
    """Returns the input_ids and labels of the examples, and how many were too long and left out.

    A text without a prompt is cut into pieces. An example whose prompt and completion do not fit
    into `max_length` tokens is left out, since half an answer is not worth learning.
    """
    prompts = _ids(tokenizer, [prompt_text(tokenizer, example) for example in examples])
    completions = _ids(tokenizer, [example.completion for example in examples])
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    items, left_out = [], 0
    for prompt, completion in zip(prompts, completions, strict=True):
        completion = completion + end
        if prompt and len(prompt) + len(completion) <= max_length:
            items.append(_item(prompt, completion))
        elif prompt:
            left_out += 1
        else:
            step = max_length - len(begin)
            pieces = (begin + completion[i : i + step] for i in range(0, len(completion), step))
            # Nothing precedes the first token of a piece, so it cannot be predicted.
            items += [_item(piece[:1], piece[1:]) for piece in pieces if len(piece) > 1]
    if not items:
        raise UserError(
            f"none of the {len(examples)} examples fits into --max-length {max_length}, "
            "which must be larger"
        )
    return items, left_out


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def _item(prompt: list[int], completion: list[int]) -> dict[str, list[int]]:
    return {"input_ids": prompt + completion, "labels": [IGNORED] * len(prompt) + completion}


def grouped_by_length(
    items: Sequence[dict[str, list[int]]], batch_size: int, seed: int
) -> list[dict[str, list[int]]]:
    """Returns the items in random order, but items of similar length share a batch.

    In each pool of eight batches the items are sorted by length, cut into batches, and the batches
    are shuffled. Little padding is needed then, and long batches do not follow each other.
    """
    shuffler = random.Random(seed)
    order = shuffler.sample(list(items), len(items))
    batches = []
    for start in range(0, len(order), 8 * batch_size):
        pool = sorted(order[start : start + 8 * batch_size], key=lambda item: len(item["labels"]))
        full = [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
        rest = [full.pop()] if len(full[-1]) < batch_size else []
        shuffler.shuffle(full)
        batches += full + rest
    return [item for batch in batches for item in batch]


def completion_collator(tokenizer: Any, virtual_tokens: int = 0) -> Any:
    """Makes batches for the Trainer.

    tokenizer         pads on the left from now on
    virtual_tokens    how many tokens prompt tuning puts before each row of the batch

    Logits over a large vocabulary are the largest tensors of a step, and only those of the
    completions are needed. The batch is therefore padded on the left, so that all completions end
    at the last position, and `logits_to_keep` tells the model how many positions they take.
    """
    from transformers import DataCollatorForSeq2Seq

    tokenizer.padding_side = "left"
    pad = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)

    def collate(items: Sequence[dict[str, list[int]]]) -> dict[str, Any]:
        batch = dict(pad(list(items)))
        # The logits at one position predict the token at the next, so one more position is needed.
        kept = int((batch["labels"] != IGNORED).sum(1).max()) + 1
        batch["labels"] = batch["labels"][:, -kept:]
        if virtual_tokens:  # PEFT puts as many labels before these, and counts positions itself
            return {**batch, "logits_to_keep": kept + virtual_tokens}
        positions = batch["attention_mask"].cumsum(1) - 1
        return {**batch, "position_ids": positions.clamp(min=0), "logits_to_keep": kept}

    return collate
