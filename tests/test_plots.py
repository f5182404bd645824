"""Plots of the committed results: no text is cut off or overlaps another, and a method has one colour in all plots."""

import json
from itertools import combinations

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from atm_triton.cli import report
from benchmarks import calibration, pages
from benchmarks.paper import figure2, figure4, figure5, figure6, methods
from benchmarks.photos import methods as photo_methods
from benchmarks.photos import report as photographs

PLOTS = {
    "cpu_bench": lambda result, path: report.throughput_plot(result["cases"], path),
    "cpu_bench_image": lambda result, path: report.throughput_plot(result["cases"], path),
    "digits_calibration": lambda result, path: calibration.plot(result["rows"], path),
    "digits_figure2": figure2.plot,
    "digits_figure4": figure4.plot,
    "digits_figure5": figure5.plot,
    "digits_figure6": figure6.plot,
    "photos": photographs.plot,
    "vit_small_patch14_dinov2_figure2": figure2.plot,
}


def ticks_out_of_sight(panel):
    """Labels that matplotlib creates but does not draw."""
    for axis in (panel.xaxis, panel.yaxis):
        low, high = sorted(axis.get_view_interval())
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
            if not (panel.axison and low <= tick.get_loc() <= high):
                yield tick.label1


@pytest.mark.parametrize("name", PLOTS)
def test_texts_stand_in_the_picture_and_beside_one_another(name, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: drawn.append(figure))
    PLOTS[name](json.loads((pages.RESULTS / f"{name}.json").read_text()), pages.RESULTS / f"{name}.png")
    (figure,) = drawn
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    unseen = [label for panel in figure.axes for label in ticks_out_of_sight(panel)]
    texts = [text for text in figure.findobj(Text) if text.get_text().strip() and text not in unseen]
    boxes = {(text.get_text(), id(text)): text.get_window_extent(canvas.get_renderer()) for text in texts}
    assert len(boxes) > 10
    for text, box in boxes.items():
        assert 0 <= box.x0 and box.x1 <= figure.bbox.x1 and 0 <= box.y0 and box.y1 <= figure.bbox.y1, text
    for (text, box), (other, beside) in combinations(boxes.items(), 2):
        across = min(box.x1, beside.x1) - max(box.x0, beside.x0)
        assert across <= 1 or min(box.y1, beside.y1) - max(box.y0, beside.y0) <= 1, (text, other)


def test_a_method_has_one_colour():
    lines = {name: style for name, (style, _) in (methods.LINES | photo_methods.LINES).items()}
    lines |= {label: colour for label, colour in calibration.LINES.values()} | report.COLOURS
    lines |= {f"ToMe, {name}": style for name, style in figure5.STYLES.items() if name.endswith(" r")}
    lines |= {"one threshold, constant": figure5.STYLES["constant threshold"]}
    lines |= {"ATM, layer-dependent": figure5.STYLES["layer-dependent thresholds"]}
    of_method, of_colour = {}, {}
    for name, style in lines.items():
        method, colour = name.partition(",")[0], style[:3] if style[0] == "0" else style.rstrip("-:.")[:2].rstrip("h")
        of_method.setdefault(method, set()).add(colour)
        of_colour.setdefault(colour, set()).add(method)
    assert all(len(colours) == 1 for colours in of_method.values()), of_method
    assert all(len(named) == 1 for named in of_colour.values()), of_colour


def test_a_line_is_of_the_published_setting_that_changes_least(monkeypatch):
    result = json.loads((pages.RESULTS / "digits_figure4.json").read_text())
    drawn = {}
    monkeypatch.setattr(figure4, "draw", lambda lines, *_: drawn.update(lines))
    figure4.plot(result, pages.RESULTS / "digits_figure4.png")
    (_, points) = drawn["ToMe"]
    shares = {row["share"] for row in result["rows"]}
    assert len(points) == len(shares) == 5
    for share in shares:
        tomes = [row["overall"] for row in result["rows"] if row["share"] == share and row["method"].startswith("tome")]
        assert len(tomes) == 3 and min(tomes, key=lambda quality: quality["kl"]) in points
