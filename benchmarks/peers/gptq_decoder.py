"""GPTQ of LLM Compressor on the decoder that benchmarks/studies/decoder.py trains: perplexity, KL divergence and time
as JSON. One entry per run; finished entries are skipped.

Quantizes the weights of the decoder's linear layers symmetrically, with one scale per group of inputs; embedding, output layer and
activations stay float. `decoder.py linears` does the same with anybit, on the same 128 calibration blocks of the training text and the
same blocks of the held-out text. Recipes:

    gptq         the tool's default: scales from the largest weight of a group, columns ordered by their activations ("static")
    gptq-mse     the same, with scales that minimize the error
    gptq-damped  gptq with damping of 0.1 times the Hessian's mean diagonal instead of 0.01
    nearest      rounding to nearest, without GPTQ

Set up a separate environment and run one process at a time, so that times are comparable:

    python -m venv venv && venv/bin/pip install -r requirements_gptq.txt
    OMP_NUM_THREADS=1 venv/bin/python gptq_decoder.py --folder FOLDER --output out.json

FOLDER contains the network, its tokenizer, train.txt and test.txt, as written by `decoder.py train`.
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from loguru import logger
from machine import machine, versions
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

LENGTH = 128
BLOCKS = 128
BATCH = 16
RECIPES: dict[str, dict[str, Any]] = {
    "gptq": {"observer": "memoryless_minmax", "dampening_frac": 0.01},
    "gptq-mse": {"observer": "memoryless_mse", "dampening_frac": 0.01},
    "gptq-damped": {"observer": "memoryless_minmax", "dampening_frac": 0.1},
    "nearest": {"observer": "memoryless_minmax"},
}


# Data


def blocks_of(folder: Path, part: str) -> Tensor:
    """Split train.txt or test.txt, as one text, into blocks of LENGTH tokens, [N, LENGTH], as anybit does; the remainder is dropped."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.eos_token_id is not None:
        raise ValueError(
            "The tokenizer has an end-of-text token, which each sentence would need; decoder.py trains with a tokenizer that has none."
        )
    lines = [line for line in (folder / f"{part}.txt").read_text(encoding="utf8").splitlines() if line.strip()]
    tokens = [token for sentence in tokenizer(lines, verbose=False)["input_ids"] for token in sentence]
    count = len(tokens) // LENGTH
    return torch.tensor(tokens[: count * LENGTH]).view(count, LENGTH)


def drawn(blocks: Tensor, seed: int) -> Tensor:
    """Draw the blocks that anybit draws with the same seed."""
    return blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))[:BLOCKS]]


def batches(blocks: Tensor) -> DataLoader:
    return DataLoader([{"input_ids": tokens, "attention_mask": torch.ones_like(tokens)} for tokens in blocks], BATCH)


@torch.no_grad()
def log_probabilities(network: nn.Module, tokens: Tensor) -> Tensor:
    """Return log-probabilities of the next tokens, [N (T - 1), vocabulary]."""
    return network(input_ids=tokens, use_cache=False).logits[:, :-1].float().flatten(0, 1).log_softmax(-1)


def measure(network: nn.Module, blocks: Tensor, reference: Sequence[Tensor] | None = None) -> dict[str, float]:
    """Measure perplexity of the next tokens, and KL divergence from `reference`, the float network's `log_probabilities` by batch."""
    loss, divergence, count = 0.0, 0.0, 0
    for number, tokens in enumerate(blocks.split(BATCH)):
        log_probs, labels = log_probabilities(network, tokens), tokens[:, 1:].flatten()
        loss += float(F.nll_loss(log_probs, labels, reduction="sum"))
        if reference is not None:
            divergence += float(F.kl_div(log_probs, reference[number], reduction="sum", log_target=True))
        count += len(labels)
    kl = {} if reference is None else {"kl": divergence / count}
    return {"perplexity": math.exp(loss / count), "loss": loss / count, **kl, "tokens": count}


# Quantization


def modifier(recipe: str, bits: int, group: int | None) -> GPTQModifier | QuantizationModifier:
    options = dict(RECIPES[recipe])
    shape = {"strategy": "channel"} if group is None else {"strategy": "group", "group_size": group}
    weights = QuantizationArgs(num_bits=bits, type="int", symmetric=True, observer=options.pop("observer"), **shape)
    scheme = {"config_groups": {"linears": QuantizationScheme(targets=["Linear"], weights=weights)}, "ignore": ["lm_head"]}
    return QuantizationModifier(**scheme) if recipe == "nearest" else GPTQModifier(**scheme, **options)


def linear_bytes(network: nn.Module, bits: int, group: int | None) -> int:
    """Count the bytes of the decoder's linear layers: codes and float32 scales."""
    layers = [layer for name, layer in network.named_modules() if isinstance(layer, nn.Linear) and name != "lm_head"]
    return sum(layer.weight.numel() * bits // 8 + 4 * layer.weight.numel() // (group or layer.in_features) for layer in layers)


def run(folder: Path, calibration: Tensor, test: Tensor, reference: Sequence[Tensor], recipe: str, bits: int, group: int | None) -> dict:
    network = load(folder)
    size = linear_bytes(network, bits, group)
    started = time.perf_counter()
    oneshot(
        model=network,
        dataset=batches(calibration),
        recipe=[modifier(recipe, bits, group)],
        num_calibration_samples=len(calibration),
        batch_size=BATCH,
        max_seq_length=LENGTH,
    )
    seconds = time.perf_counter() - started
    return {
        "peer": "llmcompressor",
        "recipe": {"name": recipe, **RECIPES[recipe]},
        "weight_bits": bits,
        "group": group,
        **measure(network.eval(), test, reference),
        "linear_bytes": size,
        "seconds": seconds,
    }


def load(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


# Report


def environment(threads: int) -> dict[str, Any]:
    packages = versions("llmcompressor", "compressed-tensors", "transformers", "torch", "numpy")
    return {"versions": packages, "machine": {**machine(), "threads": threads}}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3])
    parser.add_argument("--groups", nargs="+", type=int, default=[128, 32], help="inputs per scale; 0: one scale per channel")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw of calibration blocks")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    logger.disable("llmcompressor")
    torch.set_num_threads(args.threads)
    calibration, test = drawn(blocks_of(args.folder, "train"), args.seed), blocks_of(args.folder, "test")
    network = load(args.folder)
    reference = [log_probabilities(network, tokens) for tokens in test.split(BATCH)]
    entries: dict[str, Any] = json.loads(args.output.read_text())["entries"] if args.output.is_file() else {}
    entries.setdefault("float", measure(network, test))
    del network
    for bits in args.bits:
        for group in args.groups:
            for recipe in args.recipes:
                key = f"W{bits}, " + (f"groups of {group}" if group else "a scale a channel") + f", {recipe}"
                if key in entries:
                    continue
                entry = run(args.folder, calibration, test, reference, recipe, bits, group or None)
                entries[key] = entry | {"blocks": len(calibration), "length": LENGTH, "seed": args.seed}
                args.output.parent.mkdir(parents=True, exist_ok=True)
                args.output.write_text(json.dumps({"environment": environment(args.threads), "entries": entries}, indent=1) + "\n")
                print(key, {name: entry[name] for name in ("perplexity", "kl", "seconds")}, flush=True)


if __name__ == "__main__":
    main()
