"""The page of a report: what it says, that it asks nothing, and that no name in it becomes markup."""

import copy
import json
import re
import tomllib
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import plotly.graph_objects as go
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import anybit
from anybit import figures, pages
from anybit.allocation import HEADER_SLACK
from anybit.checkpoint import write_report
from anybit.errors import InvalidFile, InvalidSetting
from anybit.files import write_json
from anybit.records import record_of
from anybit.roads import save_all
from anybit.scheme import Precision

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


@pytest.fixture(autouse=True)
def no_library(monkeypatch):
    """Millions of letters that no test here looks at."""
    monkeypatch.setattr("plotly.offline.get_plotlyjs", lambda: "")


@pytest.fixture(scope="session")
def plain(calibrated):
    """The report of a calibrate run, as its file holds it."""
    return json.loads(json.dumps(calibrated[2].report))


class Reader(HTMLParser):
    """Tags, headings, texts, ids, embedded data and tables of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.inside, self.headings, self.words, self.data, self.cells = [], [], [], [], {}, []
        self.references, self.ids = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.references += [attributes[key] for key in ("src", "href", "action") if key in attributes]
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
    """The same report of layers with other names."""
    report = copy.deepcopy(report)
    new = dict(zip(report["layers"], names, strict=False))

    def other(rows):
        return {new.get(name, name): row for name, row in rows.items()}

    report["layers"], report["table"]["layers"] = other(report["layers"]), other(report["table"]["layers"])
    for row in report["schemes"]:
        row["scheme"] = other(row["scheme"])
    return report


def every_page(plain):
    """A page of each road's report, and one of all of them."""
    reports = {"calibrate": plain, "grow": GROWN, "supernet": SUPERNET, "search": SUPERNET | {"search": SEARCH}}
    return {name: pages.run_page(report) for name, report in reports.items()} | {"all": pages.runs_page(reports)}


def test_a_page_asks_nothing_of_the_network(plain):
    for page in every_page(plain).values():
        assert Reader(page).references == [] and "default-src 'none'" in page
        assert not re.search(r"@import|url\(|<link|https?:|fetch\(|XMLHttp|import\(", page)


def test_headings_are_in_order_and_ids_unique(plain):
    for name, page in every_page(plain).items():
        read = Reader(page)
        levels = [level for level, _ in read.headings]
        assert levels[0] == 1 and levels.count(1) == 1, name
        assert all(after <= before + 1 for before, after in pairwise(levels)), name
        assert len(set(read.ids)) == len(read.ids) and read.inside == []


def test_every_table_has_a_caption_and_every_plot_a_table(plain):
    for page in every_page(plain).values():
        assert page.count("<table") == page.count("<caption>") > 0
        for section in page.split("<section>")[1:]:
            assert 'class="plot"' not in section or "<table" in section


def test_every_figure_is_one_that_plotly_takes(plain):
    """Colours are the page's variables, which plotly knows as black here."""
    count = 0
    for page in every_page(plain).values():
        for name, data in Reader(page).data.items():
            if "layout" in data:
                go.Figure(json.loads(re.sub(r"var\(--[\w-]+\)", "#000000", json.dumps(data))), skip_invalid=False)
                assert data["data"], name
                count += 1
    assert count >= 12


HOSTILE = "</script><img src=x onerror=document.title='taken'>"


@pytest.mark.parametrize(
    "name", [HOSTILE, "<!--<script>", "a&amp;b&lt;", "${1}`'\"", "\u2028 \ud800", "%{x}<b>bold</b>", "]]>", "var(--ink)", "__proto__"]
)
def test_no_name_becomes_markup(name, plain):
    first = next(iter(plain["layers"]))
    before = Reader(pages.run_page(renamed(plain, ["harmless"])))
    page = pages.run_page(renamed(plain, [name]))
    page.encode("utf8")
    read = Reader(page)
    assert read.tags == before.tags and HOSTILE not in page
    shown = name.encode("utf8", "backslashreplace").decode()
    assert shown in read.cells and first not in read.cells
    assert read.data["budgets-data"]["layers"][0] == name


def test_what_a_user_wrote_elsewhere_does_not_become_markup_either(plain):
    report = copy.deepcopy(plain) | {"uncovered": {HOSTILE: HOSTILE}, "settings": {HOSTILE: HOSTILE}}
    report["schemes"][0]["name"] = HOSTILE
    report["certificate"] |= {"solver": HOSTILE, "objective": HOSTILE}
    assert "<img" not in pages.run_page(report)
    assert "<img" not in pages.runs_page({HOSTILE: report, "other": plain, "grown": GROWN | {"road": HOSTILE}})
    for report in (plain, GROWN):
        with pytest.raises(InvalidFile, match="budget"):
            pages.run_page(report | {"budget": HOSTILE})


def test_the_sliders_schemes_are_those_of_the_table(plain):
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


def test_without_javascript_a_table_shows_the_smallest_and_the_largest_budget(plain):
    record = record_of(plain)
    data = pages.frontier_data(record.table, record)
    page = pages.run_page(plain)
    assert '<div class="controls" hidden>' in page
    losses = {f"{point['loss']:.4g}" for point in (data, data["steps"][-1])}
    assert losses <= set(Reader(page).cells)


def test_uniform_schemes_are_those_that_were_measured(plain):
    table = record_of(plain | {"table": plain["table"] | {"floor": 0.5}}).table
    uniforms = table.uniforms()
    measured = {row["name"]: row for row in plain["schemes"] if row["name"].startswith("uniform")}
    assert measured and set(measured) <= set(uniforms)
    for name, row in measured.items():
        assert {layer: str(precision) for layer, precision in uniforms[name].items()} == row["scheme"]
        size, loss = table.sums(uniforms[name])
        assert abs(size - row["bytes"]) <= HEADER_SLACK and loss == pytest.approx(row["predicted"] + 0.5)


def test_every_measured_scheme_is_in_the_plot_and_in_the_table(plain):
    read = Reader(pages.run_page(plain))
    drawn = {(x, y) for trace in read.data["losses"]["data"] for x, y in zip(trace["x"], trace["y"], strict=True)}
    for row in plain["schemes"]:
        assert {(row["bytes"], row["measured"]), (row["bytes"], row["predicted"])} <= drawn
        assert f"{row['measured']:.4g}" in read.cells
    chosen = next(row for row in plain["schemes"] if row["chosen"])
    assert f"{chosen['name']} (chosen)" in read.cells


def test_shapes_and_dashes_tell_what_colours_tell(plain):
    reports = {f"run {number}": record_of(plain) for number in range(12)}
    for figure in (figures.loss_over_size(record_of(plain)), figures.losses_side_by_side(reports), figures.tests_side_by_side(
        {name: record_of(GROWN) for name in reports}, "top1", "top-1"
    )):  # fmt: skip
        looks = {}
        for trace in figure["data"]:
            look = (trace["mode"], trace["marker"]["symbol"] if "marker" in trace else None, trace.get("line", {}).get("dash"))
            looks.setdefault(look, []).append((trace["name"], trace.get("marker", trace.get("line"))["color"]))
        assert all(len({of for _, of in same}) == len(same) for same in looks.values())


def test_the_next_step_of_the_layer_that_hurts_most_is_told(plain):
    page = Reader(pages.run_page(plain))
    record = record_of(plain)
    worst = max(record.layers, key=lambda name: record.table.layers[name][record.layers[name].precision].loss)
    words = next(text for text in page.words if "hurts most" in text)
    assert f"{worst} at {record.layers[worst].precision} hurts most" in words


def test_times_and_memory_are_not_on_the_page(plain):
    later = plain | {"stages": [stage | {"seconds": 1e6, "peak_bytes": 1} for stage in plain["stages"]]}
    assert pages.run_page(plain) == pages.run_page(later)


@pytest.mark.parametrize(
    ("test", "before", "said"),
    [
        ({"top1": 90.0}, {"top1": 92.5}, "90.00 % right (top-1), the float network 92.50 %: 2.50 points less"),
        ({"top1": 92.5}, {"top1": 92.5}, "no difference"),
        ({"top1": 90.0}, {}, "90.00 % right (top-1)."),
        ({"spearman": 81.25}, {"spearman": 82.0}, "spearman is 81.25, the float network's 82"),
        ({}, {}, "was not tested"),
    ],
)
def test_the_page_begins_with_size_and_accuracy_in_words(test, before, said):
    read = Reader(pages.run_page(GROWN | {"test": test, "float_test": before}))
    assert read.headings[0][1] == "1.0 kB instead of 10.0 kB, 3.00 bits a weight"
    assert any(said in words for words in read.words)


def test_the_certificate_is_in_words(plain):
    told = " ".join(Reader(pages.run_page(plain)).words)
    chosen = next(row for row in plain["schemes"] if row["chosen"])
    assert "HiGHS" in told and "It proved that none within the budget reaches less" in told
    assert f"Chosen: {chosen['name']}" in told and f"on {plain['inputs']['held_out']} held-out inputs" in told
    largest = plain | {"budget": None, "certificate": {}, "schemes": []}
    assert "HiGHS" not in " ".join(Reader(pages.run_page(largest)).words)


def test_a_report_of_before_the_table_has_a_page_without_the_slider(plain):
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
    tested = {trace["name"] for trace in read.data["tests"]["data"]}
    assert {"grown", "super"} <= {name.rpartition("/")[2] for name in tested}
    assert [path.name for path in written.parent.iterdir()] == ["all.html"]


def test_budgets_of_one_calibrate_run_share_a_slider(calibrated, tmp_path):
    result = calibrated[2]
    smaller = copy.copy(result)
    smaller.report = result.report | {"budget": "3bit"}
    save_all([result, smaller], tmp_path / "runs")
    for page in (tmp_path / "runs" / "report.html", anybit.report(tmp_path / "runs", output=tmp_path / "again.html")):
        read = Reader(page.read_text(encoding="utf8"))
        assert read.tags.count("input") == 1 and {"3bit", "4bit"} <= set(read.cells)


def test_a_folder_that_is_no_run_is_named_and_nothing_is_written(run_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    for report, said in (
        (None, "report.json is not there"),
        ([], "a list, not a JSON object"),
        ({"version": 1}, "neither a result nor subnets"),
        (GROWN | {"version": 2}, "Upgrade anybit"),
        (GROWN | {"version": True}, "version"),
        (GROWN | {"result": AMOUNTS | {"bytes": "many"}}, "result.bytes"),
        (GROWN | {"layers": {"conv": {"precision": "W9", "weights": 1, "bytes": 1}}}, "layers.conv.precision"),
    ):
        if report is not None:
            write = write_report if isinstance(report, dict) else lambda folder, told: write_json(folder / "report.json", told)
            write(tmp_path / "empty", report)
        with pytest.raises(InvalidFile, match=re.escape(said)) as error:
            anybit.report(run_folder, tmp_path / "empty", output=tmp_path / "page.html")
        assert "empty" in str(error.value)
    assert not (tmp_path / "page.html").exists()


def test_a_page_that_is_there_is_replaced_on_request_alone(run_folder, tmp_path, full_disk):
    page = tmp_path / "page.html"
    page.write_text("mine")
    with pytest.raises(InvalidSetting, match="--overwrite"):
        anybit.report(run_folder, output=page)
    assert page.read_text() == "mine"
    assert anybit.report(run_folder, output=page, overwrite=True) == page and "<h1>" in page.read_text(encoding="utf8")
    with pytest.raises(InvalidSetting, match="exists"):
        anybit.report(run_folder, output=tmp_path, overwrite=True)
    with pytest.raises(anybit.AnybitError, match=r"page\.html cannot be written: .*choose another --output"), full_disk():
        anybit.report(run_folder, output=page, overwrite=True)
    assert "<h1>" in page.read_text(encoding="utf8") and sorted(path.name for path in tmp_path.glob("*page*")) == ["page.html"]
    with pytest.raises(InvalidSetting, match="at least one"):
        anybit.report(output=tmp_path / "none.html")


def places(value, path=()):
    """Paths to everything inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


WRONG = [None, True, -1, 0, 1e308, 10**30, "", "W4A8", HOSTILE, [], {}, {"a": 1}, [[]], "W0", "float"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_report_with_anything_in_it_is_a_page_or_one_error(data, plain):
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
            assert "Restore it" in str(error) or "Upgrade" in str(error)


def test_every_file_that_is_no_module_is_packaged():
    root = Path(__file__).parent.parent
    packaged = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["anybit"]
    others = {path.name for path in (root / "src" / "anybit").iterdir() if path.is_file() and path.suffix != ".py"}
    assert others == set(packaged)
