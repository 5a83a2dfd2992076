"""What the figures draw is what they were given; files and inline SVG are whole, deterministic and
take the page's colours.
"""

import re
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from llm2comp.errors import DataError, RunError
from llm2comp.lab.plots import (
    GRID,
    INK,
    PAGE_COLOURS,
    PAPER,
    SERIES,
    curves_figure,
    heatmap_figure,
    inline_svg,
    save_figure,
    scores_figure,
    spectrum_figure,
)

SPECTRA = {"before": [3.0, 1.0, 0.1, 0.0], "after": [2.0, 1.5, 1.0, 0.5]}
MATRIX = [[1.0, 0.25, -0.5], [0.25, 1.0, 0.75], [-0.5, 0.75, 1.0]]


def every_figure():
    rng = np.random.default_rng(0)
    return {
        "spectrum": spectrum_figure(SPECTRA),
        "curves": curves_figure({"a": [(0, 1.0), (10, 0.5)], "b": [(0, 2.0)]}, "step", "loss"),
        "heatmap": heatmap_figure(MATRIX, "after UCL"),
        "scores": scores_figure(rng.normal(0, 0.1, 400), rng.normal(0.6, 0.1, 100)),
    }


def texts(svg):
    return [
        "".join(node.itertext())
        for node in ElementTree.fromstring(svg).iter()
        if node.tag.endswith("text")
    ]


def contrast(one, other):
    """WCAG's contrast ratio of two colours."""

    def luminance(colour):
        channels = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        linear = np.where(
            channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4
        )
        return linear @ [0.2126, 0.7152, 0.0722]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_spectrum_draws_values_above_zero_against_their_place():
    (axes,) = spectrum_figure(SPECTRA).axes
    drawn = [line.get_xydata().tolist() for line in axes.lines]
    assert drawn == [[[1, 3.0], [2, 1.0], [3, 0.1]], [[1, 2.0], [2, 1.5], [3, 1.0], [4, 0.5]]]
    assert axes.get_yscale() == "log"


@pytest.mark.parametrize(("log_y", "scale"), [(False, "linear"), (True, "log")])
def test_curves_draw_their_points(log_y, scale):
    points = [(0, 1.0), (10, 0.5), (20, 0.25)]
    figure = curves_figure(
        {"one": points, "two": [(5, 2.0)], "none": []}, "step", "loss", log_y=log_y
    )
    (axes,) = figure.axes
    assert [line.get_xydata().tolist() for line in axes.lines] == [
        [list(p) for p in points],
        [[5, 2.0]],
        [],
    ]
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_yscale()) == ("step", "loss", scale)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one", "two", "none"]


def test_series_differ_in_more_than_colour():
    lines = (
        curves_figure({name: [(0, i), (1, i)] for i, name in enumerate("abcdef")}, "x", "y")
        .axes[0]
        .lines
    )
    assert len({line.get_color() for line in lines}) == len(lines) == len(SERIES)
    assert len({line.get_marker() for line in lines}) == len(lines)
    assert len({str(line._dash_pattern) for line in lines}) == len(lines)


def test_many_points_have_no_markers_and_one_line_no_legend():
    long = curves_figure({"loss": [(i, i) for i in range(31)]}, "step", "loss")
    short = curves_figure({"loss": [(i, i) for i in range(30)]}, "step", "loss")
    assert long.axes[0].lines[0].get_marker() in ("", "None")
    assert short.axes[0].lines[0].get_marker() == "o"
    assert not long.legends


def test_heatmap_shows_the_matrix():
    axes = heatmap_figure(MATRIX, "after UCL").axes[0]
    (cells,) = axes.collections
    np.testing.assert_array_equal(cells.get_array(), MATRIX)
    assert cells.get_clim() == (-0.5, 1.0)
    assert axes.yaxis_inverted(), "first token at the top"
    assert heatmap_figure([[1.0]], "one token").axes[0].collections[0].get_clim() == (0.0, 1.0)


def test_scores_are_shares_of_the_pairs():
    random, related = [0.0, 0.0, 0.1, 0.3], [0.9, 1.0]
    axes = scores_figure(random, related).axes[0]
    outlines = [patch for patch in axes.patches if not patch.get_fill()]
    assert len(outlines) == 2
    for patch, cosines in zip(outlines, (random, related), strict=True):
        data = patch.get_data()
        assert data.values.sum() == pytest.approx(1.0)
        inside = (data.edges[:-1] <= 0.05) & (data.values > 0)
        assert data.values[inside].sum() == pytest.approx(np.mean(np.less(cosines, 0.05)))
    assert len([p for p in scores_figure(random, None).axes[0].patches if not p.get_fill()]) == 1


@pytest.mark.parametrize(
    ("draw", "found"),
    [
        (lambda: curves_figure({}, "x", "y"), "nothing to plot"),
        (lambda: curves_figure({"a": []}, "x", "y"), "nothing to plot"),
        (lambda: spectrum_figure({"a": [0.0, 0.0]}), "nothing to plot"),
        (lambda: heatmap_figure([[1.0, 0.5]], "t"), r"found: \(1, 2\)"),
        (lambda: heatmap_figure([], "t"), "no square matrix"),
        (lambda: scores_figure([], None), "random pairs"),
        (lambda: scores_figure([0.1], [float("nan")]), "related pairs"),
    ],
)
def test_what_cannot_be_drawn_is_refused(draw, found):
    with pytest.raises(DataError, match=found):
        draw()


@pytest.mark.thorough
def test_saved_files_are_on_white_and_the_same_each_time(tmp_path):
    for name, figure in every_figure().items():
        stem = tmp_path / f"{name}.v1"
        save_figure(figure, stem)
        first = {path.name: path.read_bytes() for path in tmp_path.glob(f"{name}*")}
        assert set(first) == {f"{name}.v1.png", f"{name}.v1.svg"}
        save_figure(every_figure()[name], stem)
        assert {path.name: path.read_bytes() for path in tmp_path.glob(f"{name}*")} == first
        with Image.open(f"{stem}.png") as image:
            assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
            assert image.width >= 800
        svg = first[f"{name}.v1.svg"].decode()
        assert INK in svg
        assert "<text" in svg, "text stays text"
        assert "currentColor" not in svg


def test_failed_write_is_explained(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write"):
        save_figure(spectrum_figure(SPECTRA), tmp_path / "file" / "spectrum")


def test_inline_svg_takes_colours_and_font_from_the_page():
    for name, figure in every_figure().items():
        svg = inline_svg(figure, name, "p")
        root = ElementTree.fromstring(svg)
        assert (root.tag, root.get("role"), root.get("aria-label")) == ("svg", "img", name)
        assert root.get("viewBox")
        assert root.get("width") is None, "as wide as the page wants it"
        assert "currentColor" in svg
        assert not [colour for colour in PAGE_COLOURS if colour in svg]
        assert not re.search(r"font-family|http|<metadata|<style", svg)
    assert "var(--series-2)" in inline_svg(every_figure()["curves"], "x", "p")
    assert len(PAGE_COLOURS) == len(SERIES) + len({INK, GRID, PAPER})


def test_inline_svg_ids_carry_the_prefix_and_references_find_them():
    for name, figure in every_figure().items():
        svg = inline_svg(figure, name, "run1-loss")
        ids = [node.get("id") for node in ElementTree.fromstring(svg).iter() if node.get("id")]
        assert len(ids) == len(set(ids)) > 10
        assert all(i.startswith("run1-loss-") for i in ids)
        references = re.findall(r'(?:url\(|href=")#([^")]+)', svg)
        assert references or name == "heatmap"
        assert set(references) <= set(ids)


def test_inline_svg_is_deterministic_and_drawing_changes_nothing_global():
    import matplotlib

    before = dict(matplotlib.rcParams)
    one, two = (inline_svg(every_figure()["spectrum"], "x", "p") for _ in range(2))
    assert one == two
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(
    "name",
    ["a $x^2$ b", "_hidden", "100 $", "<b>&\"'", r"\frac{1}{$2$}", 'id="x" url(#y) fill: #1d2630'],
)
def test_names_are_shown_as_they_are(name):
    svg = inline_svg(curves_figure({name: [(0, 1)], "other": [(0, 2)]}, name, "y"), name, "p")
    assert [text.strip() for text in texts(svg)].count(name) == 2, "legend and axis"
    assert ElementTree.fromstring(svg).get("aria-label") == name


def test_large_matrix_stays_small():
    svg = inline_svg(heatmap_figure(np.eye(128), "128 tokens"), "x", "p")
    assert len(svg) < 200_000
    assert 'href="data:image/png;base64,' in svg.replace("xlink:", "")


def test_series_are_legible_on_white():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert min(contrast(colour, PAPER) for colour in SERIES) >= 4.5
    assert contrast(INK, PAPER) >= 7


def test_long_names_leave_room_for_the_plot():
    path = "/" + "/".join(f"folder-{i}" for i in range(20))
    figure = curves_figure(
        {f"{path}/one": [(0, 1), (1, 2)], f"{path}/two": [(0, 2), (1, 1)]}, "step", "loss"
    )
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert [name.split("…")[0] for name in shown] == [path[:21]] * 2
    assert [name[-4:] for name in shown] == ["/one", "/two"]
    inline_svg(figure, "x", "p")
    assert figure.axes[0].get_position().width > 0.6
