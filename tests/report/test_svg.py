"""Panels take colours and font from the page, and text stays text."""

import re
import xml.etree.ElementTree as ElementTree

import numpy as np

from dslt.report.svg import Line, line_panel, marked_swatch, plain_swatch, sheet, thin_out

HOSTILE = "</svg><script>alert(1)</script> $\\frac{$ <b>&amp;"


def panel(name="p", **settings):
    lines = [Line(0, [0.25, 1.0], [50, 60], [1, 2], [(0.25, 49)]), Line(9, [0.25, 1.0], [55, 70])]
    return line_panel(lines, name=name, x_label=HOSTILE, **settings)


def test_a_panel_is_one_wellformed_element_that_holds_hostile_text_as_text():
    svg = panel(x_ticks={0.25: HOSTILE, 1.0: "all"}, log_x=True, levels={HOSTILE: 65.0})
    root = ElementTree.fromstring(svg)
    tags = {element.tag.rpartition("}")[2] for element in root.iter()}
    assert tags <= {"svg", "g", "path", "defs", "use", "text", "tspan", "clipPath", "rect"}
    texts = ["".join(element.itertext()) for element in root.iter() if element.tag.endswith("text")]
    assert texts.count(HOSTILE) == 3
    assert "width" not in root.attrib and root.attrib["aria-hidden"] == "true"


def test_colours_and_fonts_are_the_pages():
    svg = panel(levels={"teacher": 65.0}) + marked_swatch(3, "key") + plain_swatch(5)
    assert not re.findall(r"#[0-9a-f]{6}", svg) and "font-family" not in svg
    used = set(re.findall(r"var\((--[\w-]+)\)", svg))
    assert {
        "--line-0",
        "--line-1",
        "--line-3",
        "--line-5",
        "--ink",
        "--muted",
        "--rule",
        "--paper",
    } == used
    assert "<style" not in svg


def test_ids_of_two_panels_do_not_meet():
    one, two = (set(re.findall(r'\bid="([^"]+)"', panel(name))) for name in ("a", "b"))
    assert one and not one & two
    assert set(re.findall(r"url\(#([^)]+)\)", panel("a"))) <= one
    assert set(re.findall(r'href="#([^"]+)"', panel("a"))) <= one


def test_a_panel_is_the_same_bytes_each_time():
    assert panel() == panel()


def test_a_thinned_line_keeps_its_mean_and_its_length():
    x, y = thin_out(list(range(1000)), list(range(0, 2000, 2)), most=100)
    assert len(x) == len(y) == 100
    assert np.mean(x) == 499.5 and np.allclose(y, 2 * x)
    assert thin_out([1, 2], [3, 4])[1].tolist() == [3, 4]


def test_a_sheet_is_a_file_of_its_own_in_light_and_dark():
    panels = [(f"panel {HOSTILE}", panel(name)) for name in "abc"]
    text = sheet(HOSTILE, legend=[(HOSTILE, marked_swatch(0, "key"))] * 5, panels=panels)
    root = ElementTree.fromstring(text)
    places = [(float(e.get("x")), float(e.get("y"))) for e in root if e.tag.endswith("svg")]
    assert len(set(places)) == 5 + 3
    assert max(y for _, y in places) < float(root.get("height"))
    used = set(re.findall(r"var\((--[\w-]+)\)", text))
    light, dark = text.split("@media (prefers-color-scheme: dark)")
    assert all(f"{name}: #" in light and f"{name}: #" in dark for name in used)
    texts = ["".join(e.itertext()) for e in root if e.tag.endswith("text")]
    assert texts == [HOSTILE] * 6 + [f"panel {HOSTILE}"] * 3
    assert "http" not in text.replace("http://www.w3.org/", "")
