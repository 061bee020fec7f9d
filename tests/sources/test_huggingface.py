"""Hugging Face models: every weight and product is covered or reported, outputs are equal, padding has no effect."""

import copy
import json
import math
from functools import cache, partial
from pathlib import Path

import pytest
import torch
import transformers
from language import FAMILIES, covered, folder, inputs, make, sentences, tokenizer, write_tsv
from scipy.stats import spearmanr
from torch import nn

import anybit
from anybit.data.batches import Batch, call, predict
from anybit.data.samples import Samples, split
from anybit.data.tasks import outputs_of
from anybit.errors import AnybitError, InvalidInput, InvalidSetting, UnsupportedModel
from anybit.loops import closed_form, moments
from anybit.networks.candidates import apply_scheme
from anybit.networks.capture import input_samples
from anybit.networks.edges import observe_edge_ranges
from anybit.networks.layers import codes_of, coverage, quantized_layers
from anybit.networks.matmul import Matmul
from anybit.networks.observed import observe_network
from anybit.networks.patches import draw_places
from anybit.networks.wiring import observe
from anybit.onnx.file import load, outputs
from anybit.onnx.file import session as onnx_file_session
from anybit.progress import listening
from anybit.roads.settings import CalibrateSettings
from anybit.roads.steps import range_candidates
from anybit.scheme import Precision
from anybit.sources.huggingface.attention import adapted, attention
from anybit.sources.huggingface.heads import _length_of
from anybit.sources.inputs import load_data
from anybit.sources.models import load_model
from anybit.sources.preprocessing import Preprocessing
from anybit.supernets.store import slice_subnet

QUICK = {"samples": 24, "batch_size": 8, "weight_bits": (2, 4, 8), "activation_bits": (4, 8), "steps": 4, "candidate_steps": 2}


def texts(tmp_path, kind="bert", count=24, layers=2, **options):
    """(network, its samples) from a folder and a file."""
    model = load_model(f"hf:{folder(kind, tmp_path / kind, layers=layers)}")
    return model, load_data(str(write_tsv(tmp_path / "texts.tsv", count)), Preprocessing(**options), model=model)


def test_counts_are_labelled_by_what_they_count(tmp_path):
    for kind, unit in (("bert", "samples"), ("gpt2", "tokens")):
        model, samples = texts(tmp_path, kind, length=None if kind == "bert" else 8)
        report = anybit.evaluate(model, samples)
        assert next(iter(report)) == unit and report[unit] == len(outputs_of(model, samples.batches(8)))


def test_rejects_metric_for_answers_before_any_work(tmp_path):
    model = load_model(f"hf:{folder('bert answers', tmp_path / 'net')}")
    rows = [{"question": "word1", "context": "word2 word3 word4", "answers": ["word3"]}] * 12
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    samples = load_data(str(tmp_path / "q.jsonl"), Preprocessing(stride=2), model=model)
    for work in (lambda: anybit.evaluate(model, samples, metric=len), lambda: anybit.calibrate(model, samples, metric=len)):
        with pytest.raises(InvalidSetting, match="metric="):
            work()


# Coverage


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_linear_embedding_and_attention_product_is_covered_or_reported(kind):
    model, plain = covered(kind), make(kind)
    batch = inputs(kind)
    names, uncovered = coverage(model, observe(model, batch))
    weights = {
        name
        for name, module in plain.named_modules()
        if isinstance(module, (nn.Linear, nn.Embedding, nn.Conv2d, transformers.pytorch_utils.Conv1D))
    }
    products = {name for name, module in model.named_modules() if isinstance(module, Matmul)}
    assert len(products) == 2 * 2  # two attention layers
    assert set(names) == weights | products
    # ViT's class token and positions belong to no layer; everything else is covered, and every product is a layer.
    assert set(uncovered) == ({"vit.embeddings.cls_token", "vit.embeddings.position_embeddings"} if kind == "vit" else set())


def test_attention_outside_the_interface_is_reported(monkeypatch):
    monkeypatch.setattr("anybit.sources.huggingface.attention._calls_interface", lambda module: False)
    model = covered("bert")
    model.set_attn_implementation("eager")
    _, uncovered = coverage(model, observe(model, inputs("bert")))
    assert len(uncovered) == 4 and all("matmul" in name and "stays float" in reason for name, reason in uncovered.items())


@pytest.mark.parametrize("kind", [*FAMILIES, "bert embedding", "bert answers"])
def test_adapted_network_computes_the_same(kind):
    model, batch = make(kind), inputs(kind)
    before = copy.deepcopy(model.state_dict())
    expected, computed = (call(one, batch.inputs) for one in (model, adapted(model)))
    mask = batch.mask
    for name in ("logits", "last_hidden_state", "start_logits"):
        if name in expected:
            some = [one[name] if mask is None or one[name].shape[:2] != mask.shape else one[name][mask] for one in (expected, computed)]
            assert torch.allclose(*some, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert not any(isinstance(module, Matmul) for module in model.modules())


def test_adapted_network_keeps_state_dict_keys():
    for kind in ("bert", "vit"):
        assert list(covered(kind).state_dict()) == list(make(kind).state_dict())
    assert set(covered("gpt2").state_dict()) == set(make("gpt2").state_dict())


def test_tied_weights_are_separated():
    tied, apart = make("llama"), covered("llama")
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert apart.lm_head.weight is not apart.model.embed_tokens.weight
    assert torch.equal(apart.lm_head.weight, apart.model.embed_tokens.weight)


def test_half_precision_weights_are_converted_to_float32_with_a_note():
    half, notes = make("llama").to(torch.bfloat16), []
    with listening(events=lambda event, fields: notes.append(fields["note"])):
        model = adapted(half)
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32} and half.lm_head.weight.dtype == torch.bfloat16
    assert "weights of bfloat16: computed in float32" in notes[0]


def test_position_bias_and_attention_sink_equal_those_of_transformers():
    module = covered("bert").bert.encoder.layer[0].attention.self
    query, key, value = (torch.randn(2, 4, 3, 4) for _ in range(3))
    bias, sinks = torch.randn(1, 4, 3, 3), torch.randn(4)
    ours, _ = attention(module, query, key, value, None, position_bias=bias, s_aux=sinks)
    scores = torch.cat([query @ key.mT / 2 + bias, sinks.view(1, 4, 1, 1).expand(2, 4, 3, 1)], -1).softmax(-1)[..., :-1]
    assert torch.allclose(ours, (scores @ value).transpose(1, 2), atol=1e-6)


def test_adapted_encoder_decoder_shares_no_weight_and_computes_the_same():
    config = transformers.T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8, vocab_size=30, decoder_start_token_id=0)
    plain = transformers.T5ForConditionalGeneration(config).eval()
    tokens = torch.randint(2, 30, (3, 5))
    model, inputs = adapted(plain), {"input_ids": tokens, "decoder_input_ids": tokens}
    weights = [module.weight for module in model.modules() if isinstance(module, (nn.Embedding, nn.Linear))]
    assert len({id(weight) for weight in weights}) == len(weights)
    assert torch.allclose(model(**inputs).logits, plain(**inputs).logits, atol=1e-5)


def test_computed_weight_is_stored_in_a_copy():
    plain = make("bert")
    nn.utils.parametrizations.weight_norm(plain.classifier)
    before, batch = plain.classifier.weight.clone(), inputs("bert")
    model = adapted(plain)
    assert torch.equal(model.classifier._parameters["weight"], before) and torch.equal(plain.classifier.weight, before)
    assert torch.allclose(call(model, batch.inputs).logits, call(plain, batch.inputs).logits, atol=1e-5)


# Padding


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_padding_changes_no_statistic(kind):
    model = covered(kind)
    tight, padded = inputs(kind), inputs(kind, padding=9)
    names = observe(model, tight).layer_names()
    samples = [input_samples(model, names, [batch], 10**6, 0) for batch in (tight, padded)]
    for name in names:
        if not isinstance(model.get_submodule(name), nn.Embedding) and "position" not in name:
            for one, other in zip(samples[0][name], samples[1][name], strict=True):
                # Attention weights are over keys: those of padding are zero, and padding adds more of them.
                one, other = (x[x != 0].sort().values if name.endswith("mixture") else x.sort().values for x in (one, other))
                assert torch.allclose(one, other, rtol=1e-3, atol=1e-4), name
    wiring = observe(model, tight)
    edges = [observe_edge_ranges(model, wiring, [batch]) for batch in (tight, padded)]
    layers = [name for name in names if name in edges[0]]
    assert len(layers) > 10
    for name in layers:
        assert edges[0][name] == pytest.approx(edges[1][name], rel=1e-3, abs=1e-4), name


class Padded(torch.utils.data.Dataset):
    """A text data set with `padding` more arbitrary tokens in every batch, masked out."""

    def __init__(self, dataset, padding):
        self.dataset, self.padding = dataset, padding
        self.lengths = dataset.lengths

    def __len__(self):
        return len(self.dataset)

    def __getitems__(self, indices):
        batch = self.dataset.__getitems__(indices)
        longer = {name: nn.functional.pad(x, (0, self.padding), value=7 * (name == "input_ids")) for name, x in batch.inputs.items()}
        return Batch(longer, batch.labels)


@pytest.mark.parametrize("solver", [{}, {"solver": "none"}], ids=["closed form", "none"])
def test_calibration_is_independent_of_padding(solver, tmp_path, monkeypatch):
    drawn: list[tuple] = []
    for module in (closed_form, moments):
        monkeypatch.setattr(module, "draw_places", recorded(drawn))
    model, samples = texts(tmp_path)
    padded = Samples(Padded(samples.dataset, 7), True, reader=samples.reader)
    results, places = [], []
    for one in (samples, padded):
        results.append(anybit.calibrate(model, one, "4bit", **QUICK, **solver, parallel=False))
        places.append(list(drawn))
        drawn.clear()
    assert places[0] == places[1] and bool(places[0]) == (not solver)
    assert results[0].scheme == results[1].scheme
    tables = [result.table["table"]["rows"] for result in results]
    for name, row in tables[0].items():
        assert list(row.values()) == pytest.approx(list(tables[1][name].values()), rel=1e-2, abs=1e-6)
    units = results[0].report["units"]
    # Another order of summation sometimes flips an input's rounding; a solver then chooses other codes.
    alike = [name for name in units if solver or ".layer.0." in name]
    assert len(alike) >= 6
    for name in alike:
        assert list(units[name].values()) == pytest.approx(list(results[1].report["units"][name].values()), rel=2e-2, abs=1e-6)


def recorded(drawn: list):
    """Wrap `draw_places` to record its draws."""

    def draw(layer, shape, *rest):
        places = draw_places(layer, shape, *rest)
        drawn.append((tuple(shape), places.tolist()))
        return places

    return draw


def test_batches_are_sorted_by_length_and_lose_no_text(tmp_path):
    _, samples = texts(tmp_path, count=40)
    calibration = split(samples, 0, 0.25, 5)
    widths = [batch.inputs["input_ids"].shape[1] for batch in calibration.fitting]
    assert widths == sorted(widths) and widths[0] < widths[-1]
    seen = [tuple(row[mask].tolist()) for piece in (calibration.fitting, calibration.held_out) for batch in piece
            for row, mask in zip(batch.inputs["input_ids"], batch.mask, strict=True)]  # fmt: skip
    assert sorted(seen) == sorted(tuple(tokenizer()(text)["input_ids"]) for text in sentences(40))


def test_rejects_sample_of_only_padding(tmp_path):
    model, batch = covered("bert"), inputs("bert")
    batch.inputs["attention_mask"][2] = 0
    rows = [{name: tensor[i] for name, tensor in batch.inputs.items()} for i in range(len(batch))]
    with pytest.raises(InvalidInput, match="only padding"):
        anybit.calibrate(model, rows, "4bit", **QUICK)


# Roads


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_is_calibrated_and_round_trips_bitwise(kind, tmp_path):
    model, batch = make(kind, layers=1), inputs(kind, 24)
    items = list(batch.inputs) if kind == "vit" else [{name: tensor[i] for name, tensor in batch.inputs.items()} for i in range(24)]
    result = anybit.calibrate(model, items, "4bit", **QUICK)
    assert result.report["result"]["weight_bits"] <= 4
    layers = quantized_layers(result.model)
    for name, precision in result.scheme.items():
        quantizer = layers[name].input_quantizer
        if isinstance(layers[name], Matmul):
            assert precision.weight_bits is None and precision.activation_bits and quantizer.scale.shape == (2,)
        elif isinstance(layers[name], nn.Embedding):
            assert precision.weight_bits and precision.activation_bits is None and quantizer is None
        else:
            assert precision.weight_bits and precision.activation_bits and quantizer.scale.shape == ()
    run = result.save(tmp_path / "run")
    assert (run / "model.safetensors").stat().st_size == result.report["result"]["bytes"]
    loaded = anybit.load(run, model=make(kind, layers=1))
    assert torch.equal(call(loaded, batch.inputs)["logits"], call(result.model, batch.inputs)["logits"])
    # Two ranges per product: the operands differ.
    assert any((layer.input_quantizer.scale[0] != layer.input_quantizer.scale[1]) for layer in layers.values() if isinstance(layer, Matmul))


def test_both_operands_of_a_product_are_quantized():
    layer = Matmul(transposed=True)
    left, right = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    from anybit.networks.layers import prepare
    from anybit.numerics.quantizers import UniformQuantizer

    prepared = prepare(nn.Sequential(layer), ["0"])
    assert torch.equal(prepared[0](left, right), left @ right.mT)
    prepared[0].input_quantizer = UniformQuantizer(4, False, torch.tensor([0.5, 0.1]), torch.tensor([8.0, 7.0]))
    expected = (torch.round(left / 0.5).clamp(-8, 7) * 0.5) @ (torch.round(right / 0.1).clamp(-7, 8) * 0.1).mT
    assert torch.allclose(prepared[0](left, right), expected, atol=1e-6)


def test_operations_of_a_product_count_the_bits_of_both_operands():
    model, batch = covered("bert"), inputs("bert", 2)
    network = observe_network(model, batch, CalibrateSettings().options)
    name = next(name for name in network.names if name.endswith("scores"))
    length = batch.inputs["input_ids"].shape[1]
    assert network.costs.layers[name].macs == length * length * 16
    assert network.costs.layer_bops(name, Precision(None, 4)) == length * length * 16 * 4 * 4
    assert network.costs.layer_bytes(name, Precision(None, 4)) == 2 * 5


def test_only_layers_that_sum_over_inputs_are_reconstructed(tmp_path):
    model, samples = texts(tmp_path)
    result = anybit.calibrate(model, samples, None, **{**QUICK, "weight_bits": (4,), "activation_bits": (8,)})
    assert result.report["units"] and not any("embeddings" in name or "scores" in name for name in result.report["units"])


@pytest.mark.parametrize(("kind", "task", "scores"), [
    ("bert", "classification", {"top1", "loss"}),
    ("llama", "language-model", {"top1", "top5", "loss", "perplexity"}),
])  # fmt: skip
def test_calibrates_from_the_command_line(kind, task, scores, tmp_path, capsys):
    from typer.testing import CliRunner

    from anybit.cli.app import app

    place, data = folder(kind, tmp_path / kind, layers=1), write_tsv(tmp_path / "texts.tsv", 40)
    length = ["--length", "8"] if task == "language-model" else []
    options = ["--model", f"hf:{place}", "--data", str(data), "--test", str(data), *length, "--json"]
    steps = ["--steps", "3", "--candidate-steps", "2", "--samples", "24", "--weight-bits", "2,4,8"]
    ran = CliRunner().invoke(app, ["calibrate", *options, *steps, "--budget", "5bit", "--output", str(tmp_path / "run")])
    assert ran.exit_code == 0, ran.output
    report = json.loads(ran.stdout)
    assert scores <= set(report["test"]) and "kl" in report["test"]
    again = CliRunner().invoke(app, ["evaluate", str(tmp_path / "run"), "--data", str(data), "--json"])
    assert json.loads(again.stdout)["loss"] == pytest.approx(report["test"]["loss"], rel=1e-4)
    file = json.loads((tmp_path / "run" / "scheme.json").read_text())
    assert file["task"] == task and file["model"]["reference"] == f"hf:{place}"
    assert all(f"{name}" in file["layers"] for name in file["layers"])


def test_network_with_a_random_answer_head_is_covered(tmp_path):
    place = folder("bert", tmp_path / "bert")
    one, other = (load_model(f"hf:{place}", None, "question-answering") for _ in range(2))
    assert "qa_outputs" in observe(one, inputs("bert")).layer_names()
    assert torch.equal(one.qa_outputs.weight, other.qa_outputs.weight)  # random, but always the same


def test_answers_are_scored_and_calibrated(tmp_path):
    from language import WORDS

    model = load_model(f"hf:{folder('bert answers', tmp_path / 'qa', layers=1)}")
    rows = [
        {"question": WORDS[i], "context": " ".join(WORDS[(i * j) % 60] for j in range(1, 40)), "answers": {"text": [WORDS[i]]}}
        for i in range(1, 13)
    ]
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf8")
    samples = load_data(str(file), Preprocessing(length=20, stride=4), model=model)
    assert len(samples) > len(rows)  # several windows per context
    result = anybit.calibrate(model, samples, "4bit", test=samples, **QUICK)
    assert {"exact", "f1", "kl"} <= set(result.report["test"]) and "f1" in result.report["ladder"][0]


def test_sentence_embeddings_average_unpadded_tokens_and_are_scored_by_rank(tmp_path):
    model = load_model(f"hf:{folder('bert embedding', tmp_path / 'bert', layers=1)}")
    pairs = list(zip(sentences(10, 1), sentences(10, 2), range(10), strict=True))
    file = tmp_path / "pairs.csv"  # tabs and no header, despite the suffix
    file.write_text("\n".join(f'{label}\t"x\t{one}\t{two}' for one, two, label in pairs), encoding="utf8")
    samples = load_data(str(file), Preprocessing(columns="text=2,pair=3,label=0"), model=model)
    batch = next(samples.batches(10))
    vectors = predict(model, batch)
    plain = make("bert embedding", layers=1)
    alone = [plain(**tokenizer()(text, return_tensors="pt")).last_hidden_state[0].mean(0) for one, two, _ in pairs for text in (one, two)]
    assert torch.allclose(vectors, torch.stack(alone), atol=1e-4)
    cosines = torch.cosine_similarity(vectors[0::2], vectors[1::2]).detach().numpy()
    words = anybit.evaluate(model, samples)
    assert words["spearman"] == pytest.approx(100 * spearmanr(cosines, range(10)).statistic, abs=1e-3)
    result = anybit.calibrate(model, samples, "4bit", test=samples, **{**QUICK, "samples": 10})
    assert {"spearman", "error"} <= set(result.report["test"])


def test_perplexity_equals_that_of_the_loss_of_the_network(tmp_path):
    model = load_model(f"hf:{folder('llama', tmp_path / 'llama')}")
    data = write_tsv(tmp_path / "texts.tsv", 30)
    samples = load_data(str(data), Preprocessing(length=10), model=model)
    blocks = torch.cat([batch.inputs["input_ids"] for batch in samples.batches(4)])
    stream = [token for text in sentences(30) for token in tokenizer()(text)["input_ids"]]  # each with its end-of-text token
    assert blocks.flatten().tolist() == stream[: blocks.numel()]
    losses = [make("llama")(input_ids=block[None], labels=block[None]).loss.item() for block in blocks]
    assert anybit.evaluate(model, samples)["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-3)


# Rejected inputs


def refused(tmp_path, content, name="texts.tsv", kind="bert", **options):
    (tmp_path / name).write_text(content, encoding="utf8")
    model = load_model(f"hf:{folder(kind, tmp_path / kind)}")
    with pytest.raises(AnybitError) as raised:
        list(load_data(str(tmp_path / name), Preprocessing(**options), model=model).batches(2))
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(("content", "options", "message"), [
    ("label\tsentence\n0\tword1\n1\t \n", {}, "line 3: the text is empty"),
    ("label\tsentence\n0\tword1\n", {"columns": "text=words"}, "no column 'words' for the text; its columns are label, sentence"),
    ("label\twords\n0\tword1\n", {}, "no column of texts"),
    ("label\tsentence\nmaybe\tword1\n", {}, "label 'maybe' is neither a class number"),
    ("", {}, "holds no rows"),
    ("label\tsentence\n1\t" + "word1 " * 50 + "\n", {}, "52 tokens, more than the 40"),
    ("label\tsentence\n1\tword1\n", {"length": 99}, "the network accepts 2 to 40 tokens"),
])  # fmt: skip
def test_rejects_invalid_texts_by_name(content, options, message, tmp_path):
    assert message in refused(tmp_path, content, **options)


def test_long_texts_are_truncated_to_the_length(tmp_path):
    model, _ = texts(tmp_path)
    (tmp_path / "long.tsv").write_text("label\tsentence\n1\t" + "word1 " * 50 + "\n", encoding="utf8")
    samples = load_data(str(tmp_path / "long.tsv"), Preprocessing(length=16), model=model)
    assert next(samples.batches(1)).inputs["input_ids"].shape == (1, 16)


def test_rejects_texts_without_a_language_model(tmp_path):
    data = write_tsv(tmp_path / "texts.tsv", 4)
    with pytest.raises(InvalidSetting, match="tokenizer of a Hugging Face model"):
        load_data(str(data), model=nn.Linear(2, 2))
    make("bert").save_pretrained(tmp_path / "bare")
    with pytest.raises(InvalidSetting, match="has no tokenizer"):
        load_data(str(data), model=load_model(f"hf:{tmp_path / 'bare'}"))


def test_rejects_missing_model_in_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidSetting, match="cannot be loaded") as raised:
        load_model(f"hf:{tmp_path / 'empty'}")
    assert "\n" not in str(raised.value)


def test_code_shipped_with_a_model_is_not_executed(tmp_path):
    place = folder("bert", tmp_path / "bert")
    (place / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    config = json.loads((place / "config.json").read_text()) | {"auto_map": {"AutoConfig": "mine.Config", "AutoModel": "mine.Model"}}
    (place / "config.json").write_text(json.dumps(config | {"model_type": "mine"}))
    with pytest.raises(AnybitError):
        load_model(f"hf:{place}")
    assert not (tmp_path / "ran").exists()


def test_rejects_weights_that_are_not_safetensors(tmp_path):
    place = folder("bert", tmp_path / "bert")
    torch.save(make("bert").state_dict(), place / "pytorch_model.bin")
    (place / "model.safetensors").unlink()
    with pytest.raises(InvalidSetting, match="cannot be loaded"):
        load_model(f"hf:{place}")


def test_rejects_unknown_class_label(tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"text": "word1", "label": 0.7}\n{"text": "word2", "label": 1.0}\n', encoding="utf8")
    model = load_model(f"hf:{folder('bert', tmp_path / 'bert')}")
    with pytest.raises(InvalidInput, match=r"0\.7 is neither a class number"):
        load_data(str(tmp_path / "texts.jsonl"), model=model)


def test_scoring_embeddings_requires_pairs(tmp_path):
    model = load_model(f"hf:{folder('bert embedding', tmp_path / 'bert')}")
    with pytest.raises(InvalidInput, match="pairs"):
        load_data(str(write_tsv(tmp_path / "texts.tsv", 8)), model=model)
    rows = [{name: tensor[i] for name, tensor in inputs("bert", 8).inputs.items()} | {"labels": torch.tensor(float(i))} for i in range(8)]
    with pytest.raises(InvalidInput, match="pairs"):
        anybit.evaluate(model, rows)
    (tmp_path / "one.tsv").write_text("text\tpair\tlabel\nword1\tword2\t3\n", encoding="utf8")
    with pytest.raises(InvalidInput, match="at least two"):
        anybit.evaluate(model, str(tmp_path / "one.tsv"), preprocessing=Preprocessing(columns="text=text,pair=pair,label=label"))


def test_rejects_missing_weights_but_initializes_a_missing_head(tmp_path):
    place = folder("bert", tmp_path / "bert")
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(InvalidSetting, match=r"its files lack bert\.encoder\.layer\.2.* and .* more"):
        load_model(f"hf:{place}")
    assert load_model(f"hf:{folder('bert embedding', tmp_path / 'body')}", None, "classification").classifier.weight.shape == (2, 16)


def test_rejects_damaged_weights_by_name(tmp_path):
    place = folder("bert", tmp_path / "bert")
    (place / "model.safetensors").write_bytes((place / "model.safetensors").read_bytes()[:100])
    with pytest.raises(InvalidSetting, match="cannot be loaded"):
        load_model(f"hf:{place}")


@pytest.mark.parametrize("kind", ["bert answers", "bert embedding"])
def test_left_padding_changes_no_result(kind, tmp_path):
    from language import WORDS

    report = []
    for side in ("right", "left"):
        place = folder(kind, tmp_path / side)
        config = json.loads((place / "tokenizer_config.json").read_text())
        (place / "tokenizer_config.json").write_text(json.dumps(config | {"padding_side": side}))
        if kind == "bert embedding":
            (place / "1_Pooling").mkdir()
            (place / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
        model = load_model(f"hf:{place}")
        file = tmp_path / "data.jsonl"
        if kind == "bert answers":
            rows = [{"question": WORDS[i], "context": " ".join(WORDS[i : 2 * i + 1]), "answers": WORDS[i]} for i in range(1, 9)]
        else:
            rows = [
                {"text": one, "pair": two, "label": i} for i, (one, two) in enumerate(zip(sentences(9, 1), sentences(9, 2), strict=True))
            ]
        file.write_text("\n".join(map(json.dumps, rows)), encoding="utf8")
        samples = load_data(str(file), Preprocessing(length=30, stride=4), model=model)
        report.append(outputs_of(model, samples.batches(4)))
    assert torch.allclose(*report, atol=1e-5)


def test_rejects_unsupported_pooling(tmp_path):
    place = folder("bert embedding", tmp_path / "bert")
    (place / "1_Pooling").mkdir()
    (place / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": false, "pooling_mode_lasttoken": true}')
    with pytest.raises(UnsupportedModel, match="pooling_mode_lasttoken"):
        load_data(
            str(write_tsv(tmp_path / "texts.tsv", 4)), Preprocessing(columns="text=sentence,pair=sentence"), model=load_model(f"hf:{place}")
        )


def test_length_excludes_positions_reserved_for_padding():
    config = transformers.RobertaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=30,
                                        max_position_embeddings=40, pad_token_id=1)  # fmt: skip
    model = transformers.RobertaForSequenceClassification(config)
    assert _length_of(model) == 38
    model(input_ids=torch.full((1, 38), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, 39), 5))


def test_dict_with_labels_is_an_input_and_its_label(tmp_path):
    model, samples = texts(tmp_path)
    report = anybit.evaluate(model, samples)
    rows = [{name: x[0] for name, x in b.inputs.items()} | {"labels": b.labels[0]} for b in samples.batches(1)]
    loader = torch.utils.data.DataLoader(rows, collate_fn=lambda items: tokenizer().pad(items, return_tensors="pt"), batch_size=4)
    again = anybit.evaluate(model, loader)
    assert again["samples"] == report["samples"] and again["loss"] == pytest.approx(report["loss"], rel=1e-5)


def test_later_verb_uses_recorded_options_unless_overridden(tmp_path):
    from anybit.sources.preprocessing import overridden

    recorded = Preprocessing(length=12, columns="text=a")
    assert overridden(recorded, Preprocessing(columns="text=b")) == Preprocessing(length=12, columns="text=b")
    assert overridden(recorded, Preprocessing()) == recorded


def test_products_of_a_custom_network_are_masked():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.query, self.key = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.scores, self.mixture, self.fc = Matmul(transposed=True), Matmul(), nn.Linear(8, 3)

        def forward(self, input_ids, attention_mask):
            x = self.words(input_ids)
            scores = self.scores(self.query(x), self.key(x)) + (1 - attention_mask[:, None].float()) * -1e9
            mixed = self.mixture(scores.softmax(-1), x)
            return self.fc((mixed * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True))

    torch.manual_seed(0)
    rows = [{"input_ids": torch.randint(20, (6,)), "attention_mask": (torch.arange(6) < 2 + i % 5).long()} for i in range(24)]
    result = anybit.calibrate(Own().eval(), rows, "4bit", **QUICK)
    assert {"scores", "mixture"} <= set(result.scheme)
    assert all(low > -1e8 for low, _ in result.canonical.edges.values() if low > -1e9 * 0.99)
    assert result.canonical.edges["scores"][0] > -100


# Groups


def test_groups_have_scales_of_their_own_and_are_counted_saved_and_loaded(tmp_path):
    model, samples = texts(tmp_path, layers=1)
    options = {**QUICK, "weight_bits": (3,), "activation_bits": (None,), "pipeline": "light"}
    whole, grouped = (anybit.calibrate(model, samples, None, **options, group=group) for group in (None, 8))
    name = "bert.encoder.layer.0.intermediate.dense"
    scales = [result.model.get_submodule(name).weight_quantizer.scale.shape for result in (whole, grouped)]
    assert scales == [(24, 1), (24 * 2, 1)]
    weight = model.get_submodule(name).weight
    errors = [(result.model.get_submodule(name).weight - weight).square().sum() for result in (whole, grouped)]
    assert errors[1] < errors[0]
    run = grouped.save(tmp_path / "run")
    assert (run / "model.safetensors").stat().st_size == grouped.report["result"]["bytes"] > whole.report["result"]["bytes"]
    batches = list(samples.batches(8))
    assert torch.equal(outputs_of(anybit.load(run, model=make("bert", layers=1)), batches), outputs_of(grouped.model, batches))


def test_groups_are_reconstructed():
    model, batch = covered("bert"), inputs("bert", 24)
    items = [{name: tensor[i] for name, tensor in batch.inputs.items()} for i in range(24)]
    options = {**QUICK, "weight_bits": (2,), "activation_bits": (None,), "group": 8, "steps": 60}
    units = anybit.calibrate(model, items, None, **options).report["units"]
    assert sum(unit["after"] < unit["before"] for unit in units.values()) > len(units) / 2


def test_rejects_group_that_divides_no_layer():
    with pytest.raises(InvalidSetting, match="group 1 "):
        CalibrateSettings(group=1)
    with pytest.raises(InvalidSetting, match="group 7 divides the inputs of no"):
        observe_network(covered("bert"), inputs("bert"), CalibrateSettings(group=7).options)


def test_unquantized_network_with_groups_equals_the_float_one_bitwise():
    model, batch = covered("bert"), inputs("bert")
    network = observe_network(model, batch, CalibrateSettings(group=8).options)
    assert torch.equal(call(network.prepared, batch.inputs)["logits"], call(model, batch.inputs)["logits"])
    items = [{name: tensor[i] for name, tensor in batch.inputs.items()} for i in range(len(batch))]
    candidates = range_candidates(network, split(Samples(items, False), 0, 0.4, 2), CalibrateSettings(group=8))
    rebuilt = apply_scheme(network.prepared, network.uniform(8, 8), candidates)
    assert torch.allclose(call(rebuilt, batch.inputs)["logits"], call(model, batch.inputs)["logits"], atol=0.2)


# The other roads


def test_a_supernet_of_a_transformer_is_saved_loaded_and_sliced(tmp_path):
    model, samples = texts(tmp_path, count=32, layers=1)
    supernet = anybit.train(model, samples, bits=(4, 8), epochs=1, batch_size=8, held_out=0.2)
    folder = supernet.save(tmp_path / "supernet")
    loaded = anybit.load_supernet(folder, model=make("bert", layers=1))
    batches = list(samples.batches(8))
    for bits in (4, 8):
        supernet.switch(supernet.uniform(bits))
        loaded.switch(loaded.uniform(bits))
        assert torch.equal(outputs_of(loaded.model, batches), outputs_of(supernet.model, batches))
    products = [layer for layer in quantized_layers(loaded.model).values() if isinstance(layer, Matmul)]
    assert len(products) == 2 and all(layer.input_quantizer.start.shape == (2, 2) for layer in products)
    result = anybit.extract(folder, scheme=supernet.uniform(4), model=make("bert", layers=1))
    sliced = slice_subnet(folder, supernet.uniform(4))
    assert not any("scores" in name or "mixture" in name for name in sliced)
    for name, (codes, _) in sliced.items():
        assert (codes_of(result.model.get_submodule(name)).numpy() == codes).all()


def test_interrupted_grow_of_a_transformer_resumes_to_identical_bytes(tmp_path, monkeypatch):
    model, samples = texts(tmp_path, count=32, layers=1)
    options = {"activation_bits": 8, "per_channel": True, "epochs": 2, "batch_size": 8, "seed": 3}
    whole = anybit.grow(model, samples, "4bit", **options)
    checkpoint = tmp_path / "checkpoint.safetensors"
    monkeypatch.setattr("anybit.loops.training.tell", stop)  # an epoch is reported before its checkpoint: the second one is lost
    with pytest.raises(KeyboardInterrupt):
        anybit.grow(model, samples, "4bit", checkpoint=checkpoint, **options)
    monkeypatch.undo()
    results = [whole, anybit.grow(model, samples, "4bit", checkpoint=checkpoint, **options)]
    assert results[0].scheme == results[1].scheme and results[0].report["result"]["weight_bits"] <= 4 * 1.02
    runs = [result.save(tmp_path / f"run{number}") for number, result in enumerate(results)]
    assert len({(run / "model.safetensors").read_bytes() for run in runs}) == 1


def stop(event, epoch=None, **fields):
    """Simulate Ctrl-C at the end of the second epoch."""
    if (event, epoch) == ("epoch", 2):
        raise KeyboardInterrupt


@pytest.mark.parametrize(("name", "wrong"), [("embeddings.word_embeddings", "W4A8"), ("attention.self.scores", "W4A8")])
def test_rejects_scheme_with_bits_for_a_missing_operand(name, wrong, tmp_path):
    model, samples = texts(tmp_path, layers=1)
    scheme = anybit.calibrate(model, samples, None, **{**QUICK, "weight_bits": (4,), "activation_bits": (8,), "pipeline": "light"}).scheme
    layer = next(one for one in scheme if one.endswith(name))
    with pytest.raises(AnybitError, match=f"{layer} is a"):
        anybit.grow(model, samples, scheme=scheme.replace({layer: Precision.parse(wrong)}), epochs=1)


def test_answers_are_trained_only_by_distillation(tmp_path):
    from language import WORDS

    model = load_model(f"hf:{folder('bert answers', tmp_path / 'qa', layers=1)}")
    rows = [{"question": WORDS[i], "context": " ".join(WORDS[:12]), "answers": WORDS[i]} for i in range(8)]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf8")
    samples = load_data(str(tmp_path / "questions.jsonl"), Preprocessing(length=20, stride=4), model=model)
    with pytest.raises(InvalidSetting, match="distill=1"):
        anybit.grow(model, samples, "4bit", epochs=1, batch_size=4)
    anybit.grow(model, samples, "4bit", epochs=1, batch_size=4, distill=1.0)


# Export


@cache
def run_of(kind, home, budget="6bit", **settings):
    """(run folder, data) of a network for texts or images; created once per arguments, read only."""
    here = Path(home) / f"{kind}{len(list(Path(home).iterdir()))}"
    settings = {**QUICK, "weight_bits": (3, 4, 8), "pipeline": "light", **settings}
    if kind == "vit":
        data = inputs(kind, 24).inputs
        return anybit.calibrate(make(kind, layers=1), data, budget, **settings).save(here / "run"), data
    place = f"hf:{folder(kind, here / kind, layers=1)}"
    data = str(write_tsv(here / "texts.tsv", 40))
    return anybit.calibrate(place, data, budget, preprocessing=Preprocessing(length=10), **settings).save(here / "run"), data


@cache
def exported_file(kind, home, weight_only=False, **settings):
    """(run folder, data, file) of such a run, exported."""
    run, data = run_of(kind, home, **settings)
    file = run.parent / f"{'packed' if weight_only else 'file'}.onnx"
    anybit.export(run, file, data=data, model=make(kind, layers=1) if kind == "vit" else None, weight_only=weight_only)
    return run, data, file


@pytest.fixture
def exported_run(tmp_path_factory, monkeypatch):
    """`exported_file` in a home folder shared by its runs, so that every test trusts them."""
    home = tmp_path_factory.getbasetemp() / "exported"
    home.mkdir(exist_ok=True)
    monkeypatch.setenv("XDG_STATE_HOME", str(home / "state"))
    return partial(exported_file, home=str(home))


@pytest.mark.parametrize("kind", FAMILIES)
def test_exports_every_family_with_all_layers_on_integers(kind, exported_run):
    run, data, file = exported_run(kind)
    report = anybit.verify(run, file, data=data, model=make(kind, layers=1) if kind == "vit" else None)
    assert report["ok"], report["failures"]
    assert all(reason == "an embedding looks rows up" for reason in report["floats"].values())
    products = {name: kernel for name, kernel in report["kernels"].items() if name.endswith(("scores", "mixture"))}
    assert len(products) == 2 and set(products.values()) <= {"MatMulIntegerToFloat", "QLinearMatMul"}
    if "bitwise" not in report["skipped"]:  # norms and softmax are summed in float, which may change a number by one code
        assert report["numbers"]["bitwise"] or report["numbers"]["codes_apart"] <= 1
    assert report["simulation"]["largest_difference"] <= 0.2 * report["simulation"]["largest_output"]


def test_exported_file_accepts_any_batch_size_and_length(exported_run):
    run, _, file = exported_run("bert")
    loaded = anybit.load(run)
    session = onnx_file_session(file)
    for count, padding in ((1, 0), (5, 7)):
        batch = inputs("bert", count, padding)
        there = outputs(session, [batch])[0]
        assert there.shape == (count, 2)
        assert torch.allclose(torch.from_numpy(there), outputs_of(loaded, [batch]), atol=0.1)


def test_sum_read_by_a_norm_is_not_rounded(exported_run):
    _, _, file = exported_run("bert")
    graph = load(file).graph
    norms = [node for node in graph if node.op_type == "LayerNormalization"]
    assert len(norms) == 3
    for norm in norms:
        sums = norm.inputs[0].producer()
        assert sums.op_type == "Add" and not any(value.producer().op_type == "DequantizeLinear" for value in sums.inputs)


@pytest.mark.parametrize("weight_only", [False, True])
def test_grouped_weights_are_exported_exactly(weight_only, exported_run):
    options = {"budget": None, "weight_bits": (4,), "activation_bits": (None,), "group": 16}
    run, _, file = exported_run("llama", weight_only=weight_only, **options)
    report = anybit.verify(run, file)
    assert report["ok"], report["failures"]
    # Packed kernels round their inputs to 8 bits per block; weights unpacked at load give exactly the simulation's numbers.
    assert report["simulation"]["largest_difference"] <= (0.1 if weight_only else 1e-4) * report["simulation"]["largest_output"]
    if weight_only:
        assert report["numbers"]["bitwise"] is not None and any("MatMulNBits" in reason for reason in report["floats"].values())


def test_grouped_layers_compute_in_float_and_are_reported(exported_run):
    run, data, file = exported_run("bert", group=8)
    report = anybit.verify(run, file, data=data)
    assert report["ok"], report["failures"]
    assert sum("groups of inputs" in reason for reason in report["floats"].values()) >= 6
    assert any(name.endswith("scores") for name in report["kernels"])


def test_a_network_of_chosen_experts_exports_and_its_configuration_stays():
    config = transformers.MixtralConfig(
        vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        num_local_experts=2, num_experts_per_tok=1, max_position_embeddings=16, experts_implementation="grouped_mm",
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).eval()
    tokens = {"input_ids": torch.randint(20, (4, 5)), "attention_mask": torch.ones(4, 5, dtype=torch.long)}
    report = anybit.inspect(model, tokens)
    assert report["export"]["ok"], report["export"]
    assert any("experts" in name for name in report["uncovered"]) and model.config._experts_implementation == "grouped_mm"
