"""Load Hugging Face models, by name or from a folder, without running code that comes with them."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors import SafetensorError

from anybit.errors import InvalidSetting
from anybit.progress import tell
from anybit.sources.huggingface.attention import adapted
from anybit.sources.huggingface.folder import json_of, quiet
from anybit.sources.huggingface.heads import HEADS
from anybit.sources.libraries import randomly_initialized, short_timeouts


def is_transformers(model: Any) -> bool:
    """Return whether `model` is one of transformers' models."""
    return isinstance(model, transformers.PreTrainedModel)


HALF = ("float16", "bfloat16")

# Loading


def load(name: str, task: str | None = None, random: bool = False) -> transformers.PreTrainedModel:
    """Return the float32 network of a folder or a name, adapted; with a head for `task`, or the one with which it was saved.

    With `random`, its weights are random, and only the configuration is read of its files. No code that comes with the network is executed:
    weights must be safetensors, and custom code is an error. A head that the files lack is initialised with a fixed seed.
    """
    place = str(Path(name).resolve()) if Path(name).is_dir() else name
    if Path(name).is_absolute() and not Path(name).is_dir():
        raise InvalidSetting(f"There is no folder {name}. Name the network's folder with --model=hf:FOLDER.")
    options = {"dtype": torch.float32, "use_safetensors": True, "trust_remote_code": False}
    try:
        with quiet(), short_timeouts(place), torch.random.fork_rng(devices=[]):
            config = transformers.AutoConfig.from_pretrained(place, trust_remote_code=False)
            if getattr(config, "quantization_config", None) is not None:
                raise ValueError("it is already quantized; name the float network. `anybit verify` loads what anybit exported")
            stored = str(getattr(config, "dtype", None)).removeprefix("torch.")
            loader = _loader(config, task)
            if random:
                config.dtype = torch.float32
                return adapted(
                    cast(
                        transformers.PreTrainedModel, randomly_initialized(lambda: _of_config(loader, config), f"--model=hf:{name}").eval()
                    )
                )
            torch.manual_seed(0)
            model, report = loader.from_pretrained(place, config=config, output_loading_info=True, **options)
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, TypeError, AttributeError, SafetensorError) as error:
        message = " ".join(str(error).split())
        raise InvalidSetting(f"--model=hf:{name} cannot be loaded: {message[:300]}{_offline(error)}") from error
    _check_whole(name, model, report["missing_keys"])
    if stored in HALF:
        tell("note", note=f"hf:{name} is stored in {stored}: computed in float32, and stored as such where it is kept float")
    return adapted(model.eval())


def _of_config(loader: Any, config: Any) -> transformers.PreTrainedModel:
    return loader.from_config(config) if hasattr(loader, "from_config") else loader(config)


def _offline(error: Exception) -> str:
    """Return the remedy where the hub cannot be reached."""
    return ". Name a folder that holds the model: hf:FOLDER" if isinstance(error, OSError) and "connect" in str(error) else ""


def _check_whole(name: str, model: transformers.PreTrainedModel, drawn: Iterable[str]) -> None:
    """Raise InvalidSetting if the files lack weights other than a head's; report a head with random weights."""
    body = [key for key in sorted(drawn) if key.startswith(f"{model.base_model_prefix}.") and ".pooler." not in key]
    if type(model).__name__.endswith("Model") and not type(model).__name__.endswith("LMHeadModel"):
        body = [key for key in sorted(drawn) if not key.startswith("pooler.")]
    if body:
        more = f" and {len(body) - 1} more" if len(body) > 1 else ""
        raise InvalidSetting(f"--model=hf:{name}: its files lack {body[0]}{more}, which its configuration requires. Complete the files.")
    if drawn:
        tell("note", note=f"hf:{name} has no {', '.join(sorted(drawn)[:2])}: it is random, to be trained or only for inspection")


def _loader(config: Any, task: str | None) -> Any:
    if task in HEADS and any(name.endswith(HEADS[task].others) for name in config.architectures or () if HEADS[task].others):
        task = None  # for images or sounds
    if task is not None:
        if task not in HEADS:
            raise InvalidSetting(f"task {task!r} has no Hugging Face model. Choose from {', '.join(HEADS)}.")
        return getattr(transformers, HEADS[task].loader)
    named = getattr(transformers, (config.architectures or [""])[0], None)
    return named if named is not None else transformers.AutoModel


def image_settings(model: transformers.PreTrainedModel) -> dict[str, Any]:
    """Return mean, std, size, resize and interpolation of the model's images from its preprocessor_config.json; {} if it has none."""
    config = json_of(model, "preprocessor_config.json")
    settings: dict[str, Any] = {}
    for ours, theirs in (("mean", "image_mean"), ("std", "image_std")):
        if config.get("do_normalize", True) and isinstance(config.get(theirs), list):
            settings[ours] = tuple(config[theirs])
    size, crop = config.get("size"), config.get("crop_size")
    size = size if isinstance(size, Mapping) else {"height": size}
    if crop is not None and config.get("do_center_crop", True):
        settings["size"] = crop["height"] if isinstance(crop, Mapping) else crop
        settings["resize"] = size.get("shortest_edge") or size.get("height")
    elif size.get("height"):
        settings["size"] = size["height"]
    if config.get("resample") in (0, 1, 2, 3):
        settings["interpolation"] = ("nearest", "lanczos", "bilinear", "bicubic")[config["resample"]]
    return settings
