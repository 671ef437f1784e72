"""Renders Altair charts to SVG and PNG through vl-convert, without a browser or a network.

Colours are names of CSS variables, which the page sets for light and dark; PNG takes the light ones. Each
chart is drawn for a given width, so that its letters are as large on a phone as on a wide screen.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from viaticum.errors import MissingExtra

WIDE, NARROW = 760, 328
FONT = "Helvetica, Arial, Liberation Sans, DejaVu Sans, sans-serif"
LETTER = 6.4  # width of one at 12 pixels, on the safe side
WIDE_LETTER = 7.4  # the same where the page's font is a wide one
# For PNG, and the light colours of the page.
LIGHT = {
    "ink": "#1c2430",
    "muted": "#566072",
    "line": "#dfe3ea",
    "paper": "#ffffff",
    "hull": "#7b8494",
    "single": "#7b8494",
    "run-1": "#1d5fd1",
    "run-2": "#b3357d",
    "run-3": "#0a7a5c",
    "run-4": "#8a5a00",
    "oracle": "#0a7a5c",
    "mix": "#8a5a00",
    "held": "#9db8ea",
    "bad": "#c0322b",
}
SERIES = ("run-1", "run-2", "run-3", "run-4")


@dataclass(frozen=True)
class Chart:
    """A chart that can be drawn at any width.

    Attributes:
        title, description: for screen readers.
        draw: returns the Altair chart for a width in pixels.
        caption: meaning of its marks, shown below it.
        heading: shown above it, where a section has several charts.
    """

    name: str
    title: str
    description: str
    draw: Callable[[int], Any]
    caption: str = ""
    heading: str = ""

    def svg(self, width: int) -> str:
        """The drawing as an SVG document, with CSS variables for colours."""
        return str(library("vl_convert").vegalite_to_svg(self.draw(width).to_dict(validate=False)))

    def png(self, width: int = WIDE, scale: float = 2.0) -> bytes:
        """The drawing in the light colours. scale: pixels of the file a pixel of the drawing."""
        spec = json.dumps(self.draw(width).properties(background=LIGHT["paper"]).to_dict())
        spec = re.sub(r"var\(--([a-z0-9-]+)\)", lambda found: LIGHT[found[1]], spec)
        return bytes(library("vl_convert").vegalite_to_png(spec, scale=scale))


def log_ticks(low: float, high: float) -> list[float]:
    """Ticks of a logarithmic axis: 1, 2 and 5 times powers of ten, or fewer where there are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if high / low < 50 else (1, 3) if high / low < 2_000 else (1,)
    ticks = [step * 10.0**power for power in powers for step in steps]
    return [tick for tick in ticks if low <= tick <= high]


def money_ticks(low: float, high: float, count: int = 4) -> tuple[list[float], str]:
    """Ticks of a linear axis of dollars, about `count`, and the format in which no two of them read alike."""
    span = high - low or abs(high) or 1.0
    power = math.floor(math.log10(span / count))
    steps = [each * 10.0**power for each in (1, 2, 5, 10)]
    fitting = [step for step in steps if step * count >= span * 0.99]
    for step in (fitting[0], fitting[0] / 2):  # the smaller one where a single tick falls between the ends
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        ticks = [round(n * step, 12) for n in range(first, last + 1)]
        if len(ticks) > 1:
            break
    digits = 3
    while digits < 15 and any(abs(float(f"{tick:.{digits - 1}e}") - tick) > step / 1e6 for tick in ticks):
        digits += 1
    return ticks, f"$,.{digits}~r"


def data_of(rows: Iterable[dict[str, Any]]) -> Any:
    return library("altair").Data(values=list(rows))


def var(name: str) -> str:
    return f"var(--{name})"


def styled(alt: Any, chart: Any, width: int, height: int) -> Any:
    ink, muted, line = var("ink"), var("muted"), var("line")
    return (
        chart.properties(
            width=width,
            height=height,
            background="transparent",
            autosize=alt.AutoSizeParams(type="fit", contains="padding"),
            padding={"left": 8, "top": 2, "right": 8, "bottom": 2},  # letters may be wider than measured
        )
        .configure(font=FONT, aria=False)
        .configure_view(stroke=None)
        .configure_axis(
            labelColor=muted,
            titleColor=ink,
            gridColor=line,
            domainColor=muted,
            tickColor=muted,
            labelFontSize=12,
            titleFontSize=12,
            titleFontWeight="normal",
            titlePadding=10,
            labelFont=FONT,
            titleFont=FONT,
        )
        .configure_legend(labelColor=ink, labelFontSize=12, labelFont=FONT, padding=4, columnPadding=18)
    )


def library(name: str) -> Any:
    """Import Altair or vl-convert. Raises `MissingExtra` where it is not installed."""
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError:
        raise MissingExtra({"vl_convert": "vl-convert-python"}.get(name, name), "reports") from None
