"""What every showing has: a folder, a store, an MLflow database, an account, and a killer."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

from ckpt_tasks.demo.account import Account
from ckpt_tasks.demo.killer import Killer
from ckpt_tasks.store.open import open_store

__all__ = ["DATABASE", "KILLS", "RUN", "STORE", "Stage"]

KILLS = 2
RUN = "digits"
"""Name of the training run that is killed."""
STORE = "store"
DATABASE = "mlflow.db"
"""MLflow's, in the stage's folder as the store is."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """Where a showing keeps everything, and whom it tells."""

    folder: Path
    account: Account

    @property
    def store_url(self) -> str:
        return str(self.folder / STORE)

    @property
    def tracking_uri(self) -> str:
        return f"sqlite:///{self.folder / DATABASE}"

    @contextlib.contextmanager
    def killing(self) -> Iterator[list[int]]:
        """Kill the run's trainer as it trains; yields the numbers of the killed attempts."""
        with open_store(self.store_url) as store:
            killer = Killer(store, RUN, kills=KILLS, on_kill=self._tell_kill)
            killer.start()
            try:
                yield killer.killed
            finally:
                killer.stop()

    def _tell_kill(self, number: int, attempt: int, pid: int, newest: str) -> None:
        self.account.say(
            "KILL",
            f"SIGKILL {number} of {KILLS}: attempt {attempt}, process {pid} "
            f"(newest checkpoint {newest})",
        )
