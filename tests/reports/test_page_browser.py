"""The page in a real browser: the slider moves, the plots have their points, nothing is asked of any network."""

import json
import shutil
from itertools import pairwise

import pytest
from test_pages import HOSTILE, Reader, renamed

from anybit import pages
from anybit.records import record_of

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
    """Opens a page, its plots drawn; whatever the browser complains of or asks for is in `page.heard`."""
    contexts = []

    def opened(html, **options):
        file = tmp_path_factory.mktemp("page") / "report.html"
        file.write_text(html, encoding="utf8")
        context = browser.new_context(**({"viewport": {"width": 1000, "height": 800}} | options))
        contexts.append(context)
        page = context.new_page()
        page.heard = []
        page.on("console", lambda message: page.heard.append(message.text))
        page.on("pageerror", lambda error: page.heard.append(str(error)))
        page.on("dialog", lambda dialog: page.heard.append(dialog.message))
        page.on("request", lambda request: page.heard.append(request.url) if request.url != file.as_uri() else None)
        context.route("**/*", lambda route: route.continue_() if route.request.url == file.as_uri() else route.abort())
        page.goto(file.as_uri())
        if options.get("java_script_enabled", True):
            sync_api.expect(page.locator(".plot:not(:has(.main-svg))")).to_have_count(0)
        return page

    yield opened
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def page(opened, plain):
    """The calibrate run's page; a test leaves its slider anywhere."""
    return opened(pages.run_page(plain))


def shown(page):
    """What the slider's part says: size, bits a weight, predicted loss, and the scheme."""
    amounts = [page.locator(f"[data-show={what}]").inner_text() for what in ("size", "bits", "loss")]
    return (*amounts, tuple(page.locator("[data-layer]").all_inner_texts()))


def told(plain, budget):
    """The same, worked out from the table."""
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
        expected = told(plain, int(slider.input_value()))
        value, unit = size.split()
        assert float(value) * {"B": 1, "kB": 1000}[unit] == pytest.approx(expected[0], abs={"B": 0.5, "kB": 51}[unit])
        assert float(bits) == pytest.approx(expected[1], abs=0.006)
        assert float(loss) == pytest.approx(expected[2], rel=0.006)
        assert scheme == expected[3]
        assert loss in slider.get_attribute("aria-valuetext")
        seen.add((size, loss, scheme))
    assert len(seen) >= 4
    assert page.heard == []


def test_the_slider_is_reached_by_tabbing_and_has_a_name(page):
    page.evaluate("document.activeElement.blur(); window.getSelection().removeAllRanges()")
    page.locator("body").press("Tab")
    for _ in range(60):
        if page.evaluate("document.activeElement.type") == "range":
            break
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.type") == "range"
    assert page.get_by_role("slider", name="Budget for the file").count() == 1


def test_the_buttons_go_one_scheme_at_a_time_and_stop_at_the_ends(page, plain):
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


def test_every_plot_has_its_points(page, plain):
    figures = {name: data for name, data in Reader(pages.run_page(plain)).data.items() if "layout" in data}
    assert len(figures) >= 4
    for name, figure in figures.items():
        plot = page.locator(f"[data-figure={name}]")
        logarithmic = figure["layout"]["yaxis"].get("type") == "log"
        markers = sum(
            sum(y is not None and (y > 0 or not logarithmic) and x is not None for x, y in zip(trace["x"], trace["y"], strict=True))
            for trace in figure["data"]
            if "markers" in trace.get("mode", "")
        )
        assert plot.locator(".scatterlayer .point").count() == markers, name
        assert plot.locator(".barlayer .point").count() == sum(len(trace["x"]) for trace in figure["data"] if trace["type"] == "bar")
        assert markers > 0


def lightness(locator, what):
    """Red, green and blue of a computed colour, summed."""
    colour = locator.evaluate(f"(element) => getComputedStyle(element).{what}")
    return sum(int(part) for part in colour.split("(")[1].rstrip(")").split(",")[:3])


def test_dark_is_dark_and_follows_the_system(page):
    body, words = page.locator("body"), page.locator(".plot .xtitle").first
    for scheme, is_dark in (("light", False), ("dark", True), ("light", False)):
        page.emulate_media(color_scheme=scheme)
        ink = body.evaluate("(element) => getComputedStyle(element).color")
        sync_api.expect(words).to_have_css("fill", ink)
        paper = lightness(body, "backgroundColor")
        assert paper < 150 < 600 < lightness(body, "color") if is_dark else paper > 600 > 150 > lightness(body, "color")


def test_a_phone_scrolls_in_one_direction(opened, plain):
    long = [f"encoder.layers.{number}.self_attention.output_projection_of_the_whole_block" for number in range(9)]
    for html in (pages.run_page(renamed(plain, long)), pages.runs_page({name: renamed(plain, long) for name in ("a" * 80, "b")})):
        page = opened(html, viewport={"width": 360, "height": 700})
        page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert page.heard == []


def test_names_stay_names(opened, plain):
    page = opened(pages.run_page(renamed(plain, [HOSTILE, "<b>bold</b>", "a&amp;b", "%{x}", "__proto__"])))
    assert page.heard == [] and page.title() != "taken" and page.locator("img").count() == 0
    page.get_by_role("slider").press("End")
    assert page.locator("table", has=page.locator("[data-layer]")).locator("tbody th").first.inner_text() == HOSTILE
    ticks = page.locator("[data-figure=bits] .xtick").all_text_contents()
    assert any("<b>bold</b>" in tick for tick in ticks) and any("a&amp;b" in tick for tick in ticks)


def test_without_javascript_the_tables_are_there(opened, plain):
    page = opened(pages.run_page(plain), java_script_enabled=False)
    assert not page.locator(".controls").is_visible()
    page.get_by_text("Some budgets as a table").click()
    assert page.get_by_role("table").filter(has_text="Best predicted schemes").locator("tbody tr").count() > 2
