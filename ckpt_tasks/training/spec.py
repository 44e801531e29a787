"""What is to be trained, and how it ended: the two records that cross the process boundary."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import msgspec

from ckpt_tasks.config import CheckpointConfig
from ckpt_tasks.errors import CkptTasksError, ConfigError
from ckpt_tasks.fencing.process import end_process, process_is_alive, this_process
from ckpt_tasks.format.layout import encode_name
from ckpt_tasks.format.records import Failure, Process
from ckpt_tasks.training.failure import exception_failure, message_of
from ckpt_tasks.types import EXIT_BUSY, EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, CheckpointId, Position

__all__ = [
    "CATCH_UP",
    "FOLDER_PREFIX",
    "NOT_REGISTERED",
    "AttemptFolder",
    "Leader",
    "RankPlace",
    "TrainOutcome",
    "TrainSpec",
]

FOLDER_PREFIX = "ckpt-tasks-"
_PROCESS = ".process"
_WRITER = "writer"

NOT_REGISTERED = "checkpoints are not registered"
CATCH_UP = (
    "What is missing there is kept in the store: start the run again, also when it is complete, "
    "to register it"
)
"""What people are told when the registry lacks something at the end."""


class TrainSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One execution of a training run, as the orchestrator or the shell asks for it.

    Parameters
    ----------
    entrypoint
        ``MODULE:FUNCTION`` or ``path/to/file.py:FUNCTION``.
    run
        The run's name, any text.
    params
        Hyperparameters: the training function's keyword arguments.
    resume
        ``auto``, ``fresh`` or a checkpoint's id.
    invocation
        The orchestrator's id for one triggered execution; all its retries share it.
    tags
        The orchestrator's ids, for the registry.
    python
        The interpreter that trains. Default: this one.
    takeover
        Take the run over even from another invocation's live attempt.
    recorded_as
        What records and registries call the entry point, where it is a file that goes away.
    folders
        Where the training's code may lie, besides the working directory and Python's own path.
    nproc
        How many ranks train, each in a process of its own on this machine.
    place
        Which rank this execution trains, where torchrun starts one for each rank.

    Raises
    ------
    ConfigError
        `run` cannot be a name, `resume` is none of those words and no id, or `nproc` ranks are
        to be started for one rank.
    """

    entrypoint: str
    run: str
    params: dict[str, Any] = {}
    config: CheckpointConfig = CheckpointConfig()
    resume: str = "auto"
    invocation: str
    tags: dict[str, str] = {}
    python: str | None = None
    takeover: bool = False
    recorded_as: str | None = None
    folders: list[str] = []
    nproc: int = 1
    place: RankPlace | None = None

    def __post_init__(self) -> None:
        encode_name(self.run)
        if self.nproc < 1:
            raise ConfigError(f"nproc = {self.nproc}: at least one rank has to train")
        if self.nproc > 1 and self.place is not None:
            raise ConfigError(f"nproc = {self.nproc}: torchrun has started the ranks already")
        if self.resume not in ("auto", "fresh"):
            try:
                CheckpointId.parse(self.resume)
            except ValueError as error:
                raise ConfigError(f"resume takes 'auto', 'fresh' or an id: {error}") from error

    @property
    def recorded_entrypoint(self) -> str:
        """What is trained, as people find it again."""
        return self.recorded_as or self.entrypoint

    @property
    def leads(self) -> bool:
        """Whether rank 0, whose word counts, is trained here."""
        return self.place is None or self.place.rank == 0


class RankPlace(msgspec.Struct, frozen=True, kw_only=True):
    """One rank among those of an attempt, and where they talk to one another.

    Parameters
    ----------
    rank, ranks
        Which of how many.
    host, port
        Where what ranks agree through is served: by torchrun's agent if there is one that does,
        else by rank 0.
    served
        Whether it is the agent.
    one_machine
        All ranks are on this machine.
    """

    rank: int = 0
    ranks: int = 1
    host: str = "127.0.0.1"
    port: int = 0
    served: bool = False
    one_machine: bool = True

    def to_arguments(self) -> list[str]:
        """For a command line."""
        return [msgspec.json.encode(self).decode()]

    @classmethod
    def from_arguments(cls, arguments: Sequence[str]) -> RankPlace:
        """Inverse of `to_arguments`; without any, the only rank."""
        return msgspec.json.decode(arguments[0], type=cls) if arguments else cls()


class Leader(msgspec.Struct, frozen=True, kw_only=True):
    """Where the other ranks find rank 0.

    Parameters
    ----------
    host, port
        Where its supervisor listens for those of the other ranks.
    generation
        A secret of this start of the ranks.
    messages
        The port at which its trainer serves what ranks tell one another.
    """

    host: str
    port: int
    generation: str
    messages: int = 0


class TrainOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """How an attempt ended.

    Parameters
    ----------
    code
        An exit code of the command line (``EXIT_*`` in `ckpt_tasks.types`).
    message
        One sentence for people.
    position, checkpoint
        How far training came, and the newest checkpoint of the attempt or what it resumed from.
    ended_with
        What later attempts compare their own end with; ``None`` where that would say nothing.
    """

    code: int
    message: str
    run: str
    uid: str | None = None
    attempt: int | None = None
    position: Position | None = None
    checkpoint: str | None = None
    ended_with: Failure | None = None

    @classmethod
    def failure(
        cls,
        error: Exception,
        *,
        run: str,
        uid: str | None = None,
        attempt: int | None = None,
        position: Position | None = None,
        checkpoint: str | None = None,
    ) -> TrainOutcome:
        """What an exception means for the one who decides about a retry."""
        what = message_of(error)
        if isinstance(error, CkptTasksError):
            code, message = error.exit_code, what
        else:
            where = f"at {position}" if position else "before it began"
            code = EXIT_FAILED
            message = (
                f"the training raised {type(error).__name__}: {what} ({where}; newest checkpoint: "
                f"{checkpoint or 'none'})"
            )
        return cls(
            code=code,
            message=message,
            run=run,
            uid=uid,
            attempt=attempt,
            position=position,
            checkpoint=checkpoint,
            ended_with=exception_failure(error, position),
        )

    @property
    def done(self) -> bool:
        """The run is complete."""
        return self.code == EXIT_DONE

    @property
    def retryable(self) -> bool:
        """A retry may do better."""
        return self.code in (EXIT_FAILED, EXIT_BUSY, EXIT_STOPPED)


class AttemptFolder:
    """The private folder through which the processes of one attempt talk.

    Everything in it is a file, so that nothing blocks and nothing is lost with the process that
    wrote it. It is removed by the launcher when the attempt is over.

    Parameters
    ----------
    rank
        Whose files the trainer's and the writer's are; rank 0's are those that others follow.
    """

    def __init__(self, path: str | os.PathLike[str], rank: int = 0) -> None:
        self.path = Path(path)
        of_rank = f"-rank{rank:04d}" if rank else ""
        self.trainer_name = f"trainer{of_rank}"
        self._writer_name = f"{_WRITER}{of_rank}"
        self.spec = self.path / "spec.json"
        self.output = self.path / "output.log"
        self.trainer_events = self.path / f"{self.trainer_name}.events"
        self.writer_events = self.path / f"{self._writer_name}.events"
        self.registrar_events = self.path / "registrar.events"
        self._metric_bounds = self.path / "metric-bounds.json"
        self.trainer_outcome = self.path / f"trainer-outcome{of_rank}.json"
        self.failures = self.path / "failures"
        self.outcome = self.path / "outcome.json"
        self.version = self.path / "version"
        self.leader = self.path / "leader.json"
        self.joined = self.path / "joined.json"

    def of_rank(self, rank: int) -> AttemptFolder:
        """The same folder, as another rank uses it."""
        return AttemptFolder(self.path, rank)

    def write_spec(self, spec: TrainSpec) -> None:
        """Hyperparameters may be confidential: a 0600 file, never a command line."""
        descriptor = os.open(self.spec, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(msgspec.json.encode(spec))

    def read_spec(self) -> TrainSpec:
        return msgspec.json.decode(self.spec.read_bytes(), type=TrainSpec)

    def keep_metric_bounds(self, high_water: Mapping[str, int]) -> Mapping[str, int]:
        """Keep the highest step of each metric, as it was before this attempt logged any.

        Returns what was given first: a registrar that takes another's place finds the steps of
        its own attempt in the registry as well, and those have not been done again.
        """
        if not self._metric_bounds.exists():
            self._replace(self._metric_bounds, msgspec.json.encode(high_water))
            return high_water
        return msgspec.json.decode(self._metric_bounds.read_bytes(), type=dict[str, int])

    def open_output(self) -> IO[bytes]:
        """To append what processes print, which may be confidential, too."""
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        return os.fdopen(os.open(self.output, flags, 0o600), "ab", buffering=0)

    def write_process(self, name: str, process: Process) -> None:
        """Say who uses the folder: it is removed for those who all have died."""
        self._replace(self.path / f"{name}{_PROCESS}", msgspec.json.encode(process))

    def read_processes(self) -> dict[str, Process]:
        """All that were ever said to use it. Raises `msgspec.DecodeError` for what is no record."""
        return {
            path.name.removesuffix(_PROCESS): msgspec.json.decode(path.read_bytes(), type=Process)
            for path in self.path.glob(f"*{_PROCESS}")
        }

    def write_writer(self, pid: int) -> None:
        """Say which process writes this rank's saves, in place of the one before."""
        self.write_process(self._writer_name, this_process(pid))

    def has_live_writer(self) -> bool:
        """Whether any rank's still runs, here."""
        return any(process_is_alive(writer) is True for writer in self._writers())

    def has_live_writer_but_own(self) -> bool:
        """Whether any other rank's still runs, here."""
        writers = self._writers(but=self._writer_name)
        return any(process_is_alive(writer) is True for writer in writers)

    def has_live_trainer(self) -> bool:
        """Whether any process but the writer still runs, here."""
        processes = self.read_processes()
        others = [p for name, p in processes.items() if not name.startswith(_WRITER)]
        return any(process_is_alive(process) is not False for process in others)

    def end_writers(self) -> None:
        """Kill those that still run."""
        for writer in self._writers():
            end_process(writer)

    def _writers(self, *, but: str | None = None) -> list[Process]:
        found = self.read_processes().items()
        return [p for name, p in found if name.startswith(_WRITER) and name != but]

    def write_leader(self, leader: Leader, path: Path) -> None:
        """`leader`: rank 0's supervisor, as one has told or found. `joined`: it has accepted."""
        self._replace(path, msgspec.json.encode(leader))

    def read_leader(self, path: Path) -> Leader | None:
        try:
            return msgspec.json.decode(path.read_bytes(), type=Leader)
        except FileNotFoundError:
            return None

    def write_version(self, version: str) -> None:
        """The package's version in the environment that trains."""
        self._replace(self.version, version.encode())

    def read_version(self) -> str | None:
        try:
            return self.version.read_text("utf-8", "replace")
        except FileNotFoundError:
            return None

    def write_outcome(self, outcome: TrainOutcome, path: Path) -> None:
        """Atomically: a reader finds the whole of it or nothing."""
        self._replace(path, msgspec.json.encode(outcome))

    def read_outcome(self, path: Path) -> TrainOutcome | None:
        try:
            return msgspec.json.decode(path.read_bytes(), type=TrainOutcome)
        except FileNotFoundError:
            return None

    def _replace(self, path: Path, content: bytes) -> None:
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_bytes(content)
        temporary.replace(path)
