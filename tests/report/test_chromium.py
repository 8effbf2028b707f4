"""The page in a real Chromium: offline, by mouse and by keyboard, light and dark, 10,000 rows."""

import shutil
from pathlib import Path

import pytest
from made_runs import changed, make_rows, make_run, make_sweep
from test_page import HOSTILE, make_hostile_runs

from dslt.report.page import write_report

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright, of '.[test]'")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt install chromium")
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--no-first-run",
)  # fmt: skip
BIG = 10_000


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


class Visit:
    """A page that was opened offline, and what it complained about or asked for."""

    def __init__(self, browser, path: Path, **settings):
        self.context = browser.new_context(offline=True, **settings)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        if self.page.locator("#count").count():
            self.page.wait_for_function("!$('count').textContent.startsWith('Unpacking')")

    def choose(self, name: str, text: str) -> None:
        self.page.locator(f"#{name}").select_option(label=text)

    def count(self) -> int:
        return int(self.page.locator("#count").inner_text().split(" ")[0].replace(",", ""))

    def selected(self) -> int:
        """The place of the selected row, from 1."""
        row = self.page.locator("#rows [aria-selected=true]")
        return int(row.get_attribute("aria-posinset"))

    def focused(self) -> str:
        return self.page.evaluate("document.activeElement.id")

    def close(self) -> None:
        assert self.complaints == []
        assert all(url.startswith(("file:", "data:")) for url in self.requests)
        self.context.close()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    directory = tmp_path_factory.mktemp("small")
    make_sweep(directory / "sweep", seeds=2, fractions=(0.5, 1.0))
    write_report([directory / "sweep"], directory / "report")
    return directory / "report" / "index.html"


@pytest.fixture
def visit(browser, small):
    opened = Visit(browser, small)
    yield opened
    opened.close()


def expected(seed: int, accuracy: float, with_rationales: bool):
    return make_rows(seed, accuracy, test=300, with_rationales=with_rationales)


def test_it_loads_alone_and_without_a_complaint(visit):
    assert visit.page.title() == "Distilling step-by-step: 8 runs"
    assert len([url for url in visit.requests if url.startswith("file:")]) == 1
    assert visit.count() == 330
    box = visit.page.locator("figure svg").first.bounding_box()
    assert box["width"] > 250 and box["height"] > 150


def test_filters_leave_what_they_name(visit):
    visit.choose("run", "step_by_step-1-tiny_32-s0")
    ours, base = expected(0, 0.85, True), expected(0, 0.65, False)
    assert visit.count() == len(ours)
    right = [p.prediction == p.label for p in ours]
    visit.choose("verdict", "student right")
    assert visit.count() == sum(right)
    visit.choose("split", "test")
    assert visit.count() == sum(right[:300])
    visit.choose("verdict", "student right, teacher wrong")
    assert visit.count() == sum(
        r and p.teacher_label != p.label for r, p in zip(right[:300], ours, strict=False)
    )
    visit.choose("verdict", "all")
    visit.choose("disagreement", "student ≠ teacher")
    assert visit.count() == sum(p.prediction != p.teacher_label for p in ours[:300])
    visit.choose("disagreement", "run ≠ other run")
    assert visit.count() == 0 and "Choose a run beside it" in visit.page.inner_text("#count")
    visit.choose("other", "fine_tuning-1-tiny_32-s0")
    differing = [a for a, b in zip(ours[:300], base, strict=False) if a.prediction != b.prediction]
    assert visit.count() == len(differing) > 10
    visit.choose("disagreement", "only this run is right")
    assert visit.count() == sum(a.prediction == a.label for a in differing)
    assert "fine_tuning-1-tiny_32-s0" in visit.page.inner_text("#detail")
    visit.choose("dataset", "facts")
    visit.page.fill("#text", "NUMBER 29")
    assert visit.count() == sum(
        "number 29" in a.input and a.prediction == a.label for a in differing
    )


def test_the_detail_shows_all_of_a_prediction(visit):
    visit.choose("run", "step_by_step-1-tiny_32-s1")
    visit.page.fill("#text", "number 17 .")
    row = expected(1, 0.86, True)[17]
    text = visit.page.inner_text("#detail")
    for part in (row.input, row.label, row.rationale, row.teacher_rationale, row.teacher_label):
        assert part in text
    assert ("✗" in text) == (row.prediction != row.label or row.teacher_label != row.label)


def test_everything_is_done_by_keyboard(visit):
    keyboard = visit.page.keyboard
    keyboard.press("/")
    assert visit.focused() == "text"
    keyboard.type("red hat/")  # a slash here is text
    assert visit.page.input_value("#text") == "red hat/" and visit.count() == 0
    keyboard.press("Backspace")
    found = visit.count()
    assert 0 < found < 330
    keyboard.press("ArrowDown")
    assert visit.focused() == "rows" and visit.selected() == 1
    for key, place in (
        ("ArrowDown", 2), ("ArrowDown", 3), ("ArrowUp", 2), ("End", found), ("ArrowDown", found),
        ("Home", 1), ("ArrowUp", 1),
    ):  # fmt: skip
        keyboard.press(key)
        assert visit.selected() == place, key
        active = visit.page.get_attribute("#rows", "aria-activedescendant")
        assert visit.page.get_attribute(f"#{active}", "aria-selected") == "true"
        assert visit.page.locator(f"#{active}").is_visible()
    keyboard.press("PageDown")
    assert visit.selected() > 5
    keyboard.press("/")
    keyboard.press("Escape")
    assert visit.page.input_value("#text") == "" and visit.count() == 330
    seen = []
    visit.page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    visit.page.locator("a.skip").focus()
    for _ in range(60):
        seen.append(visit.focused())
        keyboard.press("Tab")
    order = ["theme", "run", "other", "split", "dataset", "verdict", "disagreement", "text", "rows"]
    assert [name for name in seen if name in order][: len(order)] == order


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_follow_the_system_and_the_button(browser, small, scheme):
    visit = Visit(browser, small, color_scheme=scheme)

    def paper() -> int:
        colour = visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
        return int(colour.removeprefix("rgb(").split(",")[0])

    def stroke() -> str:
        path = "document.querySelector('figure path[style*=\"--line-0\"]')"
        return visit.page.evaluate(f"getComputedStyle({path}).stroke")

    colours = {scheme: stroke()}
    assert (paper() > 128) == (scheme == "light")
    for theme in ("light", "dark"):
        visit.page.click("#theme")
        assert visit.page.inner_text("#theme") == f"Theme: {theme}"
        assert (paper() > 128) == (theme == "light")
        assert colours.setdefault(theme, stroke()) == stroke()
    assert colours["light"] != colours["dark"]
    visit.page.reload()
    assert visit.page.inner_text("#theme") == "Theme: dark"
    visit.close()


# WCAG 2.2's relative luminance and contrast, of two CSS variables' colours.
CONTRAST = """([one, two]) => {
  const probe = document.body.appendChild(document.createElement('i'));
  const luminance = (name) => {
    probe.style.color = `var(${name})`;
    const parts = getComputedStyle(probe).color.match(/[\\d.]+/g).slice(0, 3).map((x) => x / 255);
    const linear = parts.map((x) => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  };
  const found = [luminance(one), luminance(two)].sort((a, b) => b - a);
  probe.remove();
  return (found[0] + 0.05) / (found[1] + 0.05);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_is_enough(browser, small, scheme):
    """4.5 for text, 3 for lines."""
    visit = Visit(browser, small, color_scheme=scheme)
    for name in ("ink", "muted", "accent", "right", "wrong"):
        for ground in ("paper", "raised", "selected"):
            if (name, ground) != ("muted", "selected"):
                assert visit.page.evaluate(CONTRAST, [f"--{name}", f"--{ground}"]) >= 4.5, name
    for i in range(8):
        assert visit.page.evaluate(CONTRAST, [f"--line-{i}", "--paper"]) >= 3, i
    visit.close()


@pytest.mark.parametrize("width", [360, 800, 1400])
def test_nothing_sticks_out(browser, tmp_path, width):
    page = tmp_path / "report"
    runs = make_hostile_runs(tmp_path / "runs")
    make_run(runs / ("long" * 40), changed(make_rows(0, 0.5), input="x" * 5000))
    write_report([runs], page)
    visit = Visit(browser, page / "index.html", viewport={"width": width, "height": 800})
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
    visit.close()


def test_hostile_text_is_shown_and_not_run(browser, tmp_path):
    write_report([make_hostile_runs(tmp_path / "runs")], tmp_path / "report")
    visit = Visit(browser, tmp_path / "report" / "index.html")
    assert HOSTILE in visit.page.inner_text("#detail")
    visit.page.locator("#other").select_option(index=1)
    visit.page.fill("#text", "</SCRIPT>")
    assert visit.count() == 90
    visit.page.keyboard.press("ArrowDown")
    assert HOSTILE in visit.page.inner_text("#detail")
    assert HOSTILE[:60] in visit.page.inner_text("#left-out")
    assert visit.page.evaluate("window.pwned") is None
    assert visit.page.locator("img, iframe, b").count() == 0
    visit.close()


def test_the_policy_stops_a_script_that_got_in(browser, small, tmp_path):
    """The second lock: were something left unescaped, it still would not run."""
    page = small.read_text()
    broken = tmp_path / "broken.html"
    attack = "<script>window.pwned=1</script><img src=x onerror='window.pwned=1'>"
    broken.write_text(page.replace("</main>", attack + "</main>"))
    visit = Visit(browser, broken)
    assert visit.page.evaluate("window.pwned") is None
    assert any("Content Security Policy" in complaint for complaint in visit.complaints)
    visit.context.close()


# The longest of several rounds, a frame included, in milliseconds.
MEASURE = """async () => {
  const frame = () => new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
  const time = async (act) => {
    const started = performance.now();
    act();
    await frame();
    return performance.now() - started;
  };
  const text = document.getElementById('text'), rows = document.getElementById('rows');
  const type = (value) => () => {
    text.value = value;
    text.dispatchEvent(new Event('input', { bubbles: true }));
  };
  const found = { filter: 0, scroll: 0, nodes: 0 };
  for (const value of ['number 9', 'red hat', 'neutral', '', 'number 99'])
    found.filter = Math.max(found.filter, await time(type(value)));
  await time(type(''));
  for (let i = 0; i < 20; i++) {
    const scroll = () => { rows.scrollTop = rows.scrollHeight * i / 20; };
    found.scroll = Math.max(found.scroll, await time(scroll));
    found.nodes = Math.max(found.nodes, rows.querySelectorAll('[role=option]').length);
  }
  return found;
}"""


def test_ten_thousand_rows_stay_quick(browser, tmp_path, record_property):
    rows = make_rows(0, 0.6, test=BIG - 30)
    rows_without = make_rows(1, 0.7, test=BIG - 30, with_rationales=False)
    make_run(tmp_path / "runs" / "a", rows)
    make_run(tmp_path / "runs" / "b", rows_without, seed=1)
    write_report([tmp_path / "runs"], tmp_path / "report")
    visit = Visit(browser, tmp_path / "report" / "index.html")
    assert visit.count() == BIG
    visit.page.locator("#other").select_option(index=2)
    found = visit.page.evaluate(MEASURE)
    record_property("milliseconds", found)
    print(found)
    assert found["nodes"] < 60  # not ten thousand: that is what keeps it quick
    assert found["filter"] < 2000 and found["scroll"] < 1000  # also on a machine that is busy
    visit.page.locator("#rows").focus()
    visit.page.keyboard.press("End")
    assert visit.selected() == BIG
    visit.close()
