"""A thread whose children are denied what the permissions of files deny, also as root."""

from __future__ import annotations

import ctypes
import os

_PR_CAPBSET_DROP = 24
_CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH = 1, 2


def drop_roots_powers() -> None:
    """For programs that this thread starts from now on; the thread itself keeps them.

    The bounding set of capabilities(7) belongs to a thread, and limits what ``execve`` gives.
    """
    if os.geteuid() != 0:
        return
    library = ctypes.CDLL(None, use_errno=True)
    for power in (_CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH):
        if library.prctl(_PR_CAPBSET_DROP, power, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "cannot drop a capability")
