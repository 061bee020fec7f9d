import re
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import Chain, TwoInputs, images, make
from torch import nn
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

from anybit.data.batches import call
from anybit.errors import AnybitError, InvalidFile, InvalidInput, InvalidSetting, MissingPackage, SchemeMismatch
from anybit.sources.callables import absolute, load_callable
from anybit.sources.inputs import as_samples, compared, load_data
from anybit.sources.models import load_model, load_weights
from anybit.sources.preprocessing import Preprocessing

SCRIPT = """
import torch, networks
def net():
    return networks.make(networks.Chain).train()
def number():
    return 7
def data():
    return torch.utils.data.TensorDataset(networks.images(6), torch.arange(6))
def loader():
    return torch.utils.data.DataLoader(data(), batch_size=4)
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(SCRIPT)
    return path


def all_of(samples, size: int = 4) -> tuple[torch.Tensor, torch.Tensor | None]:
    batches = list(samples.batches(size))
    labels = None if batches[0].labels is None else torch.cat([batch.labels for batch in batches])
    return torch.cat([batch.inputs for batch in batches]), labels


def test_model_reference_names_a_function_of_a_file_or_package(script):
    for reference in (f"{script}:net", "torch.nn:Identity"):
        model = load_model(reference)
        assert isinstance(model, nn.Module) and not model.training
    assert torch.equal(load_model(f"{script}:net")(images(2)), make(Chain)(images(2)))


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("{}", "mine.py:net"), ("{}:", "cannot be read"), (":net", "cannot be read"), ("net", "timm:net"),
        ("{}:nets", "has no function 'nets'"), ("nowhere.py:net", "no file nowhere.py"), ("no_such_package:net", "no_such_package"),
        ("{}:number", "returned a int, not a torch.nn.Module"), ("math:pi", "no function 'pi'"),
    ],
)  # fmt: skip
def test_rejects_unresolvable_model_reference(reference, message, script):
    with pytest.raises(InvalidSetting, match=message.replace(".", r"\.")):
        load_model(reference.format(script))


@pytest.mark.parametrize("text", ["import no_such_thing_at_all", "def net(:", "raise KeyError('mine')"])
def test_rejects_script_that_fails_to_import_by_name(text, tmp_path):
    (tmp_path / "broken.py").write_text(text)
    with pytest.raises(AnybitError, match=r"broken\.py") as raised:
        load_model(f"{tmp_path / 'broken.py'}:net")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("package", "module"), [("timm", "timm"), ("torchvision", "torchvision"), ("pillow", "PIL")])
def test_missing_optional_package_error_gives_the_install_command(package, module, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, f"{module}.Image", raising=False)
    with pytest.raises(MissingPackage, match=f"needs {package}, .* run `pip install {package}`") as raised:
        load_data(str(tmp_path)) if package == "pillow" else load_model(f"{package}:resnet18")
    assert "\n" not in str(raised.value)


def test_every_optional_package_is_an_extra():
    root = Path(__file__).parent.parent.parent
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    offered = {re.match(r"[\w-]+", requirement)[0] for extra in ("images", "timm", "torchvision", "hf") for requirement in extras[extra]}
    used = set(re.findall(r'_optional\("[\w.]+", "([\w-]+)"', "".join(path.read_text() for path in (root / "src").rglob("*.py"))))
    assert used == offered


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_loads_weights_from_every_format(suffix, tmp_path):
    from safetensors.torch import save_file

    trained, path = make(Chain, seed=5), tmp_path / f"weights.{suffix}"
    save_file(trained.state_dict(), path) if suffix == "safetensors" else torch.save({"state_dict": trained.state_dict()}, path)
    model = make(Chain)
    load_weights(model, path)
    assert torch.equal(model(images(2)), trained(images(2)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("fc.weight"), r"lack fc\.weight"),
        (lambda s: s.update(extra=torch.ones(1)), "have additional extra"),
        (lambda s: s.update({"fc.weight": torch.ones(5, 9)}), r"differ in shape at fc\.weight"),
    ],
    ids=["lacking", "surplus", "shape"],
)
def test_rejects_weights_of_another_network_without_loading_any(change, message, tmp_path):
    state = make(Chain, seed=5).state_dict()
    change(state)
    torch.save(state, tmp_path / "weights.pt")
    model = make(Chain)
    with pytest.raises(SchemeMismatch, match=message):
        load_weights(model, tmp_path / "weights.pt")
    assert torch.equal(model.conv1.weight, make(Chain).conv1.weight)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("weights.pt", b"garbage"), ("weights.safetensors", b"garbage"), ("weights.pt", None), ("weights.pt", [1, 2]),
        ("weights.pt", "a network"),
    ],
    ids=["garbage pt", "garbage safetensors", "missing", "a list", "pickled module"],
)  # fmt: skip
def test_rejects_unreadable_weights_file_in_one_line(name, content, tmp_path):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(nn.Linear(2, 2) if content == "a network" else content, path)
    with pytest.raises((InvalidFile, SchemeMismatch), match="weights") as raised:
        load_weights(make(Chain), path)
    assert "\n" not in str(raised.value)


def test_arrays_are_read_unchanged(tmp_path):
    x, y = np.random.default_rng(0).standard_normal((6, 3, 8, 8)).astype(np.float32), np.arange(6)
    np.savez(tmp_path / "plain.npz", x=x, y=y)
    np.savez(tmp_path / "parts.npz", x_train=x, y_train=y, x_test=x[:4] + 1, y_test=y[:4])
    np.savez(tmp_path / "unlabelled.npz", x=x)
    for reference, inputs, labels in (
        ("plain.npz", x, y), ("parts.npz", x, y), ("parts.npz#test", x[:4] + 1, y[:4]), ("unlabelled.npz", x, None)
    ):  # fmt: skip
        batches, marks = all_of(load_data(str(tmp_path / reference)))
        assert np.array_equal(batches.numpy(), inputs)
        assert marks is None if labels is None else np.array_equal(marks.numpy(), labels)


def test_arrays_are_matched_to_inputs_by_name(tmp_path):
    model = make(TwoInputs)
    arrays = {"image": images(5).numpy(), "vector": np.ones((5, 4)), "y": np.arange(5)}
    np.savez(tmp_path / "named.npz", **arrays, **{f"{name}_test": array[:2] for name, array in arrays.items()}, other=np.ones(9))
    samples, tests = (load_data(f"{tmp_path / 'named.npz'}{part}", model=model) for part in ("", "#test"))
    assert (len(samples), len(tests)) == (5, 2)
    batch = next(samples.batches(3))
    assert batch.inputs["vector"].dtype == torch.float32 and torch.equal(batch.inputs["image"], images(5)[:3])
    assert batch.labels.tolist() == [0, 1, 2] and call(model, batch.inputs).shape == (3, 5)
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items() if name != "y"}
    assert torch.equal(next(as_samples(tensors).batches(3)).inputs["vector"], batch.inputs["vector"])
    with pytest.raises(InvalidInput, match=r"nor one of the network's inputs \(x\); it holds image"):
        load_data(str(tmp_path / "named.npz"), model=make(Chain))
    np.savez(tmp_path / "odd.npz", image=np.ones((3, 3, 8, 8)), vector=np.ones((2, 4)))
    with pytest.raises(InvalidInput, match="3 image and 2 vector"):
        load_data(str(tmp_path / "odd.npz"), model=model)


def test_reads_npy_file(tmp_path):
    np.save(tmp_path / "x.npy", images(4).numpy())
    assert torch.equal(all_of(load_data(str(tmp_path / "x.npy")))[0], images(4))


def test_image_arrays_are_scaled_and_normalized_as_set(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", x=x)
    preprocessing = Preprocessing(mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 4.0))
    batches, _ = all_of(load_data(str(tmp_path / "x.npz"), preprocessing))
    expected = (x / 255 - np.array([0.1, 0.2, 0.3])) / np.array([1, 2, 4])
    assert np.allclose(batches.numpy(), expected.transpose(0, 3, 1, 2), atol=1e-6)


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_independent_of_the_number_of_workers(workers, tmp_path):
    np.savez(tmp_path / "x.npz", x=images(5).numpy(), y=np.arange(5))
    batches, labels = all_of(load_data(str(tmp_path / "x.npz"), workers=workers), size=2)
    assert torch.equal(batches, images(5)) and labels.tolist() == list(range(5))


def save_image(path, colour=(10, 20, 30), size=(8, 8)):
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def test_image_folder_is_read_in_order(tmp_path):
    for index in range(3):
        save_image(tmp_path / f"{index}.png", (index * 50, 0, 255))
    batches, labels = all_of(load_data(str(tmp_path)))
    assert labels is None and batches.shape == (3, 3, 8, 8)
    assert torch.allclose(batches[:, 0, 0, 0], torch.tensor([0, 50, 100]) / 255) and (batches[:, 2] == 1).all()


@pytest.mark.parametrize(
    ("names", "labels"), [(("7", "10", "2"), [10, 2, 7]), (("dog", "ant", "cat"), [0, 1, 2])], ids=["integers", "names"]
)
def test_integer_folder_names_are_class_numbers_and_others_are_numbered_in_order(names, labels, tmp_path):
    for name in names:
        save_image(tmp_path / name / "image.png")
    assert all_of(load_data(str(tmp_path)))[1].tolist() == labels


def test_images_are_resized_as_set(tmp_path):
    from PIL import Image

    path = tmp_path / "wide.png"
    left, right = Image.new("RGB", (30, 30), (255, 0, 0)), Image.new("RGB", (30, 30), (0, 0, 255))
    wide = Image.new("RGB", (60, 30))
    wide.paste(left, (0, 0)), wide.paste(right, (30, 0))
    wide.save(path)
    squeezed, _ = all_of(load_data(str(tmp_path), Preprocessing(size=10)))
    cropped, _ = all_of(load_data(str(tmp_path), Preprocessing(size=10, resize=20, interpolation="nearest")))
    assert squeezed.shape == cropped.shape == (1, 3, 10, 10)
    assert (cropped[0, 0, :, :5] == 1).all() and (cropped[0, 2, :, 5:] == 1).all()


def test_result_is_independent_of_the_data_source(script):
    for reference in (f"{script}:data", f"{script}:loader"):
        batches, labels = all_of(load_data(reference))
        assert torch.equal(batches, images(6)) and labels.tolist() == list(range(6))


@pytest.mark.parametrize(
    "data",
    [
        (images(6), torch.arange(6)), (images(6).numpy(), np.arange(6)), TensorDataset(images(6), torch.arange(6)),
        DataLoader(TensorDataset(images(6), torch.arange(6)), batch_size=2), [(images(6)[i], i) for i in range(6)],
    ],
    ids=["tensors", "arrays", "data set", "loader", "list"],
)  # fmt: skip
def test_all_forms_of_data_give_the_same_samples(data):
    batches, labels = all_of(as_samples(data))
    assert torch.equal(batches, images(6)) and labels.tolist() == list(range(6))


def halved(items):
    return torch.stack([x for x, _ in items]) / 2, [y + 1 for _, y in items]


@pytest.mark.parametrize("workers", [0, 2])
def test_collate_function_of_a_loader_makes_the_batches(workers):
    dataset = list(zip(images(6), range(6), strict=True))
    batches, labels = all_of(as_samples(DataLoader(dataset, batch_size=2, num_workers=workers, collate_fn=halved)))
    assert torch.equal(batches, images(6) / 2) and labels.tolist() == [1, 2, 3, 4, 5, 6]


def test_collate_function_of_a_loader_determines_labels():
    words = ["a", "bb", "ccc"]  # items that only the user's function can batch
    samples = as_samples(DataLoader(words, collate_fn=lambda items: torch.tensor([[float(len(word))] for word in items])))
    assert all_of(samples)[0].tolist() == [[1], [2], [3]] and not samples.labelled
    batches, labels = all_of(as_samples(DataLoader(images(4), collate_fn=lambda items: (torch.stack(items) * 2, torch.ones(len(items))))))
    assert torch.equal(batches, 2 * images(4)) and labels.tolist() == [1, 1, 1, 1]


def test_workers_and_subset_of_a_loader_are_used():
    def init_worker(worker):
        raise RuntimeError("worker_init_fn has run")

    dataset = TensorDataset(images(6), torch.arange(6))
    samples = as_samples(DataLoader(dataset, num_workers=1, worker_init_fn=init_worker))
    assert samples.workers == 1
    with pytest.raises(InvalidInput, match="worker_init_fn has run"):
        all_of(samples)
    assert all_of(as_samples(DataLoader(dataset, sampler=SubsetRandomSampler([4, 1]))))[1].tolist() == [4, 1]


@pytest.mark.parametrize(
    "data", [images(6), images(6).numpy(), list(images(6)), images(6).requires_grad_()], ids=["tensor", "array", "list", "grad"]
)
def test_unlabelled_inputs_have_no_labels(data):
    batches, labels = all_of(as_samples(data))
    assert torch.equal(batches, images(6)) and labels is None


@pytest.mark.parametrize("data", [None, 7, {"x": 1}, b"x"], ids=["None", "number", "dict", "bytes"])
def test_rejects_other_types_as_data(data):
    with pytest.raises(InvalidInput, match=type(data).__name__):
        as_samples(data)


@pytest.mark.parametrize(
    ("arrays", "fragment", "message"),
    [
        ({"images": np.ones(3)}, "", "no array x; it holds images"),
        ({"x_train": np.ones((2, 3))}, "#test", "no array x_test"),
        ({"x": np.ones((3, 2)), "y": np.arange(2)}, "", "3 x and 2 labels"),
        ({"x": np.array([{}, {}], dtype=object)}, "", "cannot be read"),
        ({"x": np.array(["a", "b"])}, "", r"x\.npz: x holds text \(<U1\), not numbers"),
        ({"x": np.array([b"a", b"b"])}, "", "x holds bytes"),
        ({"x": np.zeros(2, "datetime64[s]")}, "", "x holds dates"),
        ({"x": np.zeros(2, "timedelta64[s]")}, "", "x holds durations"),
        ({"x": np.zeros(2, [("a", "f4"), ("b", "i4")])}, "", "x holds records of several fields"),
        ({"x": np.array(3.0)}, "", "x is a single number"),
        ({"x": np.ones((2, 3)), "y": np.array(3)}, "", "y is a single number"),
        ({"x": np.ones((2, 3)), "y": np.array(["cat", "dog"])}, "", r"y holds text .* numpy\.unique\(y, return_inverse=True\)"),
        ({"x": np.ones((2, 3)), "y": np.array([1.0, np.nan])}, "", r"y holds NaN or infinity \(1 numbers\)"),
        ({"x": np.ones((2, 3)), "y": np.array([1, 2**63], "uint64")}, "", "y holds 9223372036854775808"),
    ],
    ids=[
        "other names",
        "no test part",
        "too few labels",
        "pickled",
        "text",
        "bytes",
        "dates",
        "durations",
        "records",
        "0-d",
        "0-d labels",
        "names of classes",
        "nan",
        "uint64",
    ],
)
def test_rejects_unsuitable_array_file(arrays, fragment, message, tmp_path):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises((InvalidInput, InvalidFile), match=message) as refused:
        load_data(f"{tmp_path / 'x.npz'}{fragment}")
    assert "\n" not in str(refused.value)
    if "x" in arrays and arrays["x"].dtype != object:
        with pytest.raises(InvalidInput):
            as_samples((arrays["x"], arrays["y"]) if "y" in arrays else arrays["x"])


@pytest.mark.parametrize(
    "kind", [">f4", ">f8", "<f8", "longdouble", "float16", "int8", ">i2", "uint16", "uint64", ">i8", "clongdouble", ">c8"]
)
def test_reads_arrays_of_any_numeric_dtype_and_byte_order(kind, tmp_path):
    x = np.arange(12).reshape(4, 3)
    np.savez(tmp_path / "x.npz", x=x.astype(kind), y=np.arange(4).astype(kind if "c" not in kind else ">i4"))
    for samples in (load_data(str(tmp_path / "x.npz")), as_samples((x.astype(kind), np.arange(4, dtype=">i4")))):
        inputs, labels = all_of(samples)
        assert inputs.dtype in (torch.float32, torch.int64, torch.complex64) and np.array_equal(inputs.numpy(), x)
        assert labels.tolist() == [0, 1, 2, 3]


def test_one_hot_labels_become_class_numbers_and_others_keep_their_shape(tmp_path):
    classes = np.array([2, 0, 1, 2])
    several, pixels = np.array([[1, 1, 0], [0, 0, 0], [1, 0, 0], [0, 0, 1]]), np.zeros((4, 2, 2), int)
    for y, expected in (
        (np.eye(3)[classes], classes), (np.eye(3, dtype=bool)[classes], classes), (classes[:, None], classes), (several, several),
        (np.eye(3)[classes] * 0.5, np.eye(3)[classes] * 0.5), (pixels, pixels),
    ):  # fmt: skip
        np.savez(tmp_path / "x.npz", x=np.ones((4, 3), np.float32), y=y)
        for samples in (load_data(str(tmp_path / "x.npz")), as_samples((np.ones((4, 3), np.float32), y))):
            assert all_of(compared(nn.Linear(3, 3), samples, {}))[1].tolist() == expected.tolist()


def test_existing_path_takes_precedence_over_syntax(tmp_path):
    folder = tmp_path / "run#1"
    folder.mkdir()
    np.savez(folder / "x#test.npz", x=np.zeros((2, 3)), x_test=np.ones((3, 3)))
    assert len(load_data(str(folder / "x#test.npz"))) == 2
    assert len(load_data(f"{folder / 'x#test.npz'}#test")) == 3
    save_image(tmp_path / "images#2" / "a.png")
    assert len(load_data(str(tmp_path / "images#2"))) == 1
    assert absolute(f"{folder / 'x#test.npz'}#test") == f"{folder / 'x#test.npz'}#test"
    with pytest.raises(InvalidInput, match=r"missing\.npz"):
        load_data(f"{folder / 'missing.npz'}#test")


def test_rejects_missing_data_by_name(tmp_path):
    (tmp_path / "broken.npz").write_bytes(b"PK\3\4 broken")
    (tmp_path / "empty").mkdir()
    for name in ("missing.npz", "missing", "broken.npz", "empty"):
        with pytest.raises((InvalidInput, InvalidFile), match=name):
            load_data(str(tmp_path / name))


def test_broken_image_is_named(tmp_path):
    save_image(tmp_path / "a.png")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 no image")
    with pytest.raises(InvalidInput, match=r"broken\.jpg"):
        all_of(load_data(str(tmp_path)))


def test_images_of_several_sizes_require_resizing(tmp_path):
    save_image(tmp_path / "a.png", size=(8, 8))
    save_image(tmp_path / "b.png", size=(9, 7))
    with pytest.raises(InvalidInput, match="--size"):
        all_of(load_data(str(tmp_path)))
    assert all_of(load_data(str(tmp_path), Preprocessing(size=8)))[0].shape == (2, 3, 8, 8)


@pytest.mark.parametrize(
    "wrong",
    [{"interpolation": "linear"}, {"std": (1.0, 0.0, 1.0)}, {"size": 0}, {"size": -8}, {"resize": 0}, {"std": (float("nan"),)}],
    ids=str,
)
def test_rejects_invalid_preprocessing(wrong):
    with pytest.raises(InvalidSetting):
        Preprocessing(**wrong)


def test_preprocessing_round_trips_through_json():
    for one in (Preprocessing(), Preprocessing((0.5,), (0.2,), 32, 36, "bicubic")):
        assert Preprocessing.from_json(one.to_json()) == one


def test_sizes_do_not_apply_to_arrays(tmp_path):
    np.savez(tmp_path / "x.npz", x=images(3).numpy())
    with pytest.raises(InvalidSetting, match="--size"):
        load_data(str(tmp_path / "x.npz"), Preprocessing(size=8))


def test_importing_a_script_restores_sys_path(script):
    before = list(sys.path)
    assert callable(load_callable(f"{script}:net", "--model"))
    assert sys.path == before


def test_exception_in_a_user_function_is_one_error_that_names_it(tmp_path):
    (tmp_path / "net.py").write_text("def network(size):\n    return size\n\ndef broken():\n    raise KeyError('weights')\n")
    for name, error in (("network", "TypeError"), ("broken", "KeyError")):
        with pytest.raises(InvalidSetting, match=f"net.py:{name} failed with {error}"):
            load_model(f"{tmp_path / 'net.py'}:{name}")


def test_rejects_crop_larger_than_the_resized_image():
    with pytest.raises(InvalidSetting, match="larger resize="):
        Preprocessing(size=256, resize=224)


@pytest.mark.parametrize(
    ("names", "reference", "remedy"),
    [
        (("xt", "yt"), "a.npz", "Name the inputs x and the labels y"),
        (("xt", "yt"), "a.npz#test", "Name the inputs x and the labels y"),
        (("x_val", "y_val"), "a.npz", r"Write a\.npz#val for x_val"),
        (("x_val", "y_val"), "a.npz#test", r"Write a\.npz#val for x_val"),
    ],
)
def test_remedy_for_arrays_of_other_names_works(names, reference, remedy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("a.npz", **{name: np.zeros((4, 3), np.float32) for name in names})
    with pytest.raises(InvalidInput, match=remedy):
        load_data(reference)
