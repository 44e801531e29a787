"""Child processes of the stores' tests: they race, and they are killed.

Run as a script: ``store_child.py race CONFIG NAME`` or ``store_child.py kill ROOT OPERATION``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import msgspec

from ckpt_tasks.config import StoreConfig
from ckpt_tasks.errors import ObjectExistsError
from ckpt_tasks.store import open_store
from ckpt_tasks.store.local import LocalStore
from ckpt_tasks.testing import Fault, faulty_files

OLD = b"old" * 1000
DATA = b"0123456789" * 20_000


def race(config: str, name: str) -> None:
    """Create each path that is read from stdin; print whether this process made it."""
    store = open_store(msgspec.json.decode(config, type=StoreConfig))
    print("ready", flush=True)
    for line in sys.stdin:
        try:
            store.create(line.strip(), name.encode())
            print("won", flush=True)
        except ObjectExistsError:
            print("lost", flush=True)


def kill(root: str, operation: str) -> None:
    """Do `operation` in forked children, the n-th killed in its n-th system call.

    A ``writev`` that is struck writes half of its bytes first. Prints, for each n, how the child
    ended and where its store lies; stops at the first child that is not killed.
    """
    for number in range(1, 1000):
        folder = os.path.join(root, f"{operation}-{number:03d}")
        store = LocalStore(folder)
        if operation == "put":
            store.put("run/it", OLD)
        child = os.fork()
        if child == 0:
            with faulty_files(folder, [Fault(at=number, when="during", how="kill")]):
                _act(store, operation)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        print(json.dumps({"folder": folder, "killed": killed, "status": status}), flush=True)
        if not killed:
            return


def _act(store: LocalStore, operation: str) -> None:
    if operation == "create":
        store.create("run/it", DATA)
    elif operation == "put":
        store.put("run/it", DATA)
    else:
        store.write("run/it", [DATA[:50_000], DATA[50_000:]], len(DATA))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    {"race": race, "kill": kill}[sys.argv[1]](*sys.argv[2:])
