"""Reading of user data sets: any of their errors becomes one line that names the data set, the item and the exception."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader, Dataset, Subset

from anybit.errors import AnybitError, InvalidInput, some
from anybit.files.strict import in_words
from anybit.settings import LARGEST

REPAIR = "Repair the data set, or leave such samples out."


@contextmanager
def reading(what: str, remedy: str = REPAIR) -> Iterator[None]:
    """Raise InvalidInput, beginning with `what`, for an exception of user code inside the block."""
    try:
        yield
    except AnybitError:
        raise
    except (Exception, SystemExit) as error:
        message = f": {in_words(error)}" if str(error).split() else ""
        raise InvalidInput(f"{what} raises {type(error).__name__}{message.rstrip('.')}. {remedy}") from error


def name_of(dataset: Any) -> str:
    """Return the name in messages of a data set that has no reference."""
    kind = type(whole(dataset)[0])
    return "the data" if kind in (list, tuple) or kind.__module__.startswith("anybit.") else f"the data set {kind.__name__}"


class Drawn(Subset):
    """Items that anybit itself has drawn: messages number them as in the data set that the user gave."""


def given(dataset: Any) -> tuple[Any, list[int] | None]:
    """Return (the data set that the user gave, which may be a Subset; the indices of the items drawn from it, None for all)."""
    return _below(dataset, (Drawn,))


def whole(dataset: Any) -> tuple[Any, list[int] | None]:
    """Return (the data set below subsets, the indices of its items; None for all)."""
    return _below(dataset, (Drawn, Subset))


def _below(dataset: Any, kinds: tuple[type, ...]) -> tuple[Any, list[int] | None]:
    if type(dataset) not in kinds:  # a subclass may change the items
        return dataset, None
    inner, indices = _below(dataset.dataset, kinds)
    own = [int(index) for index in dataset.indices]
    return inner, own if indices is None else [indices[index] for index in own]


def length_of(dataset: Any, name: str = "") -> int:
    """Return the length of a data set. Raises InvalidInput if it has none, or an impossible one."""
    name = name or name_of(dataset)
    with reading(f"The length of {name}", "Let __len__ return the number of samples."):
        length = len(dataset)
    if length > LARGEST:
        raise InvalidInput(f"The length of {name} is {length}, and at most {LARGEST} samples are read. Let __len__ return their number.")
    return length


def item_of(dataset: Any, index: int, name: str = "", also: str = "") -> Any:
    """Return one item. Raises InvalidInput naming it, by its index and what it is `also` called, if the data set fails."""
    name = name or name_of(dataset)
    try:
        with reading(f"Item {index} of {name}{also}"):
            return dataset[index]
    except InvalidInput as error:
        if isinstance(error.__cause__, IndexError):
            raise InvalidInput(f"{str(error).removesuffix(REPAIR)}Its length is {length_of(dataset)}. {REPAIR}") from error
        raise


def elements_of(data: Iterable[Any], name: str = "") -> Iterator[Any]:
    """Yield the elements of an iterable. Raises InvalidInput with their number so far if it fails."""
    name, count = name or name_of(data), 0
    with reading(f"The iteration over {name}"):
        iterator = iter(data)
    try:
        while True:
            with reading(f"Element {count} of {name}"), _of_workers(data.num_workers if isinstance(data, DataLoader) else 0):
                element = next(iterator, iterator)
            if element is iterator:
                return
            yield element
            count += 1
    finally:
        del iterator


class OtherItem(InvalidInput):
    """A fault of the item at a `place` of a batch, to be read after its name."""

    def __init__(self, words: str, place: int):
        super().__init__(words)
        self.place = place


class Batches(Dataset):
    """Batches of a data set's items, by their number. Errors are returned, not raised: between processes, an exception would become a
    traceback."""

    def __init__(self, dataset: Any, parts: Sequence[Sequence[int]], collate: Callable[[list], Any], name: str = ""):
        self.dataset, self.indices = whole(dataset)
        data, drawn = given(dataset)
        self.numbers = (range(len(data)) if drawn is None else drawn) if data is not self.dataset else None
        self.parts, self.collate, self.name = parts, collate, name or name_of(dataset)

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, number: int) -> Any:
        part = list(self.parts[number])
        indices = part if self.indices is None else [self.indices[index] for index in part]
        try:
            items = self._items(part, indices)
            try:
                return self.collate(items)
            except OtherItem as error:
                own = f" It is item {indices[error.place]} of {self.name}{self._also(part[error.place])}."
                raise InvalidInput(f"{error}{self._different(part, indices, items) or own}") from error
            except InvalidInput as error:
                raise InvalidInput(f"{error}{self._different(part, indices, items)}") from error
        except AnybitError as error:
            return error

    def _also(self, place: int) -> str:
        """Return an item's number in the Subset that the user gave, if it is one, in parentheses after a space."""
        return "" if self.numbers is None else f" (item {self.numbers[place]} of the Subset)"

    def _items(self, part: list[int], indices: list[int]) -> Any:
        at_once = getattr(self.dataset, "__getitems__", None)
        if at_once is None:
            numbered = zip(part, indices, strict=True)
            return [item_of(self.dataset, index, self.name, self._also(place)) for place, index in numbered]
        with reading(f"{self.name}, asked for items {some([str(index) for index in indices])},"):
            return at_once(indices)

    def _different(self, part: list[int], indices: list[int], items: Any) -> str:
        """Name the first item whose parts differ from those of the first, after a space; "" if there is none."""
        if not isinstance(items, list):
            return ""
        kinds = [_parts_of(item) for item in items]
        for place, index, kind in zip(part, indices, kinds, strict=True):
            if kind != kinds[0]:
                first = f"item {indices[0]}{self._also(part[0])} is {kinds[0]}"
                return f" Of {self.name}, {first}, and item {index}{self._also(place)} is {kind}."
        return ""


def _parts_of(item: Any) -> str:
    """Describe the parts of an item by types and shapes: (Tensor [3, 8, 8], int)."""
    if isinstance(item, Mapping):
        return "{" + ", ".join(f"{key}: {_parts_of(part)}" for key, part in item.items()) + "}"
    if isinstance(item, tuple):
        return f"({', '.join(map(_parts_of, item))})"
    shape = getattr(item, "shape", None)
    return f"{type(item).__name__}{'' if shape is None else f' {list(shape)}'}"


def loaded(batches: Batches, workers: int, **options: Any) -> Iterator[Any]:
    """Yield the batches, loaded by `workers` processes. Raises InvalidInput if one of them, or user code, fails."""
    loader = DataLoader(batches, batch_size=None, collate_fn=_same, num_workers=workers, **options)
    with _of_workers(workers):
        iterator = iter(loader)
    try:
        for _ in range(len(batches)):
            with _of_workers(workers):
                batch = next(iterator)
            if isinstance(batch, AnybitError):
                raise batch
            yield batch
    finally:
        del iterator  # ends the workers now: collected later, among a traceback's frames, they take five seconds to end


def _same(batch: Any) -> Any:
    return batch


@contextmanager
def _of_workers(workers: int) -> Iterator[None]:
    """Raise InvalidInput if processes that load data fail, with the last line of the traceback that they sent."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if not workers:
            raise
        lines = [line for line in str(error).splitlines() if line.strip()]
        last = lines[-1] if lines and lines[0].startswith("Caught ") else f"{type(error).__name__}: {in_words(error)}"
        raise InvalidInput(
            f"The worker processes that load the data ({workers}) failed: {last.rstrip('.')}. Load it in the main process: --workers=0, "
            "and num_workers=0 in a DataLoader."
        ) from error.with_traceback(None)  # whose frames hold the workers
