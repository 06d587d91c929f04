"""The page about one or several runs, and its charts."""

import json
import re
import xml.etree.ElementTree

import numpy as np
import pytest

from garrulax.cli import main
from garrulax.models import preset
from garrulax.train import metrics, svg
from garrulax.train.settings import Settings, write_run_file


def points(chart):
    """The points of the first polyline, [N, 2]."""
    text = re.search(r'points="([^"]+)"', chart).group(1)
    return np.array([[float(v) for v in pair.split(",")] for pair in text.split()])


def test_a_line_lies_where_its_values_say():
    x, y = np.array([0.0, 50, 100]), np.array([2.0, 4.0, 3.0])
    chart = svg.line_chart("a < b & c", [svg.Line("run", x, y, "#0072b2")])
    root = xml.etree.ElementTree.fromstring(chart)  # well-formed, and the title is escaped
    places = points(chart)
    np.testing.assert_allclose(np.diff(places[:, 0]), np.diff(places[:, 0])[0])  # equal distances
    assert (places[0, 1] - places[2, 1]) == pytest.approx((places[0, 1] - places[1, 1]) / 2, abs=0.1)
    # The tick at 3 is as high as the value 3.
    texts = {t.text: float(t.get("y")) for t in root.iter("{http://www.w3.org/2000/svg}text") if t.get("text-anchor")}
    assert texts["3.0"] - 4 == pytest.approx(places[2, 1], abs=0.1)
    logarithmic = points(svg.line_chart("", [svg.Line("", x, np.array([1.0, 10.0, 100.0]), "red")], log=True))
    assert np.diff(logarithmic[:, 1])[0] == pytest.approx(np.diff(logarithmic[:, 1])[1], abs=0.11)


def test_values_that_are_not_finite_leave_gaps():
    y = np.array([1.0, 2.0, np.nan, 3.0, np.inf, 5.0, 6.0])
    chart = svg.line_chart("", [svg.Line("", np.arange(7.0), y, "red")])
    assert chart.count("<polyline") == 2
    assert svg.line_chart("", [svg.Line("", np.arange(2.0), np.full(2, np.nan), "red")]) == ""


def test_a_peak_among_many_points_is_drawn():
    y = np.ones(5003)
    y[1234], y[4321] = 9, -7
    drawn = points(svg.line_chart("", [svg.Line("", np.arange(5003.0), y, "red")]))
    ends = points(svg.line_chart("", [svg.Line("", np.array([0, 5002.0]), np.array([9.0, -7.0]), "red")]))
    assert len(drawn) <= svg.MOST_POINTS
    assert (drawn[:, 1].min(), drawn[:, 1].max()) == (ends[:, 1].min(), ends[:, 1].max())
    np.testing.assert_array_equal(drawn[[0, -1], 0], ends[:, 0])


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(0, 10, [0, 2, 4, 6, 8, 10]), (0.1, 0.4, [0.1, 0.2, 0.3, 0.4]), (-3, 3, [-2, 0, 2])]
)
def test_ticks_are_round(low, high, expected):
    np.testing.assert_allclose(svg.ticks(low, high, 5), expected, atol=1e-12)


def test_labels_of_ticks():
    got = [svg.label(v, s) for v, s in ((2500, 500), (0.25, 0.05), (3, 1), (2e6, 1e6), (1e-5, 1e-5), (0, 0.5))]
    assert got == ["2.5k", "0.25", "3", "2M", "1e-05", "0.0"]


def run(folder, settings, records, model="gpt2-tiny", tokenizer="t"):
    folder.mkdir()
    write_run_file(folder, settings, preset(model), {"corpus": "c", "tokenizer": tokenizer})
    (folder / metrics.NAME).write_text("".join(json.dumps(r) + "\n" for r in records))


def test_page_of_two_runs(tmp_path, capsys):
    records = [{"step": s, "loss": 5 / s, "lr": 0.1, "grad_norm": 1.0, "grad_norm/blocks/0": 0.5, "time": 60.0 * s,
                "tokens_per_second": 900.0, "goodput": 0.8} for s in range(1, 20)]  # fmt: skip
    records += [{"step": 19, "valid_loss": 0.3125, "perplexity": 1.37}, {"step": 19, "valid_loss/code": 0.5},
                {"step": 19, "prompt": "def <b>", "sample": "</pre><script>alert(1)</script>"},
                {"step": 19, "skipped": 1, "skipped_because": "loss nan"}]  # fmt: skip
    run(tmp_path / "one", Settings(lr=0.1, steps=19), records)
    mixture = ("a.txt:0.5", "b.txt:0.5")
    run(tmp_path / "two", Settings(lr=0.2, steps=19, corpus=mixture), records[:5], "glm-base", "other")
    assert main(["report", str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    page = (tmp_path / "one" / "report.html").read_text()
    assert "report.html" in capsys.readouterr().out
    for chart in re.findall(r"<svg.*?</svg>", page):
        xml.etree.ElementTree.fromstring(chart)
    # Two losses, perplexity, code, norm, rate, speed, goodput, and the blocks of each run.
    assert page.count("<svg") == 10
    assert not re.search(r"(src|href)=|https?://(?!www.w3.org/2000/svg)|<script", page)
    assert "&lt;script&gt;alert(1)" in page
    other = '<tr class="other"><td>lr</td><td>0.1</td><td>0.2'
    for shown in ("0.3125 (19)", "loss nan", "held-out loss of code", other, "<td>a.txt:0.5,b.txt:0.5</td>",
                  "The objectives differ", "compare bits per byte"):  # fmt: skip
        assert shown in page, shown
    assert "The texts differ" not in page
    assert "18:00" in page  # minutes from the first record to the last


def test_what_is_no_run_is_said(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "has no run.json" in capsys.readouterr().err
    run(tmp_path / "new", Settings(), [])
    assert main(["report", str(tmp_path / "new")]) == 2
    assert "has no metrics yet" in capsys.readouterr().err
    run(tmp_path / "bad", Settings(), [{"step": 1, "loss": 1.0}])
    (tmp_path / "bad" / "environment.json").write_bytes(b'{"python": "3.1\xff')
    assert main(["report", str(tmp_path / "bad")]) == 2
    assert "environment.json is damaged: delete it" in capsys.readouterr().err
