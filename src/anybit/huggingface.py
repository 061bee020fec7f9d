"""Hugging Face models: loaded by name, their attention matmuls made layers, their texts tokenized. The only importer of transformers.

Attention is covered through transformers' own attention interface: a function that is registered there calls two `Matmul` layers, which
`adapted` puts into every module that calls the interface. The modules keep their forwards and their state-dict keys.
"""

import copy
import inspect
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import AttentionInterface
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file

from anybit.batches import Reader, Samples
from anybit.errors import InvalidInput, InvalidSetting, UnsupportedModel
from anybit.matmul import Matmul
from anybit.progress import tell
from anybit.texts import (
    Answers,
    Blocks,
    Encoding,
    FirstOutput,
    NextTokens,
    Questions,
    Row,
    SentenceEmbedding,
    Texts,
    with_roles,
)

ATTENTION = "anybit"
HEADS = {  # task -> (what transformers calls a class with that head, the class that loads one)
    "question-answering": ("ForQuestionAnswering", "AutoModelForQuestionAnswering"),
    "language-model": ("ForCausalLM", "AutoModelForCausalLM"),
    "classification": ("ForSequenceClassification", "AutoModelForSequenceClassification"),
    "regression": ("ForSequenceClassification", "AutoModelForSequenceClassification"),
    "embedding": ("Model", "AutoModel"),
}


# Attention


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor]:
    """softmax(query key^T scaling + mask) value through the module's two Matmul layers; [N, heads, T, d] -> [N, T, heads, d].

    Keys and values of fewer heads serve several queries' heads each. Raises UnsupportedModel on what it would have to leave out.
    """
    left_out = [name for name in ("position_bias", "s_aux", "head_mask") if others.get(name) is not None]
    if left_out:
        raise UnsupportedModel(f"{type(module).__name__} passes {', '.join(left_out)} to its attention, which anybit does not cover yet.")
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = module.scores(query, key) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None:
        scores = scores + attention_mask
    shares = nn.functional.softmax(scores, -1, dtype=torch.float32).to(query.dtype)
    shares = nn.functional.dropout(shares, dropout, module.training)
    return module.mixture(shares, value).transpose(1, 2).contiguous(), shares


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, eager_mask)


def is_transformers(model: Any) -> bool:
    """Whether `model` is one of transformers' models."""
    return isinstance(model, transformers.PreTrainedModel)


def adapted(model: nn.Module) -> nn.Module:
    """A copy whose attention runs through Matmul layers `scores` and `mixture` of each attention module, whose Conv1D layers are Linear,
    and whose tied weights are apart.

    Outputs are those of the model up to float rounding. Raises UnsupportedModel for an encoder-decoder.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"{type(model).__name__} is an encoder-decoder, which is not covered yet. Encoders and decoders are.")
    model = copy.deepcopy(model)
    model.config.return_dict = True
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False  # whole sequences are run at once
    for module in model.modules():
        if _calls_interface(module):
            module.add_module("scores", Matmul(transposed=True))
            module.add_module("mixture", Matmul())
    if any(_calls_interface(module) for module in model.modules()):
        model.set_attn_implementation(ATTENTION)
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, _linear(module))
    _untie(model)
    return model


def _calls_interface(module: nn.Module) -> bool:
    """Whether the module's forward looks its attention function up in transformers' interface."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def _linear(layer: Conv1D) -> nn.Linear:
    """GPT-2's layer, which keeps its weight transposed, as the Linear that it is."""
    linear = nn.Linear(layer.weight.shape[0], layer.weight.shape[1], device=layer.weight.device, dtype=layer.weight.dtype)
    with torch.no_grad():
        linear.weight.copy_(layer.weight.T)
        linear.bias.copy_(layer.bias)
    return linear


def _untie(model: nn.Module) -> None:
    """Give the output layer a weight of its own where it shares the embedding's: two layers may take different bits."""
    head, words = model.get_output_embeddings(), model.get_input_embeddings()
    if isinstance(head, nn.Linear) and head.weight is getattr(words, "weight", None):
        head.weight = nn.Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = False


# Loading


def load(name: str, task: str | None = None) -> nn.Module:
    """The float32 network of a folder or a name, adapted; with a head for `task`, or the one it was saved with.

    Nothing that comes with the network is executed: weights are safetensors, and code of its own is refused. A head that the files do
    not hold is drawn by a fixed seed.
    """
    place = str(Path(name).resolve()) if Path(name).is_dir() else name
    if Path(name).is_absolute() and not Path(name).is_dir():
        raise InvalidSetting(f"There is no folder {name}, which hf: names. Name the network's folder with --model hf:FOLDER.")
    how = {"dtype": torch.float32, "use_safetensors": True, "trust_remote_code": False}
    try:
        with _quiet(), torch.random.fork_rng(devices=[]):
            config = transformers.AutoConfig.from_pretrained(place, trust_remote_code=False)
            if getattr(config, "quantization_config", None) is not None:
                raise ValueError("it is quantized already; name the float network. anybit verify loads what anybit exported")
            loader = _loader(config, task)
            torch.manual_seed(0)
            model, told = loader.from_pretrained(place, config=config, output_loading_info=True, **how)
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, TypeError, AttributeError, SafetensorError) as error:
        said = " ".join(str(error).split())
        raise InvalidSetting(f"--model hf:{name} cannot be loaded: {said[:300]}") from error
    _check_whole(name, model, told["missing_keys"])
    return adapted(model.eval())


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own messages and progress bars."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        transformers.logging.enable_progress_bar()


def _check_whole(name: str, model: nn.Module, drawn: Iterable[str]) -> None:
    """Raise InvalidSetting where weights that the files lack, and that were drawn, are more than a head's; say so of a head."""
    body = [key for key in sorted(drawn) if key.startswith(f"{model.base_model_prefix}.") and ".pooler." not in key]
    if type(model).__name__.endswith("Model") and not type(model).__name__.endswith("LMHeadModel"):
        body = [key for key in sorted(drawn) if not key.startswith("pooler.")]
    if body:
        more = f" and {len(body) - 1} more" if len(body) > 1 else ""
        raise InvalidSetting(f"--model hf:{name}: its files lack {body[0]}{more}, which its configuration asks for. Complete the files.")
    if drawn:
        tell("note", note=f"hf:{name} has no {', '.join(sorted(drawn)[:2])}: drawn at random, to be trained or for coverage alone")


def _loader(config: Any, task: str | None) -> Any:
    if task in ("regression", "classification") and any("ForImage" in name for name in config.architectures or ()):
        task = None  # a picture's classes
    if task is not None:
        if task not in HEADS:
            raise InvalidSetting(f"task {task!r} has no Hugging Face model. Choose from {', '.join(HEADS)}.")
        return getattr(transformers, HEADS[task][1])
    named = getattr(transformers, (config.architectures or [""])[0], None)
    return named if named is not None else transformers.AutoModel


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
    modes = {mode: on for mode, on in _json_of(model, "1_Pooling/config.json").items() if mode.startswith("pooling_mode_") and on}
    others = sorted(set(modes) - {"pooling_mode_mean_tokens", "pooling_mode_cls_token"})
    if others or len(modes) > 1:
        raise UnsupportedModel(f"{model.name_or_path} pools its tokens by {', '.join(sorted(modes))}; the mean and the first are covered.")
    return "first" if "pooling_mode_cls_token" in modes else "mean"


def _file_of(model: nn.Module, name: str) -> Path | None:
    """A file that comes with the model; None where there is none."""
    if not model.name_or_path:
        return None
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    try:
        found = cached_file(model.name_or_path, name, **quiet)
    except (OSError, ValueError):
        return None
    return None if found is None else Path(found)


def _json_of(model: nn.Module, file: str) -> dict[str, Any]:
    """A JSON file that comes with the model; nothing where there is none."""
    try:
        path = _file_of(model, file)
        found = json.loads(path.read_text(encoding="utf8")) if path else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def picture_settings(model: nn.Module) -> dict[str, Any]:
    """mean, std, size, resize and interpolation of the model's pictures, as its preprocessor_config.json has them; {} where it has none."""
    found = _json_of(model, "preprocessor_config.json")
    settings: dict[str, Any] = {}
    for ours, theirs in (("mean", "image_mean"), ("std", "image_std")):
        if found.get("do_normalize", True) and isinstance(found.get(theirs), list):
            settings[ours] = tuple(found[theirs])
    size, crop = found.get("size"), found.get("crop_size")
    size = size if isinstance(size, Mapping) else {"height": size}
    if crop is not None and found.get("do_center_crop", True):
        settings["size"] = crop["height"] if isinstance(crop, Mapping) else crop
        settings["resize"] = size.get("shortest_edge") or size.get("height")
    elif size.get("height"):
        settings["size"] = size["height"]
    if found.get("resample") in (0, 1, 2, 3):
        settings["interpolation"] = ("nearest", "lanczos", "bilinear", "bicubic")[found["resample"]]
    return settings


# Saved again


BESIDE = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json", "merges.txt",
    "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja", "generation_config.json",
    "preprocessor_config.json", "processor_config.json", "modules.json", "sentence_bert_config.json",
    "config_sentence_transformers.json", "1_Pooling/config.json",
)  # fmt: skip
"""Files that come with a network, besides its configuration and its weights, and hold no code."""


def own_network(model: nn.Module) -> nn.Module:
    """The network as transformers itself makes it for the model's configuration, without weights (on the device "meta")."""
    with torch.device("meta"):
        return type(model)(copy.deepcopy(model.config))


def transposed_layers(own: nn.Module) -> set[str]:
    """The layers of transformers' own network that are Linear in the adapted one, and keep their weight the other way round."""
    return {name for name, module in own.named_modules() if isinstance(module, Conv1D)}


def own_config(model: nn.Module) -> dict[str, Any]:
    """config.json of the model, without what `adapted` changes for the time in which anybit runs it."""
    config = json.loads(model.config.to_json_string(use_diff=False))
    for name in ("use_cache", "return_dict", "_name_or_path", "quantization_config"):
        config.pop(name, None)
    return config | {"architectures": [type(model).__name__], "dtype": "float32"}


def files_beside(model: nn.Module) -> dict[str, bytes]:
    """Name -> content of the files that came with the model: its tokenizer, and what else transformers reads."""
    return {name: place.read_bytes() for name in BESIDE if (place := _file_of(model, name)) is not None}


def loaded_folder(path: Path, model: nn.Module) -> nn.Module:
    """What transformers loads from a folder that holds a network of the model's class; raises ImportError where it lacks a package."""
    with _quiet(), redirect_stderr(io.StringIO()):  # compressed-tensors draws a progress bar of its own
        return type(model).from_pretrained(path.resolve(), dtype=torch.float32, use_safetensors=True).eval()


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
