"""Texts as samples: read from files, tokenized by the network's own tokenizer, padded batch by batch.

No text library is imported here: a tokenizer is anything with the interface of transformers' tokenizers.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from anybit.data.batches import Batch
from anybit.data.options import ROLES, parse_columns, suffix_of
from anybit.data.tasks import IGNORED
from anybit.errors import InvalidFile, InvalidInput, InvalidSetting

Row = Mapping[str, Any]


# Files


def read_rows(path: Path, columns: str | None = None) -> list[Row]:
    """Read the rows of a file, each role -> value: tab- or comma-separated with a header, .jsonl of objects, or .txt with one text per
    line.

    `columns` ("text=sentence,label=label") gives the column of each role; numbers, counted from 0, are columns of a file without a header.
    Raises InvalidInput naming the faulty line.
    """
    roles = parse_columns(columns)
    try:
        content = path.read_bytes().decode("utf-8-sig")  # a byte-order mark is not part of the first column's name
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidFile(f"{path} cannot be read as text: {error}") from error
    content = content.replace("\r\n", "\n").replace("\r", "\n")
    lines = content.split("\n")  # and at nothing else: a text may contain other Unicode line ends
    if suffix_of(path) == ".txt":
        if roles:
            raise InvalidSetting(f"{path} has one text per line and no columns. Leave --columns out.")
        table: list[tuple[int, Row]] = [(number, {"text": line}) for number, line in enumerate(lines, 1) if line.strip()]
    elif suffix_of(path) == ".jsonl":
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
    """Return (line, row of column -> text). Tabs separate columns in a .tsv and in any file whose first line has one."""
    tabs = suffix_of(path) == ".tsv" or "\t" in content.partition("\n")[0]
    # Between tabs, quotes are ordinary characters: real files have unpaired ones.
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
                f"{path}, line {number}: {len(row)} columns, but the header names {len(header)}. Put texts with "
                f"{'tabs' if tabs else 'commas'} into quotes, or separate by {'commas' if tabs else 'tabs'}."
            )
    return [(number, dict(zip(header, row, strict=False))) for number, row in cells]


def with_roles(table: Sequence[tuple[int, Mapping]], columns: Mapping[str, str | int], where: str) -> list[Row]:
    """Turn numbered rows of column -> value into rows of role -> value. Raises InvalidInput naming the line if a column or text is
    missing."""
    present = list(table[0][1])
    for role, column in columns.items():
        if column not in present:
            names = ", ".join(map(str, present))
            raise InvalidInput(
                f"{where} has no column {column!r} for the {role}; its columns are {names}. Name one with --columns='{role}=NAME'."
            )
    candidates = {
        role: columns.get(role, next((name for name in names if name in present), None))
        for role, names in ROLES.items()
    }  # fmt: skip
    chosen = {role: column for role, column in candidates.items() if column is not None}
    if not {"text", "context"} & set(chosen):
        names = ", ".join(map(str, present))
        raise InvalidInput(f"{where} has no column of texts ({names}). Name it: --columns='text=NAME' (and label=NAME, pair=NAME).")
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
    """The interface of transformers' tokenizers."""

    model_input_names: list[str]
    eos_token_id: int | None
    pad_token_id: int | None
    mask_token_id: Any

    @property
    def all_special_ids(self) -> list[int]:
        """Return the tokens that belong to no text."""

    @property
    def is_fast(self) -> bool:
        """Return whether it maps tokens to words."""

    def __call__(self, text: Any = None, pair: Any = None, /, **options: Any) -> Any:
        """Return the tokens of the texts, under the names of the network's inputs."""

    def pad(self, samples: Any, /, *, return_tensors: Any, return_attention_mask: bool, verbose: bool) -> Any:
        """Return the samples' inputs as tensors [N, T], padded to the longest."""

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """Return the number of special tokens that the tokenizer adds to a text, or to a pair."""


@dataclass(frozen=True)
class Encoding:
    """How texts become tokens: the tokenizer, the most tokens of a sample (longer ones are truncated only if `cut`), and the overlap in
    tokens of the windows of a long context."""

    tokenizer: Tokenizer
    length: int
    cut: bool
    stride: int = 128


class Lengths(Sequence):
    """Numbers of tokens, counted on demand."""

    def __init__(self, texts: "Texts"):
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index):
        return len(self.texts.tokens(index)["input_ids"])


class Texts(Dataset):
    """Rows as tokens; a batch is padded to its longest. `labels` may have any type that becomes a tensor, or be None.

    With `apart`, the two texts of a row become the inputs of two samples, one after the other, both with the row's label.
    """

    def __init__(self, rows: Sequence[Row], labels: Sequence | None, encoding: Encoding, where: str, apart: bool = False):
        self.rows, self.labels, self.encoding, self.where, self.apart = rows, labels, encoding, where, apart
        self.lengths = Lengths(self)

    def __len__(self) -> int:
        return len(self.rows)

    def tokens(self, index: int) -> Mapping[str, list[int]]:
        """Return one sample's inputs, without padding; those of the first text if its two texts are apart."""
        return self._parts(index)[0]

    def _parts(self, index: int) -> list[Mapping[str, list[int]]]:
        row = self.rows[index]
        pair = row.get("pair")
        return [self._encoded(index, text) for text in ((row["text"],), (pair,))] if self.apart and pair else [
            self._encoded(index, (row["text"],) if pair is None else (row["text"], pair))
        ]  # fmt: skip

    def _encoded(self, index: int, texts: tuple[Any, ...], **options: Any) -> Any:
        encoding = self.encoding
        most = {"truncation": encoding.cut, "max_length": encoding.length if encoding.cut else None}
        tokens = encoding.tokenizer(*texts, **most, verbose=False, **options)
        count = len(tokens["input_ids"])
        if count > encoding.length:
            raise InvalidInput(
                f"{self.where}: text {index + 1} has {count} tokens, more than the {encoding.length} that the network accepts "
                f"({texts[0][:40]!r}...). Truncate such texts with --length={encoding.length}, or leave them out."
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
    """Return one tensor [N, T] per input, with T the longest; "attention_mask" is 0 at the padding."""
    inputs = [{name: tokens[name] for name in tokens if name in tokenizer.model_input_names} for tokens in samples]
    return dict(tokenizer.pad(inputs, return_tensors="pt", return_attention_mask=True, verbose=False))


class MaskedTexts(Texts):
    """Texts with a share HIDDEN of the tokens, drawn by each text's number, replaced by the mask; labels [N, T] are the original tokens."""

    HIDDEN = 0.15

    def __getitems__(self, indices: list[int]) -> Batch:
        inputs = padded(self.encoding.tokenizer, [self.tokens(index) for index in indices])
        tokens = inputs["input_ids"]
        drawn = [torch.rand(tokens.shape[1], generator=torch.Generator().manual_seed(index)) for index in indices]
        special = torch.isin(tokens, torch.tensor(self.encoding.tokenizer.all_special_ids))
        chances = torch.stack(drawn).masked_fill(special, 2.0)
        hidden = (chances < self.HIDDEN) | (chances == chances.amin(1, keepdim=True))
        hidden &= ~special
        return Batch(
            {**inputs, "input_ids": tokens.masked_fill(hidden, self.encoding.tokenizer.mask_token_id)},
            tokens.masked_fill(~hidden, IGNORED),
        )


class TaggedTexts(Texts):
    """Texts with a class for each word: `labels` is a list per row; labels [N, T] have it at the word's first token."""

    def tokens(self, index: int) -> Any:
        return self._encoded(index, (self.rows[index]["text"].split(),), is_split_into_words=True)

    def __getitems__(self, indices: list[int]) -> Batch:
        encoded = [self.tokens(index) for index in indices]
        inputs = padded(self.encoding.tokenizer, encoded)
        if self.labels is None:
            return Batch(inputs)
        labels = torch.full(inputs["input_ids"].shape, IGNORED)
        for row, index, tokens in zip(labels, indices, encoded, strict=True):
            words = tokens.word_ids()
            for place, word in enumerate(words):
                if word is not None and word not in words[:place]:
                    row[place] = self.labels[index][word]
        return Batch(inputs, labels)


class Translations(Texts):
    """Texts with a target text each, which the decoder reads shifted by one, after the token `start`. Labels [N, T] are its tokens."""

    def __init__(self, rows: Sequence[Row], encoding: Encoding, where: str, start: int):
        super().__init__(rows, None, encoding, where)
        self.start = start

    def _parts(self, index: int) -> list[Mapping[str, list[int]]]:
        return [self._encoded(index, (self.rows[index]["text"],))]

    def __getitems__(self, indices: list[int]) -> Batch:
        encoding = self.encoding
        inputs = padded(encoding.tokenizer, [self.tokens(index) for index in indices])
        answers = [
            encoding.tokenizer(text_target=self.rows[index]["pair"], truncation=True, max_length=encoding.length, verbose=False)[
                "input_ids"
            ]
            for index in indices
        ]
        longest = max(map(len, answers))
        labels = torch.tensor([[*tokens, *[IGNORED] * (longest - len(tokens))] for tokens in answers])
        before = torch.cat([torch.full((len(labels), 1), self.start), labels[:, :-1]], 1)
        decoder = {
            "decoder_input_ids": before.masked_fill(before == IGNORED, encoding.tokenizer.pad_token_id or 0),
            "decoder_attention_mask": (labels != IGNORED).long(),
        }
        return Batch({**inputs, **decoder}, labels)


class Blocks(Dataset):
    """One long text in blocks of `length` tokens, each a sample; labels are the next tokens of all samples, one after another."""

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
    """A stretch of a context with its question: number of the example, tokens, and position of each token in the context (None:
    outside)."""

    example: int
    tokens: Mapping[str, list[int]]
    offsets: Sequence[tuple[int, int] | None]


class Questions(Dataset):
    """Questions about contexts, in overlapping windows if a context is too long for the network; a window is a sample, labelled by its
    number."""

    def __init__(self, rows: Sequence[Row], encoding: Encoding, where: str):
        self.rows, self.encoding = rows, encoding
        for number, row in enumerate(rows, 1):
            if "answers" in row and gold_answers(row["answers"]) is None:
                raise InvalidInput(
                    f"{where}: the answers of question {number} are {str(row['answers'])[:60]!r}. Give a text, a list of texts, or "
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
            f"but windows overlap by {encoding.stride}. Raise --length, or lower --stride."
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


def gold_answers(answers: Any) -> list[str] | None:
    """Return the accepted texts of {"text": [...]}, a list of texts, or one text; "" if there are none. None for anything else."""
    texts = answers.get("text") if isinstance(answers, Mapping) else answers
    texts = [texts] if isinstance(texts, str) else texts
    return (list(texts) or [""]) if isinstance(texts, (list, tuple)) and all(isinstance(text, str) for text in texts) else None
