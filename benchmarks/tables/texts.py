"""The sections of docs/results.md on texts."""

from collections.abc import Mapping
from typing import Any

from benchmarks.tables.shared import NOT_RUN, entries, table


def interval(run: Mapping[str, Any]) -> str:
    """Write "-0.23 (-1.18 to +0.72)"."""
    return f"{run['difference']:+.2f} ({run['low']:+.2f} to {run['high']:+.2f})"


def megabytes(count: float) -> str:
    return f"{count / 1e6:.2f} MB"


def _size(run: Mapping[str, Any]) -> list[str]:
    return [megabytes(run["bytes"]), megabytes(run["embedding_bytes"]), f"{run['weight_bits']:.2f}"]


def _effort(run: Mapping[str, Any]) -> list[str]:
    return [f"{run['seconds'] / 60:.0f} min", f"{run['peak_bytes'] / 1e9:.1f} GB"]


def sentences_section() -> str:
    rows = []
    for file in ("minilm_uniform", "minilm_mixed"):
        for key, run in entries(file).items():
            rows.append([key, f"{run['top1']:.2f}", interval(run), f"{run['kl']:.4f}", *_size(run), *_effort(run)])
    if not rows:
        return NOT_RUN
    float_run = next(iter(entries("minilm_uniform").values()))
    first = ["float", f"{float_run['float']['top1']:.2f}", "", "", megabytes(float_run["float_bytes"]), "", "32", "", ""]
    columns = [
        "scheme",
        "top-1",
        "difference (paired, 95 %)",
        "KL to float",
        "file",
        "embeddings in it",
        "bits per weight",
        "time",
        "memory",
    ]
    return table(columns, [first, *rows])


def text_ladder_section() -> str:
    """Tabulate the loss after each step on held-out training sentences, and whether the step was undone."""
    runs = {key: run for file in ("minilm_uniform", "minilm_mixed") for key, run in entries(file).items()}
    runs |= {f"STS-B, {key}": run for key, run in entries("minilm_embeddings").items()}
    steps = list(dict.fromkeys(row["step"] for run in runs.values() for row in run["ladder"]))
    rows = []
    for key, run in runs.items():
        ladder = {row["step"]: row for row in run["ladder"]}
        cells = [f"{ladder[step]['loss']:.4f}{'' if ladder[step]['kept'] else ' (undone)'}" if step in ladder else "" for step in steps]
        rows.append([key, *cells])
    return table(["scheme", *steps], rows)


def text_groups_section() -> str:
    rows = [
        [key, f"{run['top1']:.2f}", interval(run), f"{run['kl']:.4f}", megabytes(run["bytes"]), *_effort(run)]
        for key, run in entries("minilm_groups").items()
    ]
    columns = ["weights", "top-1", "difference (paired, 95 %)", "KL to float", "file", "time", "memory"]
    return table(columns, rows)


def sentence_embeddings_section() -> str:
    rows = [
        [key, f"{run['spearman']:.2f}", f"{run['float']['spearman']:.2f}", interval(run), f"{run['error']:.4f}", *_size(run), *_effort(run)]
        for key, run in entries("minilm_embeddings").items()
    ]
    columns = [
        "scheme",
        "Spearman",
        "float",
        "difference (95 %)",
        "squared error",
        "file",
        "embeddings in it",
        "bits per weight",
        "time",
        "memory",
    ]
    return table(columns, rows)


def text_files_section() -> str:
    rows = []
    for key, run in entries("minilm_exported").items():
        faster, accuracy = run["onnxruntime"]["faster"], run["accuracy"]
        rows.append([
            key, f"{faster['ratio']:.2f} ({faster['low']:.2f} to {faster['high']:.2f})", megabytes(run["bytes"]),
            f"{100 * (run['bytes'] / run['ideal_bytes'] - 1):.1f} %", str(len(run["kernels"])), f"{accuracy['simulated']['top1']:.2f}",
            f"{accuracy['exported']['top1']:.2f}", f"{run['simulation']['agreement']:.2f} %", "yes" if run["ok"] else "no",
        ])  # fmt: skip
    columns = [
        "scheme", "speedup over float32 (quartiles)", "file", "size above bits", "on integers", "simulated", "exported", "same class",
        "verified",
    ]  # fmt: skip
    return table(columns, rows)


def text_roads_section() -> str:
    runs, rows = entries("minilm_roads"), []
    if (grown := runs.get("grow 4bit A8")) is not None:
        rows.append(["grow, `4bit`, A8", f"{grown['sentences']:,}", f"{grown['top1']:.2f}", interval(grown), f"{grown['kl']:.4f}"])
    for key, run in runs.items():
        for bits, subnet in run.get("subnets", {}).items():
            rows.append([f"{key}: {bits} bits", f"{run['sentences']:,}", f"{subnet['top1']:.2f}", interval(subnet), f"{subnet['kl']:.4f}"])
    return table(["network", "sentences", "top-1", "difference (paired, 95 %)", "KL to float"], rows)


def decoder_section() -> str:
    """Tabulate all layers: weights only, and with 8-bit activations."""
    runs = entries("decoder_methods")
    rows = [_decoder_row(key, run) for key, run in runs.items()] + [_decoder_row(k, r) for k, r in entries("decoder_matmuls").items()]
    return table(["all layers", "perplexity", "KL to float", "file"], _once(rows))


def decoder_linears_section() -> str:
    rows = []
    for name, runs in (("anybit", entries("decoder_linears")), ("LLM Compressor", entries("peer_llmcompressor_decoder"))):
        for key, run in runs.items():
            if key != "float":
                rows.append([name, key, f"{run['perplexity']:.2f}", f"{1000 * run['kl']:.3f}", megabytes(run["linear_bytes"])])
    columns = ["tool", "linear layers", "perplexity", "KL to float, thousandths", "bytes of linear layers"]
    return table(columns, sorted(rows, key=lambda row: (row[1][:2], row[1].split(",")[1], row[0], row[1])))


def _decoder_row(key: str, run: Mapping[str, Any]) -> list[str]:
    size = megabytes(run["bytes"]) if "bytes" in run else ""
    return [key, f"{run['perplexity']:.2f}", f"{run['kl']:.5f}" if "kl" in run else "", size]


def _once(rows: list[list[str]]) -> list[list[str]]:
    return [row for index, row in enumerate(rows) if row not in rows[:index]]


SECTIONS = {
    "SENTENCES": sentences_section, "TEXTLADDER": text_ladder_section, "TEXTGROUPS": text_groups_section,
    "EMBEDDINGS": sentence_embeddings_section, "TEXTFILES": text_files_section, "TEXTROADS": text_roads_section, "DECODER": decoder_section,
    "DECODERLINEARS": decoder_linears_section,
}  # fmt: skip
