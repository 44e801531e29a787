"""A sweep tries every fault that there is, and finds what is not as it should be."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

import pytest

from ckpt_tasks.errors import StoreError
from ckpt_tasks.store.base import Store
from ckpt_tasks.store.memory import MemoryStore
from ckpt_tasks.testing import FakeClock, Fault, FaultInjector, FaultyStore
from ckpt_tasks.testing.sweep import FATES, Outcome, Struck, summary, sweep

_NAMES = count()
_COUNTED = {"create", "exists"}


class Transfer:
    """Moves what an account holds to another: two objects, or, done well, one."""

    paths = ("debited", "credited")
    gives_up = False

    def __init__(self) -> None:
        self.store: Store = MemoryStore(f"sweep-{next(_NAMES)}")

    def transfer(self, store: Store) -> None:
        for path in self.paths:
            if not store.exists(path):
                store.create(path, b"100")

    def count(self) -> list[tuple[str, str]]:
        faulty = FaultyStore(self.store, counted=_COUNTED)
        self.transfer(faulty)
        return faulty.log

    def strike(self, fault: Fault) -> Struck:
        injector = FaultInjector([fault], counted=_COUNTED, sleep=FakeClock().sleep)
        faulty = FaultyStore(self.store, injector)
        try:
            self.transfer(faulty)
        except StoreError:
            return Struck(reached=True, failed=True)
        return Struck(reached=faulty.count >= fault.at, failed=False)

    def recover(self) -> str | None:
        if self.gives_up:
            return "nobody retries"
        self.transfer(self.store)
        return None

    def check(self) -> Sequence[str]:
        return [f"{path} is missing" for path in ("debited", "credited") if not self.has(path)]

    def close(self) -> None:
        self.store.close()

    def has(self, path: str) -> bool:
        return self.store.exists(path)


class WithoutRetry(Transfer):
    gives_up = True


class Careless(Transfer):
    """Takes any failure for a success."""

    def recover(self) -> str | None:
        return None


class Shorter(Transfer):
    """Has nothing left to do when it is struck."""

    def strike(self, fault: Fault) -> Struck:
        self.transfer(self.store)
        self.paths = ()
        return super().strike(fault)


@pytest.mark.parametrize(
    ("kind", "outcomes"),
    [
        (Transfer, {"recovered"}),
        (WithoutRetry, {"lost"}),
        (Careless, {"silent", "recovered"}),
        (Shorter, {"not reached"}),
    ],
)
def test_outcomes(kind: type[Transfer], outcomes: set[Outcome]) -> None:
    """What cannot be recovered is lost, what ends otherwise is silent, and neither is passed over;
    each operation meets each fate that it can.
    """
    cases = list(sweep(kind, [FATES["raise"], FATES["ambiguous"]], name="transfer"))
    assert [(case.fate, case.number, case.operation) for case in cases] == [
        ("raise", 1, "exists"),
        ("raise", 2, "create"),
        ("raise", 3, "exists"),
        ("raise", 4, "create"),
        ("ambiguous", 2, "create"),
        ("ambiguous", 4, "create"),
    ]
    assert {case.outcome for case in cases} == outcomes
    if kind is Careless:
        assert cases[1].details == ("debited is missing", "credited is missing")
    assert summary(cases).splitlines()[-1].split()[:2] == ["all", "6"]


def test_a_sample() -> None:
    """Only the chosen cases are tried."""
    cases = list(sweep(Transfer, [FATES["raise"]], chosen=lambda number: number == 2))
    assert [case.number for case in cases] == [3]
