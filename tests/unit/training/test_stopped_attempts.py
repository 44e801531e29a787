"""An attempt that is stopped for a while, and stale when it goes on, ends what it stood in."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from support.retained_runs import GRACE, RetainedRun, state_of

from ckpt_tasks.config import RegistryConfig, RetentionConfig
from ckpt_tasks.errors import StaleAttemptError
from ckpt_tasks.fencing.fence import Fence
from ckpt_tasks.registry import RunDescription
from ckpt_tasks.retention import collect, expire
from ckpt_tasks.testing import (
    Fault,
    FaultInjector,
    FaultyRegistry,
    FaultyStore,
    MemoryRegistry,
    RegistryMemory,
)
from ckpt_tasks.testing.registry_wrappers import REGISTRY_CHANGES
from ckpt_tasks.testing.wrappers import CHANGES
from ckpt_tasks.training.registration.publisher import Publisher

Act = Callable[[RetainedRun, RegistryMemory, FaultInjector], None]


def _description(run: RetainedRun) -> RunDescription:
    return RunDescription(
        run=run.name, uid=run.identity.uid, store_url=run.store.url, hyperparameters={}
    )


def _publish(run: RetainedRun, memory: RegistryMemory, injector: FaultInjector) -> None:
    store = FaultyStore(run.store, injector)
    publisher = Publisher(
        store,
        run.layout,
        Fence(store, run.layout, 1),
        FaultyRegistry(MemoryRegistry(memory), injector),
        RegistryConfig(best="loss:min"),
        _description(run),
        [].append,
    )
    publisher.add_rows([("loss", 0.5, 1, 1000)])
    publisher.publish()
    publisher.end("finished")


def _retain(run: RetainedRun, memory: RegistryMemory, injector: FaultInjector) -> None:
    store, by = FaultyStore(run.aged, injector), "attempt 1"
    fence = Fence(store, run.layout, 1)
    expire(store, run.name, RetentionConfig(latest=1), by=by, fence=fence)
    run.aged.age(2 * GRACE)
    collect(store, run.name, grace=GRACE, by=by, fence=fence)


@pytest.mark.parametrize("act", [_publish, _retain])
def test_stopped_at_every_operation(act: Act) -> None:
    """Wherever it is stopped while another attempt is claimed: what it stood in may take effect,
    the removal of one checkpoint is brought to its end, and nothing else is published or removed.
    """
    stale = 0
    for number in itertools.count(1):
        run, memory = RetainedRun(), RegistryMemory()
        attempt = run.begin()
        for step in (1, 2, 3):
            attempt.save(step, state_of(step), metrics={"loss": 1.0 / step})
        injector = FaultInjector(
            [Fault(at=number, how="stall")], sleep=lambda _, run=run: run.begin()
        )
        try:
            act(run, memory, injector)
        except StaleAttemptError:
            stale += 1
        if len(injector.log) < number:
            break
        later = [o for o in injector.log[number:] if o[0] in CHANGES | REGISTRY_CHANGES]
        assert [o for o in later if not _belongs(o, injector.log[:number])] == [], number
    assert stale > 20


def _belongs(operation: tuple[str, str], before: list[tuple[str, str]]) -> bool:
    """Whether an operation takes back, or ends, what was begun before."""
    name, subject = operation
    if name == "create":
        return subject.endswith("/memory.json")  # finds another's there, or the one run's
    if "/collecting/" in subject and ("create", subject) in before:
        return True
    since_fence = list(
        itertools.takewhile(lambda o: not (o[0] == "exists" and "/attempts/" in o[1]), before[::-1])
    )
    return name == "delete" and any(o[0] == "delete" for o in since_fence)
