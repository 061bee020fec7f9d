"""Of several that write one place at once, the first goes on, and the others are told."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from commands import anybit_cli
from networks import Chain, images, make

import anybit
from anybit.errors import InvalidSetting
from anybit.files.whole import claimed
from anybit.runs.folder import new_folder


def in_a_thread(work):
    """Run `work` in another thread, and return or raise what it does."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


@pytest.mark.parametrize("verb", ["calibrate", "grow", "train"])
def test_second_of_two_verbs_on_one_output_is_told_of_the_first(here, verb):
    """It said that the checkpoint was not as written, or that the folder holds a finished run."""
    inputs = ["--data" if verb == "calibrate" else "--train", "x.npz", *(["--budget", "4bit"] if verb != "train" else [])]
    with claimed(here / "deep" / "run", "--output"):
        done = in_a_thread(lambda: anybit_cli(verb, "--model", "m.py:net", *inputs, "--output", "deep/run"))
        assert done.exit_code == 2 and "is writing deep/run. Wait until it is done, or choose another --output" in done.stderr
    assert not Path("deep").exists()


@pytest.mark.parametrize("verb", [anybit.grow, anybit.train])
def test_second_of_two_trainings_on_one_checkpoint_is_told_of_the_first(here, verb):
    model, data = make(Chain), (images(8), torch.arange(8) % 5)
    told = pytest.raises(InvalidSetting, match=r"is writing kept\. Wait until it is done, or choose another checkpoint=")
    with claimed(here / "kept", "--checkpoint"), told:
        in_a_thread(lambda: verb(model, data, checkpoint="kept"))
    assert not Path("kept").exists() and not list(here.glob(".*"))


def test_trainings_at_once_end_right_or_are_told_why(here):
    model, data = make(Chain), (images(16), torch.arange(16) % 5)

    def grown(_):
        try:
            return anybit.grow(model, data, "4bit", epochs=3, batch_size=8, checkpoint="kept").scheme
        except InvalidSetting as error:
            return str(error)

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(grown, range(3)))
    schemes = [one for one in results if not isinstance(one, str)]
    assert schemes and all(one == schemes[0] for one in schemes)
    assert all("is writing kept" in one for one in results if isinstance(one, str))


def test_claims_are_kept_while_their_owner_lives(tmp_path):
    place = tmp_path / "run"
    with claimed(place, "--output"), claimed(place, "--output"):  # by the same work again
        with pytest.raises(InvalidSetting, match="is writing"):
            in_a_thread(lambda: claimed(place, "--output").__enter__())
        with new_folder(place, overwrite=True) as draft:
            (draft / "report.json").write_text("{}")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    (tmp_path / f".run.{'0' * 16}.anybit").mkdir()  # of a killed process
    with claimed(place, "--output"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    for impossible in (Path("/proc/run"), Path("a" * 300), Path("a\0b"), place / "report.json" / "more"):
        with claimed(impossible, "--output"):
            pass
