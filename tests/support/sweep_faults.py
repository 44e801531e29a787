"""``make test-faults``: one fault at every operation of a training, on every kind of store.

``python -m support.sweep_faults [--places local,seaweedfs,ceph] [--scenarios save,...] [--fates
raise,...] [--every N] [--rows FILE]``, with ``tests`` on the path. Exits with 1 where anything was
lost. Every N-th case with ``--every``; each case as a line of JSON in FILE.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
from mlflow import MlflowClient
from support import ceph_server, s3_servers
from support.attempt_forks import AttemptForks
from support.s3_servers import S3Server
from support.struck_ranks import RANKED_SCENARIOS, sweeps_of
from support.struck_runs import SCENARIOS, Place

from ckpt_tasks.testing.sweep import FATES, LOSSES, Case, summary, sweep

_SERVERS: dict[str, Callable[[Path], contextlib.AbstractContextManager[S3Server]]] = {
    "seaweedfs": s3_servers.seaweedfs_server,
    "ceph": ceph_server.ceph_server,
    "moto": s3_servers.moto_server,
}
_SCENARIOS = SCENARIOS | RANKED_SCENARIOS
# What rank 0 asks of a store, a lone rank asks of it as well.
_LOCAL_ONLY = {"files", "mlflow", "rank0", "rank0-resume", "rank0-writer"}


def main() -> int:
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends the servers, too
    cases: list[Case] = []
    with tempfile.TemporaryDirectory(prefix="ckpt-tasks-faults-", dir=_memory()) as folder:
        root = Path(folder)
        with AttemptForks(root) as forks:
            for place in options.places:
                if place == "ceph" and not ceph_server.is_installed():
                    print(f"ceph is left out: it needs the Debian packages {ceph_server.PACKAGES}")
                    continue
                with _opened(place, root) as opened:
                    for case in _at(opened, forks, options):
                        cases.append(case)
                        _report(case, options.rows)
    print(f"\n{summary(cases)}")
    return int(any(case.outcome in LOSSES for case in cases))


def _at(place: Place, forks: AttemptForks, options: argparse.Namespace) -> Iterator[Case]:
    for name in options.scenarios:
        if name in _LOCAL_ONLY and place.server is not None:
            continue
        database = _database(place.folder) if name == "mlflow" else None
        sweeps = sweeps_of(forks, place, _SCENARIOS[name], database)
        began = time.monotonic()
        cases = sweep(
            sweeps.trial,
            [FATES[fate] for fate in options.fates],
            name=f"{name}, {place.name}",
            chosen=lambda number: number % options.every == options.offset,
        )
        for done, case in enumerate(cases, 1):
            if sys.stderr.isatty() or done % 50 == 0:
                pace = (time.monotonic() - began) / done
                print(f"{case.sweep}: {done} cases, {pace:.2f} s each", file=sys.stderr, flush=True)
            yield case


def _report(case: Case, rows: Path | None) -> None:
    if rows is not None:
        with rows.open("ab") as file:
            file.write(msgspec.json.encode(case) + b"\n")
    if case.outcome in LOSSES:
        print(f"{case.outcome.upper()}: {case.sweep}: {case.fate} at {case.number}, ", end="")
        print(f"{case.operation} of {case.subject}:")
        for detail in case.details:
            print(f"    {detail}")
        sys.stdout.flush()


@contextlib.contextmanager
def _opened(name: str, root: Path) -> Iterator[Place]:
    folder = root / name
    folder.mkdir()
    if name == "local":
        yield Place(name, folder)
        return
    with (
        tempfile.TemporaryDirectory(prefix="ckpt-tasks-server-") as disk,
        _SERVERS[name](Path(disk)) as server,
    ):
        os.environ.update(server.environment)
        yield Place(name, folder, server)


def _memory() -> str | None:
    """A folder in memory, where the system has one: SIGKILL keeps the page cache."""
    memory = "/dev/shm"  # noqa: S108 - a private folder is made in it
    return memory if os.access(memory, os.W_OK) else None


def _database(folder: Path) -> Path:
    path = folder / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


def _options() -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return text.split(",")

    parser = argparse.ArgumentParser(prog="make test-faults")
    parser.add_argument("--places", type=names, default=["local", "seaweedfs", "ceph"])
    parser.add_argument("--scenarios", type=names, default=list(_SCENARIOS))
    parser.add_argument("--fates", type=names, default=list(FATES))
    parser.add_argument("--every", type=int, default=1, help="try every N-th case only")
    parser.add_argument("--offset", type=int, default=0, help="of those, begin with this one")
    parser.add_argument("--rows", type=Path, help="file that gets a line for each case")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
