"""Labels in all usual forms: one-hot, in lists, with ignored pixels. Labels of no task are refused with a true reason."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

import anybit
from anybit.data.tasks import guess_task, score
from anybit.errors import InvalidInput
from anybit.progress import listening

N, C = 24, 4
DRAW = torch.Generator().manual_seed(0)
X, IMAGES = torch.randn(N, 6, generator=DRAW), torch.randn(N, 1, 4, 6, generator=DRAW)
QUICK = {"pipeline": "light", "solver": "none", "bn_tuning": False, "weight_bits": (4, 8), "activation_bits": (8,), "cache": False}


def net(outputs=C):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, outputs)).eval()


def pixels(outputs=C):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, outputs, 1)).eval()


@pytest.fixture(scope="module")
def classes():
    with torch.no_grad():
        return net()(X).argmax(1)


@pytest.fixture(scope="module")
def masks():
    with torch.no_grad():
        return pixels()(IMAGES).argmax(1)


def notes_of(work):
    notes = []
    with listening(events=lambda event, fields: notes.append(str(fields.get("note", "")))):
        work()
    return " ".join(notes)


def refusal(work):
    with pytest.raises(InvalidInput) as refused:
        work()
    return str(refused.value)


@pytest.mark.parametrize("kind", [lambda *data: data, TensorDataset], ids=["arrays", "data set"])
@pytest.mark.parametrize("task", [None, "segmentation"])
def test_one_hot_masks_are_class_maps(masks, kind, task):
    one_hot = F.one_hot(masks, C).movedim(-1, 1)
    for labels in (one_hot, one_hot.float(), one_hot.bool()):
        assert anybit.evaluate(pixels(), kind(IMAGES, labels), task=task) == anybit.evaluate(pixels(), (IMAGES, masks))
    assert "f1" in anybit.evaluate(pixels(), kind(IMAGES, one_hot), task="multi-label")


def test_a_later_mask_that_is_not_one_hot_is_named(masks):
    one_hot = F.one_hot(masks, C).movedim(-1, 1)
    one_hot[20] = 0
    assert "no class or several" in refusal(lambda: anybit.evaluate(pixels(), (IMAGES, one_hot)))


class Loaded(Dataset):
    """A data set whose items are computed one by one."""

    def __init__(self, x, labels):
        self.x, self.labels = x, labels

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index], self.labels[index]


def saved(folder, x, labels):
    np.savez(folder / "data.npz", x=x.numpy(), y=labels.numpy())
    return str(folder / "data.npz")


CONTAINERS = {
    "arrays": lambda folder, *data: data,
    "file": saved,
    "tensors": lambda folder, *data: TensorDataset(*data),
    "data set": lambda folder, *data: Loaded(*data),
    "subset": lambda folder, *data: Subset(Loaded(*data), range(N)),
    "items": lambda folder, *data: list(zip(*data, strict=True)),
    "batches": lambda folder, x, labels: DataLoader(list(zip(x.split(8), labels.split(8), strict=True)), batch_size=None),
    "loader": lambda folder, *data: DataLoader(TensorDataset(*data), batch_size=5),
    "dictionaries": lambda folder, x, labels: [{"x": one, "label": label} for one, label in zip(x, labels, strict=True)],
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_rows_of_labels_are_read_alike_in_every_container(classes, container, tmp_path):
    """If all rows are one-hot they are classes, which a note says; otherwise several labels, even if the first rows are one-hot."""
    make, one_hot, expected = CONTAINERS[container], F.one_hot(classes, C), anybit.evaluate(net(), (X, classes))
    for labels in (one_hot, one_hot.float()):
        data = make(tmp_path, X, labels)
        assert anybit.evaluate(net(), data) == expected
        notes = notes_of(lambda data=data: anybit.evaluate(net(), data))
        assert "one-hot" in notes and "--task=multi-label" in notes
    assert "f1" in anybit.evaluate(net(), make(tmp_path, X, one_hot), task="multi-label")
    one_hot[20] = 1
    assert "f1" in anybit.evaluate(net(), make(tmp_path, X, one_hot))


def test_a_late_row_of_many_that_is_not_one_hot_is_refused_by_name(classes):
    x, one_hot = X.repeat(6, 1), F.one_hot(classes, C).repeat(6, 1)
    one_hot[17] = 1  # no sample that is looked at
    message = refusal(lambda: anybit.evaluate(net(), Loaded(x, one_hot)))
    assert "no class or several" in message and "multi-label" in message
    assert "f1" in anybit.evaluate(net(), Loaded(x, one_hot), task="multi-label")


def test_tests_have_as_many_labels_per_sample_as_the_data(classes):
    """Test labels that happen to be one-hot are read in the same form as those of the data."""
    several = F.one_hot(classes, C).repeat(3, 1)
    several[::2, 0] = 1
    data, one_hot = TensorDataset(X.repeat(3, 1), several), F.one_hot(classes, C)
    assert "f1" in anybit.calibrate(net(), data, "6bit", test=(X, one_hot), **QUICK).report["test"]
    assert "f1" in anybit.grow(net(), data, "6bit", test=(X, one_hot), epochs=1).report["test"]
    assert "top1" in anybit.calibrate(net(), (X, classes), "6bit", test=(X, one_hot), **QUICK).report["test"]


@pytest.mark.parametrize(("task", "key"), [("multi-label", "f1"), ("regression", "loss"), ("classification", "top1")])
def test_a_named_task_reads_one_hot_arrays_as_it_needs_them(classes, task, key):
    one_hot = F.one_hot(classes, C)
    scores = anybit.evaluate(net(), (X, one_hot), task=task)
    assert key in scores and ("top1" in scores) == (task == "classification")
    report = anybit.calibrate(net(), (X, one_hot), "6bit", test=(X, one_hot), task=task, **QUICK).report
    assert key in report["test"]


@pytest.mark.parametrize("ignored", [-100, 255])
def test_pixels_of_one_logit_may_be_ignored(ignored):
    outputs = pixels(1)(IMAGES).detach()
    labels = (outputs > 0).long()
    labels[:, :, 0] = ignored
    for form in (labels, labels[:, 0], labels.float()):
        scores = anybit.evaluate(pixels(1), TensorDataset(IMAGES, form))
        assert scores["f1"] == scores["exact"] == 100 and scores["loss"] < 1
    constant = torch.where(labels == 1, 0, labels) if ignored == -100 else torch.where(labels == 0, 1, labels)
    assert "f1" in anybit.evaluate(pixels(1), TensorDataset(IMAGES, constant))
    rest = score(outputs[:, :, 1:], labels[:, :, 1:], "multi-label")
    assert score(outputs, labels, "multi-label") == pytest.approx(rest)
    grown = anybit.grow(pixels(1), TensorDataset(IMAGES, labels), "6bit", epochs=1)
    assert grown.report["epochs"][0]["loss"] < 2
    labels[:] = ignored
    for task in (None, "multi-label"):
        assert "nothing to score" in refusal(lambda task=task: anybit.evaluate(pixels(1), TensorDataset(IMAGES, labels), task=task))


def test_masks_of_black_and_white_are_not_taken_for_ignored_pixels():
    labels = 255 * (pixels(1)(IMAGES).detach() > 0).long()
    assert "Write 1 for the foreground" in refusal(lambda: anybit.evaluate(pixels(1), TensorDataset(IMAGES, labels)))
    assert "loss" in anybit.evaluate(pixels(1), TensorDataset(IMAGES, labels), task="regression")


def test_wrong_values_of_the_right_shape_are_named(masks):
    one = masks.clone()
    one[0, 0, 0] = C
    assert "from 0 to 4, but the model has 4 classes" in refusal(lambda: anybit.evaluate(pixels(), (IMAGES, one)))
    for ignored in (-100, 255):
        assert "nothing to score" in refusal(lambda ignored=ignored: anybit.evaluate(pixels(), (IMAGES, torch.full_like(masks, ignored))))
    tokens = torch.full((N, 7), -100)
    assert guess_task(torch.randn(N, 7, 5), None, tokens).task == "token-classification"
    assert "No token has a label" in refusal(lambda: score(torch.randn(N, 7, 5), tokens, "token-classification"))


@pytest.mark.parametrize(
    "run", [anybit.evaluate, lambda model, data: anybit.calibrate(model, X, "6bit", test=data, **QUICK)], ids=["data", "test"]
)
def test_complex_labels_are_refused(classes, run):
    assert "complex" in refusal(lambda: run(net(), TensorDataset(X, classes.to(torch.complex64))))
    assert "complex" in refusal(lambda: run(net(), (X, classes.to(torch.complex64))))


def test_complex_test_labels_beside_labelled_data_are_refused(classes):
    data, test = (X.repeat(3, 1), classes.repeat(3)), (X.repeat(3, 1), classes.repeat(3).to(torch.complex64))
    assert "complex" in refusal(lambda: anybit.calibrate(net(), data, "6bit", test=test, **QUICK))


@pytest.mark.parametrize("kind", [list, tuple, np.array])
def test_lists_of_labels_are_labels(classes, kind):
    expected = anybit.evaluate(net(), (X, classes))
    assert anybit.evaluate(net(), (X, kind(classes.tolist()))) == expected
    assert anybit.evaluate(net(), (X.numpy(), kind(F.one_hot(classes, C).tolist()))) == expected
    assert anybit.calibrate(net(), X, "6bit", test=(X, kind(classes.tolist())), **QUICK).report["float_test"]["top1"] == 100


def test_lists_of_another_length_are_counted(classes):
    assert "24 inputs and 23 labels" in refusal(lambda: anybit.evaluate(net(), (X, classes.tolist()[:-1])))


def test_labels_that_fit_no_task_are_a_note_or_one_final_sentence(classes):
    data = TensorDataset(X, classes + 0.5)
    assert "labels of the data are not used" in notes_of(lambda: anybit.calibrate(net(), data, "6bit", **QUICK))
    for task in (None, "classification", "regression", "multi-label"):
        assert "task=" not in refusal(lambda task=task: anybit.evaluate(net(), data, task=task))


def test_a_task_that_the_labels_fit_is_proposed(classes):
    message = refusal(lambda: anybit.evaluate(net(), TensorDataset(X, torch.rand(N, C)), task="multi-label"))
    assert "regression" in message
    assert "loss" in anybit.evaluate(net(), TensorDataset(X, torch.rand(N, C)), task="regression")


def test_a_target_that_is_nan_is_named():
    targets = torch.randn(N, 1)
    targets[13] = torch.nan
    message = refusal(lambda: anybit.evaluate(net(1), TensorDataset(X, targets)))
    assert "labels are NaN or infinite on 1 samples, the first is 13" in message


def test_a_metric_that_exits_is_named(classes):
    def leaving(outputs, labels):
        raise SystemExit("bye")

    assert "leaving failed" in refusal(lambda: anybit.evaluate(net(), (X, classes), leaving))


@pytest.mark.parametrize("kind", [lambda *data: data, TensorDataset], ids=["arrays", "data set"])
@pytest.mark.parametrize("task", [None, "segmentation"])
def test_one_hot_masks_with_the_classes_last_are_class_maps(masks, kind, task):
    expected = anybit.evaluate(pixels(), (IMAGES, masks))
    assert anybit.evaluate(pixels(), kind(IMAGES, F.one_hot(masks, C)), task=task) == expected
    assert anybit.evaluate(pixels(), kind(IMAGES, masks[..., None]), task=task) == expected


class Rows(nn.Module):
    """Scores at each of T positions, [N, T, classes], or with the classes second."""

    def __init__(self, classes, second):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.second = nn.Linear(2, classes), second

    def forward(self, x):
        scores = self.linear(x.view(len(x), 3, 2))
        return scores.transpose(1, 2) if self.second else scores


@pytest.mark.parametrize("second", [False, True])
def test_one_hot_labels_of_places_may_have_the_classes_on_either_axis(second):
    network = Rows(4, second).eval()
    classes = network(X).argmax(1 if second else 2)
    expected = anybit.evaluate(network, (X, classes))
    for labels in (F.one_hot(classes, 4), F.one_hot(classes, 4).transpose(1, 2)):
        assert anybit.evaluate(network, (X, labels)) == expected


@pytest.mark.parametrize("second", [False, True])
def test_square_outputs_need_a_named_task(second):
    network = Rows(3, second).eval()
    classes = network(X).argmax(1 if second else 2)
    message = refusal(lambda: anybit.evaluate(network, (X, classes)))
    assert "task='token-classification'" in message and "task='segmentation'" in message
    scores = anybit.evaluate(network, (X, classes), task="segmentation" if second else "token-classification")
    assert scores.get("top1", scores.get("pixel_accuracy")) == 100


@pytest.mark.parametrize("task", [None, "regression", "multi-label"])
def test_labels_in_another_order_than_the_outputs_are_refused(task):
    for labels in (torch.rand(N, 4, 6, 3), torch.randint(0, 2, (N, 4, 6, 3), generator=DRAW).float()):
        message = refusal(lambda labels=labels: anybit.evaluate(pixels(3), (IMAGES, labels), task=task))
        assert "labels.movedim(-1, 1)" in message
    assert "loss" in anybit.evaluate(pixels(3), (IMAGES, torch.rand(N, 3, 4, 6)))


def test_masks_in_another_order_than_the_outputs_are_not_resized(masks):
    assert "labels.movedim(1, -1)" in refusal(lambda: anybit.evaluate(pixels(), (IMAGES, masks.transpose(1, 2))))

    class Last(nn.Sequential):
        def forward(self, x):
            return super().forward(x).movedim(1, -1)

    assert "outputs.movedim(-1, 1)" in refusal(lambda: anybit.evaluate(Last(*pixels()).eval(), (IMAGES, masks)))
    larger = masks.repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert "mean_iou" in anybit.evaluate(pixels(), (IMAGES, larger))


@pytest.mark.parametrize("ignored", [-100, 255])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_several_labels_may_be_ignored(ignored, dtype):
    labels = (net()(X) > 0).to(dtype)
    labels[::3, 1] = ignored
    scores = anybit.evaluate(net(), (X, labels))
    assert scores["f1"] == 100 and scores == anybit.evaluate(net(), (X, labels), task="multi-label")


@pytest.mark.parametrize("unknown", [-1, -999])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_a_negative_number_beside_zeros_and_ones_is_a_question(unknown, dtype):
    labels = (net()(X) > 0).to(dtype)
    labels[::3, 1] = unknown
    message = refusal(lambda: anybit.evaluate(net(), (X, labels)))
    assert f"0, 1 and {unknown}" in message and "write -100" in message and "task='regression'" in message
    assert "loss" in anybit.evaluate(net(), (X, labels), task="regression")
    assert "f1" in anybit.evaluate(net(), (X, torch.where(labels == unknown, -100, labels)))
