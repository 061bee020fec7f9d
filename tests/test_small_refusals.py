"""Values that are refused by name with a remedy that is true."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import anybit_cli
from networks import Chain, make
from safetensors.torch import save_file
from torch import Tensor, nn

import anybit
from anybit.budget import Budget
from anybit.data.batches import Batch
from anybit.data.options import parse_outputs
from anybit.data.outputs import output_reader
from anybit.data.texts import read_rows
from anybit.errors import InfeasibleBudget, InvalidFile, InvalidInput, InvalidSetting, UnsupportedModel
from anybit.networks.wiring import observe
from anybit.roads.settings import CalibrateSettings
from anybit.runs.folder import check_free
from anybit.sources.callables import absolute
from anybit.sources.images import ImageFolder
from anybit.sources.inputs import load_data
from anybit.sources.models import load_weights
from anybit.sources.preprocessing import Preprocessing
from anybit.sources.references import check_data, check_device, check_file, check_model

NET, X = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(8, 4)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: CalibrateSettings(samples=64.0), ("64.0 must be a whole number", "samples=64")),
        (lambda: CalibrateSettings(steps=-0.0), ("-0.0 must be a whole number",)),
        (lambda: CalibrateSettings(samples=2.5), ("2.5 must be a whole number",)),
        (lambda: Preprocessing(std=(1e-320,)), ("std", "1e-320", "from 1e-06")),
        (lambda: anybit.calibrate(NET, X, "4bit", cache=5), ("cache=5 is not a folder",)),
        (lambda: anybit.calibrate(NET, X, []), ("budget is an empty list",)),
        (lambda: anybit.allocate(anybit.calibrate, "4bit"), ("allocate reads a run folder", "result.save")),
        (lambda: check_device("cpu:99"), ("cpu:99 is not a device",)),
    ],
    ids=["float", "negative zero", "fraction", "denormal", "cache", "no budget", "result", "device"],
)
def test_values_are_refused_with_what_is_meant(call, words):
    with pytest.raises(InvalidSetting) as refused:
        call()
    assert all(word in str(refused.value) for word in words), str(refused.value)


def test_outputs_may_be_named_by_their_numbers():
    assert CalibrateSettings(outputs={0: 1.0}).outputs == {"0": 1.0}
    check_device("cpu:0")


def test_arrays_of_objects_are_refused_without_advice_to_unpickle(here):
    np.savez("o.npz", x=np.array([[1], [2, 3]], dtype=object))
    done = anybit_cli("evaluate", "--model", "m.py:net", "--data", "o.npz")
    assert done.exit_code == 2 and "holds Python objects" in done.stderr and "pickle" not in done.stderr
    with pytest.raises(InvalidInput, match="Python objects"):
        anybit.evaluate(NET, (np.array([[1], [2, 3]], dtype=object), np.arange(2)))


# References


def test_a_suggestion_never_repeats_what_was_written(here):
    for path in ("d.py", "D.XYZ", "d.xyz#test"):
        Path(path).write_text("def data(): pass")
    for path, words in {
        "d.py": "Name the function that returns the data: d.py:data",
        "D.XYZ": "Give it one of these suffixes",
        "d.xyz#test": "",
    }.items():
        with pytest.raises(InvalidInput) as refused:
            check_data(path)
        assert words in str(refused.value) and "Did you mean" not in str(refused.value)
    os.mkfifo("pipe")
    with pytest.raises(InvalidFile, match="pipe is a pipe or device, not a file"):
        check_file("pipe")
    with pytest.raises(InvalidSetting, match="meta is not a device that holds numbers") as meta:
        check_device("meta")
    assert "mtia" not in str(meta.value)


def test_suffixes_count_in_any_case(here):
    np.savez("D.npz", x=X.numpy(), y=np.arange(8) % 2)
    Path("D.npz").rename("D.NPZ")
    assert anybit.evaluate(NET, "D.NPZ") == anybit.evaluate(NET, Path("D.NPZ"))
    save_file(NET.state_dict(), "w.SAFETENSORS")
    load_weights(NET, Path("w.SAFETENSORS"))
    Path("m.py").rename("M.PY")
    Path("x.npz").rename("X.NPZ")
    Path("C.TOML").write_text("batch_size = 4")
    done = anybit_cli("evaluate", "--model", "M.PY:net", "--data", "X.NPZ", "--config", "C.TOML", "--json")
    assert done.exit_code == 0, done.stderr
    table, objects = "text\none\ntwo\n", '{"text": "one"}\n{"text": "two"}\n'
    for name, content in {"T.TXT": "one\ntwo\n", "T.JSONL": objects, "T.TSV": table, "T.CSV": table}.items():
        Path(name).write_text(content)
        check_data(name)
        assert [row["text"] for row in read_rows(Path(name))] == ["one", "two"]
        with pytest.raises(InvalidSetting, match="holds texts, which need the tokenizer"):
            load_data(name)
    with pytest.raises(InvalidSetting, match="Weights go to --weights"):
        check_model("w.SAFETENSORS")


def test_a_path_that_exists_wins_over_the_meaning_of_its_name(here):
    """A file may be called d.npz#test, or a:b.npz, whether or not d.npz is there."""
    for name, length in {"d.npz#test": 3, "t:d.npz": 5}.items():
        np.savez("saved.npz", x=X[:length].numpy(), y=np.arange(length) % 2)
        Path("saved.npz").rename(name)
    Path("t.txt#1").write_text("one\ntwo\n")
    for also in (False, True):
        if also:
            np.savez("d.npz", x=X.numpy(), x_test=X.numpy())
        check_data("t.txt#1")
        check_data("d.npz#test")
        assert len(load_data("d.npz#test")) == 3 and absolute("d.npz#test") == str(Path.cwd() / "d.npz#test")
    check_data("t:d.npz")
    assert len(load_data("t:d.npz")) == 5 and absolute("t:d.npz") == str(Path.cwd() / "t:d.npz")
    assert [row["text"] for row in read_rows(Path("t.txt#1"))] == ["one", "two"]
    quick = ["--samples", "3", "--pipeline", "light", "--no-cache"]
    for name in ("x.npz#test", "t:x.npz"):
        Path(name).write_bytes(Path("x.npz").read_bytes())
    named = ["--data", "x.npz#test", "--test", "t:x.npz", "--budget", "6bit", "--output", "run", "--json"]
    done = anybit_cli("calibrate", "--model", "m.py:net", *named, *quick)
    assert done.exit_code == 0, done.stderr


def test_a_part_of_what_has_no_parts_is_refused(here):
    """It was once read whole: training and test data were the same."""
    Path("images/test").mkdir(parents=True)
    Path("t.txt").write_text("one\ntwo\n")
    np.save("x.npy", X.numpy())
    for path, advice in {"images": "or the folder images/test", "t.txt": "Name t.txt alone.", "x.npy": "Name x.npy alone."}.items():
        for check in (check_data, load_data):
            with pytest.raises(InvalidInput, match="has no parts, so #test names nothing") as refused:
                check(f"{path}#test")
            assert advice in str(refused.value)


@pytest.mark.parametrize("content", ["text", "objects"])
def test_advice_to_load_unsafely_is_not_passed_on(here, content):
    if content == "text":
        Path("w.pt").write_text("no weights")
    else:
        torch.save(NET, "w.pt")
    with pytest.raises(InvalidFile, match=r"cannot be read as a state dict: .* Save model\.state_dict\(\)") as refused:
        load_weights(NET, Path("w.pt"))
    assert "weights_only" not in str(refused.value) and "arbitrary" not in str(refused.value)


def test_a_missing_config_file_is_not_there(here):
    done = anybit_cli("inspect", "--model", "m.py:net", "--config", "none.toml")
    assert done.exit_code == 2 and "--config=none.toml is not there." in done.stderr


@pytest.mark.parametrize(
    ("file", "words"), [("c.toml", "Write weight_bits = [4]."), ("c.json", 'Write "weight_bits": [4].')], ids=["toml", "json"]
)
def test_a_correction_is_written_as_in_the_file(here, file, words):
    Path(file).write_text("weight_bits = 4" if file.endswith("toml") else '{"weight_bits": 4}')
    done = anybit_cli("inspect", "--model", "m.py:net", "--config", file)
    assert done.exit_code == 2 and words in done.stderr


def test_a_taken_output_is_named_as_what_it_is(here):
    run = Path("run")
    run.mkdir()
    (run / "report.json").touch()
    Path("link").symlink_to("run")
    with pytest.raises(InvalidSetting, match=r"link is a symbolic link to .*run\. Name that place"):
        check_free(Path("link"), overwrite=True)
    (run / "notes.txt").touch()
    with pytest.raises(InvalidSetting, match=r"run holds a run and other files \(notes.txt\). Move these away"):
        check_free(run, overwrite=True)
    (run / "checkpoint.safetensors").touch()
    with pytest.raises(InvalidSetting, match=r"run holds an unfinished training and other files \(notes.txt\)"):
        check_free(run, unfinished=True)


# Data


def test_wrong_numbers_of_channels_are_named(here):
    with pytest.raises(InvalidSetting, match="--mean has 2 numbers, and images in folders are read as RGB"):
        ImageFolder(here, Preprocessing(mean=(0.5, 0.5)))
    for channels, words in ((1, "Give grey images"), (3, "Give images of three channels")):
        with pytest.raises(InvalidInput, match=words):
            observe(nn.Sequential(nn.Conv2d(channels, 2, 3)), Batch(torch.zeros(2, 4 - channels, 8, 8)))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
@pytest.mark.parametrize("layer", [nn.Linear(4, 2), nn.Conv1d(4, 2, 1)])
def test_integers_for_a_float_network_are_named(layer, dtype):
    inputs = torch.ones(2, 4, *([3] if isinstance(layer, nn.Conv1d) else []), dtype=dtype)
    with pytest.raises(InvalidInput, match="convert them to float32 first"):
        observe(nn.Sequential(layer), Batch(inputs))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ((X, torch.zeros(7)), "8 inputs and 7 labels. Give as many of each."),
        ((X, torch.zeros(8), torch.zeros(3)), "3 rows in element 2"),
        ((X.numpy(), np.arange(8).astype("datetime64[D]")), "labels hold dates"),
        ((X.double() * 1e300, torch.zeros(8).long()), "beyond float32's 3.4e38"),
        ([None, None], "None"),
    ],
    ids=["short", "three", "dates", "large", "nothing"],
)
def test_faulty_data_is_named_as_the_user_knows_it(data, words):
    with pytest.raises(InvalidInput) as refused:
        anybit.evaluate(NET, data)
    assert words in str(refused.value)


def test_none_stands_for_no_labels():
    y = torch.arange(8) % 2
    assert anybit.evaluate(NET, (X, y, None)) == anybit.evaluate(NET, (X, y))
    with pytest.raises(InvalidInput, match="needs labels"):
        anybit.evaluate(NET, (X, None))


def test_a_text_named_npz_is_no_file_of_arrays(here):
    Path("t.npz").write_text("text")
    with pytest.raises(InvalidFile, match=r"t.npz is not a file of arrays"):
        anybit.evaluate(NET, "t.npz")


# Outputs


class Named(nn.Module):
    """A network whose outputs have names with an equals sign; in every other pass `flips` reverses them."""

    def __init__(self, flips: bool = False):
        super().__init__()
        self.one, self.two, self.flips, self.passes = nn.Linear(4, 2), nn.Linear(4, 2), flips, 0

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.passes += 1
        outputs = {"c=1": self.one(x), "d": self.two(x)}
        return dict(reversed(outputs.items())) if self.flips and self.passes % 2 else outputs


@pytest.mark.parametrize(("text", "weight"), [("c=1", 1.0), ("c=1=1", 1.0), ("c=1=0.5", 0.5)])
def test_names_of_outputs_may_hold_equals_signs(text, weight):
    reader, _ = output_reader(Named(), [Batch(X)], parse_outputs([text]))
    assert reader is None or [(one.name, one.weight) for one in reader.outputs] == [("c=1", weight)]


def test_outputs_that_change_their_order_are_refused():
    with pytest.raises(UnsupportedModel, match=r"outputs are .* in one pass and .* in the next"):
        anybit.inspect(Named(flips=True), X, export=False)


# Suggestions and units


GROWING = ["grow", "--model", "m.py:net", "--train", "x.npz", "--output", "run"]
CALIBRATING = ["calibrate", "--model", "m.py:net", "--data", "x.npz", "--output", "run"]


@pytest.mark.parametrize("budget", ["bop=2G", "bops2G", "bops=2,1G", "latency3ms", "2G", "los=0.1", "many"])
@pytest.mark.parametrize(
    ("line", "other"),
    [(GROWING, ("bops", "latency", "loss", "drop")), (["search", "train"], ("loss", "drop"))],
    ids=["grow", "search"],
)
def test_a_suggested_budget_is_one_that_the_verb_takes(here, line, other, budget):
    Path("train").mkdir()
    Path("train/supernet.json").write_text("{}")
    more = [] if line[0] == "grow" else ["--output", "found"]
    done = anybit_cli(*line, "--budget", budget, *more)
    advice = done.stderr.partition("cannot be read.")[2]
    assert done.exit_code == 2 and advice and not any(name in advice for name in other), done.stderr


def test_grow_suggests_its_own_budgets_in_python():
    for budget in ("bop=2G", 4):
        with pytest.raises(InvalidSetting) as refused:
            anybit.grow(NET, (X, torch.arange(8) % 2), budget)
        assert "bops" not in str(refused.value).partition("Write")[2] and "4bit" in str(refused.value)


def test_an_unrelated_file_of_the_same_suffix_is_not_suggested(here):
    for name in ("pyproject.toml", "mine.toml", "settings.json"):
        Path(name).write_text("")
    for missing, meant in {"none.toml": "", "nope.toml": "", "min.toml": "mine.toml", "mine.tml": "mine.toml"}.items():
        with pytest.raises(InvalidFile) as refused:
            check_file(missing)
        assert str(refused.value).partition("is not there.")[2].strip() == (f"Did you mean {meant}?" if meant else "")


@pytest.mark.parametrize("bits", ["float", "4,float"])
def test_float_weights_are_refused_by_what_keeps_them(here, bits):
    done = anybit_cli(*CALIBRATING, "--weight-bits", bits)
    assert done.exit_code == 2 and "--keep='LAYER=float'" in done.stderr and "None" not in done.stderr


def test_the_output_whose_weight_is_out_of_range_is_named(here):
    done = anybit_cli(*CALIBRATING, "--outputs", "boxes=1", "--outputs", "scores=0")
    assert done.exit_code == 2 and "--outputs of 'scores': 0.0" in done.stderr
    with pytest.raises(InvalidSetting, match="outputs of 'scores': -1"):
        anybit.calibrate(NET, X, "4bit", outputs={"boxes": 1.0, "scores": -1})


@pytest.mark.parametrize("kind", ["M8[D]", "m8[s]", "U3", "S3"])
def test_arrays_that_hold_no_numbers_are_named_grammatically(kind):
    with pytest.raises(InvalidInput, match=r"The data: labels hold "):
        anybit.evaluate(NET, (X.numpy(), np.zeros(8, kind)))
    with pytest.raises(InvalidInput, match=r"The data: inputs hold "):
        anybit.evaluate(NET, (np.zeros((8, 4), kind), np.zeros(8, int)))


@pytest.mark.parametrize("budget", ["bops=10", "bops=20k", "bops=0.0001M", "1B", "0.5kB", "0.2%", "1bit"])
def test_a_budget_and_the_least_possible_are_in_one_unit(budget):
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
    network(torch.zeros(1, 3, 12, 12))
    with pytest.raises(InfeasibleBudget) as refused:
        anybit.calibrate(network, torch.randn(8, 3, 12, 12), budget, weight_bits=(2, 4), activation_bits=(8,), cache=False)
    found = re.search(r"needs (\S+), more than the budget of (\S+) .*raise the budget to (\S+)\.$", str(refused.value))
    assert found, str(refused.value)
    needed, limit, advised = found.groups()
    units = {re.sub(r"[\d.]", "", text) for text in (needed, limit)}
    assert len(units) == 1 and advised == needed
    assert Budget.parse(limit).conditions[0].limit == pytest.approx(Budget.parse(budget).conditions[0].limit, rel=1e-9)
    assert Budget.parse(advised).conditions[0].limit > Budget.parse(limit).conditions[0].limit


def test_a_weight_file_that_has_changed_since_a_run_is_named(here):
    quick = ["--pipeline", "light", "--solver", "none", "--weight-bits", "4,8", "--activation-bits", "8", "--samples", "12", "--no-cache"]
    torch.save(make(Chain).state_dict(), "w.pt")
    done = anybit_cli(*CALIBRATING, "--weights", "w.pt", "--budget", "6bit", *quick)
    assert done.exit_code == 0, done.stderr
    for change, words in ((1e-4, "The weights are not those"), (1.0, "The model is not the one")):
        state = make(Chain).state_dict()
        state["conv1.weight"][0, 0, 0, 0] += change
        torch.save(state, "w.pt")
        done = anybit_cli("allocate", "run", "--budget", "5bit", "--output", "other")
        assert done.exit_code == 2 and words in done.stderr
        assert f"has its weights from --weights={Path.cwd() / 'w.pt'}: restore that file" in done.stderr


def test_a_batch_of_more_inputs_than_there_are_is_refused(exported_run):
    run, file, model, data = exported_run
    with pytest.raises(InvalidSetting, match=r"batch_size=1000000000 is more than the data's 40 inputs\. Give at most batch_size=40\."):
        anybit.bench(run, file, model=model, data=data, batch_size=10**9)


def test_uint8_arrays_with_channels_second_are_refused_with_a_remedy_that_works():
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 6 * 6, 4)).eval()  # it accepts any order of the numbers
    pixels = torch.randint(0, 256, (24, 3, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()
    labels = network(torch.tensor(pixels) / 255).argmax(1)
    with pytest.raises(InvalidInput, match=r"\[24, 3, 6, 6\], as if channels came second.*transpose\(0, 2, 3, 1\)"):
        anybit.evaluate(network, (pixels, labels))
    for given in (pixels.transpose(0, 2, 3, 1), torch.tensor(pixels) / 255):
        assert anybit.evaluate(network, (given, labels))["top1"] == 100


@pytest.mark.parametrize("setting", [{"mean": (123.675, 116.28, 103.53)}, {"mean": (0.485,), "std": (58.395,)}])
def test_means_and_deviations_of_pixels_up_to_255_are_refused(setting):
    with pytest.raises(InvalidSetting, match=r"123\.675|58\.395"):
        anybit.Preprocessing(**setting)


@pytest.mark.parametrize(("text", "meant"), [("1,000kB", "1000kB"), ("3,5bit", "3.5bit"), ("1,024B", "1024B")])
def test_a_comma_in_a_budget_is_read_as_it_was_probably_meant(text, meant):
    with pytest.raises(InvalidSetting, match=rf"Did you mean {re.escape(meant)}\?"):
        Budget.parse(text)


@pytest.mark.parametrize("device", ["gpu", "GPU:0", "Cuda"])
def test_a_device_called_otherwise_by_others_is_suggested_by_its_name(device):
    with pytest.raises(InvalidSetting, match=r"Did you mean cuda\?"):
        anybit.calibrate(make(Chain), torch.randn(8, 3, 12, 12), "4bit", device=device)
