"""The toy training, registered and retained, as a trial of `ckpt_tasks.testing.sweep`."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest.mock import patch

import msgspec
import psutil
from support import faulty_attempt
from support.attempt_forks import AttemptForks, Fork, Kill
from support.claims import move_claim_elsewhere
from support.faulty_attempt import StoreFault
from support.launches import wait_until
from support.run_checks import leftovers
from support.run_contents import Contents, contents_of
from support.s3_servers import S3Server
from support.toy_runs import Digest, toy_spec

from ckpt_tasks.config import (
    AttemptConfig,
    RegistryConfig,
    RetentionConfig,
    ScheduleConfig,
    StoreConfig,
)
from ckpt_tasks.events import AttemptClaimed, SaveFailed
from ckpt_tasks.fencing.attempts import list_attempts
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.store import open_store
from ckpt_tasks.tasks import reconcile
from ckpt_tasks.testing import Fault
from ckpt_tasks.testing.files import FILE_OPERATIONS
from ckpt_tasks.testing.registry_wrappers import REGISTRY_CHANGES, REGISTRY_OPERATIONS
from ckpt_tasks.testing.sweep import Struck
from ckpt_tasks.testing.wrappers import CHANGES, OPERATIONS
from ckpt_tasks.training.spec import TrainSpec
from ckpt_tasks.types import EXIT_DONE

EPOCHS, STEPS, EVERY = 2, 16, 6
_RETRIES = 3
_ATTEMPT = AttemptConfig(without_commit=50, heartbeat=0.01, takeover_after=0.1)


class Place(msgspec.Struct, frozen=True):
    """Where the runs of trials lie: below a folder, or on an S3 server."""

    name: str
    folder: Path
    server: S3Server | None = None

    def new_store(self) -> StoreConfig:
        if self.server is None:
            return StoreConfig(url=str(self.folder / f"store-{uuid.uuid4().hex[:12]}"))
        bucket, prefix = self.server.new_place()
        return StoreConfig(
            url=f"s3://{bucket}/{prefix}", options={"endpoint_url": self.server.endpoint}
        )

    def remove(self, store: StoreConfig) -> None:
        """Local ones lie in memory, of which there is not too much."""
        if self.server is None:
            shutil.rmtree(store.url, ignore_errors=True)


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """What is struck.

    Parameters
    ----------
    operations
        Those that have a number.
    killed_at
        An attempt that is killed in this step comes before the one that is struck.
    retention
        What is retained.
    writer
        The process of the writer is struck, and not the trainer.
    registry
        ``file``, or ``mlflow`` on a database of its own.
    steps
        Of the whole training.
    """

    name: str
    operations: frozenset[str] = OPERATIONS | REGISTRY_OPERATIONS
    killed_at: int | None = None
    retention: RetentionConfig = RetentionConfig()
    writer: bool = False
    registry: str = "file"
    steps: int = STEPS


_LATEST = RetentionConfig(latest=1)
SCENARIOS: dict[str, Scenario] = {
    scenario.name: scenario
    for scenario in (
        Scenario(name="save"),
        Scenario(name="resume", killed_at=9),
        Scenario(name="retention", retention=_LATEST),
        Scenario(name="files", operations=FILE_OPERATIONS, killed_at=9, retention=_LATEST),
        Scenario(name="writer", operations=OPERATIONS, writer=True),
        Scenario(name="mlflow", operations=REGISTRY_OPERATIONS, killed_at=9, registry="mlflow"),
    )
}


class Sweeps:
    """Makes the trials of a scenario at a place, and knows how all of them must end."""

    def __init__(
        self, forks: AttemptForks, place: Place, scenario: Scenario, database: Path | None = None
    ) -> None:
        self.forks = forks
        self.place = place
        self.scenario = scenario
        self.database = database
        self.expected = self._expect()

    def trial(self) -> ToyTrial:
        return ToyTrial(self)

    def _expect(self) -> Contents:
        trial = self.trial()
        try:
            why = trial.recover()
            assert why is None, why
            return trial.contents()
        finally:
            trial.close()


class ToyTrial:
    """One run."""

    def __init__(self, sweeps: Sweeps) -> None:
        self._forks = sweeps.forks
        self._scenario = sweeps.scenario
        self._place = sweeps.place
        self._sweeps = sweeps
        # In memory, if the place is: thousands of trials would wait for a disk.
        self._folder = Path(tempfile.mkdtemp(prefix="trial-", dir=sweeps.place.folder))
        self._digest = Digest(self._folder / "digest")
        self._spec = self._make_spec()
        self._saves_failed = self._stalled = False

    # -- as a `Trial` ----------------------------------------------------------------------------

    def count(self) -> list[tuple[str, str]]:
        self._begin()
        fork = self._start(counted=True).wait()
        assert fork.outcome.code == EXIT_DONE, fork.output
        return fork.operations

    def strike(self, fault: Fault) -> Struck:
        self._begin()
        fork = self._start(fault)
        if fault.how == "stall":
            return self._replace(fork, fault)
        fork.wait()
        if self._died(fork):
            return Struck(reached=True, failed=True)
        if len(fork.operations) < fault.at:
            return Struck(reached=False, failed=False)
        self._saves_failed = bool(fork.events_of(SaveFailed))
        return Struck(
            reached=True,
            failed=fork.outcome.code != EXIT_DONE,
            problems=self._problems_of_write(*fork.operations[fault.at - 1]),
        )

    def _problems_of_write(self, operation: str, path: str) -> list[str]:
        """What a write of data that failed should have said and cleared away."""
        if operation not in ("write", "file.writev") or "/data/" not in path:
            return []
        problems = []
        if not self._saves_failed:
            problems.append(f"{path} could not be written, and nobody was told")
        if leftovers(self._spec):
            problems.append(f"of the failed save there is left {sorted(leftovers(self._spec))}")
        return problems

    def recover(self) -> str | None:
        return self._retry()

    def _retry(self, *, ages: bool = True) -> str | None:
        for _ in range(_RETRIES):
            fork = self._start(ages=ages).wait()
            if fork.outcome.code == EXIT_DONE:
                return None
        return f"the last retry: {fork.outcome.message}\n{fork.output}"

    def check(self) -> Sequence[str]:
        with self._registry_patched():
            report = reconcile(self._spec.config, self._spec.run, dry_run=True)
        # What may be removed is: below, as by any later collection.
        found = [
            difference
            for difference in (*report.changes, *report.left)
            if difference.kind not in ("expired", "orphan")
        ]
        found += filter(None, [report.problem])
        problems = [f"store and registry disagree: {one}" for one in found]
        contents = self.contents()
        # Beside a writer, saves that fall due while one is written are left out.
        may_miss = self._saves_failed or self._scenario.writer
        differences = contents.differences(self._sweeps.expected, may_miss_saves=may_miss)
        return [*problems, *contents.problems, *differences]

    def close(self) -> None:
        self._place.remove(self._spec.config.store)
        shutil.rmtree(self._folder, ignore_errors=True)

    # ----------------------------------------------------------------------------------------------

    def contents(self) -> Contents:
        """What is left of the run once all that nobody refers to has been collected."""
        digest = self._digest.read()
        return contents_of(
            self._spec, digest=digest, steps=self._scenario.steps, stalled=self._stalled
        )

    def _make_spec(self) -> TrainSpec:
        store, scenario = self._place.new_store(), self._scenario
        spec = toy_spec(store.url, params={"epochs": EPOCHS})
        if scenario.registry == "file":
            uri = str(self._folder / "registry")
        else:
            assert self._sweeps.database is not None
            shutil.copy(self._sweeps.database, self._folder / "mlflow.db")
            uri = f"sqlite:///{self._folder}/mlflow.db"
        config = msgspec.structs.replace(
            spec.config,
            store=store,
            schedule=ScheduleConfig(every_steps=EVERY),
            retention=scenario.retention,
            registry=RegistryConfig(kind=scenario.registry, tracking_uri=uri, best="loss:min"),
            attempt=_ATTEMPT,
        )
        return msgspec.structs.replace(spec, config=config)

    def _begin(self) -> None:
        """What comes before the attempt that is struck."""
        step = self._scenario.killed_at
        if step is not None:
            assert self._start(kill=Kill(step=step)).wait().killed

    def _start(
        self,
        fault: Fault | None = None,
        *,
        counted: bool = False,
        kill: Kill | None = None,
        ages: bool = True,
    ) -> Fork:
        faults = [] if fault is None else [StoreFault(at=fault.at, when=fault.when, how=fault.how)]
        is_counted = counted or fault is not None
        environment = dict(self._digest.environment)
        if self._place.server is not None:
            environment |= self._place.server.environment
        return self._forks.start(
            self._spec,
            faults=faults,
            counted=sorted(self._scenario.operations) if is_counted else [],
            kill=kill,
            environment=environment,
            registers=True,
            ages=ages,
            has_writer=self._scenario.writer and is_counted,
        )

    def _died(self, fork: Fork) -> bool:
        if not self._scenario.writer:
            return fork.killed
        return not (fork.folder / "operations.json").exists()

    def _replace(self, older: Fork, fault: Fault) -> Struck:
        """Another attempt comes to its end while the older one stalls, which goes on then."""
        wait_until(lambda: older.held or not psutil.pid_exists(older.pid), "the stall")
        if not older.held:
            older.wait()
            return Struck(reached=False, failed=False)
        self._stalled = True
        self._hide()
        why = self._retry(ages=False)  # it stalls for less than a grace: that is what one is for
        assert why is None, why
        older.let_go()
        older.wait()
        self._saves_failed = bool(older.events_of(SaveFailed))
        return Struck(
            reached=True,
            failed=older.outcome.code != EXIT_DONE,
            zombie=self._changes_of_a_zombie(older, fault.at),
        )

    def _hide(self) -> None:
        """Else the replacement would end the process that stalls, as it can see it."""
        newest = self._newest_attempt()
        if newest:
            move_claim_elsewhere(self._spec.config.store, self._spec.run, newest)

    def _newest_attempt(self) -> int:
        """0 where none has been claimed."""
        with open_store(self._spec.config.store) as store:
            return max(list_attempts(store, RunLayout(self._spec.run)), default=0)

    def _changes_of_a_zombie(self, older: Fork, at: int) -> list[str]:
        """What the older attempt did after the operation that it stood in, which nobody can stop.

        One that had not claimed its number yet has got a later one than its replacement, and owns
        the run.
        """
        claims = older.events_of(AttemptClaimed)
        operations = older.operations
        claimed_at = [n for n, operation in enumerate(operations, 1) if _is_claim(*operation)]
        if not claims or not claimed_at or at <= claimed_at[-1]:
            return []
        if claims[0].attempt == self._newest_attempt():
            return []  # the run was complete, so that the replacement claimed nothing
        return [
            f"{operation} of {subject}"
            for operation, subject in operations[at:]
            if operation in CHANGES | REGISTRY_CHANGES
            and not _is_harmless(operation, subject, operations[:at], claims[0].attempt)
        ]

    @contextlib.contextmanager
    def _registry_patched(self) -> Iterator[None]:
        """Have the registry of the configuration opened here as the children do."""
        with patch("ckpt_tasks.tasks.reconcile.load_registry", faulty_attempt.open_registry):
            yield


def _is_claim(operation: str, path: str) -> bool:
    return operation == "create" and RunLayout.attempt_number(path) is not None


def _is_harmless(operation: str, subject: str, before: list[tuple[str, str]], attempt: int) -> bool:
    """Whether a stale attempt may do so, having done what it did `before`."""
    if operation == "delete":
        return (
            f"/data/a{attempt:04d}-" in subject or _removes(before) or _gives_back(subject, before)
        )
    if operation == "create":
        # The ids of the registry's run stand there already. A checkpoint of a stale attempt, that
        # had just asked the fence, is none of the lineage: nobody starts from it or registers it.
        # So is the index of one of several ranks, by which rank 0 finds its data.
        return subject.endswith(("/memory.json", "/mlflow.json", ".index.json")) or (
            "/commits/" in subject and f"-a{attempt}-" in subject
        )
    return operation == "discard_run" or (operation == "write" and "/data/" in subject)


def _removes(before: list[tuple[str, str]]) -> bool:
    """It stood in the removal of a checkpoint, which is ended as any other collection would."""
    for operation, subject in reversed(before):
        if operation == "forget":
            return True
        if operation == "exists" and "/attempts/" in subject:
            return False
    return False


def _gives_back(subject: str, before: list[tuple[str, str]]) -> bool:
    """It takes back the mark by which it had claimed the removal of a checkpoint."""
    return "/collecting/" in subject and ("create", subject) in before
