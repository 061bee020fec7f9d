"""A report's page: its contents, that it makes no requests, and that no name in it becomes markup."""

import copy
import hashlib
import json
import re
import tomllib
from base64 import b64encode
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import anybit
from anybit.errors import InvalidFile, InvalidSetting, printable
from anybit.files.strict import write_json
from anybit.networks.cost import HEADER_SLACK
from anybit.reports import figures
from anybit.reports import page as pages
from anybit.reports.charts import DASHES, SHAPES, Chart, percent_axis
from anybit.reports.words import measurement
from anybit.roads.result import save_all
from anybit.runs.records import record_of
from anybit.runs.report import write_report
from anybit.scheme import Precision

ROOT = Path(__file__).parent.parent.parent
AMOUNTS = {"weight_bits": 3.0, "bytes": 1000, "percent": 10.0, "bops": 5_000_000}
GROWN = {
    "version": 1,
    "road": "grow",
    "budget": "3bit",
    "result": AMOUNTS,
    "float_bytes": 10_000,
    "layers": {"conv": {"precision": "W3A8", "weights": 100, "macs": 5, "bytes": 40}},
    "epochs": [
        {
            "epoch": n,
            "loss": 1 / n,
            "weight_bits": 3.0,
            "layers": {"conv": 3, "kept": None},
            "soft": {"top1": 90.0},
            "frozen": {"top1": 89.0 + n},
        }
        for n in (1, 2)
    ],
    "stages": [{"stage": "training", "seconds": 3.0, "peak_bytes": 10**9}],
    "test": {"top1": 91.0, "loss": 0.3},
    "float_test": {"top1": 92.5, "loss": 0.2},
}
SUPERNET = {
    "version": 1,
    "road": "train once",
    "subnets": {"2 bits": AMOUNTS, "8 bits": AMOUNTS | {"bytes": 4000}},
    "test": {"2 bits": {"top1": 70.0}, "8 bits": {"top1": 90.0}},
    "epochs": [{"epoch": 1, "loss": 0.5}],
}
FOUND = {"scheme": {"conv": "W2A8"}, "score": 80.0, "cost": 2.0, "origin": "drawn", "measured": 79.0}
SEARCH = {
    "version": 1,
    "score": "top1",
    "quantity": "bits",
    "evaluated": [FOUND, FOUND | {"score": 70.0, "measured": None}],
    "front": [FOUND],
    "budgets": {"3bit": AMOUNTS | {"scheme": {"conv": "W2A8"}}},
    "settings": {"strategy": "uniform"},
}
"""As a page has it; in a folder it is in two files."""


@pytest.fixture(scope="session")
def plain(calibrated):
    """The report of a calibrate run, as stored in its file."""
    return json.loads(json.dumps(calibrated[2].report))


class Reader(HTMLParser):
    """The tags, headings, texts, ids, embedded data and tables of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.inside, self.headings, self.words, self.data, self.cells = [], [], [], [], {}, []
        self.references, self.ids, self.attributes = [], [], set()
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.attributes |= set(attributes)
        self.references += [attributes[key] for key in ("src", "href", "action") if key in attributes and attributes[key][:1] != "#"]
        self.ids += [attributes["id"]] if "id" in attributes else []
        if tag not in ("meta", "input"):
            self.inside.append((tag, attributes))

    def handle_endtag(self, tag):
        assert self.inside.pop()[0] == tag

    def handle_data(self, text):
        tag, attributes = self.inside[-1] if self.inside else ("", {})
        if attributes.get("type") == "application/json":
            self.data[attributes["id"]] = json.loads(text)
        elif tag not in ("script", "style"):
            self.words.append(text)
        if tag in ("h1", "h2", "h3"):
            self.headings.append((int(tag[1]), text))
        if tag in ("td", "th"):
            self.cells.append(text)


def renamed(report, names):
    """The same report with other layer names."""
    report = copy.deepcopy(report)
    new = dict(zip(report["layers"], names, strict=False))

    def other(rows):
        return {new.get(name, name): row for name, row in rows.items()}

    report["layers"], report["table"]["layers"] = other(report["layers"]), other(report["table"]["layers"])
    for row in report["schemes"]:
        row["scheme"] = other(row["scheme"])
    return report


def every_page(plain):
    """A page of each road's report, and one of all of them together."""
    reports = {"calibrate": plain, "grow": GROWN, "supernet": SUPERNET, "search": SUPERNET | {"search": SEARCH}}
    return {name: pages.run_page(report) for name, report in reports.items()} | {"all": pages.runs_page(reports)}


def test_page_makes_no_requests(plain):
    for page in every_page(plain).values():
        assert Reader(page).references == [] and "default-src 'none'" in page
        assert not re.search(r"@import|url\(|<link|https?:|fetch\(|XMLHttp|import\(", page)


def test_policy_allows_only_the_script_and_style_of_the_page(plain):
    for page in every_page(plain).values():
        policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
        assert "unsafe" not in policy and "http" not in policy
        for element in ("script", "style"):
            (text,) = re.findall(rf"<{element}>(.*?)</{element}>", page, re.DOTALL)
            assert f"{element}-src 'sha256-{b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" in policy
        assert not any(name == "style" or name.startswith("on") for name in Reader(page).attributes)


def large(plain, layers, epochs):
    """The report of a large network after a long training: `layers` layers of ten precisions each."""
    report = copy.deepcopy(plain)
    names = [f"backbone.stages.{place // 9}.blocks.{place % 9}.projection" for place in range(layers)]
    precisions = [f"W{weights}A{inputs}" for weights in (2, 3, 4, 6, 8) for inputs in (4, 8)]
    cells = {
        name: {text: {"loss": 1 / (1 + place * (1 + at)), "bytes": 100 * (1 + at), "bops": 10} for at, text in enumerate(precisions)}
        for place, name in enumerate(names)
    }
    scheme = {name: precisions[place % 10] for place, name in enumerate(names)}
    report["table"] |= {"layers": cells}
    report["layers"] = {name: {"precision": text, "weights": 1000, "bytes": 500} for name, text in scheme.items()}
    report["schemes"] = [row | {"scheme": scheme} for row in report["schemes"]]
    bits = [{name: 1 + (place + epoch) // 9 % 8 for place, name in enumerate(names)} for epoch in range(epochs)]
    scores = {"soft": {"top1": 50.0}, "frozen": {"top1": 40.0}}
    report["epochs"] = [{"epoch": n, "loss": 0.5, "weight_bits": 4.0, "layers": row, **scores} for n, row in enumerate(bits)]
    return report


def test_page_of_a_large_network_is_small(plain, run_folder):
    assert (run_folder / "report.html").stat().st_size < 100_000
    report = large(plain, layers=200, epochs=100)
    for page in (pages.run_page(report), pages.runs_page({f"run {number}": large(plain, 100, 60) for number in range(5)})):
        assert len(page.encode()) <= 1_500_000
    scheme = {name: "W4A8" for name in report["layers"]}
    search = SEARCH | {"evaluated": [FOUND | {"cost": float(at), "scheme": scheme} for at in range(600)]}
    page = pages.run_page(SUPERNET | {"search": search})
    assert len(page.encode()) <= 1_500_000 and page.count(" ".join(scheme.values())) == 600


def test_headings_are_in_order_and_ids_unique(plain):
    for name, page in every_page(plain).items():
        read = Reader(page)
        levels = [level for level, _ in read.headings]
        assert levels[0] == 1 and levels.count(1) == 1, name
        assert all(after <= before + 1 for before, after in pairwise(levels)), name
        assert len(set(read.ids)) == len(read.ids) and read.inside == []


def test_every_table_has_a_caption_and_every_chart_a_table(plain):
    for page in every_page(plain).values():
        assert page.count("<table") == page.count("<caption>") > 0
        for section in page.split("<section")[1:]:
            assert "<figure" not in section or "<table" in section


def charts_in(value):
    """All charts of a page."""
    if isinstance(value, Chart):
        yield value
    for one in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ():
        yield from charts_in(one)


def charts_of(report):
    return [chart for chart in charts_in(pages._of_one(record_of(report))) if chart.series]


def test_every_chart_is_on_its_page_and_within_its_area(plain):
    count = 0
    for report in (plain, GROWN, SUPERNET | {"search": SEARCH}):
        page = pages.run_page(report)
        charts = charts_of(report)
        assert [chart.key for chart in charts] == re.findall(r'<figure class="chart" id="([\w-]+)"', page)
        for chart in charts:
            for series in chart.series:
                marks, boxes, lines = list(chart.marks(series)), list(chart.boxes(series)), list(chart.lines(series))
                assert marks or boxes, (chart.key, series.name)
                corners = [(left + more * width, top + more * height) for left, top, width, height, _ in boxes for more in (0, 1)]
                corners += [tuple(map(float, corner.split(","))) for line in lines for corner in line.split()]
                assert all(-0.01 <= place <= 100.01 for place in sum([corner[:2] for corner in [*marks, *corners]], ()))
                count += 1
    assert count >= 12


def test_page_defines_every_shape_and_dash(plain):
    for page in every_page(plain).values():
        assert set(re.findall(r'href="#([\w-]+)"', page)) <= set(Reader(page).ids)
    style = (ROOT / "src/anybit/reports/page.css").read_text()
    assert all(f".{dash} {{" in style for dash in DASHES if dash != "solid")
    assert all(f'id="shape-{shape}"' in page for shape in (*SHAPES, "ring", "star", "dot"))


def test_missing_measurements_are_not_drawn(plain):
    report = copy.deepcopy(plain)
    row = next(row for row in report["schemes"] if not row["chosen"] and row["name"].startswith("uniform"))
    before = figures.loss_over_size(record_of(report))
    del row["measured"]
    after = figures.loss_over_size(record_of(report))
    drawn = [{series.name: len(list(chart.marks(series))) for series in chart.series} for chart in (before, after)]
    assert drawn[1] == drawn[0] | {"uniform, measured": drawn[0]["uniform, measured"] - 1}
    epochs = [GROWN["epochs"][0] | {"epoch": n, "soft": {"top1": 90.0} if n != 3 else {}} for n in range(1, 7)]
    soft, _ = (chart := figures.scores_over_epochs(record_of(GROWN | {"epochs": epochs}).epochs, "top1")).series
    assert [len(line.split()) for line in chart.lines(soft)] == [2, 3] and len(list(chart.marks(soft))) == 5


HOSTILE = "</script><img src=x onerror=document.title='taken'>"
STEERING = "a\x1b[31m\x9b2J\u202e\n\u200f\ud800"


@pytest.mark.parametrize(
    "name",
    [HOSTILE, "<!--<script>", "a&amp;b&lt;", "${1}`'\"", "\u2028 \ud800", "%{x}<b>bold</b>", "]]>", "{{ title }}", "__proto__", STEERING],
)
def test_no_name_becomes_markup(name, plain):
    first = next(iter(plain["layers"]))
    before = Reader(pages.run_page(renamed(plain, ["harmless"])))
    page = pages.run_page(renamed(plain, [name]))
    page.encode("utf8")
    read = Reader(page)
    assert read.tags == before.tags and HOSTILE not in page
    assert all(letter.isprintable() for letter in page.replace("\n", ""))
    assert printable(name) in read.cells and first not in read.cells
    assert read.data["budgets-data"]["layers"][0] == printable(name)


@pytest.mark.parametrize("text", [HOSTILE, STEERING[:-1]])
def test_other_user_text_does_not_become_markup(text, plain):
    report = copy.deepcopy(plain) | {"uncovered": {text: text}, "settings": {text: text}}
    report["schemes"][0]["name"] = text
    report["certificate"] |= {"solver": text, "objective": text}
    for page in (pages.run_page(report), pages.runs_page({text: report, "other": plain, "grown": GROWN | {"road": text}})):
        assert "<img" not in page and all(letter.isprintable() for letter in page.replace("\n", ""))
    for report in (plain, GROWN):
        with pytest.raises(InvalidFile, match="budget"):
            pages.run_page(report | {"budget": text})


def test_slider_has_the_schemes_of_the_table(plain):
    record = record_of(plain)
    data = pages.frontier_data(record.table, record)
    scheme = dict(zip(data["layers"], data["start"], strict=True))
    assert len(data["steps"]) > 3
    for point in [data, *data["steps"]]:
        if point is not data:
            assert scheme[data["layers"][point["layer"]]] != point["precision"]
            scheme[data["layers"][point["layer"]]] = point["precision"]
        cells = {name: plain["table"]["layers"][name][precision] for name, precision in scheme.items()}
        assert point["bytes"] == plain["table"]["fixed_bytes"] + sum(cell["bytes"] for cell in cells.values())
        assert point["loss"] == pytest.approx(plain["table"]["floor"] + sum(cell["loss"] for cell in cells.values()))
        bits = sum(plain["layers"][name]["weights"] * Precision.parse(text).stored_weight_bits for name, text in scheme.items())
        assert point["bits"] == pytest.approx(bits / plain["table"]["weights"])


def test_table_for_no_javascript_shows_the_smallest_and_largest_budget(plain):
    record = record_of(plain)
    data = pages.frontier_data(record.table, record)
    page = pages.run_page(plain)
    assert '<div class="controls" hidden>' in page
    losses = {measurement(point["loss"]) for point in (data, data["steps"][-1])}
    assert losses <= set(Reader(page).cells)


def test_uniform_schemes_are_the_measured_ones(plain):
    table = record_of(plain | {"table": plain["table"] | {"floor": 0.5}}).table
    uniforms = table.uniforms()
    measured = {row["name"]: row for row in plain["schemes"] if row["name"].startswith("uniform")}
    assert measured and set(measured) <= set(uniforms)
    for name, row in measured.items():
        assert {layer: str(precision) for layer, precision in uniforms[name].items()} == row["scheme"]
        size, loss = table.sums(uniforms[name])
        assert abs(size - row["bytes"]) <= HEADER_SLACK and loss == pytest.approx(row["predicted"] - plain["table"]["floor"] + 0.5)


def test_every_measured_scheme_is_in_the_chart_and_in_the_table(plain):
    read, chart = Reader(pages.run_page(plain)), figures.loss_over_size(record_of(plain))
    drawn = {(point.x, point.y) for series in chart.series for point in series.points}
    marks = [mark for series in chart.series for mark in chart.marks(series)]
    for row in plain["schemes"]:
        assert (row["bytes"], row["measured"]) in drawn
        assert any(x == row["bytes"] and y == pytest.approx(row["predicted"], rel=1e-9) for x, y in drawn)  # the order of summation differs
        assert (chart.x.place(row["bytes"]), round(100 - chart.y.place(row["measured"]), 2)) in {mark[:2] for mark in marks}
        assert measurement(row["measured"]) in read.cells and any(measurement(row["measured"]) in words for *_, words in marks)
    chosen = next(row for row in plain["schemes"] if row["chosen"])
    assert f"{chosen['name']} (chosen)" in read.cells
    assert {words for *_, words in marks} <= set(read.words) | {""}


def test_every_colour_has_its_own_shape_or_dash(plain):
    reports = {f"run {number}": record_of(plain) for number in range(12)}
    grown = {name: record_of(GROWN) for name in reports}
    tests = figures.tests_side_by_side(grown, "top1", "top-1")
    for chart in (figures.loss_over_size(record_of(plain)), figures.losses_side_by_side(reports), tests, figures.bits_along_network(grown)):
        looks = {}
        for series in chart.series:
            looks.setdefault((series.shape, series.is_open, series.dash), []).append((series.name, series.classes))
        assert all(len({classes for _, classes in same}) == len(same) for same in looks.values())


def test_page_names_the_next_step_of_the_most_sensitive_layer(plain):
    page = Reader(pages.run_page(plain))
    record = record_of(plain)
    worst = max(record.layers, key=lambda name: record.table.layers[name][record.layers[name].precision].loss)
    words = next(text for text in page.words if "hurts most" in text)
    assert f"{worst} at {record.layers[worst].precision} hurts most" in words


def test_times_and_memory_are_not_on_the_page(plain):
    later = plain | {"stages": [stage | {"seconds": 1e6, "peak_bytes": 1} for stage in plain["stages"]]}
    assert pages.run_page(plain) == pages.run_page(later)


@pytest.mark.parametrize(
    ("test", "before", "headline", "notes"),
    [
        ({"top1": 90.0}, {"top1": 92.5}, "Top-1 90.00 % in 1.0 kB", ["float 92.50 %; 2.50 points less"]),
        ({"top1": 92.5}, {"top1": 92.5}, "Top-1 92.50 % in 1.0 kB", ["float 92.50 %; no difference"]),
        ({"top1": 90.0}, {}, "Top-1 90.00 % in 1.0 kB", []),
        ({"spearman": 81.25}, {"spearman": 82.0}, "Spearman 81.25 in 1.0 kB", ["float 82"]),
        ({}, {}, "1.0 kB instead of 10.0 kB", ["Accuracy was not tested; give labelled data to --test."]),
    ],
)
def test_page_begins_with_accuracy_and_size_beside_float(test, before, headline, notes):
    read = Reader(pages.run_page(GROWN | {"test": test, "float_test": before}))
    assert read.headings[0][1] == headline
    answer = read.words[: read.words.index("Layers")]
    assert {"3.00", "float 10.0 kB; 10.0 % of it", *notes} <= set(answer)
    assert any("latency" in words for words in answer) is False


def test_answer_has_the_interval_of_the_drop_and_the_measured_speed():
    counts = {"top1": 90.0, "agreement": 95.0, "samples": 400.0}
    latency = {"predicted": 0.001, "exported": 0.002, "float32": 0.005}
    text = " ".join(Reader(pages.run_page(GROWN | {"test": counts, "latency": latency})).words)
    assert "95 % interval of the loss of accuracy, on 400 test samples: " in text
    assert "2 ms" in text and "float 5 ms; 2.5 times as fast" in text


def test_scores_on_held_out_inputs_stand_beside_the_float_networks(plain):
    scored = [row | {"top1": 90.0} for row in plain["schemes"]]
    ladder = [row | {"top1": 91.0} for row in plain["ladder"]]
    report = plain | {"schemes": scored, "ladder": ladder, "float_held_out": {"top1": 92.0}, "float_test": {"top1": 50.0}}
    chart = figures.accuracy_over_size(record_of(report), "top1", "top-1")
    drawn = {series.name: {point.y for point in series.points} for series in chart.series}
    assert drawn["float network"] == {92.0} and drawn["this run"] == {91.0} and 50.0 not in set.union(*drawn.values())


@pytest.mark.parametrize("values", [[99.6], [99.6, 99.6], [99.9, 100.0], [0.0, 100.0], [100.0], [55.0, 56.0]])
def test_percentages_are_on_an_axis_that_ends_at_100(values):
    axis = percent_axis("top-1", values)
    assert axis.low < min(values) and max(values) < axis.high <= 104.1 and axis.high - axis.low >= 0.5
    assert all(tick <= 100 for tick, _ in axis.ticks) and len(axis.ticks) >= 2


def test_gap_of_float_rounding_is_no_gap(plain):
    closed = plain | {"certificate": plain["certificate"] | {"value": 0.25, "bound": 0.25 - 1e-17, "gap": 4e-17}}
    text = " ".join(Reader(pages.run_page(closed)).words)
    assert "(gap 0 %), so there is none better" in text and "10⁻¹⁷" not in text


def test_page_describes_the_certificate_in_words(plain):
    text = " ".join(Reader(pages.run_page(plain)).words)
    chosen = next(row for row in plain["schemes"] if row["chosen"])
    assert "HiGHS" in text and "It proved that none within the budget reaches less" in text
    assert f"Chosen: {chosen['name']}" in text and f"on {plain['inputs']['held_out']} held-out inputs" in text
    largest = plain | {"budget": None, "certificate": {}, "schemes": []}
    assert "HiGHS" not in " ".join(Reader(pages.run_page(largest)).words)


def test_report_from_before_the_table_has_no_slider(plain):
    page = pages.run_page({key: value for key, value in plain.items() if key != "table"})
    assert Reader(page).tags.count("input") == 0 and "Size against loss" in page


def test_runs_of_all_roads_are_side_by_side(run_folder, folders, tmp_path):
    for name, report in (("grown", GROWN), ("super", SUPERNET)):
        (tmp_path / name).mkdir()
        write_report(tmp_path / name, report)
    several = tmp_path / "several"
    several.mkdir()
    for name in ("4bit", "other"):
        run_folder.joinpath("report.json").parent.rename(several / name) if name == "4bit" else None
    written = anybit.report(
        several / "4bit", tmp_path / "grown", tmp_path / "super", folders["search"], output=tmp_path / "new" / "all.html"
    )
    read = Reader(written.read_text(encoding="utf8"))
    ends = {cell.rpartition("/")[2] for cell in read.cells}
    assert {"4bit", "grown", "super, 2 bits", "super, 8 bits", "search, 5bit"} <= ends
    legend = re.search(r'id="tests">.*?</figure>', written.read_text(encoding="utf8"), re.DOTALL)[0]
    assert all(re.search(rf"[^<>]*/{name}\s*</li>", legend) for name in ("grown", "super"))
    assert [path.name for path in written.parent.iterdir()] == ["all.html"]


def test_budgets_of_one_run_share_a_slider(calibrated, tmp_path):
    result = calibrated[2]
    smaller = copy.copy(result)
    smaller.report = result.report | {"budget": "3bit"}
    save_all([result, smaller], tmp_path / "runs")
    for page in (tmp_path / "runs" / "report.html", anybit.report(tmp_path / "runs", output=tmp_path / "again.html")):
        read = Reader(page.read_text(encoding="utf8"))
        assert read.tags.count("input") == 1 and {"3bit", "4bit"} <= set(read.cells)


def test_folder_that_is_not_a_run_is_named_and_nothing_is_written(run_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    for report, message in (
        (None, "report.json is not there"),
        ([], "a list, not a JSON object"),
        ({"version": 1}, "neither a result nor subnets"),
        (GROWN | {"version": 2}, "Upgrade anybit"),
        (GROWN | {"version": True}, "version"),
        (GROWN | {"result": AMOUNTS | {"bytes": "many"}}, "result.bytes"),
        (GROWN | {"layers": {"conv": {"precision": "W9", "weights": 1, "bytes": 1}}}, "layers.conv.precision"),
    ):
        if report is not None:
            write = write_report if isinstance(report, dict) else lambda folder, text: write_json(folder / "report.json", text)
            write(tmp_path / "empty", report)
        with pytest.raises(InvalidFile, match=re.escape(message)) as error:
            anybit.report(run_folder, tmp_path / "empty", output=tmp_path / "page.html")
        assert "empty" in str(error.value)
    assert not (tmp_path / "page.html").exists()


def test_existing_page_is_replaced_only_on_request(run_folder, tmp_path, full_disk):
    page = tmp_path / "page.html"
    page.write_text("mine")
    with pytest.raises(InvalidSetting, match="overwrite=True"):
        anybit.report(run_folder, output=page)
    assert page.read_text() == "mine"
    assert anybit.report(run_folder, output=page, overwrite=True) == page and "<h1>" in page.read_text(encoding="utf8")
    with pytest.raises(InvalidSetting, match="exists"):
        anybit.report(run_folder, output=tmp_path, overwrite=True)
    with pytest.raises(anybit.AnybitError, match=r"page\.html cannot be written: .*choose another output="), full_disk():
        anybit.report(run_folder, output=page, overwrite=True)
    assert "<h1>" in page.read_text(encoding="utf8") and sorted(path.name for path in tmp_path.glob("*page*")) == ["page.html"]
    with pytest.raises(InvalidSetting, match="at least one"):
        anybit.report(output=tmp_path / "none.html")


def places(value, path=()):
    """Paths to all values in a JSON document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


WRONG = [None, True, -1, 0, 1e308, 10**30, "", "W4A8", HOSTILE, [], {}, {"a": 1}, [[]], "W0", "float"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_mutated_report_gives_a_page_or_one_error(data, plain):
    for start in (plain, GROWN, SUPERNET | {"search": SEARCH}):
        report = copy.deepcopy(start)
        path = data.draw(st.sampled_from(list(places(report))))
        place = report
        for key in path[:-1]:
            place = place[key]
        if data.draw(st.booleans()) and isinstance(place, dict):
            del place[path[-1]]
        else:
            place[path[-1]] = data.draw(st.sampled_from(WRONG))
        try:
            assert "<img" not in pages.runs_page({"changed": report, "other": plain}) + pages.run_page(report)
        except InvalidFile as error:
            assert re.search("Restore (it|the file) or (recreate it|run again)|Upgrade", str(error)), error


def test_every_data_file_is_packaged():
    source, tables = ROOT / "src", tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    packaged = {path for package, globs in tables.items() for glob in globs for path in (source / package.replace(".", "/")).glob(glob)}
    others = {path for path in (source / "anybit").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert others == packaged
