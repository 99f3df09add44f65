"""Class names are drawn literally, in any script."""

import logging
import warnings

import numpy as np
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import conddetr
from conddetr.viz import fonts
from conddetr.viz.attention import AttentionMaps, attention_figure
from conddetr.viz.boxes import draw_boxes

IMAGE = torch.zeros(3, 60, 80, dtype=torch.uint8)
DOLLARS = ["$5_$10 note", "a$$b", "100$", r"$\frac$ {", "$x^2$"]


def install_font(path, family, letters):
    """Install a font in which every letter is a black square."""
    builder = FontBuilder(1000, isTTF=True)
    names = [".notdef", *(f"u{ord(letter):04X}" for letter in letters)]
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(letter): name for letter, name in zip(letters, names[1:], strict=True)})
    pen = TTGlyphPen(None)
    pen.moveTo((100, 0))
    for corner in ((100, 800), (900, 800), (900, 0)):
        pen.lineTo(corner)
    pen.closePath()
    square = pen.glyph()
    builder.setupGlyf(dict.fromkeys(names, square))
    builder.setupHorizontalMetrics(dict.fromkeys(names, (1000, 100)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": family, "styleName": "Regular"})
    builder.setupOS2(usWeightClass=400)
    builder.setupPost()
    builder.save(path)
    font_manager.fontManager.addfont(path)


@pytest.fixture
def bundled_fonts(monkeypatch):
    """Only matplotlib's bundled fonts are installed, and no letter was searched yet."""
    manager = font_manager.fontManager
    bundled = [entry for entry in manager.ttflist if "mpl-data" in str(entry.fname)]
    monkeypatch.setattr(manager, "ttflist", bundled)
    monkeypatch.setattr(fonts, "_family_of", {})


def draw(captions, title=""):
    """Draw captions without a warning; returns the axes and the pixels."""
    figure = Figure(figsize=(4, 3))
    axes = figure.subplots()
    boxes = torch.tensor([[10.0, 20.0, 40.0, 50.0]]).expand(len(captions), -1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_boxes(axes, IMAGE, boxes, [0] * len(captions), captions, title)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
    return axes, np.asarray(canvas.buffer_rgba())


def shown(axes):
    return [text.get_text() for text in axes.texts]


def test_dollar_signs_are_drawn_literally():
    axes, _ = draw(DOLLARS, DOLLARS[0])
    assert shown(axes) == DOLLARS
    assert axes.get_title() == DOLLARS[0]
    assert not any(text.get_parse_math() for text in [*axes.texts, axes.title])


def test_an_attention_figure_accepts_any_name(bundled_fonts):
    maps = AttentionMaps(torch.full((3, 1, 1, 4, 4), 1 / 16), ("$p$", "$c$"), layer=0, cell=(0.25, 0.25))
    box, zero = torch.tensor([[10.0, 20.0, 40.0, 50.0]]), torch.zeros(1, dtype=torch.int64)
    for name in ("信号灯", *DOLLARS):
        detections = conddetr.Detection(torch.tensor([0.5]), zero, box, zero, [name])
        figure = attention_figure(IMAGE, detections, 0, maps)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            figure.canvas.draw()
    assert figure.get_suptitle() == f"{DOLLARS[-1]} 0.50 · query 0 · decoder layer 0"


def test_ascii_names_need_no_font_search(bundled_fonts, monkeypatch):
    monkeypatch.setattr(fonts, "_look_for", None)
    names = ["cat 0.50", "a\tb", "two\nlines", ""]
    assert fonts.lettering(names) == (["cat 0.50", "ab", "two\nlines", ""], ["sans-serif"])


def test_letters_of_the_default_font_need_no_other_font(bundled_fonts, caplog):
    names = ["café", "Ёлка", "سلام", "ñandú – 5"]
    assert fonts.lettering(names) == (names, ["sans-serif"])
    assert not caplog.records


def test_a_font_with_the_letters_draws_them(bundled_fonts, tmp_path, caplog):
    def whiteness():
        """Fraction of the caption's area that its letters fill."""
        axes, pixels = draw(["信号灯"], "灯")
        left, bottom, right, top = map(round, axes.texts[0].get_window_extent().extents)
        area = pixels[len(pixels) - top : len(pixels) - bottom, left:right, :3]
        return axes, (area > 200).all(-1).mean()

    assert whiteness()[1] < 0.3
    assert len(caplog.records) == 1
    fonts._family_of.clear()
    install_font(tmp_path / "part.ttf", "A Part", "信号")
    install_font(tmp_path / "whole.ttf", "Script Of Squares", "信号灯")
    axes, filled = whiteness()
    assert shown(axes) == ["信号灯"]
    assert axes.texts[0].get_family() == axes.title.get_family() == ["sans-serif", "Script Of Squares"]
    # Each letter is a square of 0.8 by 0.8.
    assert filled > 0.4
    assert len(caplog.records) == 1


def test_letters_without_a_font_are_reported_once(bundled_fonts, caplog):
    with caplog.at_level(logging.WARNING, fonts.log.name):
        axes, _ = draw(["cat", "信号 café", "กั่\udce9"], "灯")
        draw(["कुत्ता"])
    # A combining mark is removed with its letter.
    assert shown(axes) == ["cat", "?? café", "?"]
    [record] = [record for record in caplog.records if record.name == fonts.log.name]
    assert "No installed font has all letters of '灯' (first missing: '灯', U+706F)" in record.getMessage()
