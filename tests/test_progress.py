"""Progress of long work: shares sum to one, the bar never goes back, every stage appears, the time left is nearly right."""

import re

import pytest
from commands import anybit_cli
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Residual, images, make

import anybit
from anybit.progress import Meter, listening, plan, tell, track
from anybit.reports.bars import in_notebook, show_progress, stage_in_words
from anybit.reports.words import duration

STAGES = st.lists(st.tuples(st.sampled_from("abcdef"), st.floats(0, 100)), min_size=1, max_size=8)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@settings(max_examples=60, deadline=None)
@given(STAGES, st.data())
def test_whatever_happens_the_bar_never_goes_back_and_time_is_never_negative(stages, data):
    heard, clock = [], Clock()
    meter = Meter(heard.append, clock)
    meter.plan(stages, measured=True)
    for step in data.draw(st.lists(st.sampled_from(["enter", "unknown", "count", "inside", "reuse", "plan"]), max_size=20)):
        clock.now += data.draw(st.floats(0, 50))
        if step == "enter":
            meter.enter(data.draw(st.sampled_from("abcdef")))
        elif step == "unknown":
            meter.enter("something else")
        elif step == "count":
            meter.count(data.draw(st.integers(0, 3)), 3, "layer")
        elif step == "inside":
            meter.inside(data.draw(st.floats(0, 1)))
        elif step == "reuse":
            meter.reuse()
        else:
            meter.plan([(name, seconds * 2) for name, seconds in stages], measured=True)
    whole = [moment.whole for moment in heard]
    assert whole == sorted(whole) and whole[0] >= 0 and whole[-1] <= 1
    assert all(moment.left is None or moment.left >= 0 for moment in heard)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=8), st.floats(0.2, 5))
def test_the_time_left_is_the_truth_where_stages_are_in_proportion(seconds, factor):
    heard, clock = [], Clock()
    meter = Meter(lambda moment: heard.append((clock.now, moment)), clock)
    meter.plan([(f"stage {index}", one) for index, one in enumerate(seconds)], measured=True)
    for index, one in enumerate(seconds):
        meter.enter(f"stage {index}")
        for done in range(11):
            meter.count(done, 10)
            clock.now += one * factor / 10 * (done < 10)
    end = sum(seconds) * factor
    shares = {moment.stage: moment.share for _, moment in heard if moment.stage}
    assert sum(shares.values()) == pytest.approx(1)
    for when, moment in heard:
        if moment.whole >= 0.25 and end - when > 0.1 * end:
            assert 0.5 < moment.left / (end - when) < 2


@settings(max_examples=60, deadline=None)
@given(st.floats(0.01, 10), st.floats(0, 50), st.integers(2, 40), st.integers(1, 30))
def test_the_time_left_of_a_training_does_not_count_its_start(second, start, epochs, steps):
    """One of 4 s was said to take over an hour: proportions were read as seconds, and the start-up as the pace."""
    heard, clock = [], Clock()
    meter = Meter(lambda moment: heard.append((clock.now, moment)), clock)
    meter.plan([("observe", 5.0), ("training", 1000.0 * epochs), ("freeze", 50.0)], measured=None)
    meter.enter("observe")
    clock.now += start
    meter.enter("training")
    for epoch in range(epochs):
        meter.count(epoch, epochs, f"epoch {epoch}")
        for step in range(steps):
            meter.inside(step / steps)
            clock.now += second + start * (step == epoch == 0)
    meter.count(epochs, epochs)
    meter.enter("freeze")
    clock.now += second * steps / 20
    end, work = clock.now, epochs * steps
    ground = [(when, moment) for when, moment in heard if moment.stage == "training" and moment.left is not None]
    for when, moment in ground:
        assert 0.5 < (moment.left + 1e-9) / (end - when + 1e-9) < 2
    assert all(moment.left is None for _, moment in heard if moment.whole < 0.09)
    assert len(ground) >= 0.85 * work - 3


@pytest.mark.parametrize("verb", ["grow", "train"])
def test_no_time_left_is_said_before_the_training_has_a_pace(verb):
    data = (images(24), make(Residual)(images(24)).argmax(1))
    target = {"budget": "4bit"} if verb == "grow" else {"bits": (4, 8)}
    heard = heard_of(lambda: getattr(anybit, verb)(make(Residual), data, epochs=4, batch_size=8, **target))
    assert all(moment.left is None for moment in heard if moment.whole < 0.05)
    assert any(moment.left is not None for moment in heard) and all(moment.left < 60 for moment in heard if moment.left is not None)


def heard_of(work):
    heard = []
    with listening(heard.append):
        work()
    return heard


QUICK = {"weight_bits": (4, 8), "activation_bits": (8,), "samples": 24, "steps": 3, "cache": False}


@pytest.mark.parametrize("pipeline", ["light", "advanced"])
def test_every_stage_of_a_calibration_appears_with_its_share(pipeline, monkeypatch):
    plans, plan = [], Meter.plan
    monkeypatch.setattr(
        Meter, "plan", lambda self, stages, measured: (plans.append([seconds for _, seconds in stages]), plan(self, stages, measured))
    )
    data = (images(24), make(Residual)(images(24)).argmax(1))
    heard = heard_of(lambda: anybit.calibrate(make(Residual), data, ["6bit", "5bit"], test=data, pipeline=pipeline, **QUICK))
    begun = [moment for moment in heard if moment.begins]
    count = begun[-1].place[1]
    assert [moment.place[0] for moment in begun] == list(range(1, count + 1))  # each that was planned, in order, once
    last = {moment.place: moment.share for moment in heard if moment.left is not None}
    seconds = plans[-1]  # as corrected by the float pass that was timed
    assert last == {(place, count): pytest.approx(seconds[place - 1] / sum(seconds)) for place, _ in last} and len(last) > count / 2
    assert [moment.whole for moment in heard] == sorted(moment.whole for moment in heard)
    assert heard[-1].whole > 0.9 and any(moment.item for moment in heard if moment.stage == "sensitivity")
    assert any("held-out loss" in moment.best for moment in heard)


@pytest.mark.parametrize("verb", ["grow", "train"])
def test_every_stage_of_a_training_appears(verb):
    data = (images(24), make(Residual)(images(24)).argmax(1))
    budget = {"budget": "4bit"} if verb == "grow" else {"bits": (4, 8)}
    heard = heard_of(lambda: getattr(anybit, verb)(make(Residual), data, test=data, epochs=2, batch_size=8, **budget))
    begun = [moment for moment in heard if moment.begins]
    assert [moment.place[0] for moment in begun] == list(range(1, begun[-1].place[1] + 1))
    assert {moment.item for moment in heard if moment.stage == "training"} >= {"epoch 1", "epoch 2"}


@pytest.mark.parametrize("verb", ["search", "extract"])
def test_every_stage_of_a_search_and_an_extraction_appears(verb, folders, calibrated):
    model, inputs, _ = calibrated
    data = (inputs, model(inputs).argmax(1))
    options = {"evaluations": 12} if verb == "search" else {"polish": True, "samples": 24, "steps": 2, "test": data}
    heard = heard_of(lambda: getattr(anybit, verb)(folders["search"], data=data, budget="5bit", model=model, cache=False, **options))
    begun = [moment for moment in heard if moment.begins]
    assert [moment.place[0] for moment in begun] == list(range(1, begun[-1].place[1] + 1)) and len(begun) >= 3
    assert sum(moment.share for moment in begun) == pytest.approx(1) and heard[-1].whole > 0.9


def test_what_is_taken_up_is_said(tmp_path):
    def run():
        anybit.calibrate(make(Residual), images(24), "6bit", **{**QUICK, "cache": tmp_path / "cache"})

    assert not any(moment.reused for moment in heard_of(run))
    again = {moment.stage for moment in heard_of(run) if moment.reused}
    assert {"ranges", "sensitivity", "allocation", "edge ranges"} <= again


def test_without_a_terminal_there_is_a_line_a_stage(capsys):
    with show_progress():
        plan([("one", 1.0), ("other", 3.0)])
        for stage in ("one", "other"):
            list(track([1, 2, 3], stage))
        tell("note", note="a note: --task=labels overrides it")
    lines = capsys.readouterr().err.splitlines()
    assert [re.match(r" *\d+ %  (\d/2 \w+ \(\d+ % of the work\))", line)[1] for line in lines[:2]] == [
        "1/2 one (25 % of the work)",
        "2/2 other (75 % of the work)",
    ]
    assert lines[2:] == ["a note: task='labels' overrides it"] and not in_notebook()


def test_a_notebook_shows_the_progress_of_a_call(monkeypatch, capsys):
    from anybit.reports import bars

    monkeypatch.setattr(bars, "in_notebook", lambda: True)
    anybit.calibrate(make(Residual), images(24), "6bit", pipeline="light", **QUICK)
    assert capsys.readouterr().out.strip()


def test_durations_are_written_in_two_units_at_most():
    assert [duration(one) for one in (0.4, 59, 200, 1000, 6000)] == ["0 s", "59 s", "3 min 20 s", "17 min", "1 h 40 min"]


def test_words_of_a_stage_without_a_plan():
    heard = heard_of(lambda: list(track(["a"], "work", str)))
    assert {stage_in_words(moment) for moment in heard} == {"work"} and heard[1].item == "a"


def test_an_interrupted_verb_says_what_is_kept_and_how_to_continue(monkeypatch, tmp_path):
    def interrupted(*arguments, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr(anybit, "calibrate", interrupted, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.py").write_text("def net(): pass")
    (tmp_path / "x.npz").write_bytes(b"")
    line = ["calibrate", "--model", "m.py:net", "--data", "x.npz", "--budget", "4bit", "--output", "run"]
    monkeypatch.setattr("sys.argv", ["anybit", *line])
    done = anybit_cli(*line)
    assert done.exit_code == 130
    assert "interrupted" in done.stderr and "kept" in done.stderr and "anybit calibrate --model m.py:net" in done.stderr


def test_the_end_names_the_drop_with_its_interval():
    from anybit.reports.outcomes import drop_line

    scored = {"test": {"samples": 400, "top1": 90.0, "agreement": 96.0}, "float_test": {"samples": 400, "top1": 91.0}}
    low, high = map(float, re.search(r"drop 1.00 points \(95 % interval (\S+) to (\S+), 400 samples", drop_line(scored)).groups())
    assert low < 0 < 1 < high < 4
    assert drop_line({"test": {"loss": 1.0}}) == "" and drop_line({}) == ""
