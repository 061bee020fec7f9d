"""Texts from files, windows of long contexts, and answer scores compared with hand-computed cases."""

import itertools
import json
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from language import WORDS, sentences, tokenizer

from anybit.data.batches import Batch
from anybit.data.readers import Answers, NextTokens, answer_scores, best_answer
from anybit.data.tasks import TASKS
from anybit.data.texts import Blocks, Encoding, Questions, Texts, gold_answers, read_rows
from anybit.errors import AnybitError, InvalidInput, InvalidSetting

# Files


def written(tmp_path, content, name):
    (tmp_path / name).write_text(content, encoding="utf8")
    return tmp_path / name


@pytest.mark.parametrize(("name", "content"), [
    ("a.tsv", "label\tsentence\n1\tone \"odd quote\n0\ttwo, with comma\n"),
    ("a.csv", "label\tsentence\n1\tone \"odd quote\n0\ttwo, with comma\n"),
    ("a.csv", 'label,sentence\n1,"one ""odd quote"\n0,"two, with comma"\n'),
    ("a.csv", 'sentence,label,more\n"one ""odd quote",1,x\n"two, with comma",0,y\n'),
    ("a.jsonl", '{"text": "one \\"odd quote", "label": "1"}\n\n{"text": "two, with comma", "label": "0"}\n'),
])  # fmt: skip
def test_every_file_format_gives_the_same_rows(name, content, tmp_path):
    rows = read_rows(written(tmp_path, content, name))
    assert [dict(row) for row in rows] == [{"text": 'one "odd quote', "label": "1"}, {"text": "two, with comma", "label": "0"}]


def test_quoted_text_may_span_lines(tmp_path):
    rows = read_rows(written(tmp_path, 'sentence,label\n"one\nand more",1\n', "a.csv"))
    assert rows[0]["text"].split() == ["one", "and", "more"]


def test_numbered_columns_mean_there_is_no_header(tmp_path):
    file = written(tmp_path, "x\t4.5\tone\ttwo\nx\t1\tthree\tfour\n", "a.csv")
    rows = read_rows(file, "text=2,pair=3,label=1")
    assert [dict(row) for row in rows] == [
        {"text": "one", "pair": "two", "label": "4.5"},
        {"text": "three", "pair": "four", "label": "1"},
    ]


def test_plain_lines_are_texts(tmp_path):
    assert [row["text"] for row in read_rows(written(tmp_path, "one\n\ntwo\n", "a.txt"))] == ["one", "two"]


@pytest.mark.parametrize(("name", "content", "columns", "message"), [
    ("a.jsonl", '{"text": "a"}\n[1]\n', None, "line 2: a JSON object"),
    ("a.jsonl", '{"text": "a"}\n{\n', None, "line 2: not JSON"),
    ("a.jsonl", '{"text": "a"}\n{"text": ""}\n', None, "line 2: the text is empty"),
    ("a.tsv", "text\tlabel\nword\t1\n", "text=nothing", "no column 'nothing'"),
    ("a.tsv", "text\tlabel\nword\t1\n", "words", "cannot be read"),
    ("a.tsv", "text\tlabel\nword\t1\n", "noise=text", "cannot be read"),
    ("a.tsv", "a\tb\nword\t1\n", None, "no column of texts"),
    ("a.tsv", "text\tlabel\n\t1\n", None, "line 2: the text is empty"),
    ("a.csv", "text,label\nword, word,1\n", None, "line 2: 3 columns, but the header names 2"),
    ("a.csv", 'text,label\n\n"two\nlines",1\n ,1\n', None, "line 5: the text is empty"),
    ("a.jsonl", '\n{"text": "a"}\n\n{"text": 42}\n', None, "line 4: the text is a int"),
    ("a.txt", "\n \n", None, "holds no rows"),
    ("a.txt", "word\n", "text=0", "no columns"),
    ("a.tsv", "text\nword\n", "text=²", "no column '²'"),
    ("a.tsv", "text\nword\n", "text=a,text=b", "twice"),
])  # fmt: skip
def test_error_in_a_file_names_its_line(name, content, columns, message, tmp_path):
    with pytest.raises(AnybitError, match=message) as raised:
        read_rows(written(tmp_path, content, name), columns)
    assert "\n" not in str(raised.value)


@given(st.text(max_size=200), st.sampled_from(["a.tsv", "a.csv", "a.jsonl", "a.txt"]), st.sampled_from([None, "text=0", "text=a"]))
def test_any_content_gives_rows_or_one_error(tmp_path_factory, content, name, columns):
    file = tmp_path_factory.mktemp("texts") / name
    file.write_text(content, encoding="utf8", errors="replace")
    try:
        rows = read_rows(file, columns)
    except AnybitError:
        return
    assert all(row["text"].strip() for row in rows)


@pytest.mark.parametrize(("name", "content", "expected"), [
    ("a.tsv", "\ufefflabel\tsentence\n1\tword\n", [{"text": "word", "label": "1"}]),
    ("a.tsv", "sentence\none, two, three\n", [{"text": "one, two, three"}]),
    ("a.jsonl", '{"text": "one\u2028two"}\r\n{"text": "three"}\r\n', [{"text": "one\u2028two"}, {"text": "three"}]),
    ("a.tsv", "sentence\none\u2028two\n", [{"text": "one\u2028two"}]),
    ("a.txt", "\ufeffone\x85two\r\nthree\n", [{"text": "one\x85two"}, {"text": "three"}]),
    ("a.csv", "sentence,label\rone,1\r", [{"text": "one", "label": "1"}]),
])  # fmt: skip
def test_byte_order_marks_and_line_endings_change_no_row(name, content, expected, tmp_path):
    (tmp_path / name).write_bytes(content.encode("utf8"))
    assert [dict(row) for row in read_rows(tmp_path / name)] == expected


def test_rejects_bytes_that_are_not_text(tmp_path):
    (tmp_path / "a.tsv").write_bytes(b"\xff\xfe\x00bad")
    with pytest.raises(AnybitError, match="cannot be read as text"):
        read_rows(tmp_path / "a.tsv")


# Samples


def test_batch_is_padded_to_its_longest_and_masked():
    rows = [{"text": sentence} for sentence in sentences(12)]
    texts = Texts(rows, [0] * 12, Encoding(tokenizer(), 40, False), "here")
    batch = texts.__getitems__([3, 7, 1])
    lengths = [len(rows[i]["text"].split()) + 2 for i in (3, 7, 1)]
    assert batch.inputs["input_ids"].shape == (3, max(lengths)) and batch.mask.sum(1).tolist() == lengths
    assert list(texts.lengths) == [len(row["text"].split()) + 2 for row in rows]


def test_language_model_has_one_row_per_label_token():
    tokens = torch.arange(30).tolist()
    batch = Blocks(tokens, 10, "here").__getitems__([2, 0])
    logits = torch.nn.functional.one_hot((batch.inputs["input_ids"] + 1) % 30, 30).float()  # predicts the next number
    outputs = NextTokens().read({"logits": logits}, batch)
    assert torch.equal(outputs.argmax(-1), batch.labels) and len(outputs) == 18
    with pytest.raises(InvalidInput, match="less than one block"):
        Blocks(tokens, 31, "here")


# Answers


@pytest.mark.parametrize(("text", "accepted", "exact", "overlap"), [
    ("the Eiffel Tower", ["Eiffel Tower"], 1, 1),
    ("Eiffel  tower!", ["the eiffel tower"], 1, 1),
    ("Tower", ["Eiffel Tower"], 0, 2 / 3),
    ("Eiffel Tower in Paris", ["Eiffel Tower"], 0, 2 * 2 / (4 + 2)),
    ("tower tower", ["Eiffel tower"], 0, 0.5),
    ("", [""], 1, 1),
    ("", ["Paris"], 0, 0),
    ("the", ["Paris"], 0, 0),
    ("Rome", ["Paris", "in Rome"], 0, 2 / 3),
    ("a cat", ["cats"], 0, 0),
])  # fmt: skip
def test_answer_scores_of_hand_computed_cases(text, accepted, exact, overlap):
    assert answer_scores(text, accepted) == pytest.approx((exact, overlap))


def test_accepted_answers_are_read_in_every_format():
    assert gold_answers({"text": ["a", "b"], "answer_start": [1, 2]}) == ["a", "b"]
    assert gold_answers(["a"]) == ["a"] and gold_answers("a") == ["a"] and gold_answers([]) == [""]
    assert all(gold_answers(other) is None for other in (None, 42, [None], ["x", None], {"answer_start": [1]}, [{"text": "x"}]))


@pytest.mark.parametrize("answers", [None, 42, ["x", None], {"answer_start": [1]}])
def test_rejects_malformed_answers_before_any_work(answers):
    rows = [
        {"question": "word1", "context": "word2 word3", "answers": "word2"},
        {"question": "word1", "context": "word2", "answers": answers},
    ]
    with pytest.raises(InvalidInput, match="the answers of question 2"):
        Questions(rows, Encoding(tokenizer(), 24, True, 6), "here")


@pytest.mark.parametrize("length", range(6, 14))
def test_any_length_gives_windows_or_one_error(length):
    rows = [{"question": "word1 word2 word3", "context": " ".join(WORDS), "answers": "word9"}]
    try:
        windows = Questions(rows, Encoding(tokenizer(), length, True, 4), "here").windows
    except InvalidInput:
        return
    assert {place for window in windows for place in window.offsets if place} == set(_places(rows[0]["context"]))


def test_best_answer_span_is_ordered_and_within_the_context():
    offsets = [None, (0, 3), (4, 7), (8, 12), None]
    start, end = np.array([9.0, 1, 2, 5, 8]), np.array([9.0, 4, 6, 0, 9])
    # Start 3 with end 2 would score highest, but ends before it starts.
    assert best_answer(start, end, offsets, "one two more", 30, 20) == (8.0, "two")
    assert best_answer(start, end, offsets, "one two more", 1, 20) == (8.0, "two")
    assert best_answer(start, end, [None] * 5, "one", 30, 20)[1] == ""
    assert best_answer(np.array([0.0, 5, 0, 0, 0]), np.array([0.0, 0, 0, 5, 0]), offsets, "one two more", 30, 20) == (10.0, "one two more")
    assert best_answer(np.array([0.0, 5, 0, 0, 0]), np.array([0.0, 1, 0, 5, 0]), offsets, "one two more", 2, 20) == (6.0, "one")


def questions(count=8, context=50, length=24, stride=6):
    draw = random.Random(0)
    rows = []
    for _ in range(count):
        words = draw.sample(WORDS, context)
        at = draw.randrange(context - 2)
        rows.append({"question": words[at], "context": " ".join(words), "answers": [" ".join(words[at : at + 2])]})
    return Questions(rows, Encoding(tokenizer(), length, True, stride), "here")


def test_the_windows_of_a_context_cover_it_and_overlap():
    data = questions()
    for number, row in enumerate(data.rows):
        windows = [window for window in data.windows if window.example == number]
        assert len(windows) > 1 and all(len(window.tokens["input_ids"]) <= 24 for window in windows)
        places = [[place for place in window.offsets if place is not None] for window in windows]
        assert {word for piece in places for word in piece} == set(_places(row["context"]))
        assert all(set(one) & set(other) for one, other in itertools.pairwise(places))


def _places(text):
    at, scores = 0, []
    for word in text.split():
        scores.append((at, at + len(word)))
        at += len(word) + 1
    return scores


def perfect(data, order):
    """Logits of a network that knows the answers, for the windows `order`; uniform for a window without the answer."""
    outputs = torch.zeros(len(order), 2, data.encoding.length)
    for row, number in enumerate(order):
        window = data.windows[number]
        context, answer = data.rows[window.example]["context"], data.rows[window.example]["answers"][0]
        first = context.index(answer)
        ends = [i for i, place in enumerate(window.offsets) if place and place[1] == first + len(answer)]
        starts = [i for i, place in enumerate(window.offsets) if place and place[0] == first]
        if starts and ends:
            outputs[row, 0, starts[0]] = outputs[row, 1, ends[0]] = 9.0
    return outputs


def test_perfect_answers_score_100_in_any_order():
    data = questions()
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
    labels = torch.cat([data.__getitems__([number]).labels for number in order])
    assert Answers(24, data).score(perfect(data, order), labels) == {"exact": 100.0, "f1": 100.0}
    wrong = Answers(24, data).score(perfect(data, order).roll(1, 0), labels)
    assert wrong["exact"] < 100


def test_padding_logits_are_excluded_without_nan():
    data = questions()
    batch = data.__getitems__(list(range(6)))
    length = batch.inputs["input_ids"].shape[1]
    output = {"start_logits": torch.full((6, length), 3.0), "end_logits": torch.full((6, length), 3.0)}
    logits = Answers(30, data).read(output, Batch(batch.inputs))
    assert logits.shape == (6, 2, 30)
    shares = logits.softmax(-1)
    assert torch.equal(shares[:, 0, :length] > 0, batch.mask) and (shares[:, :, length:] == 0).all()
    assert torch.isfinite(TASKS["question-answering"].distance.loss(logits, logits * 0.5))


def test_rejects_question_that_leaves_no_room():
    rows = [{"question": " ".join(WORDS[:20]), "context": " ".join(WORDS), "answers": "word1"}]
    with pytest.raises(InvalidInput, match="leaves room for 1 of its context"):
        Questions(rows, Encoding(tokenizer(), 24, True, 6), "here")


def test_hub_data_set_gives_the_same_rows(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    from anybit.sources.huggingface.heads import hub_rows

    datasets.disable_progress_bars()
    rows = [{"sentence": text, "label": i % 2} for i, text in enumerate(sentences(6))]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf8")
    scores = hub_rows(str(tmp_path / "data"), "train", {})
    assert [dict(row) for row in scores] == [{"text": row["sentence"], "label": row["label"]} for row in rows]
    with pytest.raises(InvalidInput, match="cannot be loaded"):
        hub_rows(str(tmp_path / "nothing"), "", {})


def test_rejects_length_below_two():
    from anybit.sources.preprocessing import Preprocessing

    with pytest.raises(InvalidSetting, match="length"):
        Preprocessing(length=0)
