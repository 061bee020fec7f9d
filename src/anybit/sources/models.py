"""Networks from the references of `--model`."""

import importlib
import re
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import nn

from anybit.data.batches import in_evaluation_mode
from anybit.data.options import suffix_of
from anybit.errors import InvalidFile, InvalidSetting, SchemeMismatch, naming
from anybit.files.strict import in_words
from anybit.networks.layers import unwrapped
from anybit.networks.plain import plain_weights
from anybit.progress import tell
from anybit.sources.callables import call_user_function, import_optional, load_callable
from anybit.sources.libraries import LIBRARIES, library_model
from anybit.sources.preprocessing import ARRAYS, Preprocessing, kind_of
from anybit.sources.published import check_published
from anybit.sources.references import RANDOM, check_file, check_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_model(reference: str, weights: str | None = None, task: str | None = None) -> nn.Module:
    """Return the network that `reference` names, in evaluation mode, with the state dict of `weights` (.safetensors, .pt, .pth) if given.

    `weights="random"` draws them, for networks of timm, torchvision and Hugging Face. `task` chooses the head of a Hugging Face model
    (None: the one with which it was saved).
    """
    with naming("--model="):
        check_model(reference)
    check_published(reference, weights)
    kind, _, name = reference.partition(":")
    if kind == "hf":
        model = huggingface("models", f"--model={reference}").load(name, task, weights == RANDOM)
    elif kind in LIBRARIES:
        model = library_model(kind, name, weights)
    elif weights == RANDOM:
        raise InvalidSetting(
            f"--weights=random is for timm:, torchvision: and hf: networks; {reference} builds its own. Leave --weights out."
        )
    else:
        model = call_user_function(load_callable(reference, "--model"), f"--model={reference}")
    if not isinstance(model, nn.Module):
        raise InvalidSetting(f"--model={reference} returned a {type(model).__name__}, not a torch.nn.Module.")
    model = _covered_form(model)
    if weights and weights != RANDOM:
        load_weights(model, Path(weights))
    return in_evaluation_mode(plain_weights(model))


def huggingface(module: str, what: str) -> Any:
    """Import a module for Hugging Face models, which needs an optional package; `what` names its use in errors."""
    import_optional("transformers", "transformers", what)
    return importlib.import_module(f"anybit.sources.huggingface.{module}")


def adapted_network(model: nn.Module) -> nn.Module:
    """Unwrap the network and make its weights plain, on copies; a network of transformers becomes an adapted copy, with attention that
    anybit covers."""
    return plain_weights(_covered_form(model))


def _covered_form(model: nn.Module) -> nn.Module:
    """Do the same, but leave the weights as a weight file has them."""
    model = unwrapped(model)
    if not is_transformers(model) or "scores" in {name.rpartition(".")[2] for name, _ in model.named_modules()}:
        return model
    return huggingface("attention", f"A {type(model).__name__}").adapted(model)


def is_transformers(model: Any) -> "TypeGuard[PreTrainedModel]":
    """Return whether `model` is one of transformers' models, without importing that package."""
    package = sys.modules.get("transformers")
    return package is not None and isinstance(model, package.PreTrainedModel)


def with_model_defaults(preprocessing: Preprocessing, model: nn.Module, data: Sequence[Any]) -> Preprocessing:
    """Return the preprocessing or, if none was given, the image preprocessing in a Hugging Face model's own files, which arrays among the
    data may have had already. Raises InvalidSetting if it has a stride of windows in which this model's head answers no questions."""
    if not is_transformers(model):
        return preprocessing
    if preprocessing.stride is not None and huggingface("heads", "the model").reader_of(model).task != "question-answering":
        raise InvalidSetting("--stride is for question answering, and this model has another head. Leave it out.")
    if preprocessing != Preprocessing(classes=preprocessing.classes):
        return preprocessing
    settings = huggingface("models", "the model").image_settings(model)
    arrays = [one for one in data if kind_of(one) == ARRAYS]
    if settings and arrays:
        own = f"the preprocessing in the model's own files ({', '.join(settings)})"
        tell("note", note=f"{arrays[0]} is used without {own}. --mean and --std normalize it")
        return preprocessing
    return Preprocessing(**settings, classes=preprocessing.classes)


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state dict strictly. Raises SchemeMismatch naming the first keys that differ. Nothing in the file is executed."""
    with naming("--weights="):
        check_file(path)
    try:
        if suffix_of(path) == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            _check_archive(path)
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InvalidFile(f"Weights file {path} cannot be read as a state dict: {_unread(error)}") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()):
        raise InvalidFile(f"Weights file {path} holds a {type(state).__name__}, not a state dict of tensors.")
    own = model.state_dict()
    # Batch counters do not matter in a trained network, and some files omit them.
    lacking = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    surplus = [key for key in state if key not in own]
    shapes = [key for key in state if key in own and tuple(state[key].shape) != tuple(own[key].shape)]
    if lacking or surplus or shapes:
        parts = [
            f"{what} {', '.join(key[:200] for key in keys[:3])}"
            for what, keys in (("lack", lacking), ("have additional", surplus), ("differ in shape at", shapes))
            if keys
        ]
        raise SchemeMismatch(f"The weights in {path.name} do not match the model: they {'; '.join(parts)}. Check --model and --weights.")
    try:
        model.load_state_dict(state, strict=False)
    except (RuntimeError, TypeError, NotImplementedError) as error:  # sparse or quantized tensors, or missing storage
        raise InvalidFile(f"Weights file {path} does not fit the model: {in_words(error)}") from error


def _unread(error: Exception) -> str:
    """Say why a weights file cannot be read, without torch's advice to run the code in it."""
    if "weights_only" not in str(error):
        return in_words(error)
    other = re.search(r"GLOBAL (\S+)", str(error))
    holds = (
        f"it holds {other[1]}, and only tensors are read" if other else "torch.save did not write it, or wrote other things than tensors"
    )
    return f"{holds}. Save model.state_dict(), at best as .safetensors."


def _check_archive(path: Path) -> None:
    """Raise ValueError if an archive would unpack to more than its own size."""
    if not zipfile.is_zipfile(path):  # the format of torch before 1.6
        return
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size for entry in archive.infolist()):
            raise ValueError("its entries are compressed, which torch.save does not do; save it again, as .safetensors at best")
