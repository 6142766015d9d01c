"""One style for every figure: safe for colour-blind readers, readable on a projector, described in words."""

import io
import math
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito (2008): told apart with any colour vision, and in grey print
PALETTE = {
    "blue": "#0072B2",
    "orange": "#E69F00",
    "green": "#009E73",
    "red": "#D55E00",
    "sky": "#56B4E9",
    "pink": "#CC79A7",
    "yellow": "#F0E442",
    "black": "#000000",
}

STYLE = {
    "figure.figsize": (7.2, 4.2),
    "figure.dpi": 100,
    "savefig.dpi": 100,
    "figure.constrained_layout.use": True,
    "figure.facecolor": "white",
    "axes.prop_cycle": mpl.cycler(color=[c for name, c in PALETTE.items() if name != "yellow"]),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 15,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 14,
    "grid.color": "#dddddd",
    "font.size": 13,
    "legend.frameon": False,
    "lines.linewidth": 2.5,
    "lines.markersize": 8,
    "errorbar.capsize": 4,
    "image.cmap": "viridis",
}
mpl.rcParams.update(STYLE)

# the 97.5% point of Student's t for 1 to 30 degrees of freedom
T95 = [
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
]
T95 += [
    2.120,
    2.110,
    2.101,
    2.093,
    2.086,
    2.080,
    2.074,
    2.069,
    2.064,
    2.060,
    2.056,
    2.052,
    2.048,
    2.045,
    2.042,
]


def show(fig: Figure, alt: str) -> None:
    """Display a figure with its description and close it. ValueError for a missing label or description."""
    png = to_png(fig, alt)
    display({"image/png": png, "text/plain": alt}, raw=True, metadata={"image/png": {"alt": alt}})


def to_png(fig: Any, alt: str) -> bytes:
    """The figure as PNG; closes it. ValueError where an axis has no label or the figure no description."""
    # closed first of all, so that a refused figure is not drawn by the notebook either
    plt.close(fig if isinstance(fig, Figure) else "all")
    if not isinstance(fig, Figure):
        what = type(fig).__name__
        raise ValueError(f"a matplotlib figure was expected, this is {what}; end draw() with `return fig`")
    if len(alt.split()) < 4:
        raise ValueError(f"alt={alt!r} does not describe the figure; say in a sentence what it shows")
    for axes in fig.axes:
        if bare := [name for name in ("x", "y") if _unlabelled(axes, name)]:
            raise ValueError(
                f"axes {axes.get_title()!r} have no {bare[0]} label; set_{bare[0]}label('what, in which unit')"
            )
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def mean_interval(values: Sequence[float] | torch.Tensor) -> tuple[float, float]:
    """The mean of n values and the half-width of its 95% t-interval (nan for n = 1).

    For error bars over seeds: plt.errorbar(x, mean, yerr=half). Write n into the caption.
    """
    x = torch.as_tensor(values, dtype=torch.float64).flatten()
    n = x.numel()
    if n == 0:
        raise ValueError("mean_interval needs at least one value")
    if n == 1:
        return float(x[0]), math.nan
    t = T95[n - 2] if n <= 31 else 1.96 + 2.4 / (n - 1)  # beyond the table: right to 0.001
    return float(x.mean()), t * float(x.std()) / math.sqrt(n)


def _unlabelled(axes: Axes, name: str) -> bool:
    """Whether an axis that shows ticks has no label, its own or that of a neighbour it shares the axis with."""
    axis = getattr(axes, f"{name}axis")
    if not (axes.axison and axes.get_visible() and axis.get_visible() and len(axis.get_majorticklocs())):
        return False
    shared = getattr(axes, f"get_shared_{name}_axes")().get_siblings(axes)
    figure_label = getattr(axes.figure, f"get_sup{name}label")()
    return not (figure_label or any(getattr(a, f"get_{name}label")() for a in shared))
