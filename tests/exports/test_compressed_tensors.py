"""Folders in the compressed-tensors format: packed to its specification, and loaded by transformers with equal numbers."""

import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import anybit_cli
from hypothesis import given
from hypothesis import strategies as st
from language import folder, make, sentences, write_tsv
from networks import Residual
from safetensors.torch import load_file, save_file

import anybit
from anybit.data.tasks import outputs_of
from anybit.errors import AnybitError, InvalidFile, InvalidSetting, UnsupportedModel
from anybit.exports.compressed_tensors import CONFIG, _exported, _write, export_folder, pack_words, packed, verify_folder
from anybit.networks.layers import Pruned, codes_of, fill, quantized_layers
from anybit.runs.opened import opened
from anybit.sources.huggingface.folder import loaded_folder, own_network
from anybit.sources.inputs import load_data
from anybit.sources.models import load_model
from anybit.sources.preprocessing import Preprocessing

FAMILIES = ("bert", "bert embedding", "llama", "gpt2", "vit")
FLOAT_PRODUCTS = {"*scores": "float", "*mixture": "float"}


def run_of(kind, path, **overrides):
    """(run folder, network, data) of a quick calibration."""
    if kind == "vit":
        make(kind, layers=1).save_pretrained(path / "net")
        data = torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    else:
        folder(kind, path / "net", layers=1)
        (path / "texts.tsv").write_text("\n".join(["sentence", *sentences(24)]) + "\n")
        if kind == "bert":
            write_tsv(path / "texts.tsv", 24)
    model = load_model(f"hf:{path / 'net'}")
    if kind != "vit":
        data = load_data(str(path / "texts.tsv"), Preprocessing(), model=model)
    settings = {
        "budget": "4bit",
        "weight_bits": (2, 3, 5, 8),
        "activation_bits": (None,),
        "samples": 24,
        "batch_size": 8,
        **overrides,
    }
    result = anybit.calibrate(model, data, pipeline="light", cache=False, **settings)
    return result.save(path / "run"), model, data


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A run of mixed bits with quantized inputs, and its folder."""
    path = tmp_path_factory.mktemp("bert")
    run, model, data = run_of("bert", path, activation_bits=(4, 8), keep=FLOAT_PRODUCTS)
    export_folder(run, path / "out", model=model)
    return run, model, data, path / "out"


@pytest.fixture
def copied(bert, tmp_path):
    """A copy of the folder that a test may change."""
    run, model, data, out = bert
    return run, model, data, Path(shutil.copytree(out, tmp_path / "out"))


# The format


def unpack_words(words: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """Invert `pack_words` by the format's definition, 32 codes in `bits` words: int8 [rows, columns]."""
    stream = np.unpackbits(np.ascontiguousarray(words, "<i4").view(np.uint8), axis=1, count=columns * bits, bitorder="little")
    fields = np.packbits(stream.reshape(len(words), columns, bits), axis=2, bitorder="little")[:, :, 0]
    return (fields.astype(np.int16) - 2 ** (bits - 1)).astype(np.int8)


@given(st.data())
def test_words_pack_each_row_as_one_bit_stream(data):
    bits, rows, columns = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 4)), data.draw(st.integers(1, 70))
    numbers = st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    codes = np.array(data.draw(st.lists(numbers, min_size=rows * columns, max_size=rows * columns)), np.int8).reshape(rows, columns)
    words = pack_words(codes, bits)
    assert words.dtype == np.int32 and words.shape == (rows, -(-columns * bits // 32))
    for row, held in zip(codes, words, strict=True):
        stream = sum(int(word) % 2**32 << 32 * number for number, word in enumerate(held))
        assert [(stream >> bits * i) % 2**bits - 2 ** (bits - 1) for i in range(columns)] == row.tolist()
        assert stream >> bits * columns == 0
    assert np.array_equal(unpack_words(words, bits, columns), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_packing_equals_that_of_the_compressed_tensors_library(bits):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (5, 45), dtype=torch.int8, generator=torch.Generator().manual_seed(bits))
    assert np.array_equal(pack_words(codes.numpy(), bits), helpers.pack_to_int32(codes, bits).numpy())


def test_folder_has_the_codes_and_scales_of_the_run(bert):
    run, model, _, out = bert
    tensors = load_file(out / "model.safetensors")
    quantized = quantized_layers(canonical_of(run, model))
    groups = json.loads((out / CONFIG).read_text())["quantization_config"]["config_groups"].values()
    report = {name: group for group in groups for name in group["targets"]}
    assert {"bert.encoder.layer.0.output.dense", "classifier"} < set(report) and len({row["weights"]["num_bits"] for row in groups}) > 1
    for name, group in report.items():
        layer = quantized[name]
        assert group["weights"]["num_bits"] == layer.weight_quantizer.bits
        assert group["input_activations"]["num_bits"] == layer.input_quantizer.bits
        shape = tensors[f"{name}.weight_shape"].tolist()
        codes = unpack_words(tensors[f"{name}.weight_packed"].numpy(), layer.weight_quantizer.bits, shape[1])
        assert np.array_equal(codes, codes_of(layer).numpy()) and f"{name}.weight" not in tensors


# Loading by transformers


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of each family, created on first use: (kind, whether it has groups) -> run, network, data."""
    groups = {False: {}, True: {"group": 8, "weight_bits": (3,), "budget": None}}
    return functools.cache(lambda kind, grouped: run_of(kind, tmp_path_factory.mktemp("run"), **groups[grouped]))


@pytest.mark.parametrize("embeddings", [False, True], ids=["", "packed embeddings"])
@pytest.mark.parametrize("grouped", [False, True], ids=["mixed", "groups"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_transformers_computes_the_evaluated_outputs(kind, grouped, embeddings, runs, tmp_path):
    pytest.importorskip("compressed_tensors")
    run, model, data = runs(kind, grouped)
    report = export_folder(run, tmp_path / "out", model=model, embeddings=embeddings)
    verdict = verify_folder(run, tmp_path / "out", model=model, data=data)
    assert verdict["ok"] and verdict["simulation"]["largest_difference"] < 1e-5 * verdict["simulation"]["largest_output"]
    quantized = [layer for layer in quantized_layers(canonical_of(run, model)).values() if layer.weight_quantizer is not None]
    assert report["packed"] + len(report["dense"]) == len(quantized)
    if kind in ("bert", "llama"):  # every linear is packed, and embeddings on request
        assert all("embed" in name for name in report["dense"]) and bool(report["dense"]) != embeddings
    if kind == "gpt2":  # its layers are not nn.Linear in transformers
        assert "transformer.h.0.attn.c_attn" in report["dense"]


def canonical_of(run, model):
    return opened(run, model)[0].model


def test_loaded_model_quantizes_inputs(bert):
    pytest.importorskip("compressed_tensors")
    run, model, data, out = bert
    batches, canonical = list(data.batches(8)), canonical_of(run, model)
    simulated, there = outputs_of(canonical, batches), outputs_of(loaded_folder(out, canonical), batches)
    for layer in quantized_layers(canonical).values():
        layer.input_quantizer = None
    without = outputs_of(canonical, batches)
    assert (there - simulated).abs().max() < 0.02 * (without - simulated).abs().max()


def test_reports_attention_products_and_inputs_of_unpacked_layers(tmp_path):
    run, model, _ = run_of("vit", tmp_path, activation_bits=(8,))
    report = export_folder(run, tmp_path / "out", model=model)
    products = {name for name in quantized_layers(canonical_of(run, model)) if name.endswith(("scores", "mixture"))}
    assert set(report["float_inputs"]) == products | {"vit.embeddings.patch_embeddings.projection"}
    assert report["dense"] == ["vit.embeddings.patch_embeddings.projection"]


def test_pruned_layer_is_stored_as_one_bit_zeros(bert):
    run, model, _, _ = bert
    canonical, name = opened(run, model)[0], "bert.encoder.layer.0.output.dense"
    fill(canonical.model.get_submodule(name), Pruned(), None)
    expected = packed(canonical, own_network(canonical.model))
    words = expected.tensors[f"{name}.weight_packed"]
    assert words.numel() == 16  # 16 rows of 24 inputs, 24 bits
    assert not unpack_words(words.numpy(), 1, 24).any()
    groups = expected.quantization["config_groups"].values()
    assert [group["weights"]["num_bits"] for group in groups if name in group["targets"]] == [1]


def test_pruned_layer_loads_as_zeros(bert, tmp_path):
    pytest.importorskip("compressed_tensors")
    run, model, data, _ = bert
    canonical, file = opened(run, model)
    fill(canonical.model.get_submodule("bert.encoder.layer.0.output.dense"), Pruned(), None)
    _write(tmp_path, *_exported(canonical, file, embeddings=False), file)
    batches = list(data.batches(8))
    simulated, there = outputs_of(canonical.model, batches), outputs_of(loaded_folder(tmp_path, canonical.model), batches)
    assert (there - simulated).abs().max() < 0.02 * simulated.abs().max()


# Contents that differ from the run


@pytest.mark.parametrize("tensor_name", ["weight_packed", "weight_scale", "input_zero_point", "bias"])
def test_verify_names_the_layer_of_one_changed_number(tensor_name, copied):
    run, model, data, out = copied
    key = f"bert.encoder.layer.0.output.dense.{tensor_name}"
    tensors = load_file(out / "model.safetensors")
    tensors[key].view(-1)[0] += 1
    rewrite(out, tensors)
    verdict = verify_folder(run, out, model=model, data=data)
    assert not verdict["ok"] and verdict["failures"] == [f"{key}: 1 of {tensors[key].numel()} stored numbers are not the run's."]
    assert "simulation" not in verdict


def rewrite(out, tensors):
    save_file(tensors, out / "model.safetensors", {"format": "pt"})


def test_verify_detects_other_tensors_and_settings(copied):
    run, model, data, out = copied
    tensors = load_file(out / "model.safetensors")
    tensors["more"] = tensors.pop("classifier.bias")
    rewrite(out, tensors)
    config = json.loads((out / CONFIG).read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 7
    (out / CONFIG).write_text(json.dumps(config))
    verdict = " ".join(verify_folder(run, out, model=model, data=data)["failures"])
    assert "classifier.bias is missing" in verdict and "more is in" in verdict and CONFIG in verdict


def test_verify_recognizes_the_folder_of_another_run(copied, tmp_path):
    _, _, _, out = copied
    run, model, data = run_of("bert", tmp_path, budget="3bit")
    assert "another run" in verify_folder(run, out, model=model, data=data)["failures"][0]


def test_rejects_folder_with_missing_files(copied):
    run, model, data, out = copied
    (out / CONFIG).unlink()
    with pytest.raises(InvalidFile, match=r"no config\.json"):
        verify_folder(run, out, model=model, data=data)


def test_existing_path_is_not_replaced(bert, tmp_path):
    run, model, _, out = bert
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    with pytest.raises(InvalidSetting, match="--overwrite"):
        export_folder(run, out, model=model)
    with pytest.raises(InvalidSetting, match="is not a folder that anybit exported"):
        export_folder(run, run, model=model, overwrite=True)
    for _ in range(4):
        export_folder(run, out, model=model, overwrite=True)
        assert {file.name: file.read_bytes() for file in out.iterdir()} == before  # identical bytes each time


def test_does_not_overwrite_user_files(copied, tmp_path):
    run, model, _, out = copied
    (out / "notes").mkdir()
    (out / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(InvalidSetting, match="holds other files"):
        export_folder(run, out, model=model, overwrite=True)
    assert (out / "notes" / "mine.txt").read_text() == "mine"
    (tmp_path / "link").symlink_to(out)
    for place in (tmp_path / "link", run / "inside"):
        with pytest.raises(InvalidSetting, match=r"is not a folder|inside a run folder"):
            export_folder(run, place, model=model, overwrite=True)


def test_damaged_folder_is_reported_and_rewritten(copied):
    run, model, data, out = copied
    content = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(content[:50])
    with pytest.raises(InvalidFile, match="Export the run again, with --overwrite"):
        verify_folder(run, out, model=model, data=data)
    export_folder(run, out, model=model, overwrite=True)
    assert (out / "model.safetensors").read_bytes() == content


def test_unwritable_folder_error_names_the_option(bert, tmp_path):
    run, model, _, _ = bert
    (tmp_path / "file").write_text("")
    with pytest.raises(AnybitError, match=r"cannot be written.*another --compressed-tensors\.$"):
        export_folder(run, tmp_path / "file" / "out", model=model)


def test_settings_are_compared_by_value_not_formatting(copied):
    run, model, data, out = copied
    config = json.loads((out / CONFIG).read_text()) | {"transformers_version": "9.9.9"}
    (out / CONFIG).write_text(json.dumps(dict(reversed(config.items())), indent=3))
    assert verify_folder(run, out, model=model, data=data)["ok"]


@pytest.mark.parametrize("name", ["special_tokens_map.json", "adapter_config.json"])
def test_verify_names_extra_files_that_transformers_may_read(name, copied):
    run, model, data, out = copied
    (out / name).write_text("{}")
    assert verify_folder(run, out, model=model, data=data)["failures"] == [
        f"{name} did not come with the network, and transformers may read it. Remove it."
    ]


def test_rejects_folder_of_another_kind(bert, tmp_path):
    run, model, data, _ = bert
    with pytest.raises(InvalidFile, match="is not a folder that anybit exported"):
        verify_folder(run, folder("bert", tmp_path / "net"), model=model, data=data)


def test_missing_loader_is_skipped_by_name(bert, monkeypatch):
    def missing(path, model):
        raise ImportError("a package is missing")

    run, model, data, out = bert
    monkeypatch.setattr("anybit.sources.huggingface.folder.loaded_folder", missing)
    verdict = verify_folder(run, out, model=model, data=data)
    assert verdict["ok"] and "a package is missing" in verdict["skipped"]["outputs"] and "simulation" not in verdict


@pytest.mark.parametrize("samples", [0, -3])
def test_rejects_too_few_samples(samples, bert):
    run, model, data, out = bert
    with pytest.raises(InvalidSetting, match=f"--samples={samples}"):
        verify_folder(run, out, model=model, data=data, samples=samples)


def test_rejects_exported_folder_as_float_network(bert):
    _, _, _, out = bert
    with pytest.raises(InvalidSetting, match="already quantized"):
        load_model(f"hf:{out}")
    with pytest.raises(InvalidSetting, match=r"there is no folder .*moved"):
        load_model(f"hf:{out / 'moved'}")


def test_rejects_network_outside_transformers_and_leaves_nothing(tmp_path):
    model = Residual().eval()
    data = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    run = anybit.calibrate(model, data, "4bit", samples=16, batch_size=8, pipeline="light", cache=False).save(tmp_path / "run")
    with pytest.raises(UnsupportedModel, match=r"Residual is not a network of transformers.*--onnx"):
        export_folder(run, tmp_path / "out", model=model)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


# The command line


def test_the_command_line_writes_and_verifies_a_folder(tmp_path, monkeypatch):
    pytest.importorskip("compressed_tensors")
    monkeypatch.chdir(tmp_path)
    folder("bert", tmp_path / "net")
    write_tsv(tmp_path / "t.tsv", 24)
    calibrate = ["calibrate", "--model", "hf:net", "--data", "t.tsv", "--samples", "24", "--pipeline", "light", "--budget", "4bit"]
    assert anybit_cli(*calibrate, "--output", "run", "--quiet").exit_code == 0
    report = anybit_cli("export", "run", "--compressed-tensors", "out")
    assert report.exit_code == 0 and "float32" in report.stdout and "scores" in report.stdout, report.stdout
    shown = anybit_cli("verify", "run", "out")
    assert shown.exit_code == 0 and shown.stdout.endswith("verified\n") and "exported, on these inputs: top1" in shown.stdout
    packed = json.loads(anybit_cli("export", "run", "--compressed-tensors", "out", "--pack-embeddings", "--overwrite", "--json").stdout)
    assert packed["dense"] == [] and packed["bytes"] == Path("out/model.safetensors").stat().st_size
    assert "not checked here" in anybit_cli("verify", "run", "out").stdout
    (tmp_path / "out" / "tokenizer.json").write_text("{}")
    broken = anybit_cli("verify", "run", "out")
    assert broken.exit_code == 1 and "tokenizer.json" in broken.stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "--onnx FILE, or --compressed-tensors FOLDER"),
        (["--onnx", "a.onnx", "--compressed-tensors", "out"], "--onnx FILE, or --compressed-tensors FOLDER"),
        (["--compressed-tensors", "out", "--tables"], "belong to --onnx"),
        (["--onnx", "a.onnx", "--pack-embeddings"], "belongs to --compressed-tensors"),
    ],
    ids=" ".join,
)
def test_rejects_contradictory_options(options, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "scheme.json").touch()
    report = anybit_cli("export", "run", *options)
    assert report.exit_code == 2 and words in report.stderr
