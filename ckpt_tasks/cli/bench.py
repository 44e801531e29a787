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
    metavar="NAME",
    help="gpt-1.5GB, mlp-300MB or many-100MB (3,000 small tensors); may be repeated. "
    f"Default: {' and '.join(_DEFAULT_STATES)}.",
)
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1))
@click.option(
    "--failures-every",
    default="6h",
    show_default=True,
    metavar="DURATION",
    help="Mean time between failures, for the interval that is recommended.",
)
@json_option
def bench(
    store: str | None,
    config_file: Path | None,
    states: tuple[str, ...],
    rounds: int,
    failures_every: str,
    json_output: bool,
) -> None:
    """Measure saves and loads here, and beside others.

    Beside torch.save, safetensors and torch.distributed.checkpoint, in alternation: medians, and
    ratios to torch's own. It says what bounds a save, and which interval pays.
    """
    if importlib.util.find_spec("torch") is None:
        raise ConfigError("bench needs torch: pip install 'ckpt-tasks[torch]'")
    from ckpt_tasks.bench.run import run_bench

    config = configure(store, config_file).store
    try:
        between = parse_duration(failures_every)
    except ValueError as error:
        raise ConfigError(f"--failures-every: {error}") from error
    reports = [
        run_bench(config, state, rounds=rounds, mean_time_between_failures=between)
        for state in states or _DEFAULT_STATES
    ]
    if json_output:
        click.echo(as_json(reports))
        return
    click.echo("\n\n".join(_text(report) for report in reports))


def _text(report: BenchReport) -> str:
    lines = [f"{report.state}: {readable_size(report.size)}, medians of {report.rounds} rounds", ""]
    for title, figures in (
        ("limit", report.limits),
        ("save", report.saves),
        ("load, cold", report.loads),
    ):
        lines += [*_table(title, figures), ""]
    lines += [*(f"not measured: {why}" for why in report.missing), report.bound]
    lines.append(f"save about every {age(report.every)}: --every {report.every:.0f}s")
    return "\n".join(lines)


def _table(title: str, figures: list[Figure]) -> list[str]:
    headers = [title, "seconds", "GB/s", "CPU s/GB", "ratio"]
    rows = [
        [
            figure.name,
            f"{figure.seconds:.3f}",
            f"{figure.gigabytes_per_second:.2f}",
            f"{figure.cpu_seconds_per_gigabyte:.2f}",
            "" if figure.ratio is None else f"{figure.ratio:.2f}",
        ]
        for figure in figures
    ]
    return table(headers, rows, right="seconds GB/s CPU s/GB ratio")
