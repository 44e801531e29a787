"""A process that copies or adopts a run and is killed at a change of the store it writes to.

``python -m support.copy_child SOURCE TARGET RUN NUMBER [WHEN]``; without SOURCE (``-``) it adopts.
"""

from __future__ import annotations

import sys

from ckpt_tasks.replica import adopt, copy
from ckpt_tasks.store import open_store
from ckpt_tasks.testing import Fault, FaultyStore


def main(source: str, target: str, run: str, number: str, when: str = "before") -> None:
    fault = Fault(at=int(number), when=when, how="kill")  # type: ignore[arg-type]
    store = FaultyStore(open_store(target, for_writing=True), [fault])
    if source == "-":
        adopt(store, run)
    else:
        copy(open_store(source), store, run)


if __name__ == "__main__":
    main(*sys.argv[1:])
