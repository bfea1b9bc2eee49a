"""How charts look, and how they become SVG and PNG."""

import io
import re
import string
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from textwrap import wrap
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from autoflip_flwr.compare.report import formats
from autoflip_flwr.compare.results import Arm

#: Text, axes and the first arm. In the page it becomes the colour of the text, so
#: that charts follow a dark mode; no other colour may be written like it.
INK = "#1a1b1e"

#: The ground, behind letters. In the page it becomes the page's own.
PAPER = "#fefffe"

#: Seen apart with any colour vision (after Okabe and Ito), and with a contrast of 3 or
#: more to both white and near-black.
COLORS = (INK, "#0072b2", "#d55e00", "#009e73", "#b95e93", "#a67c00")
_DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "p", "h")

WIDTH = 4.4  # inches: on a phone a point of text is still about a pixel
_FONT = 9.5  # points
_TAG_WIDTH, _TAG_HEIGHT = 14, 10.5  # points that a letter takes
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "autoflip",  # the same chart has the same ids
    "svg.fonttype": "path",  # looks the same on a machine without the font
    "path.simplify_threshold": 0.3,
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": _FONT,
    "axes.labelsize": _FONT,
    "xtick.labelsize": _FONT,
    "ytick.labelsize": _FONT,
    "legend.fontsize": _FONT,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "grid.linewidth": 0.6,
    "hatch.linewidth": 1.0,
}


@dataclass(frozen=True, slots=True)
class Styled:
    """An arm with what tells it apart: a letter, a colour, a dash and a marker."""

    arm: Arm
    tag: str
    name: str  # the arm's, without the groups of settings where that is clear
    color: str
    dash: Any
    marker: str

    @property
    def label(self) -> str:
        """Return the letter and the name, in lines that fit below a chart."""
        return "\n".join(
            wrap(f"{self.tag}  {self.name}", 46, subsequent_indent="     ")
        )


@dataclass(frozen=True, slots=True)
class Chart:
    """A finished chart."""

    slug: str
    title: str
    description: str  # what can be seen, for those who cannot
    svg: str
    png: bytes


def style(arms: Sequence[Arm]) -> list[Styled]:
    """Give every arm its letter and line; up to 12 differ in colour and dash."""
    letters = string.ascii_uppercase
    names = formats.short_names([arm.name for arm in arms])
    return [
        Styled(
            arm,
            letters[i % 26] + (str(i // 26) if i >= 26 else ""),
            name,
            COLORS[i % len(COLORS)],
            _DASHES[i % len(_DASHES)],
            _MARKERS[i % len(_MARKERS)],
        )
        for i, (arm, name) in enumerate(zip(arms, names, strict=True))
    ]


@contextmanager
def house_style() -> Iterator[None]:
    """Draw in this report's style, wherever it is called from."""
    with mpl.rc_context(), warnings.catch_warnings():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        # A name in letters that the font lacks is drawn with boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def new_figure(height: float, arms: Sequence[Styled]) -> tuple[Figure, Axes]:
    """Return a figure with room for its axes (inches) and the arms' names below."""
    lines = sum(1 + each.label.count("\n") for each in arms)
    figure = Figure(
        figsize=(WIDTH, height + 0.18 * lines), dpi=72, layout="constrained"
    )
    return figure, figure.add_subplot()


def add_key(
    figure: Figure, labels: Sequence[str], handles: Sequence[Artist] | None = None
) -> None:
    """Write names below the axes, with their lines where there are some."""
    figure.legend(
        handles or [Line2D([], [], linestyle="none") for _ in labels],
        labels,
        loc="outside lower left",
        frameon=False,
        handlelength=3 if handles else 0,
        handletextpad=0.8 if handles else 0,
        labelspacing=0.3,
        borderpad=0,
    )


def tag_ends(
    figure: Figure, axes: Axes, ends: Sequence[tuple[float, float, Styled]]
) -> None:
    """Write every arm's letter where its line ends, none over another."""
    figure.draw_without_rendering()  # the layout decides where the ends are
    ends = sorted(ends, key=lambda end: end[1])
    points = axes.transData.transform([(x, y) for x, y, _ in ends])
    heights = points[:, 1].copy()
    for _ in range(100):
        for i, j in combinations(range(len(ends)), 2):
            overlap = _TAG_HEIGHT - (heights[j] - heights[i])
            if overlap > 0 and abs(points[i, 0] - points[j, 0]) < _TAG_WIDTH:
                heights[i] -= overlap / 2
                heights[j] += overlap / 2
        heights = np.clip(heights, axes.bbox.ymin + 4, axes.bbox.ymax - 4)
    for (x, y, each), shift in zip(ends, heights - points[:, 1], strict=True):
        axes.annotate(
            each.tag,
            (x, y),
            xytext=(10, shift),
            textcoords="offset points",
            color=each.color,
            weight="bold",
            va="center",
            annotation_clip=False,
            path_effects=[withStroke(linewidth=2.5, foreground=PAPER)],
            arrowprops={
                "arrowstyle": "-",
                "color": each.color,
                "linewidth": 0.6,
                "shrinkA": 1,
                "shrinkB": 2,
            },
        )


def finish(figure: Figure, slug: str, title: str, description: str) -> Chart:
    """Render a figure."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=160)
    svg = io.StringIO()
    figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    return Chart(slug, title, description, svg.getvalue(), png.getvalue())


def inline(svg: str, prefix: str) -> str:
    """Return a chart's ``<svg>`` for use inside a page.

    Its ids get a prefix, as two charts of a page may not share one; it takes the
    page's width and the colour of the page's text.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg)
    svg = re.sub(r'\bid="|href="#|url\(#', lambda found: found[0] + prefix, svg)
    svg = svg.replace("<svg ", '<svg aria-hidden="true" ', 1)
    return svg.replace(INK, "currentColor").replace(PAPER, "var(--page)")
