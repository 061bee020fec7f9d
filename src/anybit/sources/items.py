"""Items of a data set: which of their parts are the network's inputs, and which is the label.

The signature of the forward decides. If two readings fit it, both are tried on the first samples; if both run, the user is asked.
"""

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from anybit.data.batches import Batch, call, evaluating, first_tensor, stacked
from anybit.data.reading import item_of, name_of, reading
from anybit.data.samples import Samples
from anybit.errors import InvalidInput, some
from anybit.networks.copies import copied
from anybit.progress import tell
from anybit.sources.models import is_transformers

LABELS = ("labels", "label", "y", "target", "targets")
"""Names of labels, as keys of items and as parameters of a forward that computes a loss."""
FIRST_LABELS = 8
"""Samples whose labels show whether they have one shape."""
Key = int | str


@dataclass(frozen=True)
class Form:
    """Split an item, or a batch from a loader's own collate_fn, into inputs and label.

    inputs  positions or keys of the inputs; None if the item itself is the input
    label   position or key of the label, or None
    target  position or key of a label that only a custom metric reads, such as a detector's boxes, or None
    named   whether a dictionary's entries are passed by name, or (False) one by one
    whole   whether the dictionary is passed to the forward as one argument
    inner   the form of a dictionary that is the only input of a tuple
    parts   names of the first item's entries or, of a tuple, its length
    names   entries of a dictionary that are read if there are any; None: all
    note    message for the user
    """

    inputs: tuple[Key, ...] | None = None
    label: Key | None = None
    target: Key | None = None
    named: bool = False
    whole: bool = False
    inner: "Form | None" = None
    parts: frozenset[Key] | int | None = field(default=None, compare=False)
    names: frozenset[Key] | None = field(default=None, compare=False)
    note: str = field(default="", compare=False)

    @property
    def with_target(self) -> "Form | None":
        """Return the form that reads the target as the label; None if there is none."""
        return None if self.target is None else replace(self, label=self.target)

    def __call__(self, item: Any) -> tuple[Any, Any]:
        """Return (inputs, label or None). Raises InvalidInput if the item lacks a part that the first has, or has one more."""
        try:
            if self._has_more(item):
                raise KeyError
            return self._split(item)
        except (IndexError, KeyError, TypeError) as error:
            kind = type(item).__name__
            held = ", ".join(map(str, item)) if isinstance(item, Mapping) else len(item) if isinstance(item, (tuple, list)) else 1
            raise InvalidInput(
                f"An item of the data, a {kind} of {held}, has other parts than the first item. Give all items the same parts."
            ) from error

    def _has_more(self, item: Any) -> bool:
        """Return whether an item has other kinds of parts than the first, or numbers that would be read if the first had them."""
        if isinstance(self.parts, int):
            return not isinstance(item, (tuple, list)) or any(map(_is_data, item[self.parts :]))
        if self.parts is None:
            return False
        if not isinstance(item, Mapping):
            return True
        more = [key for key, part in item.items() if key not in self.parts and _is_data(part)]
        return any(self.names is None or key in self.names for key in more)

    def _split(self, item: Any) -> tuple[Any, Any]:
        label = None if self.label is None else item[self.label] if self.label == self.target else _as_label(item[self.label])
        if self.inputs is None:
            return _value(item), label
        if self.inner is not None:
            return self.inner(item[self.inputs[0]])[0], label
        values = {key: _value(item[key]) for key in self.inputs}
        if self.whole:
            return (values,), label
        return (values if self.named else next(iter(values.values())) if len(values) == 1 else tuple(values.values())), label


def _value(part: Any) -> Any:
    """Return a list of numbers as a tensor, anything else unchanged, such as rows of several lengths."""
    inner = part
    while isinstance(inner, list) and inner:
        inner = inner[0]
    if isinstance(part, list) and isinstance(inner, (int, float)):
        with suppress(ValueError, TypeError, RuntimeError, OverflowError):
            return torch.as_tensor(part)
    return part


def samples_of_items(dataset: Any, workers: int, model: nn.Module | None, collate: Callable[[list], Any] = stacked) -> Samples:
    """Return samples of a data set of items, read according to the forward of `model`, and report unused parts."""
    samples, form = read_items(dataset, workers, model, collate)
    if form.note:
        tell("note", note=form.note)
    return samples


def read_items(dataset: Any, workers: int, model: nn.Module | None, collate: Callable[[list], Any] = stacked) -> tuple[Samples, Form]:
    """Return (samples of a data set of items, the form of an item). Raises InvalidInput if that is ambiguous."""
    first = item_of(dataset, 0)
    if collate is not stacked:
        with reading(f"The collate_fn of {name_of(dataset)}", "Repair it."):
            first = collate([first])
    tries = _Tries(Samples(dataset, False, workers, collate=collate), model)
    form = _with_parts(_form_of(first, tries), first, tries)
    form = _with_ragged_labels(form, tries.samples)
    unlabelled = _unlabelled_in_words(first, form)
    targets = form.with_target
    return replace(tries.samples, labelled=form.label is not None, split=form, targets=targets, unlabelled=unlabelled), form


def _with_ragged_labels(form: Form, samples: Samples) -> Form:
    """Return the form with its label also as a target if those of the first samples differ in shape, as boxes do; texts are padded."""
    if form.label is None or samples.collate is not stacked:
        return form
    shapes: set[tuple[int, ...]] = set()
    for index in range(min(FIRST_LABELS, len(samples))):
        try:
            inputs, label = form(item_of(samples.dataset, index, samples.name))
        except InvalidInput:  # reported with its number when it is read
            return form
        if not np.ndim(label) or "attention_mask" in Batch(inputs).named:
            return form
        shapes.add(tuple(np.shape(label)))
    return form if len(shapes) < 2 else replace(form, target=form.label)


def _for_metric(form: Form, place: Key, what: str) -> Form:
    """Return the form with a label that only a metric reads, which is noted."""
    note = f"{'entry' if isinstance(place, str) else 'element'} {place} of the data's items ({what}) is for a metric alone"
    return replace(form, target=place, note=f"{form.note}; {note}" if form.note else note)


def _unlabelled_in_words(first: Any, form: Form) -> str:
    """Write why items with something in the label's place have no label; "" if there is nothing."""
    if form.label is not None:
        return ""
    if form.target is not None:
        return (
            f"{'Entry' if isinstance(form.target, str) else 'Element'} {form.target} of its items is for a metric alone: give a --metric. "
        )
    places = LABELS if isinstance(first, Mapping) else range(1, len(first)) if isinstance(first, (tuple, list)) else ()
    for place in places:
        part = first.get(place, ...) if isinstance(first, Mapping) else first[place]
        name = f"{'Entry' if isinstance(first, Mapping) else 'Element'} {place} of its items"
        if isinstance(part, (str, bytes)):
            return f"{name} is text ({part[:40]!r}), not a number: numpy.unique(labels, return_inverse=True)[1] numbers texts. "
        if part is None:
            return f"{name} is None. "
    several = [str(place) for place in places if not isinstance(first, Mapping) and _is_target(first[place])]
    own = set(map(str, form.inputs or ()))
    several = [place for place in several if place not in own]
    return f"Elements {', '.join(several)} of its items may each be for a metric: keep one of them. " if len(several) > 1 else ""


def _with_parts(form: Form, first: Any, tries: "_Tries") -> Form:
    """Return the form with the parts of the first item, which later items must share."""
    if form.inner is not None:
        form = replace(form, inner=_with_parts(form.inner, first[0], tries))
    if form.inputs is None or not isinstance(first, (Mapping, tuple, list)):
        return form
    if not isinstance(first, Mapping):
        return replace(form, parts=len(first))
    takes = tries.takes
    names = None if form.whole or takes is None or takes.more_named else frozenset((*takes.parameters, *LABELS))
    return replace(form, parts=frozenset(first), names=names)


@torch.no_grad()
def runs(samples: Samples, network: nn.Module) -> bool:
    """Return whether the network runs on the first samples."""
    samples = replace(samples, workers=0, device="cpu", loading={})
    with torch.random.fork_rng(devices=[]), evaluating(network), suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batch = next(samples.subset(range(min(2, len(samples)))).batches(2))
        return isinstance(first_tensor(call(network, batch.inputs)), Tensor)
    return False


class _Tries:
    """Tries whether the network runs on its first samples, read in one form or another."""

    def __init__(self, samples: Samples, model: nn.Module | None):
        self.samples, self.model = samples, model
        self.network: nn.Module | None = None
        self.takes = None if model is None or is_transformers(model) else Signature.of(model)

    def runs(self, form: Form) -> bool:
        assert self.model is not None, "forms are tried on a network"
        self.network = self.network or copied(self.model).cpu()
        return runs(replace(self.samples, labelled=form.label is not None, split=form), self.network)


def _as_label(part: Any) -> Any:
    """Return several numbers as a tensor, anything else unchanged."""
    return _value(list(part) if isinstance(part, tuple) else part)


@dataclass(frozen=True)
class Signature:
    """The arguments of a forward: in order, those that need a value, and whether it takes more, by position or by name."""

    name: str
    parameters: Mapping[str, inspect.Parameter]
    positional: tuple[str, ...]
    required: tuple[str, ...]
    more: bool
    more_named: bool

    @classmethod
    def of(cls, model: nn.Module) -> "Signature":
        try:
            parameters = inspect.signature(model.forward).parameters
        except (TypeError, ValueError):  # a callable without a signature
            return cls(type(model).__name__, {}, (), (), True, True)
        kinds = {name: one.kind for name, one in parameters.items()}
        by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        return cls(
            type(model).__name__,
            parameters,
            tuple(name for name, kind in kinds.items() if kind in by_place),
            tuple(name for name, one in parameters.items() if one.default is one.empty and one.kind not in several),
            inspect.Parameter.VAR_POSITIONAL in kinds.values(),
            inspect.Parameter.VAR_KEYWORD in kinds.values(),
        )

    def fits(self, count: int) -> bool:
        """Return whether it accepts this many tensors by position."""
        if count < len([name for name in self.required if name in self.positional]):
            return False
        return all(map(self._takes_tensor, self.positional[:count])) and (self.more or count <= len(self.positional))

    def _takes_tensor(self, name: str) -> bool:
        one = self.parameters[name]
        switch = isinstance(one.default, (bool, int, float, str)) or one.annotation in (bool, int, float, str)
        return not switch and (name in self.required or name not in LABELS)

    def __str__(self) -> str:
        return f"{self.name}.forward({', '.join(str(one.replace(annotation=one.empty)) for one in self.parameters.values())})"


def _form_of(item: Any, tries: _Tries) -> Form:
    if isinstance(item, Mapping):
        return _form_of_dictionary(item, tries)
    if isinstance(item, (tuple, list)) and not isinstance(_value(item), Tensor):
        return _form_of_tuple(item, tries)
    return Form()


def _form_of_tuple(item: Sequence, tries: _Tries) -> Form:
    """Decide which elements are inputs. Anything but numbers, such as a path or a detector's targets, is neither input nor label."""
    if not item:
        raise InvalidInput("Items of the data are empty tuples. Give an input, or (input, label).")
    places = [place for place, part in enumerate(item) if _is_data(part) or (place == 0 and isinstance(part, Mapping))] or [0]
    if len(places) > 1 and not _is_label(item[places[-1]]) and tries.takes and not tries.takes.fits(len(places)):
        places.pop()  # several tensors that are not inputs of this forward, such as boxes and their classes
    others = [place for place in range(len(item)) if place not in places]
    form = _form_of_places(item, tries, places)
    targets = [place for place in others if _is_target(item[place])] if form.label is None else []
    target = targets[0] if len(targets) == 1 else None
    dropped = [f"{place} ({type(item[place]).__name__})" for place in others if place != target]
    form = replace(form, note=f"elements {some(dropped)} of the data's items are neither inputs nor labels" if dropped else form.note)
    return form if target is None else _for_metric(form, target, type(item[target]).__name__)


def _is_target(part: Any) -> bool:
    """Return whether a part of an item that is neither input nor label may be a label for a metric: a detector's boxes and classes."""
    return isinstance(part, (Mapping, list, tuple))


def _form_of_places(item: Sequence, tries: _Tries, places: Sequence[int]) -> Form:
    """Decide which of the elements at `places` are inputs, and whether the last is the label."""
    last = places[-1] if len(places) > 1 and _is_label(item[places[-1]]) else None
    labelled, unlabelled = Form(tuple(places[:-1]), last), Form(tuple(places))
    if isinstance(item[0], Mapping):
        inner = _form_of_dictionary(item[0], _Tries(replace(tries.samples, dataset=_Firsts(tries.samples.dataset)), tries.model))
        return Form((0,), last, inner=inner, note=inner.note)
    nested = len(places) == 2 and isinstance(item[0], (tuple, list))  # ((a, b), label)
    if last is None or tries.takes is None or nested:
        return unlabelled if last is None else labelled
    fitting = [form for form in (labelled, unlabelled) if tries.takes.fits(len(form.inputs or ()))]
    if len(fitting) == 2:
        fitting = [form for form in fitting if tries.runs(form)] or [labelled]
    if len(fitting) == 2:
        place = "".join(tries.takes.positional[len(places) - 1 :][:1]) or "an input"
        raise InvalidInput(
            f"Items of the data hold {len(places)} tensors, and {tries.takes} runs both with the last as {place} and without it. Say "
            f"which: anybit.Samples(data, labelled=False) if it is {place}, anybit.Samples(data, labelled=True) if it is the label."
        )
    return fitting[0] if fitting else labelled


class _Firsts(Sequence):
    """The first elements of another data set's items."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        return self.dataset[index][0]


def _form_of_dictionary(item: Mapping, tries: _Tries) -> Form:
    """Decide which entries the forward takes by name; if none, the dictionary itself, or the only entry on which it runs."""
    takes = tries.takes
    required = takes.required if takes else ()
    labels = [key for key in LABELS if key in item and key not in required and _is_label(item[key])]
    if len(labels) > 1:
        raise InvalidInput(
            f"Items of the data have several labels: {', '.join(labels)}. Keep one of them: [{{k: v for k, v in item.items() if k != "
            f"{labels[1]!r}}} for item in data] keeps {labels[0]!r}."
        )
    label = labels[0] if labels else None
    data = [key for key, part in item.items() if _is_data(part) and key != label and (key in required or key not in LABELS)]
    known = Signature.of(tries.model).parameters if tries.model is not None else {}
    named = tuple(key for key in data if key in known)
    if takes is None:
        return Form(named or tuple(data), label, named=True)
    if set(required) <= set(named) and (named or takes.more_named):
        return _noted(item, Form(tuple(data) if takes.more_named else named, label, named=True))
    if len(required) > 1 or not takes.fits(1):
        raise InvalidInput(_of_other_names(item, takes))
    whole = Form(tuple(data), label, whole=True)
    forms = [whole, *(Form((key,), label) for key in data)]
    running = [form for form in forms if tries.runs(form)]
    if not running and label is not None and tries.runs(everything := replace(whole, inputs=(*data, label))):
        running = [everything]
    if not running:
        raise InvalidInput(_of_other_names(item, takes))
    if len(running) > 1:
        ways = " or ".join("the dictionary itself" if form.whole else f"{form.inputs[0]!r} alone" for form in running if form.inputs)
        raise InvalidInput(
            f"Items of the data are dictionaries, and {takes} runs on {ways}. Say which: name the tensor {takes.positional[0]!r}, as "
            "the forward does, or give items that are the tensor alone."
        )
    return _noted(item, running[0])


def _of_other_names(item: Mapping, takes: Signature) -> str:
    return (
        f"Items of the data are dictionaries of {some([str(key) for key in item])}, which {takes} does not take. Name the entries as the "
        "forward names its arguments, or give items as tuples in its order."
    )


def _noted(item: Mapping, form: Form) -> Form:
    """Note a dictionary's entries that are not used, or only by a metric."""
    targets = [key for key in LABELS if key not in (form.inputs or ()) and _is_target(item.get(key))] if form.label is None else []
    left = [str(key) for key in item if key not in (form.label, *targets[:1], *(form.inputs or ()))]
    taken = some([str(key) for key in form.inputs or ()])
    note = f"entries {some(left)} of the data's items are not used: the forward receives {taken}" if left else ""
    form = replace(form, note=note)
    return _for_metric(form, targets[0], type(item[targets[0]]).__name__) if targets else form


def _is_data(part: Any) -> bool:
    """Return whether a part of an item is numbers, or tuples and lists of numbers."""
    if isinstance(part, (Tensor, bool, int, float)):
        return True
    if isinstance(part, (np.ndarray, np.generic)):
        return part.dtype.kind in "biufc"
    return isinstance(part, (tuple, list)) and len(part) > 0 and all(map(_is_data, part))


def _is_label(part: Any) -> bool:
    """Return whether a part of an item may be a label: one array of numbers."""
    return _is_data(part) and not isinstance(_as_label(part), (tuple, list))


def are_texts(part: Any) -> bool:
    """Return whether a part of the data is a list or tuple of texts, or of no values."""
    return isinstance(part, (list, tuple)) and len(part) > 0 and all(one is None or isinstance(one, (str, bytes)) for one in part)


def as_column(part: Any) -> np.ndarray | None:
    """Return a list or tuple of numbers, or of equally long lists of them, as an array; None for anything else."""
    if not isinstance(part, (list, tuple)) or not _is_data(part) or isinstance(part[0], (Tensor, np.ndarray)):
        return None
    with suppress(ValueError, OverflowError):
        array = np.asarray(part)
        return array if array.dtype.kind in "biufc" else None
    return None


def rows_of(batches: Iterable[Any]) -> list[Any]:
    """Split batches into their samples. Raises InvalidInput if the tensors of one differ in their first dimension."""
    rows: list[Any] = []
    for batch in batches:
        counts = _counts(batch)
        if not counts:
            raise InvalidInput(f"An element of the data, a {type(batch).__name__}, holds no tensor. Give tensors or arrays.")
        if len(set(counts)) != 1:
            raise InvalidInput(
                f"A batch of the data has tensors of {some([str(one) for one in counts])} samples. Give all the same number."
            )
        rows += [_row(batch, index, counts[0]) for index in range(counts[0])]
    return rows


def is_batch(element: Any) -> bool:
    """Return whether a sample could also be a batch: all its tensors have the same first dimension, and it is not one text with an
    attention_mask [T]."""
    texts = element[0] if isinstance(element, (tuple, list)) and element else element
    if isinstance(texts, Mapping) and getattr(texts.get("attention_mask"), "ndim", 0) == 1:
        return False
    return len(set(_counts(element))) == 1 and 0 not in _counts(element)


def _counts(batch: Any) -> list[int]:
    """Return the first dimension of each tensor, 0 for a single number."""
    if isinstance(batch, (Tensor, np.ndarray)):
        return [len(batch) if batch.ndim else 0]
    if isinstance(batch, (bool, int, float)):
        return [0]
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else ()
    return [count for part in parts for count in _counts(part)]


def _row(batch: Any, index: int, count: int) -> Any:
    if isinstance(batch, (Tensor, np.ndarray)):
        return batch[index]
    if isinstance(batch, Mapping):
        return {key: _row(part, index, count) for key, part in batch.items()}
    if isinstance(batch, (tuple, list)) and _counts(batch):
        return tuple(_row(part, index, count) for part in batch)
    return batch[index] if isinstance(batch, (tuple, list)) and len(batch) == count else batch
