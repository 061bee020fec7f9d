"""A four-layer Llama that this benchmark trains itself, and its weights at 4 and 3 bits. One JSON entry per run; finished entries are
skipped.

    python -m benchmarks.studies.decoder train --folder FOLDER --text sst2/train.tsv --tokenizer minilm-sst2
    python -m benchmarks.studies.decoder STUDY --folder FOLDER

    train     next-token prediction on SST-2 sentences, the last 2 % held out; writes the network, the tokenizer, train.txt and test.txt
              to FOLDER, which should be outside the repository
    methods   weights only: rounding to nearest, and layer-wise AdaQuant; one scale per channel, and per 128, 64 and 32 inputs
    linears   the same for the linear layers only, embedding and output layer in float, as in peers/gptq_decoder.py
    matmuls   8-bit activations, including those of the attention matmuls

Calibrated on 128 blocks of training text (102 to fit, 26 held out), measured on all blocks of the held-out text. SST-2 contains phrases of
the same sentences, so held-out phrases can be part of training ones: the perplexity compares networks but does not measure their quality.
"""

import argparse
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import anybit
from anybit.data.batches import Batch, evaluating, predict
from anybit.data.samples import draw
from anybit.data.texts import read_rows
from anybit.sources.inputs import load_data
from anybit.sources.models import load_model
from anybit.sources.preprocessing import Preprocessing
from benchmarks.studies.study import Entries, parser

LENGTH = 128
BLOCKS = 128
HELD_OUT = 0.02
FLOAT_WORDS = {"model.embed_tokens": "float", "lm_head": "float"}
NETWORK = {
    "hidden_size": 256,
    "intermediate_size": 768,  # like the hidden size, a multiple of every group size
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
TRAINING = {"steps": 1000, "batch_size": 8, "rate": 2e-3, "warmup": 50, "decay": 0.1, "seed": 0, "precision": "bfloat16 autocast"}


# The network, trained


def train(study: "Study") -> None:
    study.measured("train", lambda: trained(study.arguments))


def trained(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train the network, save it to the folder, and score it on the held-out text."""
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row["text"].strip() for row in read_rows(arguments.text)]
    held_out = round(len(rows) * HELD_OUT)
    (folder / "train.txt").write_text("\n".join(rows[:-held_out]) + "\n", encoding="utf8")
    (folder / "test.txt").write_text("\n".join(rows[-held_out:]) + "\n", encoding="utf8")
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.tokenizer)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(TRAINING["seed"])
    ends = {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=len(tokenizer), **NETWORK, **ends))
    model.save_pretrained(folder)
    texts = load_model(f"hf:{folder}")  # the tokenizer's files
    blocks, test = (texts_of(folder, part, texts) for part in ("train", "test"))
    history = fit(model, blocks, list(test.subset(range(0, len(test), 8)).batches(16)))
    model.eval().save_pretrained(folder)
    return {
        **measure(model, list(test.batches(16))),
        "sentences": [len(rows) - held_out, held_out],
        "blocks": [len(blocks), len(test)],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "history": history,
        "network": NETWORK,
        "training": TRAINING,
    }


def fit(model: nn.Module, blocks: Any, some: Sequence[Batch]) -> list[dict[str, float]]:
    """Train with AdamW and a cosine schedule; return perplexities along the way."""
    optimizer = torch.optim.AdamW(model.parameters(), TRAINING["rate"], betas=(0.9, 0.95), weight_decay=TRAINING["decay"], fused=True)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, TRAINING["warmup"], TRAINING["steps"])
    generator = torch.Generator().manual_seed(TRAINING["seed"])
    order: list[int] = []
    history, losses, start = [], [], time.perf_counter()
    for step in range(1, TRAINING["steps"] + 1):
        if len(order) < TRAINING["batch_size"]:
            order = torch.randperm(len(blocks), generator=generator).tolist()
        drawn, order = order[: TRAINING["batch_size"]], order[TRAINING["batch_size"] :]
        tokens = next(blocks.subset(drawn).batches(len(drawn))).inputs["input_ids"]
        model.train()
        with torch.autocast("cpu", torch.bfloat16):  # several times faster; the weights stay float32
            logits = model(input_ids=tokens, use_cache=False).logits
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if step % 100 == 0 or step == TRAINING["steps"]:
            row = {"step": step, "train_loss": sum(losses) / len(losses), "perplexity": measure(model, some)["perplexity"]}
            history.append(row | {"seconds": time.perf_counter() - start})
            losses = []
            print(history[-1], flush=True)
    return history


def texts_of(folder: Path, part: str, model: nn.Module) -> Any:
    """Load blocks of the folder's train.txt or test.txt."""
    return load_data(str(folder / f"{part}.txt"), Preprocessing(length=LENGTH), model=model)


def log_probabilities(model: nn.Module, batches: Iterable[Batch]) -> Iterator[Tensor]:
    """Yield log-probabilities of the next tokens, [tokens, vocabulary], by batch."""
    with evaluating(model), torch.no_grad():
        for batch in batches:
            yield predict(model, batch).log_softmax(-1)


def measure(model: nn.Module, batches: Sequence[Batch], reference: Iterable[Tensor] | None = None) -> dict[str, float]:
    """Measure perplexity and top-1 of the next tokens, and KL divergence from `reference`, the `log_probabilities` of the float network.

    This goes batch by batch, because `anybit.evaluate` takes all logits at once, which are gigabytes.
    """
    totals, count = {"loss": 0.0, "top1": 0.0, "kl": 0.0}, 0
    for batch, log_probs, expected in zip(batches, log_probabilities(model, batches), reference or repeat(None), strict=False):
        totals["loss"] += float(F.nll_loss(log_probs, batch.labels, reduction="sum"))
        totals["top1"] += 100 * float((log_probs.argmax(-1) == batch.labels).sum())
        if expected is not None:
            totals["kl"] += float(F.kl_div(log_probs, expected, reduction="sum", log_target=True))
        count += len(log_probs)
    means = {name: total / count for name, total in totals.items() if name != "kl" or reference is not None}
    return {"perplexity": math.exp(means["loss"]), **means, "tokens": count}


# The network, quantized


class Study(Entries):
    """The folder of the network and its texts, and the results file."""

    def __init__(self, arguments: argparse.Namespace):
        super().__init__(arguments, f"decoder_{arguments.study}")
        if arguments.study != "train":
            self.model = load_model(f"hf:{arguments.folder}")
            # Drawn here, once, so that every method gets the same blocks, as does a peer that draws in the same way.
            self.blocks = replace(draw(texts_of(arguments.folder, "train", self.model), BLOCKS, 0), labelled=False)
            self.test = list(texts_of(arguments.folder, "test", self.model).batches(16))
            self.reference = list(log_probabilities(self.model, self.test))

    def calibrated(self, **settings: Any) -> dict[str, Any]:
        # A step on 4 blocks has 512 tokens; with the default of 32 it would have 4,096 and take eight times as long.
        settings = {"samples": BLOCKS, "batch_size": 4, "step_batch": 4, "unit": "layer", "memory": 2**33, **settings}
        result = anybit.calibrate(self.model, self.blocks, cache=False, **settings)
        report = result.report
        sizes = {name: layer["bytes"] for name, layer in report["layers"].items()}
        return {
            **measure(result.model, self.test, self.reference),
            **report["result"],
            "word_bytes": sum(sizes[name] for name in FLOAT_WORDS if name in sizes),
            "linear_bytes": sum(size for name, size in sizes.items() if name not in FLOAT_WORDS),
            "float_bytes": report["float_bytes"],
            "layers": {name: layer["precision"] for name, layer in report["layers"].items()},
            "inputs": report["inputs"],
            "ladder": report["ladder"],
            "stages": report["stages"],
            "seconds": sum(stage["seconds"] for stage in report["stages"]),
            "peak_bytes": max(stage["peak_bytes"] for stage in report["stages"]),
            "settings": report["settings"],
        }

    def float_network(self) -> None:
        self.measured("float", lambda: measure(self.model, self.test))


METHODS = {"nearest": "light", "AdaQuant": "advanced"}


def weights_alone(study: Study, keep: dict[str, str]) -> None:
    study.float_network()
    for bits in (4, 3):
        for group in (None, 128, 64, 32):
            for method, pipeline in METHODS.items():
                key = f"W{bits}, " + ("a scale a channel" if group is None else f"groups of {group}") + f", {method}"
                settings = {"weight_bits": (bits,), "activation_bits": (None,), "group": group, "pipeline": pipeline, "keep": keep}
                study.measured(key, lambda settings=settings: study.calibrated(**settings))


def methods(study: Study) -> None:
    weights_alone(study, {})


def linears(study: Study) -> None:
    weights_alone(study, FLOAT_WORDS)


def matmuls(study: Study) -> None:
    study.float_network()
    for bits in (8, 4):
        for method, pipeline in METHODS.items():
            settings = {"weight_bits": (bits,), "activation_bits": (8,), "pipeline": pipeline}
            study.measured(f"W{bits}A8, {method}", lambda settings=settings: study.calibrated(**settings))


STUDIES = {"train": train, "methods": methods, "linears": linears, "matmuls": matmuls}


def main() -> None:
    """Run one study."""
    options = parser(__doc__, STUDIES)
    options.add_argument("--folder", required=True, type=Path, help="folder of the network, outside the repository")
    options.add_argument("--text", type=Path, help="for `train`: a .tsv file with a column `sentence`")
    options.add_argument("--tokenizer", type=Path, help="for `train`: the Hugging Face folder whose tokenizer is used")
    options.add_argument("--threads", type=int, default=1)
    arguments = options.parse_args()
    if arguments.study == "train" and not (arguments.text and arguments.tokenizer):
        options.error("train needs --text and --tokenizer")
    torch.set_num_threads(arguments.threads)
    STUDIES[arguments.study](Study(arguments))


if __name__ == "__main__":
    main()
