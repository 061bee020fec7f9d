"""Image folders: every mode and orientation, classes numbered consistently, sizes within limits."""

import os

import numpy as np
import pytest
import torch
from torch import nn

import anybit
from anybit.errors import InvalidInput, InvalidSetting
from anybit.progress import listening
from anybit.roads.inputs import follow_model
from anybit.sources.images import common_classes, read_image
from anybit.sources.inputs import load_data
from anybit.sources.preprocessing import Preprocessing

Image = pytest.importorskip("PIL.Image")
RAMP = np.arange(0, 256, 8, dtype=np.uint8).reshape(4, 8)
DEEP = RAMP.astype(np.uint16) * 257


def save(path, values=RAMP, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path, **options)
    return path


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("a.png", DEEP), ("a.tif", DEEP), ("a.tif", DEEP.astype(">u2")), ("a.ppm", DEEP),
        ("a.tif", RAMP.astype(np.float32) / 255), ("a.png", np.stack([RAMP] * 3, -1)),
        ("a.png", np.stack([RAMP] * 4, -1)),
    ],
    ids=["16-bit png", "16-bit tiff", "big-endian", "16-bit ppm", "float", "rgb", "rgba"],
)  # fmt: skip
def test_image_of_any_depth_is_scaled_correctly(name, values, tmp_path):
    image = read_image(save(tmp_path / name, values), Preprocessing())
    assert torch.equal(image, torch.from_numpy(RAMP).float().expand(3, -1, -1) / 255)


def test_dark_16_bit_image_stays_dark(tmp_path):
    assert read_image(save(tmp_path / "a.png", np.full((4, 4), 200, np.uint16)), Preprocessing()).max() < 0.01


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (RAMP.astype(np.float32), "floats from 0 to 248"), (np.full((2, 2), np.nan, np.float32), "floats from nan"),
        (RAMP.astype(np.int32), "32-bit integers from 0 to 248"),
    ],
    ids=["floats", "nan", "integers"],
)  # fmt: skip
def test_rejects_image_with_unknown_maximum(values, words, tmp_path):
    with pytest.raises(InvalidInput, match=rf"a\.tif holds {words}"):
        read_image(save(tmp_path / "a.tif", values), Preprocessing())


def test_images_are_rotated_by_their_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was rotated by 90 degrees
    image = read_image(save(tmp_path / "a.png", exif=exif), Preprocessing())
    assert torch.equal(image[0] * 255, torch.from_numpy(np.rot90(RAMP, -1).copy()).float())


def labels_of(root, preprocessing=Preprocessing()):
    samples = load_data(str(root), preprocessing)
    return {path.parent.name: label for path, label in samples.dataset.items}


def test_classes_of_data_and_test_data_are_numbered_together(tmp_path):
    for name in ("train/a", "train/b", "train/c", "test/a", "test/c", "more/d"):
        save(tmp_path / name / "p.png")
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1))
    _, preprocessing, provenance = follow_model(network, None, str(tmp_path / "train"), str(tmp_path / "test"), Preprocessing(), None)
    assert labels_of(tmp_path / "train", preprocessing) == {"a": 0, "b": 1, "c": 2}
    assert labels_of(tmp_path / "test", preprocessing) == {"a": 0, "c": 2}
    assert Preprocessing.from_json(provenance["preprocessing"]).classes == ("a", "b", "c")
    with pytest.raises(InvalidInput, match=r"folders of unknown classes, d, beside a, b, c\. .*--classes"):
        load_data(str(tmp_path / "more"), preprocessing)
    _, fewer, _ = follow_model(network, None, str(tmp_path / "test"), str(tmp_path / "train"), Preprocessing(), None)
    assert fewer.classes == ("a", "b", "c")
    _, own, _ = follow_model(network, None, str(tmp_path / "test"), None, Preprocessing(classes=("c", "a")), None)
    assert labels_of(tmp_path / "test", own) == {"c": 0, "a": 1}


def test_numbered_folders_need_no_common_numbering(tmp_path):
    for name in ("train/0", "train/7", "test/7"):
        save(tmp_path / name / "p.png")
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1))
    _, preprocessing, _ = follow_model(network, None, str(tmp_path / "train"), str(tmp_path / "test"), Preprocessing(), None)
    assert preprocessing.classes is None and labels_of(tmp_path / "test", preprocessing) == {"7": 7}


def test_non_decimal_digit_is_a_name(tmp_path):
    for name in ("²", "1", "123456789012345678901234567890"):
        save(tmp_path / name / "p.png")
    assert labels_of(tmp_path) == {"1": 0, "123456789012345678901234567890": 1, "²": 2}


def notes_of(read, about="class folders"):
    notes = []
    with listening(events=lambda event, fields: notes.append(str(fields.get("note")))):
        read()
    return [note for note in notes if about in note]


@pytest.mark.parametrize(
    ("names", "numbers"),
    [
        (("0", "2", "5"), {"0": 0, "2": 2, "5": 5}),
        (("00", "01", "10"), {"00": 0, "01": 1, "10": 10}),
        (("b", "a"), {"a": 0, "b": 1}),
    ],
)
def test_folders_named_by_numbers_mean_these_classes(names, numbers, tmp_path):
    for name in names:
        save(tmp_path / name / "p.png")
    assert labels_of(tmp_path) == numbers and not notes_of(lambda: load_data(str(tmp_path)))


@pytest.mark.parametrize("names", [("0", "1", "cat"), ("-1", "0", "1"), ("0", "1", "2.0")])
def test_numbers_beside_names_are_numbered_in_sorted_order_with_one_note(names, tmp_path):
    for name in names:
        save(tmp_path / name / "p.png")
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1))
    read = []
    assert len(notes_of(lambda: read.append(labels_of(tmp_path)))) == 1
    roots = str(tmp_path), str(tmp_path)
    assert len(notes_of(lambda: labels_of(tmp_path, follow_model(network, None, *roots, Preprocessing(), None)[1]))) == 1
    assert read[0] == {name: number for number, name in enumerate(sorted(names))}


@pytest.mark.parametrize("number", ["1" + "0" * 30, str(2**63), str(10**9)])
def test_rejects_class_number_beyond_any_network(number, tmp_path):
    for name in ("0", "1", number):
        save(tmp_path / name / "p.png")
    for read in (lambda: load_data(str(tmp_path)), lambda: common_classes([str(tmp_path)])):
        with pytest.raises(InvalidInput, match=f"class folder {number}"):
            read()


def test_rejects_names_in_one_folder_and_numbers_in_the_other(tmp_path):
    for name in ("train/cat", "train/dog", "test/0", "test/1"):
        save(tmp_path / name / "p.png")
    with pytest.raises(InvalidInput, match=r"test are numbers.*train also names \(cat, dog\).*--classes"):
        common_classes([str(tmp_path / "train"), str(tmp_path / "test")])


@pytest.mark.parametrize("names", [("1", "01"), ("a/x", "b/x")], ids=["one number", "one name"])
def test_rejects_two_folders_of_one_class(names, tmp_path):
    for name in names:
        save(tmp_path / name / "p.png")
    with pytest.raises(InvalidInput, match=r"same number|same name"):
        load_data(str(tmp_path))


def test_rejects_duplicate_class_names():
    with pytest.raises(InvalidSetting, match=r"classes=\('a', 'a'\)"):
        Preprocessing(classes=("a", "a"))


def test_rejects_strip_that_resizing_would_make_gigabytes(tmp_path):
    path = save(tmp_path / "a.png", np.zeros((1, 60_000), np.uint8))
    with pytest.raises(InvalidInput, match=r"60000 x 1 pixels and would be 13440000 x 224"):
        read_image(path, Preprocessing(resize=224, size=224))
    assert read_image(path, Preprocessing(size=16)).shape == (3, 16, 16)


def test_rejects_image_larger_than_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(InvalidInput, match=r"a\.png cannot be read as an image: .*pixels"):
        read_image(save(tmp_path / "a.png"), Preprocessing())


def test_a_pipe_named_like_an_image_is_no_image(tmp_path):
    """Reading a pipe would wait forever."""
    save(tmp_path / "a" / "one.png")
    os.mkfifo(tmp_path / "a" / "zz.png")
    assert len(load_data(str(tmp_path))) == 1


def link(path, target):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def test_links_are_read_as_what_they_name(tmp_path):
    """A class folder that was a link was once left out, and the classes after it got its numbers."""
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    for name in ("b/1.png", "x/y/2.png", "3.png"):
        save(elsewhere / name)
    save(root / "c" / "p.png")
    link(root / "a", elsewhere / "b")  # a class
    link(root / "e" / "p.png", elsewhere / "3.png")  # an image
    link(root / "more", "../elsewhere/deep")  # a folder of classes, one of them a link
    link(elsewhere / "deep" / "f", "../x/y")
    save(elsewhere / "deep" / "g" / "p.png")
    link(tmp_path / "linked", root)
    for place in (root, tmp_path / "linked"):
        assert labels_of(place) == {"a": 0, "c": 1, "e": 2, "f": 3, "g": 4}
        assert common_classes([str(place)]) == ("a", "c", "e", "f", "g")
        assert len(load_data(str(place)).subset(range(5))) == 5


@pytest.mark.parametrize("target", [".", "..", "../a", ""])
def test_link_to_a_folder_that_holds_it_is_named(target, tmp_path):
    save(tmp_path / "a" / "p.png")
    link(tmp_path / "a" / "back", target or tmp_path)
    for read in (load_data, lambda place: common_classes([place])):
        with pytest.raises(InvalidInput, match=r"a/back is a link to .*, the folder that holds it\. Remove it\."):
            read(str(tmp_path))


@pytest.mark.parametrize(("name", "target"), [("b", "gone"), ("p.png", "gone"), ("b", "b"), ("a/b", "../gone"), ("v1.0", "gone")])
def test_broken_link_is_named(name, target, tmp_path):
    save(tmp_path / "a" / "p.png")
    link(tmp_path / name, target)
    for read in (load_data, lambda place: common_classes([place])):
        with pytest.raises(InvalidInput, match=rf"{name} is a link to {target}, which is not there\. Repair or remove it\."):
            read(str(tmp_path))


def test_two_names_of_one_class_folder_are_refused(tmp_path):
    save(tmp_path / "a" / "p.png")
    link(tmp_path / "b", "a")
    with pytest.raises(InvalidInput, match=r"/a and .*/b are the same folder by a link"):
        load_data(str(tmp_path))


def test_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    for name in ("a", "b"):
        save(tmp_path / name / "p.png")
    scandir = os.scandir

    def denied(path):
        if path.name == "a":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(InvalidInput, match=r"folder .*/a cannot be read: .*Permission denied"):
        load_data(str(tmp_path))


def test_folders_that_are_no_classes_are_noted(tmp_path):
    for name in ("a", "c", ".ipynb_checkpoints", "c/.thumbs"):
        save(tmp_path / name / "p.png")
    (tmp_path / "b" / "deep").mkdir(parents=True)
    (tmp_path / "b" / "p.gif").touch()
    (tmp_path / ".#p.png").symlink_to("user@host")  # an editor's lock
    notes = notes_of(lambda: load_data(str(tmp_path)), "folders below")
    assert labels_of(tmp_path) == {"a": 0, "c": 1}
    assert [note.partition(f" {tmp_path} ")[2] for note in notes] == [
        "without images are no classes: b. --classes names all classes", "are not read: .ipynb_checkpoints, c/.thumbs",
    ]  # fmt: skip
    assert labels_of(tmp_path, Preprocessing(classes=("a", "b", "c"))) == {"a": 0, "c": 2}


def test_class_folder_inside_another_leaves_images_unlabelled(tmp_path):
    for name in ("a", "a/more", "b"):
        save(tmp_path / name / "p.png")
    samples = load_data(str(tmp_path))
    assert not samples.labelled and "an image lies beside the class folders more, a/p.png: move it away" in samples.unlabelled


@pytest.mark.parametrize("option", ["size", "resize"])
def test_images_that_take_gigabytes_are_refused(tmp_path, option):
    save(tmp_path / "one.png")
    with pytest.raises(InvalidSetting, match=rf"--{option}=16384 .* 3\.0 GiB"):
        load_data(str(tmp_path), Preprocessing(**{option: 16384}))


def test_batches_of_images_that_take_gigabytes_are_refused(tmp_path):
    for index in range(20):
        save(tmp_path / f"{index}.png")
    samples = load_data(str(tmp_path), Preprocessing(size=5000)).subset(range(20))
    with pytest.raises(InvalidSetting, match="smaller --batch-size or --size"):
        next(samples.batches(128))


def reading(channels, kind="convolution"):
    """Create a network that reads images of this many channels, 4 x 8 pixels."""
    torch.manual_seed(0)
    rest = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)]
    return nn.Sequential(*([nn.Conv2d(channels, 6, 3), *rest] if kind == "convolution" else [nn.Flatten(), nn.Linear(32 * channels, 3)]))


@pytest.mark.parametrize("kind", ["convolution", "linear"])
@pytest.mark.parametrize("colour", [False, True])
def test_images_have_the_channels_that_the_network_reads(kind, colour, tmp_path):
    for at in range(4):
        values = np.stack([RAMP + at, RAMP, RAMP // 2], -1) if colour else RAMP + at
        save(tmp_path / str(at % 2) / f"{at}.PNG", values)
    one, three = (load_data(str(tmp_path), model=reading(channels, kind)) for channels in (1, 3))
    assert one.dataset[0][0].shape == (1, 4, 8) and three.dataset[0][0].shape == (3, 4, 8)
    if not colour:
        assert torch.equal(one.dataset[0][0].expand(3, -1, -1), three.dataset[0][0])
    for channels, noted in ((1, True), (3, False)):
        notes = notes_of(lambda channels=channels: anybit.evaluate(reading(channels, kind), str(tmp_path)), "converted to grey")
        assert len(notes) == noted


def test_grey_images_are_normalized_by_one_number(tmp_path):
    for at in range(4):
        save(tmp_path / f"{at}.png", RAMP + at)
    samples = load_data(str(tmp_path), Preprocessing(mean=(0.5,), std=(0.25,)), model=reading(1))
    assert torch.allclose(samples.dataset[0], (torch.from_numpy(RAMP).float() / 255 - 0.5)[None] / 0.25)
    with pytest.raises(InvalidSetting, match=r"--mean has 3 numbers, and images in folders are read as grey for this network. Give one\."):
        load_data(str(tmp_path), Preprocessing(mean=(0.5, 0.5, 0.5)), model=reading(1))
