"""The heads of Hugging Face models, one per task: texts tokenized by a model's own tokenizer, and how its outputs are read."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedModel

from anybit.data.batches import Reader
from anybit.data.readers import Answers, AnyOutput, Detections, FirstOutput, NextTokens, SentenceEmbedding, TokenOutputs
from anybit.data.samples import Samples
from anybit.data.texts import Blocks, Encoding, MaskedTexts, Questions, Row, TaggedTexts, Texts, Translations, with_roles
from anybit.errors import InvalidInput, InvalidSetting, UnsupportedModel
from anybit.sources.huggingface.folder import json_of
from anybit.sources.libraries import short_timeouts


@dataclass(frozen=True)
class Head:
    """A head of transformers' models, and its task.

    endings    of the names of classes with this head;   loader  the class that loads one for texts
    others     of the names of such classes for images, sounds and more, which load as they were saved
    one_value  whether it returns one value, not several; None if that does not matter
    decodes    whether it belongs to an encoder-decoder; None if that does not matter
    reader     function of a model: the reader of its output
    samples    function of (model, rows, their origin, encoding, workers): rows of role -> value, tokenized
    length     default of the most tokens of a sample
    """

    endings: tuple[str, ...]
    loader: str
    reader: Callable[[PreTrainedModel], Reader]
    samples: Callable[[PreTrainedModel, Sequence[Row], str, Encoding, int], Samples]
    others: tuple[str, ...] = ()
    one_value: bool | None = None
    decodes: bool | None = None
    length: int | None = None

    def fits(self, model: PreTrainedModel) -> bool:
        """Return whether the model has this head."""
        name, one_value = type(model).__name__, getattr(model.config, "num_labels", 2) == 1
        named = name.endswith(self.endings + self.others) and "Heads" not in name
        return named and self.one_value in (None, one_value) and self.decodes in (None, _decodes(model))


def _decodes(model: PreTrainedModel) -> bool:
    return bool(getattr(model.config, "is_encoder_decoder", False))


def head_of(model: PreTrainedModel) -> Head:
    """Return the model's head; one without a known task counts as a head of values."""
    return next((head for head in HEADS.values() if head.fits(model)), OTHER)


def reader_of(model: PreTrainedModel) -> Reader:
    """Return the reader of the model's output."""
    return head_of(model).reader(model)


def _pooling(model: PreTrainedModel) -> str:
    """Return "first" if the model's sentence-embedding configuration uses the first token, else "mean". Raises UnsupportedModel for
    others."""
    modes = {mode: on for mode, on in json_of(model, "1_Pooling/config.json").items() if mode.startswith("pooling_mode_") and on}
    others = sorted(set(modes) - {"pooling_mode_mean_tokens", "pooling_mode_cls_token"})
    if others or len(modes) > 1:
        raise UnsupportedModel(
            f"{model.name_or_path} pools its tokens by {', '.join(sorted(modes))}; only the mean and the first are supported."
        )
    return "first" if "pooling_mode_cls_token" in modes else "mean"


# Texts


def text_samples(
    model: PreTrainedModel, rows: Sequence[Row], where: str, length: int | None = None, stride: int | None = None, workers: int = 0
) -> Samples:
    """Return samples for `model` from rows (role -> value): tokenized by its own tokenizer, for the task of its head."""
    return head_of(model).samples(model, rows, where, _encoding(model, length, stride), workers)


def _questions(model: PreTrainedModel, rows: Sequence[Row], where: str, encoding: Encoding, workers: int) -> Samples:
    if not {"question", "context"} <= set(rows[0]):
        raise InvalidInput(f"{where}: question answering needs columns question and context. Name them with --columns.")
    questions = Questions(rows, encoding, where)
    return Samples(questions, "answers" in rows[0], workers, reader=Answers(encoding.length, questions))


def _check_texts(rows: Sequence[Row], where: str) -> None:
    if "text" not in rows[0]:
        raise InvalidInput(f"{where} has no column of texts. Name it: --columns='text=NAME'.")


def _blocks(model: PreTrainedModel, rows: Sequence[Row], where: str, encoding: Encoding, workers: int) -> Samples:
    _check_texts(rows, where)
    end = encoding.tokenizer.eos_token_id
    separate = [] if end is None else [end]
    rows_of_tokens = encoding.tokenizer([row["text"] for row in rows], verbose=False)["input_ids"]
    tokens = [token for one in rows_of_tokens for token in [*one, *([] if one[-1:] == separate else separate)]]
    return Samples(Blocks(tokens, encoding.length, where), True, workers, reader=NextTokens())


def _texts(
    model: PreTrainedModel, rows: Sequence[Row], where: str, encoding: Encoding, workers: int, label: "Label | None", apart: bool = False
) -> Samples:
    _check_texts(rows, where)
    labels = [label(row["label"], model, where) for row in rows] if label is not None and "label" in rows[0] else None
    return Samples(Texts(rows, labels, encoding, where, apart=apart), labels is not None, workers, reader=reader_of(model))


def _pairs(model: PreTrainedModel, rows: Sequence[Row], where: str, encoding: Encoding, workers: int) -> Samples:
    if _decodes(model):
        return replace(_translations(model, rows, where, encoding, workers), labelled=False)
    _check_texts(rows, where)
    if "label" in rows[0] and "pair" not in rows[0]:
        raise InvalidInput(f"{where}: embeddings are scored on pairs of texts. Name the second one's column with --columns='pair=NAME'.")
    return _texts(model, rows, where, encoding, workers, _number, apart=True)


def _tagged(model: PreTrainedModel, rows: Sequence[Row], where: str, encoding: Encoding, workers: int) -> Samples:
    _check_texts(rows, where)
    labels = None
    if "label" in rows[0]:
        labels = [_class_numbers(row, number, model, where) for number, row in enumerate(rows, 1)]
    if not encoding.tokenizer.is_fast:
        raise InvalidSetting(f"{model.name_or_path}: only a fast tokenizer maps tokens to words. Put tokenizer.json beside it.")
    return Samples(TaggedTexts(rows, labels, encoding, where), labels is not None, workers, reader=reader_of(model))


def _class_numbers(row: Row, number: int, model: PreTrainedModel, where: str) -> list[int]:
    """Return the class of each word of a row's text: a list, or names between blanks."""
    words, labels = row["text"].split(), row["label"]
    labels = labels.split() if isinstance(labels, str) else labels
    if not isinstance(labels, list) or len(labels) != len(words):
        raise InvalidInput(
            f"{where}: row {number} has {len(words)} words, but the labels are {str(labels)[:60]!r}. Give one label per word."
        )
    return [_class_number(label, model, where) for label in labels]


def _masked(model: PreTrainedModel, rows: Sequence[Row], where: str, encoding: Encoding, workers: int) -> Samples:
    if encoding.tokenizer.mask_token_id is None:
        return _texts(model, rows, where, encoding, workers, None)
    _check_texts(rows, where)
    return Samples(MaskedTexts(rows, None, encoding, where), True, workers, reader=reader_of(model))


def _translations(model: PreTrainedModel, rows: Sequence[Row], where: str, encoding: Encoding, workers: int) -> Samples:
    _check_texts(rows, where)
    if "pair" not in rows[0]:
        raise InvalidInput(
            f"{where}: {type(model).__name__} reads a text and decodes another. Name the second one's column with --columns='pair=NAME'."
        )
    start = next((one for one in (_start(model), encoding.tokenizer.pad_token_id) if one is not None), 0)
    return Samples(Translations(rows, encoding, where, start), True, workers, reader=reader_of(model))


def _start(model: PreTrainedModel) -> int | None:
    """Return the first token of a decoder."""
    configs = (model.config, getattr(model, "generation_config", None))
    return next((one for config in configs if (one := getattr(config, "decoder_start_token_id", None)) is not None), None)


def _encoding(model: PreTrainedModel, length: int | None, stride: int | None) -> Encoding:
    try:
        with short_timeouts(model.name_or_path):
            tokenizer = transformers.AutoTokenizer.from_pretrained(model.name_or_path, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError) as error:
        message = " ".join(str(error).split())
        raise InvalidSetting(
            f"{model.name_or_path or 'The model'} has no tokenizer that can be loaded ({message[:200]}). Put tokenizer.json beside "
            "it, or give tokenized data."
        ) from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # an empty tokenizer is created if there are no files
        raise InvalidSetting(f"{model.name_or_path} has no tokenizer: its vocabulary is empty. Put tokenizer.json beside it.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    tokenizer.padding_side = "right"  # places in a text are counted from its first token
    most = _length_of(model)
    if length is not None and not 2 <= length <= most:
        raise InvalidSetting(f"--length={length}: the network accepts 2 to {most} tokens.")
    default = min(most, head_of(model).length or most)
    return Encoding(tokenizer, length or default, length is not None, 128 if stride is None else stride)


def _length_of(model: PreTrainedModel) -> int:
    """Return the most tokens that the network accepts; in RoBERTa's family, positions start after the padding index."""
    most = getattr(model.config, "max_position_embeddings", None)
    tables = [m for n, m in model.named_modules() if n.endswith("position_embeddings") and isinstance(m, nn.Embedding)]
    taken = tables[0].padding_idx + 1 if tables and tables[0].padding_idx is not None else 0
    return most - taken if isinstance(most, int) and most > taken else 2048


Label = Callable[[Any, PreTrainedModel, str], int | float]


def _class_number(value: Any, model: PreTrainedModel, where: str) -> int:
    """Read a class label: one of the model's names, or its number."""
    names = getattr(model.config, "label2id", None) or {}
    if isinstance(value, str) and value in names:
        return int(names[value])
    try:
        if float(value) != int(float(value)):
            raise ValueError
        return int(float(value))
    except (TypeError, ValueError, OverflowError) as error:
        message = f"neither a class number nor one of the model's ({', '.join(map(str, names))})"
        raise InvalidInput(f"{where}: the label {value!r} is {message}. Name another column with --columns='label=NAME'.") from error


def _number(value: Any, model: PreTrainedModel, where: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidInput(f"{where}: the label {value!r} is not a number. Name another column with --columns='label=NAME'.") from error


_sequence = partial(
    Head,
    ("ForSequenceClassification",),
    "AutoModelForSequenceClassification",
    others=(
        "ForImageClassification", "ForImageClassificationWithTeacher", "ForVideoClassification", "ForAudioClassification",
        "ForMultipleChoice", "ForNextSentencePrediction",
    ),
)  # fmt: skip
HEADS = {
    "question-answering": Head(
        ("ForQuestionAnswering",), "AutoModelForQuestionAnswering", lambda model: Answers(_length_of(model)), _questions, length=384
    ),
    "sequence-to-sequence": Head(
        ("ForConditionalGeneration", "MTModel"), "AutoModelForSeq2SeqLM", lambda model: TokenOutputs("sequence-to-sequence"), _translations,
        others=("ForSpeechSeq2Seq",), decodes=True, length=1024,
    ),
    "language-model": Head(
        ("ForCausalLM", "LMHeadModel"), "AutoModelForCausalLM", lambda model: NextTokens(), _blocks,
        others=("ForConditionalGeneration",), length=1024,
    ),
    "masked-language-model": Head(
        ("ForMaskedLM",), "AutoModelForMaskedLM", lambda model: TokenOutputs("masked-language-model"), _masked
    ),
    "token-classification": Head(
        ("ForTokenClassification",), "AutoModelForTokenClassification", lambda model: TokenOutputs("token-classification"), _tagged,
        others=("ForCTC", "ForAudioFrameClassification"),
    ),
    "classification": _sequence(
        reader=lambda model: FirstOutput("classification"), samples=partial(_texts, label=_class_number), one_value=False
    ),
    "regression": _sequence(reader=lambda model: FirstOutput("regression"), samples=partial(_texts, label=_number), one_value=True),
    "embedding": Head(
        ("Model",), "AutoModel", lambda model: SentenceEmbedding(_pooling(model)), _pairs,
        others=("WithProjection", "EncoderModel"),
    ),
}  # fmt: skip
"""Task -> its head. The first that fits a model is its head, since a name that ends in "LMHeadModel" also ends in "Model"."""
OTHER = Head((), "AutoModel", lambda model: _other_reader(model), partial(_texts, label=None))
"""Head of values without a known task."""


def _other_reader(model: PreTrainedModel) -> Reader:
    return (Detections if type(model).__name__.endswith("ForObjectDetection") else AnyOutput)("regression")


def hub_rows(name: str, split: str, columns: Mapping[str, str | int]) -> list[Row]:
    """Return the rows of a Hugging Face data set's split, role -> value (needs the package datasets)."""
    import datasets

    try:
        dataset = datasets.load_dataset(*name.split(":"), split=split or "train")
    except Exception as error:  # the library's readers may raise any error
        message = " ".join(str(error).split())
        raise InvalidInput(f"--data=hf:{name} cannot be loaded: {type(error).__name__}: {message[:300]}") from error
    if len(dataset) == 0:
        raise InvalidInput(f"--data=hf:{name} holds no rows.")
    return with_roles([(number, dict(row)) for number, row in enumerate(dataset, 1)], columns, f"hf:{name}")
