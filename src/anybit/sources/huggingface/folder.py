"""The files of a Hugging Face model: read beside it, and written again."""

import copy
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file

from anybit.sources.libraries import short_timeouts


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' own messages and progress bars."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        transformers.logging.enable_progress_bar()


def file_of(model: transformers.PreTrainedModel, name: str) -> Path | None:
    """Return the path of a file that comes with the model, or None."""
    if not model.name_or_path:
        return None
    options = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    try:
        with short_timeouts(model.name_or_path):
            path = cached_file(model.name_or_path, name, **options)
    except (OSError, ValueError):
        return None
    return None if path is None else Path(path)


def json_of(model: transformers.PreTrainedModel, file: str) -> dict[str, Any]:
    """Read a JSON file that comes with the model; {} if there is none."""
    try:
        path = file_of(model, file)
        data = json.loads(path.read_text(encoding="utf8")) if path else {}
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


# Saved again


BESIDE = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json", "merges.txt",
    "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja", "generation_config.json",
    "preprocessor_config.json", "processor_config.json", "modules.json", "sentence_bert_config.json",
    "config_sentence_transformers.json", "1_Pooling/config.json",
)  # fmt: skip
"""Files that come with a network, besides its configuration and its weights, and contain no code."""


def own_network(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """Return the network that transformers itself builds from the model's configuration, without weights (on the device "meta")."""
    with torch.device("meta"):
        return type(model)(copy.deepcopy(model.config))


def transposed_layers(own: nn.Module) -> set[str]:
    """Return the layers of transformers' own network that store their weight transposed, and are Linear in the adapted one."""
    return {name for name, module in own.named_modules() if isinstance(module, Conv1D)}


def own_config(model: transformers.PreTrainedModel) -> dict[str, Any]:
    """Return the model's config.json, without the changes of `adapted`."""
    config = json.loads(model.config.to_json_string(use_diff=False))
    for name in ("use_cache", "return_dict", "_name_or_path", "quantization_config"):
        config.pop(name, None)
    return config | {"architectures": [type(model).__name__], "dtype": "float32"}


def files_beside(model: transformers.PreTrainedModel) -> dict[str, bytes]:
    """Return name -> content of the model's other files: its tokenizer, and other files that transformers reads."""
    return {name: place.read_bytes() for name in BESIDE if (place := file_of(model, name)) is not None}


def loaded_folder(path: Path, model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """Return the network of a folder, loaded by transformers with the model's class. Raises ImportError if a package is missing."""
    with quiet(), redirect_stderr(io.StringIO()):  # compressed-tensors prints its own progress bar
        return type(model).from_pretrained(path.resolve(), dtype=torch.float32, use_safetensors=True).eval()
