"""How all figures look, and how they become text that is the same for the same results."""

import io

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

STYLE = {
    "svg.hashsalt": "universality",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.use": True,
}
MARKERS = "os^Dv"


def svg(figure) -> str:
    """The figure, which is closed, as an SVG element."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
