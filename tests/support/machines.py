"""Two machines, as far as the network goes: namespaces joined by a cable of their own.

They share file systems, as training machines share a store. See ip-netns(8) and veth(4).
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Machine:
    """One of them: how to run a command on it, its address, and its network card."""

    name: str
    address: str

    @property
    def before(self) -> list[str]:
        return ["ip", "netns", "exec", self.name]

    @property
    def card(self) -> str:
        return "veth0"


@contextmanager
def two_machines() -> Iterator[tuple[Machine, Machine]]:
    """Both, until the end of the block; skips the test where the kernel allows none."""
    first, second = (
        Machine(f"ckpt{os.getpid()}-{number}", f"10.77.0.{number}") for number in (1, 2)
    )
    with ExitStack() as stack:
        for machine in (first, second):
            _add(machine)
            stack.callback(_ip, "netns", "del", machine.name)
        cable = ["link", "add", first.card, "netns", first.name, "type", "veth", "peer"]
        _ip(*cable, "name", second.card, "netns", second.name)
        for machine in (first, second):
            inside = ["-n", machine.name]
            _ip(*inside, "addr", "add", f"{machine.address}/24", "dev", machine.card)
            for card in (machine.card, "lo"):
                _ip(*inside, "link", "set", card, "up")
        yield first, second


def _add(machine: Machine) -> None:
    if shutil.which("ip") is None:
        pytest.skip("there is no ip(8) here")
    try:
        _ip("netns", "add", machine.name)
        _ip("netns", "exec", machine.name, "true")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespace can be made here: {error.stderr.decode()}")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
