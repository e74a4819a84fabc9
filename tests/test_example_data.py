"""The demo's data: file kinds, bad lines, the split, the standard library's docstrings, batches."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))

from _batches import IGNORED, Encoded, collate, training_batches, validation_batches
from _data import (
    DOCSTRING_SYSTEM,
    Example,
    fingerprint,
    first_sentence,
    load_examples,
    split_examples,
    stdlib_docstrings,
)
from _errors import UserError


def write(folder: Path, name: str, *lines: str) -> Path:
    path = folder / name
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


# --- files ----------------------------------------------------------------------------------------


def test_every_kind_of_jsonl_line(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "data.jsonl",
        json.dumps({"instruction": "Add", "input": "1 and 2", "output": "3"}),
        json.dumps({"instruction": "Greet", "input": "", "output": "Hello"}),
        json.dumps({"instruction": "Count", "output": "One"}),
        "",
        json.dumps({"prompt": "Question?", "completion": " Answer ", "system": "Be brief."}),
        json.dumps({"text": "Ünïcode text"}),
    )
    assert load_examples(path) == [
        Example("Add\n\n1 and 2", "3"),
        Example("Greet", "Hello"),
        Example("Count", "One"),
        Example("Question?", "Answer", "Be brief."),
        Example("", "Ünïcode text"),
    ]


def test_plain_text_gives_paragraphs_and_drops_repeats(tmp_path: Path) -> None:
    path = write(tmp_path, "data.txt", "first", "still first", "", "  ", "second", "", "second")
    assert load_examples(path) == [Example("", "first\nstill first"), Example("", "second")]


def test_jsonl_is_recognised_by_content_and_byte_order_mark_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}\r\n')
    assert load_examples(path) == [Example("", "a"), Example("", "b")]


GOOD = '{"text": "good"}'


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        ('{"text": ', "is not JSON"),
        ('["text"]', "is a JSON list, must be an object"),
        ('{"question": "?"}', r"has the fields \['question'\], must have"),
        ('{"instruction": "only"}', "must have instruction and output"),
        ('{"text": 3}', "'text' is a int, must be a string"),
        ('{"prompt": "?", "completion": "  "}', "'completion' is empty"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path: Path, bad: str, complaint: str) -> None:
    path = write(tmp_path, "data.jsonl", GOOD, "", bad, GOOD)
    with pytest.raises(UserError, match=rf"data\.jsonl, line 3: .*{complaint}"):
        load_examples(path)


def test_bytes_that_are_not_utf8_are_named_by_their_line(tmp_path: Path) -> None:
    path = tmp_path / "data.txt"
    path.write_bytes(b"fine\n\nbad \xff byte\n")
    with pytest.raises(UserError, match="line 3: is not UTF-8"):
        load_examples(path)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [("", "is empty"), ("\n \n", "is empty"), ("one paragraph\n", r"has 1 distinct example")],
)
def test_too_little_data(tmp_path: Path, content: str, complaint: str) -> None:
    path = tmp_path / "data.txt"
    path.write_text(content)
    with pytest.raises(UserError, match=complaint):
        load_examples(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_examples(tmp_path / "absent.jsonl")
    with pytest.raises(UserError, match="is a folder"):
        load_examples(tmp_path)


# --- the split ------------------------------------------------------------------------------------

MANY = [Example(f"prompt {i}", f"completion {i}") for i in range(2000)]


def test_split_is_a_partition_of_the_promised_size() -> None:
    train, validation = split_examples(MANY)
    assert sorted([*train, *validation], key=str) == sorted(MANY, key=str)
    assert 60 <= len(validation) <= 140  # 5 % of 2000, give or take four standard deviations


def test_split_depends_on_each_example_alone() -> None:
    validation = set(split_examples(MANY)[1])
    assert set(split_examples(MANY[::-1])[1]) == validation
    more = [*MANY, *(Example(f"new {i}", "x") for i in range(500))]
    assert set(split_examples(more)[1]) & set(MANY) == validation


def test_equal_prompts_stay_on_one_side() -> None:
    doubled = [*MANY, *(Example(e.prompt, "another answer") for e in MANY)]
    train, validation = split_examples(doubled)
    assert not {e.prompt for e in train} & {e.prompt for e in validation}


def test_neither_side_of_a_tiny_split_is_empty() -> None:
    for count in range(2, 8):
        train, validation = split_examples(MANY[:count])
        assert train and validation and len(train) + len(validation) == count


# --- the standard library -------------------------------------------------------------------------


def test_stdlib_docstrings_of_a_small_tree(tmp_path: Path) -> None:
    (tmp_path / "pack").mkdir()
    (tmp_path / "test").mkdir()
    write(tmp_path / "test", "skipped.py", 'def f():\n    """Return what is never seen."""')
    write(tmp_path, "broken.py", "def f(:")
    write(
        tmp_path / "pack",
        "__init__.py",
        "raise SystemExit('parsed, not run')",
        "class Box:",
        '    """Hold one value at most."""',
        "    def put(self, value, *, twice=False):",
        '        """Store the value\n        in the box.  Really."""',
        "    def _hidden(self):",
        '        """Nobody should document this."""',
        "def again():",
        '    """Hold one value at most."""',
    )
    assert list(stdlib_docstrings(tmp_path)) == [
        Example("class pack.Box", "Hold one value at most.", DOCSTRING_SYSTEM),
        Example("pack.Box.put(value, *, twice=False)", "Store the value in the box.",
                DOCSTRING_SYSTEM),
    ]  # fmt: skip


def test_stdlib_of_this_python_is_plentiful_and_reproducible() -> None:
    examples = load_examples(None)
    assert len(examples) > 1000
    assert len({e.completion for e in examples}) == len(examples)
    package = Path(json.__file__).parent
    once, again = list(stdlib_docstrings(package)), list(stdlib_docstrings(package))
    assert len(once) > 3 and fingerprint(once) == fingerprint(again) != fingerprint(examples)


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("Return the sum of two numbers.\n\nMore.", "Return the sum of two numbers."),
        ("Return the sum\nof e.g. two numbers", "Return the sum of e.g. two numbers."),
        ("Copy data (see copyfile). Then stop.", "Copy data (see copyfile)."),
        ("copy(src, dst) -> None", None),
        ("D.keys() <==> list of the keys", None),
        ("Too short.", None),
        ("", None),
    ],
)
def test_first_sentence(docstring: str, sentence: str | None) -> None:
    assert first_sentence(docstring) == sentence


# --- batches --------------------------------------------------------------------------------------


def test_collate_learns_the_completion_only() -> None:
    batch = collate([Encoded((5, 6, 7, 8), 2), Encoded((9, 4), 1)], pad_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [9, 4, 0, 0]]
    # The label of a position is the token after it; 7 and 8 are the first row's completion.
    assert batch.labels.tolist() == [
        [IGNORED, 7, 8, IGNORED],
        [4, IGNORED, IGNORED, IGNORED],
    ]
    assert batch.tokens == 6


def items(count: int) -> list[Encoded]:
    return [Encoded(tuple(range(1, 3 + i % 17)), 1) for i in range(count)]


def first_ids(batches: object, count: int) -> list[list[list[int]]]:
    return [batch.input_ids.tolist() for batch, _ in zip(batches, range(count), strict=False)]


def test_training_batches_go_on_where_they_were() -> None:
    whole = first_ids(training_batches(items(50), 4, seed=1, pad_id=0), 40)
    assert first_ids(training_batches(items(50), 4, 1, 0, start=17), 23) == whole[17:]
    assert first_ids(training_batches(items(50), 4, seed=2, pad_id=0), 40) != whole


def test_an_epoch_has_every_example_once() -> None:
    unique = [Encoded((i, 1), 1) for i in range(50)]
    epoch = first_ids(training_batches(unique, 4, seed=3, pad_id=0), 13)
    assert sorted(row[0] for batch in epoch for row in batch) == list(range(50))


def test_batches_of_like_length_waste_little() -> None:
    batches = validation_batches(items(200), 8, pad_id=0)
    used = sum(batch.tokens for batch in batches)
    assert used / sum(batch.input_ids.numel() for batch in batches) > 0.9
    assert all(torch.any(batch.labels != IGNORED) for batch in batches)
