"""``train``: one attempt of a training run, in a supervised child process."""

from __future__ import annotations

import os
import signal
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Self

import click
import msgspec

from ckpt_tasks.cli.account import Account
from ckpt_tasks.cli.options import (
    configure,
    registry_options,
    retention_options,
    retention_overrides,
    split_params,
    store_options,
)
from ckpt_tasks.cli.tables import echo
from ckpt_tasks.config import CheckpointConfig, SecretsConfig
from ckpt_tasks.errors import CkptTasksError, ConfigError
from ckpt_tasks.format.layout import encode_name
from ckpt_tasks.masking import mask_text
from ckpt_tasks.store.open import shown_place
from ckpt_tasks.tasks.resolve import signature_of_entrypoint
from ckpt_tasks.training.entrypoints.entrypoint import check_params
from ckpt_tasks.training.launch import launch
from ckpt_tasks.training.spec import RankPlace, TrainOutcome, TrainSpec
from ckpt_tasks.training.supervision.torchrun import (
    is_first_of_machine,
    started_by_torchrun,
    tell_torchrun,
    torchrun_invocation,
    torchrun_place,
)
from ckpt_tasks.types import EXIT_STOPPED, CheckpointId

__all__ = ["train"]


def _check_resume(ctx: click.Context, param: click.Parameter, value: str) -> str:
    if value not in ("auto", "fresh"):
        try:
            CheckpointId.parse(value)
        except ValueError as error:
            raise click.BadParameter(f"{error}; or say auto or fresh") from error
    return value


@click.command()
@click.argument("entrypoint", metavar="MODULE:FUNCTION")
@click.option(
    "--run",
    "--run-name",
    "run",
    required=True,
    metavar="NAME",
    help="The training run's name. (torchrun takes --run for an option of its own.)",
)
@click.option(
    "-p",
    "--param",
    "params",
    multiple=True,
    metavar="KEY=VALUE",
    help="A hyperparameter; repeatable. Others see it in the list of processes.",
)
@click.option(
    "--secret",
    "secret_names",
    multiple=True,
    metavar="NAME",
    help="A hyperparameter, or *_dsn for several, that is masked like password or api_key; "
    "repeatable.",
)
@store_options
@click.option("--every-steps", type=int, metavar="N", help="Save every N steps.")
@click.option("--every-epochs", type=int, metavar="N", help="Save every N epochs.")
@click.option("--every", metavar="DURATION", help="Save after so long: 90s, 10m, 1h30m.")
@retention_options
@registry_options
@click.option(
    "--resume",
    metavar="auto|fresh|ID",
    default="auto",
    show_default=True,
    callback=_check_resume,
    help="What to start from.",
)
@click.option(
    "--nproc",
    type=click.IntRange(1),
    metavar="N",
    help="Ranks to train on, each a process with torchrun's environment; default: attempt.nproc of "
    "the configuration, else 1. Under torchrun, its workers are the ranks.",
)
@click.option("--python", metavar="PATH", help="The interpreter that trains; default: this one.")
@click.option("--takeover", is_flag=True, help="Take the run over from a live attempt.")
@click.option(
    "--invocation",
    metavar="ID",
    help="Id that all retries of one execution share; default: torchrun's job id, else a new one.",
)
@click.option(
    "--outcome",
    "outcome_file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Where to write how it ended, as JSON; of torchrun's workers, which hide their exit "
    "codes, rank 0 does.",
)
@click.pass_context
def train(
    ctx: click.Context,
    /,
    *,
    entrypoint: str,
    run: str,
    params: Sequence[str],
    store: str | None,
    config_file: Path | None,
    resume: str,
    nproc: int | None,
    python: str | None,
    takeover: bool,
    invocation: str | None,
    outcome_file: Path | None,
    **flags: Any,
) -> None:
    """Train, from the run's last checkpoint if there is one.

    Run it again after any failure: it goes on. Exit codes: 0 done; 1 failed, worth retrying;
    2 usage or configuration; 3 a later attempt owns the run; 4 no restorable checkpoint; 5 busy;
    75 saved and stopped on a signal, run again.

    On several machines: torchrun ... -m ckpt_tasks train ...; each restart is a new attempt.
    """  # fmt: skip
    encode_name(run)
    place = _place(nproc)
    with _OutcomeFile(outcome_file if place is None or place.rank == 0 else None, run) as file:
        config = _configure(store, config_file, {**flags, "nproc": nproc})
        spec = TrainSpec(
            entrypoint=entrypoint,
            run=run,
            params=_check(entrypoint, params, python),
            config=config,
            resume=resume,
            invocation=invocation or _new_invocation(),
            nproc=1 if place is not None else config.attempt.nproc,
            place=place,
            python=python,
            takeover=takeover,
        )
        if ctx.find_root().params.get("debug"):
            os.environ["CKPT_TASKS_DEBUG"] = "1"  # for the trainer, which inherits it
        outcome = _launch(spec)
        file.write(outcome)
    ctx.exit(outcome.code)


def _place(nproc: int | None) -> RankPlace | None:
    """Which rank this is, where torchrun has started all of them."""
    if not started_by_torchrun():
        return None
    if nproc is not None:
        raise ConfigError("--nproc is torchrun's to say: torchrun --nproc-per-node N ...")
    return torchrun_place()


def _new_invocation() -> str:
    return torchrun_invocation() if started_by_torchrun() else f"shell-{uuid.uuid4().hex[:12]}"


class _OutcomeFile:
    """Where programs read how it ended: whole or not there, and never that of an earlier start."""

    def __init__(self, path: Path | None, run: str) -> None:
        self._path = path
        self._run = run

    def __enter__(self) -> Self:
        if self._path is not None:
            try:
                self._path.unlink(missing_ok=True)
            except OSError as error:
                raise ConfigError(f"--outcome {self._path}: {error}") from error
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, CkptTasksError):
            self.write(TrainOutcome.failure(error, run=self._run))

    def write(self, outcome: TrainOutcome) -> None:
        if self._path is not None:
            temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}")
            masked = msgspec.structs.replace(outcome, message=mask_text(outcome.message))
            temporary.write_bytes(msgspec.json.encode(masked))
            temporary.replace(self._path)


def _check(entrypoint: str, params: Sequence[str], python: str | None) -> dict[str, Any]:
    signature = signature_of_entrypoint(entrypoint, python)
    return check_params(signature, split_params(params), text=True)


def _configure(
    store: str | None, config_file: Path | None, flags: dict[str, Any]
) -> CheckpointConfig:
    sections = {
        "schedule": ("every_steps", "every_epochs", "every"),
        "registry": ("tracking_uri", "experiment", "registered_model"),
        "attempt": ("nproc",),
    }
    retention = retention_overrides(flags)
    overrides = retention | {
        f"{section}.{key}": flags[key] for section, keys in sections.items() for key in keys
    }
    config = configure(store, config_file, overrides)
    # Added: a flag that masks one more must not uncover what the file has masked.
    names = [*config.secrets.names, *flags["secret_names"]]
    return msgspec.structs.replace(config, secrets=SecretsConfig(names=names))


def _launch(spec: TrainSpec) -> TrainOutcome:
    speaks = spec.place is None or is_first_of_machine()
    if speaks:
        click.echo(f"run {spec.run!r} in the store {shown_place(spec.config.store.url)}", err=True)
    account = Account()
    stop = _StopOnSignal(tell=speaks)
    agent = os.getppid()

    def requested() -> bool:
        # An agent of torchrun's that is killed leaves its workers behind.
        return stop.requested() or (started_by_torchrun() and os.getppid() != agent)

    try:
        with stop:
            outcome = launch(spec, account, stop_requested=requested)
    finally:
        account.close()
    outcome = msgspec.structs.replace(outcome, message=mask_text(outcome.message))
    if speaks:
        echo(mask_text(_last_words(outcome, stop.signal)), err=True)
    tell_torchrun(outcome)
    return outcome


def _last_words(outcome: TrainOutcome, own_signal: str | None) -> str:
    """How it ended, in one sentence.

    Parameters
    ----------
    own_signal
        The signal that this process was asked to stop with; it reaches the trainer as another.
    """
    if outcome.code == EXIT_STOPPED:
        newest = f"; newest checkpoint: {outcome.checkpoint}" if outcome.checkpoint else ""
        said = f"stopped: received {own_signal}{newest}" if own_signal else outcome.message
        return f"{said}; run the same command again to go on"
    prefix = "" if outcome.done else "failed: " if outcome.retryable else "error: "
    return f"{prefix}{outcome.message}"


class _StopOnSignal:
    """Lets training save and stop on the first SIGINT or SIGTERM; a second one interrupts."""

    def __init__(self, *, tell: bool) -> None:
        self._tell = tell
        self.signal: str | None = None
        """The first one's name."""
        self._earlier: dict[int, Any] = {}

    def requested(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._earlier[number] = signal.signal(number, self._handle)

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name
        if self._tell:
            click.echo("stopping: saves at the next boundary; once more to stop waiting", err=True)
