"""The demo's data: file formats, bad lines, the split, docstrings as examples, and batches."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))

from _data import (
    DOCSTRING_SYSTEM,
    IGNORED,
    Example,
    completion_collator,
    encode,
    fingerprint,
    first_sentence,
    grouped_by_length,
    load_examples,
    split_examples,
    stdlib_docstrings,
)
from _options import UserError


def write(folder: Path, name: str, *lines: str) -> Path:
    path = folder / name
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


# --- files ----------------------------------------------------------------------------------------


def test_every_form_of_jsonl_line_is_read(tmp_path: Path) -> None:
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
def test_too_little_data_is_refused(tmp_path: Path, content: str, complaint: str) -> None:
    path = tmp_path / "data.txt"
    path.write_text(content)
    with pytest.raises(UserError, match=complaint):
        load_examples(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_examples(tmp_path / "absent.jsonl")
    with pytest.raises(UserError, match="is a folder"):
        load_examples(tmp_path)


# --- the split ------------------------------------------------------------------------------------

MANY = [Example(f"prompt {i}", f"completion {i}") for i in range(2000)]


def test_split_is_a_partition_of_the_promised_size() -> None:
    train, validation = split_examples(MANY)
    assert sorted([*train, *validation], key=str) == sorted(MANY, key=str)
    assert 60 <= len(validation) <= 140  # 5 % of 2000, within four standard deviations


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


def test_public_docstrings_of_a_tree_become_examples(tmp_path: Path) -> None:
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


def test_the_standard_library_gives_many_examples_and_always_the_same() -> None:
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
def test_first_sentence_is_prose_or_none(docstring: str, sentence: str | None) -> None:
    assert first_sentence(docstring) == sentence


# --- batches --------------------------------------------------------------------------------------


def items(count: int) -> list[dict[str, list[int]]]:
    """Returns items of many lengths. Each begins with its own number."""
    sequences = [[i, *range(1, 2 + i % 17)] for i in range(count)]
    return [{"input_ids": sequence, "labels": [IGNORED, *sequence[1:]]} for sequence in sequences]


class Tokenizer:
    """Makes one token of each letter, and ends a text with token 1."""

    chat_template, bos_token, bos_token_id, eos_token_id = None, None, None, 1

    def __call__(self, texts: list[str], add_special_tokens: bool) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}


def test_only_the_completion_is_learnt() -> None:
    (item,), left_out = encode(Tokenizer(), [Example("ab", "c")], max_length=8)
    assert item["input_ids"] == [97, 98, 10, 99, 1] and not left_out
    assert item["labels"] == [IGNORED, IGNORED, IGNORED, 99, 1]


def test_a_long_example_is_left_out_and_a_long_text_is_cut() -> None:
    examples = [Example("a", "b" * 9), Example("", "cdefg")]
    pieces, left_out = encode(Tokenizer(), examples, max_length=4)
    assert left_out == 1
    assert [piece["input_ids"] for piece in pieces] == [[99, 100, 101, 102], [103, 1]]
    with pytest.raises(UserError, match="none of the 1 examples fits into --max-length 4"):
        encode(Tokenizer(), examples[:1], max_length=4)


def test_collator_keeps_only_the_labels_of_completions() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    PreTrainedTokenizerFast = pytest.importorskip("transformers").PreTrainedTokenizerFast
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"p": 0}, merges=[])),
        pad_token="p",
    )
    batch = completion_collator(tokenizer)(
        [
            {"input_ids": [5, 6, 7, 8], "labels": [IGNORED, IGNORED, 7, 8]},
            {"input_ids": [9, 4], "labels": [IGNORED, 4]},
        ]
    )
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [0, 0, 9, 4]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3], [0, 0, 0, 1]]
    # The last two positions are learnt. The position before them predicts the first.
    assert batch["logits_to_keep"] == 3
    assert batch["labels"].tolist() == [[IGNORED, 7, 8], [IGNORED, IGNORED, 4]]


def numbers(batches: list[dict[str, list[int]]]) -> list[int]:
    return [item["input_ids"][0] for item in batches]


def test_order_follows_from_the_seed() -> None:
    order = numbers(grouped_by_length(items(50), 4, seed=1))
    assert numbers(grouped_by_length(items(50), 4, seed=1)) == order
    assert numbers(grouped_by_length(items(50), 4, seed=2)) != order


def test_an_epoch_has_every_example_once() -> None:
    assert sorted(numbers(grouped_by_length(items(50), 4, seed=3))) == list(range(50))


def test_batches_of_similar_length_need_little_padding() -> None:
    order = grouped_by_length(items(200), 8, seed=0)
    lengths = [len(item["input_ids"]) for item in order]
    padded = sum(8 * max(lengths[i : i + 8]) for i in range(0, 200, 8))
    assert sum(lengths) / padded > 0.85
