"""The report of `inspect`: a table with advice, a figure, and plain values."""

import dataclasses
import io
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

from jbn.tools.findings import FEATURE_KL, Finding
from jbn.tools.measure import Measured


@dataclasses.dataclass(frozen=True, eq=False)
class Report:
    """The result of `inspect`. Prints as a table, with advice below.

    Attributes:
        layers: The numbers of each layer, in running order.
        findings: The findings, the worst first.
        num_batches: Number of batches.
    """

    layers: tuple[Measured, ...]
    findings: tuple[Finding, ...]
    num_batches: int

    @property
    def healthy(self) -> bool:
        """Whether all findings are notes."""
        return all(finding.severity == "note" for finding in self.findings)

    def of(self, layer: Measured) -> list[Finding]:
        """The findings of one layer, the worst first."""
        place = (layer.layer, layer.domain)
        return [f for f in self.findings if (f.layer, f.domain) == place]

    def as_dict(self) -> dict[str, Any]:
        """Everything except the numbers of single features, ready for JSON."""
        return {
            "num_batches": self.num_batches,
            "healthy": self.healthy,
            "layers": [layer.summary() for layer in self.layers],
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
        }

    def __str__(self) -> str:
        return _text(self)

    def figure(self, path: str | Path) -> None:
        """Plots drift and divergence of all features by layer, with the findings.

        Needs Matplotlib.

        Args:
            path: The file to write; its suffix sets the format.
        """
        _draw(self, Path(path))


_STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}


def _text(report: Report) -> str:
    from rich import box
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    terminal = sys.stdout.isatty()
    out = io.StringIO()
    width = None if terminal else 100
    console = Console(
        file=out,
        force_terminal=terminal,
        force_jupyter=False,  # There, `rich` prints directly, and leaves `out` empty.
        width=width,
        highlight=False,
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    names = {layer.name: layer for layer in report.layers}
    table.add_column("layer", overflow="fold", min_width=min(20, max(map(len, names))))
    for name in ("features", "rows", "eff.", "updates", "drift", "var", "KL", "max"):
        table.add_column(name, justify="right", no_wrap=True)
    widest = max((len(f.kind) for f in report.findings), default=0)
    table.add_column("findings", min_width=max(widest, len("findings")))
    for name, layer in names.items():
        s = layer.summary()
        kinds = [Text(f.kind, _STYLES[f.severity]) for f in report.of(layer)]
        table.add_row(
            name,
            f"{s['num_features']:,}",
            _cell(s["rows"], ",.4g"),
            _cell(s["effective_rows"], ",.0f"),
            _cell(s["updates"], ",.0f"),
            _cell(s["drift_rms"], ".3f"),
            _cell(s["ratio_median"], ".3g"),
            _cell(s["kl_mean"], ".4f"),
            _cell(s["kl_max"], ".4f"),
            Text(", ").join(kinds) if kinds else Text("ok", "green"),
        )
    console.print(table)
    console.print(
        "rows: of a batch; eff.: independent rows in all; drift: of the mean, in"
        " running standard deviations (rms); var: data / running (median); KL: in nats"
        " (mean, max)",
        style="dim",
    )
    if not report.findings:
        console.print(
            f"\nNo findings in {report.num_batches:,} batches: training and evaluation"
            " agree."
        )
    # Findings that several layers share are printed once.
    for advice in dict.fromkeys(f.advice for f in report.findings):
        console.print()
        for finding in report.findings:
            if finding.advice == advice:
                style = _STYLES[finding.severity]
                head = (finding.severity, style), f"  {_place(finding)}  "
                console.print(Text.assemble(*head, (finding.kind, "bold")))
                console.print(Padding(Text(finding.message), (0, 0, 0, 2)))
        console.print(Padding(Text(f"-> {advice}"), (0, 0, 0, 2)))
    return "\n".join(line.rstrip() for line in out.getvalue().strip("\n").splitlines())


def _place(finding: Finding) -> str:
    domain = "" if finding.domain is None else f"[{finding.domain}]"
    return (finding.layer or "(the model)") + domain


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None or not math.isfinite(value) else format(value, form)


_COLORS = {"error": "#b2182b", "warning": "#d9822b", "note": "#5b7db1"}
# Smaller values are drawn here.
_LEAST = 1e-5


def _draw(report: Report, path: Path) -> None:
    # Not pyplot, which would look for a display. Imported here: it takes a second.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers = report.layers
    figure = Figure((10, 1.6 + 0.42 * max(len(layers), 2)), dpi=150)
    figure.set_layout_engine("constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(
        "Running statistics against the data", x=0.01, ha="left", fontweight="bold"
    )
    left, right = figure.subplots(1, 2, sharey=True)
    for row, layer in enumerate(layers):
        found = report.of(layer)
        color = _COLORS[found[0].severity] if found else "#4d4d4d"
        marked = np.zeros(len(layer.kl), bool)
        for finding in found:
            marked[list(finding.features)] |= finding.severity == found[0].severity
        alive = layer.finite & ~layer.dead
        # Spread over the height of the row, so that features do not overlap.
        spread = row + 0.28 * np.sin(2.4 * np.arange(len(alive)))
        summary = layer.summary()
        for axes, values, mean in (
            (left, np.abs(layer.drift), summary["drift_rms"]),
            (right, layer.kl, summary["kl_mean"]),
        ):
            for which, c in ((alive & ~marked, "#8c8c8c"), (alive & marked, color)):
                x, y = np.maximum(values[which], _LEAST), spread[which]
                axes.plot(x, y, ".", color=c, alpha=0.5, ms=5, mew=0)
            if mean is not None:
                axes.plot(max(mean, _LEAST), row, "D", color=color, ms=6, mec="white")
        right.annotate(
            ", ".join(dict.fromkeys(f.kind for f in found)) or "ok",
            (1.02, row),
            xycoords=("axes fraction", "data"),
            color=color,
            va="center",
            fontsize=9,
        )
    left.set_yticks(range(len(layers)), [layer.name for layer in layers], fontsize=9)
    left.set_ylim(len(layers) - 0.5, -0.5)
    left.set_title("How far off the mean is", fontsize=10, loc="left")
    left.set_xlabel("running standard deviations", fontsize=9)
    right.set_title("How far off mean and variance are", fontsize=10, loc="left")
    right.set_xlabel("KL(data || running), nats", fontsize=9)
    right.axvline(FEATURE_KL, color="#888888", lw=0.8, ls="--", label="too far")
    right.plot([], [], ".", color="#8c8c8c", label="a feature")
    right.plot([], [], "D", color="#4d4d4d", mec="white", label="all (rms; mean)")
    figure.legend(loc="upper right", ncols=3, fontsize=8, frameon=False)
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xlim(_LEAST / 2, max(2.0, axes.get_xlim()[1]))
        axes.grid(axis="x", alpha=0.3, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
