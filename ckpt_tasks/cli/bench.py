"""``bench``: what a storage can do, and which interval pays."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ckpt_tasks.cli.options import as_json, configure, json_option, store_options
from ckpt_tasks.cli.tables import age, table
from ckpt_tasks.config import parse_duration
from ckpt_tasks.errors import ConfigError
from ckpt_tasks.sizes import readable_size

if TYPE_CHECKING:
    from ckpt_tasks.bench.report import BenchReport, Figure

__all__ = ["bench"]

_DEFAULT_STATES = ("mlp-300MB", "many-100MB")


@click.command()
@store_options
@click.option(
    "--state",
    "states",
    multiple=True,
    metavar="NAME|SIZE",
    help="gpt-1.5GB, mlp-300MB or many-100MB (3,000 small tensors), or a size such as 2GB, of a "
    f"GPT-like state; may be repeated. Default: {' and '.join(_DEFAULT_STATES)}.",
)
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1))
@click.option(
    "--failures-every",
    default="6h",
    show_default=True,
    metavar="DURATION",
    help="Mean time between failures, for the interval that is recommended.",
)
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.svg",
    help="Draw the medians as well.",
)
@json_option
def bench(
    store: str | None,
    config_file: Path | None,
    states: tuple[str, ...],
    rounds: int,
    failures_every: str,
    plot: Path | None,
    json_output: bool,
) -> None:
    """Measure saves and loads here, and beside others.

    Blocking saves, saves beside a small training, and loads; against torch.save, safetensors and
    torch.distributed.checkpoint (DCP), in alternation: medians and ratios. It says what bounds
    them, and which interval pays.
    """
    if importlib.util.find_spec("torch") is None:
        raise ConfigError("bench needs torch: pip install 'ckpt-tasks[torch]'")
    from ckpt_tasks.bench.plot import draw
    from ckpt_tasks.bench.run import run_bench
    from ckpt_tasks.bench.states import check_state

    config = configure(store, config_file).store
    states = states or _DEFAULT_STATES
    for state in states:
        check_state(state)
    if plot is not None:
        _check_plot(plot)
    try:
        between = parse_duration(failures_every)
    except ValueError as error:
        raise ConfigError(f"--failures-every: {error}") from error
    reports = [
        run_bench(config, state, rounds=rounds, mean_time_between_failures=between)
        for state in states
    ]
    if plot is not None:
        plot.write_text(draw(reports))
    if json_output:
        click.echo(as_json(reports))
    else:
        click.echo("\n\n".join(_text(report) for report in reports))


def _check_plot(path: Path) -> None:
    """Better known before all the measuring."""
    if path.suffix.lower() != ".svg":
        raise ConfigError(f"--plot {path}: what is drawn is SVG; name a file that ends with .svg")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--plot {path}: there is no such folder")


def _text(report: BenchReport) -> str:
    tensors = f"{report.tensors:,} tensor{'s' if report.tensors != 1 else ''}"
    head = (
        f"{report.state}: {readable_size(report.size)} in {tensors}, to {report.store}; "
        f"medians of {report.rounds} rounds"
    )
    tables = [
        _table("limit", report.limits, ""),
        _table("blocking save", report.saves, "x torch.save"),
        _async_table(report),
        _table("load, cold", report.loads, "x torch.load"),
        _resave_table(report),
        _memory_lines(report),
    ]
    lines = [line for block in tables if block for line in ("", *block)]
    return "\n".join([head, *lines, "", *_advice(report)])


def _table(title: str, figures: list[Figure], ratio: str) -> list[str]:
    headers = [title, "seconds", "GB/s", "CPU s/GB"]
    compared = any(figure.ratio is not None for figure in figures)
    rows = [
        [
            figure.name,
            f"{figure.seconds:.3f}",
            f"{figure.gigabytes_per_second:.2f}",
            f"{figure.cpu_seconds_per_gigabyte:.2f}",
            *([f"{figure.ratio:.2f}"] if figure.ratio is not None else []),
        ]
        for figure in figures
    ]
    return _aligned([*headers, ratio] if compared else headers, rows)


def _async_table(report: BenchReport) -> list[str]:
    headers = ["asynchronous save", "stall", "x copy", "slow-down", "x DCP", "drain", "CPU s/GB"]
    rows = [
        [
            figure.name,
            f"{figure.stall:.3f}",
            f"{figure.stall_ratio:.2f}",
            f"{figure.slow_down:.3f}",
            "-" if figure.slow_down_ratio is None else f"{figure.slow_down_ratio:.2f}",
            f"{figure.drain:.3f}",
            f"{figure.cpu_seconds_per_gigabyte:.2f}",
        ]
        for figure in report.async_saves
    ]
    if not rows or report.step is None:
        return []
    return [
        *_aligned(headers, rows),
        f"in seconds, beside a training of {1000 * report.step:.0f} ms a step; slow-down: what its "
        "steps took longer in all while the save drained",
    ]


def _resave_table(report: BenchReport) -> list[str]:
    headers = ["save after a step", "seconds", "x full save", "bytes written"]
    rows = [
        [each.name, f"{each.seconds:.3f}", f"{each.ratio:.2f}", f"{each.written:.1%}"]
        for each in report.resaves
    ]
    return _aligned(headers, rows)


def _memory_lines(report: BenchReport) -> list[str]:
    lines = [f"planning and bookkeeping of a save: {1000 * report.planning:.1f} ms"]
    if report.memory is not None:
        memory = report.memory
        lines.append(
            f"memory beyond the state, x the state: {memory.after_first:.2f} after one save, "
            f"{memory.after_last:.2f} after {memory.saves}"
        )
    return lines


def _advice(report: BenchReport) -> list[str]:
    advice = report.advice
    bounds = [advice.save, advice.asynchronous, advice.load]
    return [
        *(f"not measured: {why}" for why in report.missing),
        *(bound for bound in bounds if bound is not None),
        f"save about every {age(advice.every)}: --every {advice.every:.0f}s; a save delays the "
        f"training by {advice.cost:.3f} s, {advice.overhead:.2%} of its time",
    ]


def _aligned(headers: list[str], rows: list[list[str]]) -> list[str]:
    """A table with all columns but the first to the right."""
    return table(headers, rows, right=headers[1:])
