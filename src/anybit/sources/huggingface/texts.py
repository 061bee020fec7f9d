"""Texts tokenized by a Hugging Face model's own tokenizer, and how its outputs are read."""

from collections.abc import Mapping, Sequence
from typing import Any

import transformers
from torch import nn

from anybit.data.batches import Reader
from anybit.data.samples import Samples
from anybit.data.texts import Answers, Blocks, Encoding, FirstOutput, NextTokens, Questions, Row, SentenceEmbedding, Texts, with_roles
from anybit.errors import InvalidInput, InvalidSetting, UnsupportedModel
from anybit.sources.huggingface.folder import json_of


def task_of(model: nn.Module) -> str:
    """What the model's head is for."""
    name = type(model).__name__
    if name.endswith("LMHeadModel") or name.endswith("ForCausalLM"):
        return "language-model"
    if name.endswith("ForQuestionAnswering"):
        return "question-answering"
    if name.endswith(("ForSequenceClassification", "ForImageClassification")):
        return "regression" if getattr(model.config, "num_labels", 2) == 1 else "classification"
    if name.endswith("Model") and "Heads" not in name:
        return "embedding"
    raise UnsupportedModel(
        f"{name} has a head that is not covered: classes and values of sequences and pictures, answers, next tokens and embeddings are."
    )


def reader_of(model: nn.Module) -> Reader:
    """What is read in the model's output."""
    task = task_of(model)
    if task == "language-model":
        return NextTokens()
    if task == "question-answering":
        return Answers(_length_of(model))
    return SentenceEmbedding(_pooling(model)) if task == "embedding" else FirstOutput(task)


def _pooling(model: nn.Module) -> str:
    """ "first" where the model's sentence-embedding configuration takes the first token, else "mean"; others are refused by name."""
    modes = {mode: on for mode, on in json_of(model, "1_Pooling/config.json").items() if mode.startswith("pooling_mode_") and on}
    others = sorted(set(modes) - {"pooling_mode_mean_tokens", "pooling_mode_cls_token"})
    if others or len(modes) > 1:
        raise UnsupportedModel(f"{model.name_or_path} pools its tokens by {', '.join(sorted(modes))}; the mean and the first are covered.")
    return "first" if "pooling_mode_cls_token" in modes else "mean"


# Texts


def text_samples(
    model: nn.Module, rows: Sequence[Row], where: str, length: int | None = None, stride: int | None = None, workers: int = 0
) -> Samples:
    """Rows (role -> value) as the samples that `model` takes: tokenized by its own tokenizer, for the task of its head."""
    encoding, task = _encoding(model, length, stride), task_of(model)
    if task == "question-answering":
        if not {"question", "context"} <= set(rows[0]):
            raise InvalidInput(f"{where}: question answering needs columns question and context. Name them with --columns.")
        questions = Questions(rows, encoding, where)
        return Samples(questions, "answers" in rows[0], workers, reader=Answers(encoding.length, questions))
    if "text" not in rows[0]:
        raise InvalidInput(f"{where} has no column of texts. Name it: --columns text=NAME.")
    if task == "language-model":
        end = encoding.tokenizer.eos_token_id
        separate = [] if end is None else [end]
        rows_of_tokens = encoding.tokenizer([row["text"] for row in rows], verbose=False)["input_ids"]
        tokens = [token for one in rows_of_tokens for token in [*one, *([] if one[-1:] == separate else separate)]]
        return Samples(Blocks(tokens, encoding.length, where), True, workers, reader=NextTokens())
    if task == "embedding" and "label" in rows[0] and "pair" not in rows[0]:
        raise InvalidInput(f"{where}: embeddings are scored by pairs of texts. Name the second one's column with --columns pair=NAME.")
    labels = [_label(row["label"], task, model, where) for row in rows] if "label" in rows[0] else None
    texts = Texts(rows, labels, encoding, where, apart=task == "embedding")
    return Samples(texts, labels is not None, workers, reader=reader_of(model))


def _encoding(model: nn.Module, length: int | None, stride: int | None) -> Encoding:
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model.name_or_path, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError) as error:
        said = " ".join(str(error).split())
        raise InvalidSetting(
            f"{model.name_or_path or 'The model'} comes without a tokenizer that can be loaded ({said[:200]}). Put tokenizer.json beside "
            "it, or give data that is tokenized already."
        ) from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what is made up where there are no files
        raise InvalidSetting(f"{model.name_or_path} comes without a tokenizer: it has no words. Put tokenizer.json beside it.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    tokenizer.padding_side = "right"  # places in a text are counted from its first token
    most = _length_of(model)
    if length is not None and not 2 <= length <= most:
        raise InvalidSetting(f"--length {length}: the network takes 2 to {most} tokens.")
    default = {"question-answering": 384, "language-model": 1024}.get(task_of(model), most)
    return Encoding(tokenizer, length or min(most, default), length is not None, 128 if stride is None else stride)


def _length_of(model: nn.Module) -> int:
    """The most tokens that the network takes; of RoBERTa's family positions begin after the padding's."""
    most = getattr(model.config, "max_position_embeddings", None)
    tables = [m for n, m in model.named_modules() if n.endswith("position_embeddings") and isinstance(m, nn.Embedding)]
    taken = tables[0].padding_idx + 1 if tables and tables[0].padding_idx is not None else 0
    return most - taken if isinstance(most, int) and most > taken else 2048


def _label(value: Any, task: str, model: nn.Module, where: str) -> int | float:
    names = getattr(model.config, "label2id", None) or {}
    if task == "classification" and isinstance(value, str) and value in names:
        return int(names[value])
    try:
        number = float(value)
        if task == "classification" and number != int(number):
            raise ValueError
        return int(number) if task == "classification" else number
    except (TypeError, ValueError, OverflowError) as error:
        known = f" nor one of the model's ({', '.join(map(str, names))})" if task == "classification" else ""
        kind = "class number" if task == "classification" else "number"
        raise InvalidInput(f"{where}: the label {value!r} is no {kind}{known}. Name another column with --columns label=NAME.") from error


def hub_rows(name: str, part: str, columns: Mapping[str, str | int]) -> list[Row]:
    """The rows of a Hugging Face data set's split, role -> value (needs the package datasets)."""
    import datasets

    try:
        found = datasets.load_dataset(*name.split(":"), split=part or "train")
    except Exception as error:  # the library raises whatever its readers do
        said = " ".join(str(error).split())
        raise InvalidInput(f"--data hf:{name} cannot be loaded: {type(error).__name__}: {said[:300]}") from error
    if len(found) == 0:
        raise InvalidInput(f"--data hf:{name} holds no rows.")
    return with_roles([(number, dict(row)) for number, row in enumerate(found, 1)], columns, f"hf:{name}")
