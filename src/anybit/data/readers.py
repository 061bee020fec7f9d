"""Readers of each kind of head: one row per prediction, without padding, with the labels and scores of these rows."""

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from anybit.data.batches import Batch, are_token_classes, call, evaluating, first_tensor, of_other_length, token_mask
from anybit.data.texts import Questions, gold_answers

RULED_OUT = -1e4
"""A logit with exponential zero in float32 that, unlike infinity, no arithmetic turns into NaN."""


class FirstOutput:
    """Classes or values: the first tensor of the output, [N, ...]."""

    unit = "samples"

    def __init__(self, task: str):
        self.task: str | None = task

    def read(self, output: Any, batch: Batch) -> Tensor:
        return first_tensor(output)

    def score(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        return {}

    def align(self, labels: Tensor, batch: Batch) -> Tensor:
        return labels


class AnyOutput(FirstOutput):
    """Values of a head of no known task: the first tensor of the output, [N, ...], or [tokens, ...] without padding."""

    def read(self, output: Any, batch: Batch) -> Tensor:
        values = first_tensor(output)
        mask = token_mask(values, batch)
        return values if mask is None else values[mask]


class TokenOutputs(FirstOutput):
    """Classes of each token, [tokens, classes], without padding."""

    unit = "tokens"

    def read(self, output: Any, batch: Batch) -> Tensor:
        return self._flat(first_tensor(output), batch)

    def align(self, labels: Tensor, batch: Batch) -> Tensor:
        return labels if labels.dim() == 1 else self._flat(labels, batch)

    def _flat(self, tokens: Tensor, batch: Batch) -> Tensor:
        """Return a tensor [N, T, ...] as [tokens, ...]."""
        mask = token_mask(tokens, batch)
        return tokens.flatten(0, 1) if mask is None else tokens[mask]


class PaddedTokens(TokenOutputs):
    """Numbers of each token of a network without a known head, [tokens, ...] without padding; its task is None if labels are to tell."""

    def __init__(self, task: str | None):
        self.task = task

    def read(self, output: Any, batch: Batch) -> Tensor:
        rows = super().read(output, batch)
        return rows[:, None] if rows.dim() == 1 else rows


@torch.no_grad()
def token_reader(model: nn.Module, batch: Batch) -> PaddedTokens | None:
    """Return the reader of a network whose output on padded texts has a row per token; None if it has not, or texts are not padded.

    `model` runs twice, on two lengths, because a number of classes may equal a length by chance.
    """
    if batch.mask is None:
        return None
    with evaluating(model), suppress(Exception):  # a model may reject any length
        for texts in (batch, of_other_length(batch)):
            if token_mask(first_tensor(call(model, texts.inputs)), texts) is None:
                return None
        return PaddedTokens("token-classification" if are_token_classes(batch) else None)
    return None


class NextTokens(TokenOutputs):
    """A causal language model: logits of the next token at every token but the last, [N (T - 1), vocabulary], without padding."""

    def __init__(self) -> None:
        super().__init__("language-model")

    def read(self, output: Any, batch: Batch) -> Tensor:
        logits = first_tensor(output)[:, :-1]
        return logits.flatten(0, 1) if batch.mask is None else logits[batch.mask[:, 1:]]

    def align(self, labels: Tensor, batch: Batch) -> Tensor:
        """Shift labels [N, T] as transformers does: they are the tokens themselves."""
        if labels.dim() == 1:
            return labels
        return labels[:, 1:].flatten() if batch.mask is None else labels[:, 1:][batch.mask[:, 1:]]


class Detections(FirstOutput):
    """Classes and box of each query, [N, queries, classes + 4]."""

    def read(self, output: Any, batch: Batch) -> Tensor:
        return torch.cat([output["logits"], output["pred_boxes"]], -1)


class SentenceEmbedding(FirstOutput):
    """One vector per sentence, image or sound, [N, features]: the mean of its tokens, without padding, or the first one.

    If the output has embeddings of its own, of a text and an image, these are taken instead, one after the other.
    """

    unit = "texts"

    def __init__(self, pooling: str = "mean"):
        super().__init__("embedding")
        self.pooling = pooling

    def first(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Return each sentence's first real token."""
        places = torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device) if mask is None else mask.int().argmax(1)
        return tokens[torch.arange(len(tokens), device=tokens.device), places]

    def read(self, output: Any, batch: Batch) -> Tensor:
        if own := _own_embeddings(output):
            return torch.cat(own, -1)
        tokens = first_tensor(output)
        if tokens.dim() != 3:
            return tokens if tokens.dim() == 2 else tokens.flatten(2).mean(2)  # a map of features [N, channels, H, W]
        known = token_mask(tokens, batch)
        if self.pooling == "first":
            return self.first(tokens, known)
        mask = torch.ones(tokens.shape[:2], device=tokens.device) if known is None else known
        weights = mask.to(tokens.dtype)[:, :, None]
        return (tokens * weights).sum(1) / weights.sum(1)


def _own_embeddings(output: Any) -> list[Tensor]:
    """Return the output's entries that are embeddings [N, features] by name."""
    named = output.items() if isinstance(output, Mapping) else ()
    return [value for name, value in named if name.endswith("_embeds") and isinstance(value, Tensor) and value.dim() == 2]


class Answers(FirstOutput):
    """Extractive question answering: logits of the first and the last token, [N, 2, length], with padding ruled out.

    `questions` is the data set whose windows the labels number; without it, nothing can be scored.
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
        """Return exact match and F1 in percent, over the questions to which these windows belong."""
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
            assert accepted is not None, "Questions accepts no other answers"
            scores.append(answer_scores(text, accepted))
        exact, overlap = zip(*scores, strict=True)
        return {"exact": 100 * float(np.mean(exact)), "f1": 100 * float(np.mean(overlap))}


def best_answer(
    start: np.ndarray, end: np.ndarray, offsets: Sequence[tuple[int, int] | None], context: str, longest: int, best: int
) -> tuple[float, str]:
    """Return (sum of its logits, text) of the likeliest answer with at most `longest` tokens, among the `best` starts and ends; "" if there
    is none."""
    places = {index: place for index, place in enumerate(offsets) if place is not None}
    starts = sorted(places, key=lambda index: -start[index])[:best]
    ends = sorted(places, key=lambda index: -end[index])[:best]
    options = [(float(start[s] + end[e]), s, e) for s in starts for e in ends if s <= e < s + longest]
    if not options:
        return -np.inf, ""
    score, s, e = max(options)
    return score, context[places[s][0] : places[e][1]]


def answer_scores(text: str, accepted: Sequence[str]) -> tuple[float, float]:
    """Return (1 if it is an accepted answer, F1 of common words), the best over the accepted ones.

    Compared in lower case, without punctuation and articles, as in SQuAD's own measure (Rajpurkar et al., EMNLP 2016, section 6.1).
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
