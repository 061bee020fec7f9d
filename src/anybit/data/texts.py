"""Texts as samples: read from files, tokenized by the network's own tokenizer, padded batch by batch; what each task reads and scores.

No text library is imported here: a tokenizer is anything that is called like one of transformers'.
"""

import csv
import io
import json
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from anybit.data.batches import Batch, first_tensor
from anybit.data.options import ROLES, parse_columns
from anybit.errors import InvalidFile, InvalidInput, InvalidSetting

SUFFIXES = (".tsv", ".csv", ".jsonl", ".txt")
RULED_OUT = -1e4
"""A logit whose exponential is zero in float32, and that no arithmetic makes NaN, as infinity would."""

Row = Mapping[str, Any]


# Files


def read_rows(path: Path, columns: str | None = None) -> list[Row]:
    """Read the rows of a file, each role -> value: tab- or comma-separated with a header, .jsonl of objects, or .txt of one text a line.

    `columns` ("text=sentence,label=label") says which column has which role; columns by number, counted from 0, are those of a file
    without a header. Raises InvalidInput naming the line that is at fault.
    """
    roles = parse_columns(columns)
    try:
        content = path.read_bytes().decode("utf-8-sig")  # what begins a file in some programs is no part of its first column's name
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidFile(f"{path} cannot be read as text: {error}") from error
    content = content.replace("\r\n", "\n").replace("\r", "\n")
    lines = content.split("\n")  # and at nothing else: a text may hold what Unicode calls a line's end
    if path.suffix == ".txt":
        if roles:
            raise InvalidSetting(f"{path} has one text a line and no columns. Leave --columns out.")
        table: list[tuple[int, Row]] = [(number, {"text": line}) for number, line in enumerate(lines, 1) if line.strip()]
    elif path.suffix == ".jsonl":
        table = [(number, _object(path, number, line)) for number, line in enumerate(lines, 1) if line.strip()]
    else:
        table = _separated(path, content, any(isinstance(column, int) for column in roles.values()))
    if not table:
        raise InvalidInput(f"{path} holds no rows. Give at least 2 texts (a few hundred work well).")
    return with_roles(table, roles, str(path))


def _object(path: Path, number: int, line: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{path}, line {number}: not JSON ({error}).") from error
    if not isinstance(row, dict):
        raise InvalidInput(f"{path}, line {number}: a JSON object of column: value is needed, not a {type(row).__name__}.")
    return row


def _separated(path: Path, content: str, bare: bool) -> list[tuple[int, Row]]:
    """Return (line, row of column -> text). Tabs separate in a .tsv, and where the first line has one, whatever the file's name."""
    tabs = path.suffix == ".tsv" or "\t" in content.partition("\n")[0]
    # Between tabs quotes are characters like others: real files hold them unpaired.
    dialect: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {}
    reader = csv.reader(io.StringIO(content, newline=""), **dialect)
    try:
        cells = [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise InvalidFile(f"{path}, line {reader.line_num}: cannot be read as separated columns: {error}") from error
    if not cells:
        return []
    header: list = list(range(max(len(row) for _, row in cells))) if bare else cells.pop(0)[1]
    for number, row in cells:
        if len(row) > len(header):
            raise InvalidInput(
                f"{path}, line {number}: {len(row)} columns, and the header names {len(header)}. Put texts with "
                f"{'tabs' if tabs else 'commas'} into quotes, or separate by {'commas' if tabs else 'tabs'}."
            )
    return [(number, dict(zip(header, row, strict=False))) for number, row in cells]


def with_roles(table: Sequence[tuple[int, Mapping]], columns: Mapping[str, str | int], where: str) -> list[Row]:
    """Turn numbered rows of column -> value into rows of role -> value. Raise InvalidInput naming the line if a column or text is
    lacking."""
    there = list(table[0][1])
    for role, column in columns.items():
        if column not in there:
            names = ", ".join(map(str, there))
            raise InvalidInput(f"{where} has no column {column!r} for the {role}; it has {names}. Name one with --columns {role}=NAME.")
    candidates = {
        role: columns.get(role, next((name for name in names if name in there), None))
        for role, names in ROLES.items()
    }  # fmt: skip
    chosen = {role: column for role, column in candidates.items() if column is not None}
    if not {"text", "context"} & set(chosen):
        names = ", ".join(map(str, there))
        raise InvalidInput(f"{where} has no column of texts ({names}). Name it: --columns text=NAME (and label=NAME, pair=NAME).")
    rows: list[Row] = []
    for number, row in table:
        values = {role: row.get(column) for role, column in chosen.items()}
        for role in {"text", "pair", "question", "context"} & set(values):
            text = values[role]
            if text is not None and not isinstance(text, str):
                raise InvalidInput(f"{where}, line {number}: the {role} is a {type(text).__name__}, not a text.")
            if not text or not text.strip():
                raise InvalidInput(f"{where}, line {number}: the {role} is empty. Leave such lines out.")
        rows.append(values)
    return rows


# Samples


class Tokenizer(Protocol):
    """A tokenizer as transformers has them."""

    model_input_names: list[str]
    eos_token_id: int | None

    def __call__(self, text: Any, pair: Any = None, /, **options: Any) -> Any:
        """Return the tokens of the texts, by the names of the network's inputs."""

    def pad(self, samples: Any, /, *, return_tensors: Any, return_attention_mask: bool, verbose: bool) -> Any:
        """Return the samples' inputs as tensors [N, T], padded to the longest."""

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """Return how many tokens of its own the tokenizer adds to a text, or to a pair."""


@dataclass(frozen=True)
class Encoding:
    """How texts become tokens: the tokenizer, the most tokens a sample may have (longer ones are cut only where `cut` says so), and by how
    many tokens the windows of a long context overlap."""

    tokenizer: Tokenizer
    length: int
    cut: bool
    stride: int = 128


class Lengths(Sequence):
    """Numbers of tokens, counted when asked for."""

    def __init__(self, texts: "Texts"):
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index):
        return len(self.texts.tokens(index)["input_ids"])


class Texts(Dataset):
    """Rows as tokens; a batch is padded to its longest. `labels` may be of any type that a tensor takes, or None.

    With `apart` the two texts of a row are two samples' worth of inputs, one after the other, both with the row's label.
    """

    def __init__(self, rows: Sequence[Row], labels: Sequence | None, encoding: Encoding, where: str, apart: bool = False):
        self.rows, self.labels, self.encoding, self.where, self.apart = rows, labels, encoding, where, apart
        self.lengths = Lengths(self)

    def __len__(self) -> int:
        return len(self.rows)

    def tokens(self, index: int) -> Mapping[str, list[int]]:
        """Return one sample's inputs, without padding; the first's, if its two texts are apart."""
        return self._parts(index)[0]

    def _parts(self, index: int) -> list[Mapping[str, list[int]]]:
        row = self.rows[index]
        pair = row.get("pair")
        return [self._encoded(index, text) for text in ((row["text"],), (pair,))] if self.apart and pair else [
            self._encoded(index, (row["text"],) if pair is None else (row["text"], pair))
        ]  # fmt: skip

    def _encoded(self, index: int, texts: tuple[str, ...]) -> Mapping[str, list[int]]:
        encoding = self.encoding
        tokens = encoding.tokenizer(*texts, truncation=encoding.cut, max_length=encoding.length if encoding.cut else None, verbose=False)
        count = len(tokens["input_ids"])
        if count > encoding.length:
            raise InvalidInput(
                f"{self.where}: text {index + 1} has {count} tokens, more than the {encoding.length} that the network takes "
                f"({texts[0][:40]!r}...). Cut such texts with --length {encoding.length}, or leave them out."
            )
        if count == 0:
            raise InvalidInput(f"{self.where}: text {index + 1} has no tokens ({texts[0][:40]!r}). Leave it out.")
        return tokens

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> Batch:
        parts = [part for index in indices for part in self._parts(index)]
        inputs = padded(self.encoding.tokenizer, parts)
        if self.labels is None:
            return Batch(inputs)
        twice = len(parts) // len(indices)
        return Batch(inputs, torch.tensor([self.labels[index] for index in indices for _ in range(twice)]))


def padded(tokenizer: Tokenizer, samples: Sequence[Mapping[str, list[int]]]) -> dict[str, Tensor]:
    """Return one tensor [N, T] an input, T the longest; "attention_mask" is 0 at the padding."""
    inputs = [{name: tokens[name] for name in tokens if name in tokenizer.model_input_names} for tokens in samples]
    return dict(tokenizer.pad(inputs, return_tensors="pt", return_attention_mask=True, verbose=False))


class Blocks(Dataset):
    """One long text in blocks of `length` tokens, each a sample; labels are the next tokens, those of all samples one after another."""

    def __init__(self, tokens: Sequence[int], length: int, where: str):
        count = len(tokens) // length
        if count < 1:
            raise InvalidInput(f"{where} has {len(tokens)} tokens, less than one block of {length}. Give more text, or a smaller --length.")
        self.tokens = torch.tensor(tokens[: count * length]).view(count, length)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> Batch:
        tokens = self.tokens[indices]
        return Batch({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, tokens[:, 1:].flatten())


@dataclass(frozen=True)
class Window:
    """A stretch of a context with its question: which example, its tokens, where in the context each token stands (None: not in it)."""

    example: int
    tokens: Mapping[str, list[int]]
    offsets: Sequence[tuple[int, int] | None]


class Questions(Dataset):
    """Questions about contexts, in overlapping windows of one too long for the network; a window is a sample, its number the label."""

    def __init__(self, rows: Sequence[Row], encoding: Encoding, where: str):
        self.rows, self.encoding = rows, encoding
        for number, row in enumerate(rows, 1):
            if "answers" in row and gold_answers(row["answers"]) is None:
                raise InvalidInput(
                    f"{where}: the answers of question {number} are {str(row['answers'])[:60]!r}. Write a text, a list of texts, or "
                    '{"text": [...]}, as JSON.'
                )
        self.windows = [window for number, row in enumerate(rows) for window in _windows(number, row, encoding, where)]
        self.lengths = [len(window.tokens["input_ids"]) for window in self.windows]

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> Batch:
        inputs = padded(self.encoding.tokenizer, [self.windows[index].tokens for index in indices])
        labelled = "answers" in self.rows[0]
        return Batch(inputs, torch.tensor(indices) if labelled else None)


def _windows(number: int, row: Row, encoding: Encoding, where: str) -> list[Window]:
    tokenizer, options = encoding.tokenizer, {"truncation": "only_second", "max_length": encoding.length, "verbose": False}
    asked = len(tokenizer(row["question"], add_special_tokens=False, verbose=False)["input_ids"])
    room = encoding.length - asked - tokenizer.num_special_tokens_to_add(pair=True)
    if encoding.stride >= room:
        raise InvalidInput(
            f"{where}: question {number + 1} has {asked} tokens, which leaves room for {max(room, 0)} of its context in {encoding.length}, "
            f"and windows are to overlap by {encoding.stride}. Raise --length, or lower --stride."
        )
    encoded = tokenizer(
        row["question"], row["context"], stride=encoding.stride, return_overflowing_tokens=True, return_offsets_mapping=True, **options
    )
    names = [name for name in encoded if name in tokenizer.model_input_names]
    windows = []
    for index, offsets in enumerate(encoded["offset_mapping"]):
        of_context = [sequence == 1 for sequence in encoded.sequence_ids(index)]
        places = [tuple(place) if inside else None for place, inside in zip(offsets, of_context, strict=True)]
        windows.append(Window(number, {name: encoded[name][index] for name in names}, places))
    return windows


# What a task reads in the network's output, and scores


class FirstOutput:
    """Classes or values: the first tensor of the output, [N, ...]."""

    unit = "samples"

    def __init__(self, task: str):
        self.task = task

    def read(self, output: Any, batch: Batch) -> Tensor:
        return first_tensor(output)

    def score(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        return {}


class NextTokens(FirstOutput):
    """A causal language model: logits of the next token at every token but the last, [N (T - 1), vocabulary]; padding left out."""

    unit = "tokens"

    def __init__(self) -> None:
        super().__init__("language-model")

    def read(self, output: Any, batch: Batch) -> Tensor:
        logits = first_tensor(output)[:, :-1]
        return logits.flatten(0, 1) if batch.mask is None else logits[batch.mask[:, 1:]]


class SentenceEmbedding(FirstOutput):
    """One vector a sentence, [N, features]: the mean of its tokens' (or the first one), padding left out."""

    unit = "texts"

    def __init__(self, pooling: str = "mean"):
        super().__init__("embedding")
        self.pooling = pooling

    def first(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Return each sentence's first real token."""
        places = torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device) if mask is None else mask.int().argmax(1)
        return tokens[torch.arange(len(tokens), device=tokens.device), places]

    def read(self, output: Any, batch: Batch) -> Tensor:
        tokens = first_tensor(output)
        if self.pooling == "first":
            return self.first(tokens, batch.mask)
        mask = torch.ones(tokens.shape[:2], device=tokens.device) if batch.mask is None else batch.mask
        weights = mask.to(tokens.dtype)[:, :, None]
        return (tokens * weights).sum(1) / weights.sum(1)


class Answers(FirstOutput):
    """Extractive question answering: logits of the first and the last token, [N, 2, length]; padding is ruled out.

    `questions` are the data set whose windows the labels number; without it nothing can be scored.
    """

    unit = "windows"

    def __init__(self, length: int, questions: Questions | None = None, longest: int = 30, best: int = 20):
        super().__init__("question-answering")
        self.length, self.questions, self.longest, self.best = length, questions, longest, best

    def read(self, output: Any, batch: Batch) -> Tensor:
        logits = torch.stack([output["start_logits"], output["end_logits"]], 1)
        if batch.mask is not None:
            logits = logits.masked_fill(~batch.mask[:, None], RULED_OUT)
        return torch.nn.functional.pad(logits, (0, self.length - logits.shape[-1]), value=RULED_OUT)

    def score(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        """Return exact match and F1 in percent, over the questions that any of these windows is of."""
        if self.questions is None:
            return {}
        windows, rows = self.questions.windows, self.questions.rows
        best: dict[int, tuple[float, str]] = {}
        for logits, number in zip(outputs.double().cpu().numpy(), labels.tolist(), strict=True):
            window = windows[number]
            answer = best_answer(logits[0], logits[1], window.offsets, rows[window.example]["context"], self.longest, self.best)
            if window.example not in best or answer[0] > best[window.example][0]:
                best[window.example] = answer
        scores = []
        for example, (_, text) in best.items():
            accepted = gold_answers(rows[example]["answers"])
            assert accepted is not None, "Questions takes no other answers"
            scores.append(answer_scores(text, accepted))
        exact, overlap = zip(*scores, strict=True)
        return {"exact": 100 * float(np.mean(exact)), "f1": 100 * float(np.mean(overlap))}


def best_answer(
    start: np.ndarray, end: np.ndarray, offsets: Sequence[tuple[int, int] | None], context: str, longest: int, best: int
) -> tuple[float, str]:
    """Return (sum of its logits, text) of the likeliest answer of at most `longest` tokens, among the `best` starts and ends; "" if
    none."""
    places = {index: place for index, place in enumerate(offsets) if place is not None}
    starts = sorted(places, key=lambda index: -start[index])[:best]
    ends = sorted(places, key=lambda index: -end[index])[:best]
    options = [(float(start[s] + end[e]), s, e) for s in starts for e in ends if s <= e < s + longest]
    if not options:
        return -np.inf, ""
    score, s, e = max(options)
    return score, context[places[s][0] : places[e][1]]


def gold_answers(answers: Any) -> list[str] | None:
    """Return the accepted texts of {"text": [...]}, a list of texts, or one text; "" if there are none. None for anything else."""
    texts = answers.get("text") if isinstance(answers, Mapping) else answers
    texts = [texts] if isinstance(texts, str) else texts
    return (list(texts) or [""]) if isinstance(texts, (list, tuple)) and all(isinstance(text, str) for text in texts) else None


def answer_scores(text: str, accepted: Sequence[str]) -> tuple[float, float]:
    """Return (1 if it is one of those accepted, share of words in common as F1), the best over those accepted.

    Compared in lower case, without punctuation and articles, as SQuAD's own measure does (Rajpurkar et al., EMNLP 2016, section 6.1).
    """
    words = _words(text)
    return max(float(words == _words(one)) for one in accepted), max(_overlap(words, _words(one)) for one in accepted)


def _words(text: str) -> list[str]:
    without = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", without).split()


def _overlap(words: list[str], accepted: list[str]) -> float:
    if not words or not accepted:
        return float(words == accepted)
    common = sum((Counter(words) & Counter(accepted)).values())
    return 2 * common / (len(words) + len(accepted))
