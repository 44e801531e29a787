"""What an attempt's registrar does, in the trainer's own thread.

So all operations of an attempt have one order, and the n-th is the same one whenever it is run. The
parts that publish and retain are the registrar's own.
"""

from __future__ import annotations

from collections.abc import Callable

from support.aged_store import AgedStore
from support.retained_runs import GRACE

from ckpt_tasks.errors import CkptTasksError, RegistryError, StaleAttemptError, StoreError
from ckpt_tasks.events import (
    AttemptClaimed,
    AttemptResumed,
    CheckpointCommitted,
    Event,
    EventSink,
    MetricsLogged,
    RunFoundComplete,
    Warned,
)
from ckpt_tasks.fencing.fence import Fence
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.registry import Registry, RunDescription
from ckpt_tasks.retention import collect, expire
from ckpt_tasks.store import Store
from ckpt_tasks.training.registration.publisher import Publisher
from ckpt_tasks.training.registration.registry_ids import read_ids
from ckpt_tasks.training.spec import TrainSpec
from ckpt_tasks.types import EXIT_DONE

_TRIES = 3  # for what an outage has left at the end


class InlineRegistrar:
    """Publishes and retains after each commit, and at the end.

    Parameters
    ----------
    open_store
        Opens a store of its own, and tells what makes its objects older.
    open_registry
        Makes a registry that is not bound to a run yet.
    on_event
        Told what happens.
    ages
        Whether every grace has passed of what is there when something is committed.
    """

    def __init__(
        self,
        spec: TrainSpec,
        open_store: Callable[[], tuple[Store, AgedStore]],
        open_registry: Callable[[], Registry],
        on_event: EventSink,
        *,
        ages: bool = True,
    ) -> None:
        self._spec = spec
        self._layout = RunLayout(spec.run)
        self._open_store = open_store
        self._open_registry = open_registry
        self._on_event = on_event
        self._ages = ages
        self._claimed: AttemptClaimed | RunFoundComplete | None = None
        self._publisher: Publisher | None = None
        self._settled = False
        self._waiting: list[MetricsLogged | CheckpointCommitted] = []
        self._is_stale = False

    def __call__(self, event: Event) -> None:
        if isinstance(event, AttemptClaimed | RunFoundComplete):
            self._claimed = event
        self._settled |= isinstance(event, AttemptResumed | RunFoundComplete)
        if isinstance(event, MetricsLogged | CheckpointCommitted):
            self._waiting.append(event)
        if isinstance(event, CheckpointCommitted):
            self._publish()
            self._retain()

    def finish(self, code: int) -> None:
        """Publish what is left; `code` is the trainer's."""
        for _ in range(_TRIES):
            if self._publish(ends_with=code):
                break
        self._retain()

    def _publish(self, *, ends_with: int | None = None) -> bool:
        """Returns whether all is done; false where the registry or the store is away."""
        if self._is_stale or not self._settled:
            return True
        try:
            publisher = self._opened_publisher()
            while self._waiting:
                event = self._waiting.pop(0)
                if isinstance(event, MetricsLogged):
                    publisher.add_rows(event.rows)
                else:
                    publisher.add_commit(event.checkpoint)
            publisher.publish()
            if ends_with is not None:
                publisher.end("finished" if ends_with == EXIT_DONE else "failed")
        except StaleAttemptError as error:
            self._stop(error)
        except (RegistryError, StoreError) as error:
            self._on_event(Warned(message=f"not published: {error}"))
            return False
        return True

    def _retain(self) -> None:
        """As the registrar's thread does."""
        retention, claimed = self._spec.config.retention, self._claimed
        if retention.keeps_everything or self._is_stale or not isinstance(claimed, AttemptClaimed):
            return
        store, aged = self._open_store()
        fence, by = Fence(store, self._layout, claimed.attempt), f"attempt {claimed.attempt}"
        try:
            registry = self._bound_registry(store, claimed)
            run = self._spec.run
            expire(store, run, retention, by=by, registry=registry, fence=fence)
            if self._ages:
                aged.age(2 * GRACE)
            collect(store, run, grace=GRACE, by=by, registry=registry, fence=fence)
        except StaleAttemptError as error:
            self._stop(error)
        except CkptTasksError as error:
            self._on_event(Warned(message=f"nothing is removed: {error}"))

    def _stop(self, error: StaleAttemptError) -> None:
        self._is_stale = True
        self._on_event(Warned(message=f"nothing more is published: {error}"))

    def _opened_publisher(self) -> Publisher:
        if self._publisher is None:
            assert self._claimed is not None
            store = self._open_store()[0]
            self._publisher = Publisher(
                store,
                self._layout,
                Fence(store, self._layout, self._claimed.attempt),
                self._open_registry(),
                self._spec.config.registry,
                self._describe(store, self._claimed),
                self._on_event,
            )
        return self._publisher

    def _bound_registry(self, store: Store, claimed: AttemptClaimed) -> Registry:
        registry = self._open_registry()
        ids = read_ids(store, self._layout, registry.name, lambda _: None)
        if ids is None:
            raise RegistryError("the run is not in the registry yet")
        registry.attach_run(ids, self._describe(store, claimed))
        return registry

    def _describe(self, store: Store, claimed: AttemptClaimed | RunFoundComplete) -> RunDescription:
        return RunDescription(
            run=claimed.run,
            uid=claimed.uid,
            store_url=store.url,
            hyperparameters=dict(self._spec.params),
            entrypoint=self._spec.recorded_entrypoint,
        )
