"""The page in a real browser: the slider moves, charts show their points, no requests are made."""

import json
import shutil
from itertools import pairwise

import pytest
from test_page import HOSTILE, STEERING, charts_of, large, renamed

from anybit.errors import printable
from anybit.reports import page as pages
from anybit.runs.records import record_of

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install playwright")
CHROMIUM = shutil.which("chromium")
if CHROMIUM is None:
    pytest.skip("Chromium is not installed: apt-get install chromium", allow_module_level=True)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def plain(calibrated):
    return json.loads(json.dumps(calibrated[2].report))


@pytest.fixture(scope="module")
def opened(browser, tmp_path_factory):
    """Open a page; `page.messages` collects console messages, errors, dialogs and requests."""
    contexts = []

    def opened(html, **options):
        file = tmp_path_factory.mktemp("page") / "report.html"
        file.write_text(html, encoding="utf8")
        context = browser.new_context(**({"viewport": {"width": 1000, "height": 800}} | options))
        contexts.append(context)
        page = context.new_page()
        page.messages = []
        page.on("console", lambda message: page.messages.append(message.text))
        page.on("pageerror", lambda error: page.messages.append(str(error)))
        page.on("dialog", lambda dialog: page.messages.append(dialog.message))
        page.on("request", lambda request: page.messages.append(request.url) if request.url != file.as_uri() else None)
        context.route("**/*", lambda route: route.continue_() if route.request.url == file.as_uri() else route.abort())
        page.goto(file.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def page(opened, plain):
    """The calibrate run's page, with the slider anywhere."""
    return opened(pages.run_page(plain))


def shown(page):
    """Read the slider's text: size, bits per weight, predicted loss, and the scheme."""
    amounts = [page.locator(f"[data-show={key}]").inner_text() for key in ("size", "bits", "loss")]
    return (*amounts, tuple(page.locator("[data-layer]").all_inner_texts()))


def value_of(words):
    """Parse a number such as "2.44×10⁻⁵"."""
    return float(words.translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")).replace("\N{MULTIPLICATION SIGN}10", "e"))


def expected_words(plain, budget):
    """Compute the same from the table."""
    record = record_of(plain)
    data = pages.frontier_data(record.table, record)
    fitting = [step for step in data["steps"] if step["bytes"] <= budget]
    scheme = list(data["start"])
    for step in fitting:
        scheme[step["layer"]] = step["precision"]
    point = fitting[-1] if fitting else data
    return point["bytes"], point["bits"], point["loss"], tuple(scheme)


def test_the_slider_moves_by_keyboard_and_shows_the_best_scheme_of_every_budget(page, plain):
    slider = page.get_by_role("slider")
    slider.focus()
    seen = set()
    for keys in (["Home"], ["ArrowRight"] * 5, ["PageUp"] * 2, ["PageUp"] * 3, ["ArrowLeft"] * 3, ["End"]):
        for key in keys:
            page.keyboard.press(key)
        size, bits, loss, scheme = shown(page)
        expected = expected_words(plain, int(slider.input_value()))
        value, unit = size.split()
        assert float(value) * {"B": 1, "kB": 1000}[unit] == pytest.approx(expected[0], abs={"B": 0.5, "kB": 51}[unit])
        assert float(bits) == pytest.approx(expected[1], abs=0.006)
        assert value_of(loss) == pytest.approx(expected[2], rel=0.006)
        assert scheme == expected[3]
        assert loss in slider.get_attribute("aria-valuetext")
        seen.add((size, loss, scheme))
    assert len(seen) >= 4
    assert page.messages == []


def test_slider_is_reached_by_tab_and_is_labelled(page):
    page.evaluate("document.activeElement.blur(); window.getSelection().removeAllRanges()")
    page.locator("body").press("Tab")
    for _ in range(60):
        if page.evaluate("document.activeElement.type") == "range":
            break
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.type") == "range"
    assert page.get_by_role("slider", name="File size budget").count() == 1


def test_buttons_move_by_one_scheme_and_stop_at_the_ends(page, plain):
    record = record_of(plain)
    steps = len(pages.frontier_data(record.table, record)["steps"])
    back, on = page.get_by_role("button", name="Previous scheme"), page.get_by_role("button", name="Next scheme")
    page.get_by_role("slider").press("Home")
    for _ in range(steps):
        if back.is_enabled():
            back.press("Enter")
    schemes = [shown(page)]
    for _ in range(steps):
        on.press("Enter", timeout=2000)
        schemes.append(shown(page))
    assert not on.is_enabled() and "Nothing is left" in page.locator("[data-show=next]").inner_text()
    for before, after in pairwise(schemes):
        assert sum(one != other for one, other in zip(before[3], after[3], strict=True)) == 1
    assert schemes[-1][2] in page.get_by_role("status").inner_text()


PLACES = """(area) => {
    const all = area.getBoundingClientRect();
    return (selector) => [...area.querySelectorAll(selector)]
        .map((one) => one.getBoundingClientRect())
        .map((box) => [box.width, box.height, (box.x + box.width / 2 - all.x) / all.width, (box.y + box.height / 2 - all.y) / all.height])
}"""


def places(page, chart, selector):
    """(width, height, x, y) of a chart's elements; x and y from 0 to 1 of its area."""
    return page.evaluate(f"([key, selector]) => ({PLACES})(document.querySelector(`#${{key}} .area`))(selector)", [chart.key, selector])


def test_points_of_every_chart_are_where_they_belong(page, plain):
    charts = charts_of(plain)
    assert {chart.key for chart in charts} == {"losses", "bits", "ladder"}
    for chart in charts:
        marks = [mark for series in chart.series for mark in chart.marks(series)]
        shown = places(page, chart, "use")
        assert len(shown) == len(marks) > 0, chart.key
        for (left, top, _), (width, height, across, down) in zip(marks, shown, strict=True):
            assert 3 < width < 30 and 3 < height < 30
            assert (100 * across, 100 * down) == pytest.approx((left, top), abs=1)
        boxes = [box for series in chart.series for box in chart.boxes(series)]
        shown = places(page, chart, "rect")
        for (left, top, width, height, _), (*_, across, down) in zip(boxes, shown, strict=True):
            assert (100 * across, 100 * down) == pytest.approx((left + width / 2, top + height / 2), abs=1)


def test_slider_starts_at_the_runs_own_scheme_and_returns_to_it(opened, plain):
    page, record = opened(pages.run_page(plain)), record_of(plain)
    own = tuple(str(record.layers[name].precision) for name in record.table.layers)
    before = shown(page)
    assert before[3] == own and value_of(before[1]) == pytest.approx(record.result.weight_bits, abs=0.006)
    assert page.locator("tr.changed").count() == 0 and "this run" in page.locator("[data-show=budget]").inner_text()
    mark = places(page, next(chart for chart in charts_of(plain) if chart.key == "losses"), ".cursor")
    page.get_by_role("slider").press("End")
    assert shown(page) != before and page.locator("tr.changed").count() > 0
    assert mark != places(page, next(chart for chart in charts_of(plain) if chart.key == "losses"), ".cursor")
    back = page.get_by_role("button", name="Back to this run")
    back.press("Enter")
    assert shown(page) == before and not back.is_enabled()


def sorted_by(page, heading, times=1):
    """Return a column of the table of layers after clicks on its heading."""
    table = page.locator("table.layers")
    for _ in range(times):
        table.get_by_role("button", name=heading).click()
    place = [words.strip() for words in table.locator("thead th").all_inner_texts()].index(heading)
    return table.locator("tbody tr").evaluate_all("(rows, place) => rows.map((row) => row.cells[place].textContent.trim())", place)


def test_table_of_runs_fits_a_desktop(opened, plain):
    tested = plain | {"test": {"top1": 99.6}, "float_test": {"top1": 99.6}}
    page = opened(pages.runs_page({"2.5bit": tested, "3bit": tested}), viewport={"width": 1280, "height": 800})
    table = page.get_by_role("region", name="Results of the runs")
    assert table.evaluate("(one) => one.scrollWidth - one.clientWidth") <= 0


@pytest.fixture(scope="module")
def long(opened, plain):
    """The page and the report of a network of 160 layers."""
    report = large(plain, 160, 0)
    return opened(pages.run_page(report)), report


def test_table_of_layers_has_every_row_and_sorts(long):
    page, report = long
    names = [words.strip() for words in page.locator("table.layers tbody th").all_text_contents()]
    assert names == list(report["layers"])
    precisions = sorted_by(page, "precision")
    assert len(precisions) == 160 and precisions == sorted(precisions) and len(set(precisions)) == 10
    assert sorted_by(page, "precision") == sorted(precisions, reverse=True)
    assert page.locator("table.layers thead th[aria-sort=descending]").inner_text().strip() == "precision"
    losses = list(map(value_of, sorted_by(page, "predicted loss")))
    assert losses == sorted(losses, reverse=True) and len(set(losses)) > 50
    assert page.locator("table.layers thead th[aria-sort]").count() == 1
    assert sorted_by(page, "predicted loss", times=2) != losses
    assert [words.strip() for words in page.locator("table.layers tbody th").all_text_contents()] == names  # the network's own order


CONTRAST = """(element) => {
    const light = (colour) => {
        const parts = colour.match(/[\\d.]+/g).slice(0, 3).map((one) => one / 255);
        const [red, green, blue] = parts.map((one) => (one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4));
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
    };
    let behind = element;
    while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
    const style = getComputedStyle(element);
    const [one, other] = [light(style.color), light(getComputedStyle(behind).backgroundColor)].sort((a, b) => b - a);
    return (one + 0.05) / (other + 0.05);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(opened, plain, scheme):
    page = opened(pages.run_page(large(plain, 12, 0)), color_scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    for selector in (".bits", ".answer dt", ".answer dd", ".key", ".lead", ".sort", "td", "summary", ".legend li"):
        ratios = page.locator(selector).evaluate_all(f"(all) => all.map({CONTRAST})")
        assert ratios and min(ratios) >= 4.5, selector
    assert len(set(page.locator(".bits").evaluate_all("(all) => all.map((one) => getComputedStyle(one).backgroundColor)"))) == 5


def test_bars_have_the_colours_of_their_bits(long):
    background, fill = (f"(all) => all.map((one) => getComputedStyle(one).{name})" for name in ("backgroundColor", "fill"))
    chips = long[0].locator("table.layers td:nth-child(2) .bits:first-child").evaluate_all(background)
    bars = long[0].locator("#bits .area rect").evaluate_all(fill)
    assert chips == bars and len(set(bars)) == 5


def test_focus_is_visible(page):
    page.keyboard.press("Tab")
    outline = "(one) => [getComputedStyle(one).outlineStyle, parseFloat(getComputedStyle(one).outlineWidth)]"
    for selector in ("input[type=range]", "table.layers .sort", "summary", ".scroll.tall"):
        page.locator(selector).first.focus()
        assert page.locator(selector).first.evaluate(outline) == ["solid", 2], selector


def test_print_is_light_and_complete(long):
    page = long[0]
    page.emulate_media(media="print", color_scheme="dark")
    assert lightness(page.locator("body"), "backgroundColor") > 600 > 150 > lightness(page.locator("body"), "color")
    assert not page.locator(".controls").is_visible() and page.locator("summary:visible").count() == 0
    assert page.locator("table.layers").locator("..").evaluate("(one) => one.scrollHeight - one.clientHeight") <= 1
    sort, head = page.locator("table.layers .sort").first, page.locator("table.layers thead")  # Chromium repeats no head that has buttons
    assert sort.evaluate("(one) => getComputedStyle(one).display") == "contents"
    assert head.evaluate("(one) => getComputedStyle(one).breakInside") == "avoid"


def lightness(locator, attribute):
    """The sum of red, green and blue of a computed colour."""
    colour = locator.evaluate(f"(element) => getComputedStyle(element).{attribute}")
    return sum(int(piece) for piece in colour.split("(")[1].rstrip(")").split(",")[:3])


def test_dark_mode_follows_the_system(page):
    body, words, mark = page.locator("body"), page.locator(".axes text").first, page.locator("#losses use").first
    for scheme, is_dark in (("light", False), ("dark", True), ("light", False)):
        page.emulate_media(color_scheme=scheme)
        quiet = page.locator(".road").evaluate("(element) => getComputedStyle(element).color")
        sync_api.expect(words).to_have_css("fill", quiet)
        assert abs(lightness(mark, "stroke") - lightness(body, "backgroundColor")) > 200
        paper = lightness(body, "backgroundColor")
        assert paper < 150 < 600 < lightness(body, "color") if is_dark else paper > 600 > 150 > lightness(body, "color")


def test_phone_scrolls_only_vertically(opened, plain):
    long = [f"encoder.layers.{number}.self_attention.output_projection_of_the_whole_block" for number in range(9)]
    for html in (pages.run_page(renamed(plain, long)), pages.runs_page({name: renamed(plain, long) for name in ("a" * 80, "b")})):
        page = opened(html, viewport={"width": 360, "height": 700})
        page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert page.messages == []


@pytest.mark.parametrize("width", [375, 1000])
def test_labels_beside_a_chart_are_legible(opened, plain, width):
    """Layer names are slanted, one line after the other; other labels must not touch."""
    page = opened(pages.run_page(large(plain, 40, 30)), viewport={"width": width, "height": 700})
    for chart in charts_of(large(plain, 40, 30)):
        area = page.locator(f"#{chart.key} .area").bounding_box()
        for selector, size, place, extent in ((".below", 0, 2, area["width"]), (".left", 1, 3, area["height"])):
            shown = sorted((one for one in places(page, chart, f".axes {selector}") if one[0]), key=lambda one: one[place])
            for before, after in pairwise(shown):
                assert (after[place] - before[place]) * extent >= (before[size] + after[size]) / 2 - 3, (chart.key, selector)
        ends = sorted(across * area["width"] + width / 2 for width, _, across, _ in places(page, chart, ".aslant") if width)
        assert all(after - before >= 10 for before, after in pairwise(ends)), chart.key
    assert all(
        size >= 11
        for size in page.locator(".axes text").evaluate_all("(all) => all.map((one) => parseFloat(getComputedStyle(one).fontSize))")
    )


def test_names_with_markup_stay_text(opened, plain):
    page = opened(pages.run_page(renamed(plain, [HOSTILE, "<b>bold</b>", "a&amp;b", STEERING, "__proto__"])))
    assert page.messages == [] and page.title() != "taken" and page.locator("img").count() == 0
    page.get_by_role("slider").press("End")
    assert page.locator("table", has=page.locator("[data-layer]")).locator("tbody th").first.inner_text() == HOSTILE
    assert page.locator("table", has=page.locator("[data-layer]")).get_by_text(printable(STEERING)).count() == 1
    ticks = page.locator("#bits .aslant").all_text_contents()
    assert any("<b>bold</b>" in tick for tick in ticks) and any("a&amp;b" in tick for tick in ticks)


def test_tables_are_shown_without_javascript(opened, plain):
    page = opened(pages.run_page(plain), java_script_enabled=False)
    assert not page.locator(".controls").is_visible()
    assert all(page.locator(f"#{chart.key} .area use").first.is_visible() for chart in charts_of(plain))
    page.get_by_text("Some budgets as a table").click()
    assert page.get_by_role("table").filter(has_text="Best predicted schemes").locator("tbody tr").count() > 2
