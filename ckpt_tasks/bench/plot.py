"""A benchmark's medians as bars: SVG, which browsers show and documents include."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from xml.sax.saxutils import escape

from ckpt_tasks.bench.ours import OURS
from ckpt_tasks.bench.report import BenchReport
from ckpt_tasks.sizes import readable_size

__all__ = ["draw"]

_WIDTH, _MARGIN = 760, 24
_BARS_AT, _LONGEST = 220, 420  # pixels from the left, and of a section's longest bar
_BAR, _ROW, _SECTION, _TITLE = 16, 24, 38, 44
_BASELINE = 12.5  # of a text beside a bar, below the bar's top
_OURS_COLOR, _OTHERS_COLOR, _INK, _FAINT = "#2563eb", "#a8b0bc", "#1f2937", "#6b7280"

_Bars = list[tuple[str, float]]


def draw(reports: Sequence[BenchReport]) -> str:
    """One picture of them all; within a section bars are as long as seconds are many."""
    body: list[str] = []
    y = _MARGIN
    for report in reports:
        y += _TITLE
        body.append(_text(_MARGIN, y - 14, _headline(report), size=17, weight=600))
        for title, bars in _sections(report):
            y += _SECTION
            body.append(_text(_MARGIN, y - 12, title, fill=_FAINT))
            body.extend(_section(bars, y))
            y += _ROW * len(bars)
    height = y + _MARGIN
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
            f'width="{_WIDTH}" height="{height}" font-family="system-ui, sans-serif" '
            f'font-size="13" fill="{_INK}">',
            f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
            *body,
            "</svg>\n",
        ]
    )


def _headline(report: BenchReport) -> str:
    return f"{report.state}: {readable_size(report.size)}, {report.tensors:,} tensors"


def _sections(report: BenchReport) -> Iterator[tuple[str, _Bars]]:
    """Those that were measured."""
    yield "blocking save, until durable", [(f.name, f.seconds) for f in report.saves]
    if report.async_saves:
        figures = report.async_saves
        yield "asynchronous save: training stands still", [(f.name, f.stall) for f in figures]
        yield (
            "asynchronous save: training is slower in all",
            [(f.name, max(0.0, f.slow_down)) for f in figures],
        )
        yield "asynchronous save, until durable", [(f.name, f.drain) for f in figures]
    yield "load, cold", [(f.name, f.seconds) for f in report.loads]


def _section(bars: _Bars, top: int) -> Iterator[str]:
    longest = max(seconds for _, seconds in bars) or 1.0
    for number, (name, seconds) in enumerate(sorted(bars, key=lambda bar: bar[1])):
        y = top + number * _ROW
        length = _LONGEST * seconds / longest
        ours = name.startswith(OURS)
        color, weight = (_OURS_COLOR, 600) if ours else (_OTHERS_COLOR, 400)
        baseline = y + _BASELINE
        yield _text(_BARS_AT - 10, baseline, name, weight=weight, anchor="end")
        yield (
            f'<rect class="bar" x="{_BARS_AT}" y="{y}" width="{length:.2f}" height="{_BAR}" '
            f'rx="2" fill="{color}"><title>{escape(name)}: {seconds:.4f} s</title></rect>'
        )
        yield _text(_BARS_AT + length + 8, baseline, f"{seconds:.3f} s", weight=weight)


def _text(
    x: float,
    y: float,
    content: str,
    *,
    size: int = 13,
    weight: int = 400,
    anchor: str = "start",
    fill: str = _INK,
) -> str:
    return (
        f'<text x="{x:.2f}" y="{y:.2f}" font-size="{size}" font-weight="{weight}" '
        f'text-anchor="{anchor}" fill="{fill}">{escape(content)}</text>'
    )
