"""Figures: labelled, described, in one style; intervals over seeds."""

import math

import matplotlib.pyplot as plt
import pytest
import torch

from mini.lab import figures, mean_interval, show

ALT = "A line that rises from left to right"


@pytest.fixture
def shown(monkeypatch):
    bundles = []
    monkeypatch.setattr(figures, "display", lambda data, raw, metadata: bundles.append((data, metadata)))
    yield bundles
    plt.close("all")


def line(xlabel="steps", ylabel="loss, in nats"):
    fig, ax = plt.subplots()
    ax.plot([1, 2])
    ax.set(xlabel=xlabel, ylabel=ylabel)
    return fig


def test_show_gives_png_text_and_alt_and_closes(shown):
    fig = line()
    show(fig, ALT)
    data, metadata = shown[0]
    assert data["image/png"].startswith(b"\x89PNG")
    assert data["text/plain"] == ALT
    assert metadata == {"image/png": {"alt": ALT}}
    assert not plt.fignum_exists(fig.number)


def test_png_is_100_dpi_and_the_same_each_time():
    png = figures.to_png(line(), ALT)
    width, height = (int.from_bytes(png[i : i + 4], "big") for i in (16, 20))
    assert (width, height) == (720, 420)
    assert figures.to_png(line(), ALT) == png


@pytest.mark.parametrize(
    ("fig", "alt", "words"),
    [
        (lambda: line(xlabel=""), ALT, r"no x label; set_xlabel\("),
        (lambda: line(ylabel=""), ALT, "no y label"),
        (line, "", "does not describe the figure"),
        (line, "a plot", "does not describe the figure"),
    ],
)
def test_unlabelled_or_undescribed_figures_are_refused_and_not_left_open(shown, fig, alt, words):
    with pytest.raises(ValueError, match=words):
        show(fig(), alt)
    assert shown == []
    assert plt.get_fignums() == []


@pytest.mark.parametrize("returned", [None, [1]], ids=["nothing", "a list"])
def test_a_draw_function_that_returns_no_figure_is_told_so(returned):
    line()
    with pytest.raises(
        ValueError, match=r"a matplotlib figure was expected, .* end draw\(\) with `return fig`"
    ):
        figures.to_png(returned, ALT)
    assert plt.get_fignums() == []


def test_labels_of_shared_axes_and_of_the_figure_count(shown):
    fig, axes = plt.subplots(2, 2, sharex=True, sharey=True)
    axes[1, 0].set(xlabel="key", ylabel="query")
    show(fig, ALT)
    fig, _ = plt.subplots(1, 2)
    fig.supxlabel("key")
    fig.supylabel("query")
    show(fig, ALT)
    fig, axes = plt.subplots(1, 2)
    axes[0].set(xlabel="key", ylabel="query")
    with pytest.raises(ValueError, match="no x label"):
        show(fig, ALT)


def test_an_axis_without_ticks_needs_no_label(shown):
    fig, ax = plt.subplots()
    ax.set(xlabel="key", yticks=[])
    show(fig, ALT)
    fig, ax = plt.subplots()
    ax.set(ylabel="query")
    ax.xaxis.set_visible(False)
    show(fig, ALT)
    assert len(shown) == 2


def test_colour_bars_need_a_label_and_switched_off_axes_do_not(shown):
    def picture():
        fig, ax = plt.subplots()
        return fig, ax, ax.imshow([[1, 2]])

    fig, ax, image = picture()
    ax.set_axis_off()
    show(fig, ALT)
    fig, ax, image = picture()
    ax.set(xlabel="key", ylabel="query")
    fig.colorbar(image, label="probability")
    show(fig, ALT)
    fig, ax, image = picture()
    ax.set(xlabel="key", ylabel="query")
    fig.colorbar(image)
    with pytest.raises(ValueError, match="no y label"):
        show(fig, ALT)


@pytest.mark.parametrize(
    ("values", "half"),
    [([1.0, 3.0], 12.706), ([1.0, 2.0, 3.0], 2.484), (list(range(31)), 3.335), (list(range(101)), 5.784)],
)
def test_interval_against_tables(values, half):
    mean, got = mean_interval(values)
    assert mean == pytest.approx(sum(values) / len(values))
    assert got == pytest.approx(half, rel=1e-3)


def test_every_point_of_t_leaves_a_fortieth_above_it():
    """The density of Student's t, integrated from 0 by the trapezoid rule."""
    for df, t in enumerate(figures.T95, start=1):
        x = torch.linspace(0, t, 20_001, dtype=torch.float64)
        scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
        share = torch.trapezoid(scale * (1 + x**2 / df) ** (-(df + 1) / 2), x).item()
        assert share == pytest.approx(0.475, abs=4e-5)


def test_interval_covers_the_mean_about_95_times_of_100():
    x = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0))
    covered = sum(abs(mean) <= half for mean, half in map(mean_interval, x))
    assert 0.94 < covered / 4000 < 0.96


def test_interval_of_one_value_is_unknown_and_of_none_refused():
    mean, half = mean_interval([2.0])
    assert mean == 2
    assert math.isnan(half)
    with pytest.raises(ValueError, match="at least one"):
        mean_interval([])
