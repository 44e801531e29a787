"""Exhaustive exploration of the model, the invariants, and readable counterexamples."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from protocol_collector import collector_steps
from protocol_state import (
    START,
    Checkpoint,
    Checkpoints,
    Collector,
    Rules,
    State,
    Store,
    Trainer,
    Violation,
    in_order,
    lineage,
    on_lineage,
)
from protocol_trainer import trainer_steps


class Explored(NamedTuple):
    """What an exploration found: how many states there are, and what went wrong, if anything."""

    states: int
    violation: str | None
    trace: list[str]

    def __str__(self) -> str:
        lines = [f"{self.violation or 'no violation'} ({self.states} states)", *self.trace]
        return "\n  ".join(lines)


def explore(rules: Rules) -> Explored:
    """Visit every reachable state once, nearest first, until one breaks a promise."""
    initial = _initial(rules)
    reached: dict[State, tuple[State, str] | None] = {initial: None}
    queue = deque([initial])
    while queue:
        state = queue.popleft()
        label = "?"
        try:
            check(state)
            for label, after in successors(rules, state):
                if after not in reached:
                    reached[after] = (state, label)
                    queue.append(after)
        except Violation as violation:
            return Explored(len(reached), str(violation), _trace(reached, state))
    return Explored(len(reached), None, [])


def _trace(reached: dict[State, tuple[State, str] | None], state: State) -> list[str]:
    steps: list[str] = []
    while (came_from := reached[state]) is not None:
        state, label = came_from
        steps.append(label)
    return steps[::-1]


def _initial(rules: Rules) -> State:
    bounds = rules.bounds
    first = "list marks" if rules.mutant == "choose_before_claim" else "list claims"
    store = Store(
        resumed=(None,) * bounds.attempts,
        damages=bounds.damages,
        lost_answers=bounds.lost_answers,
        collectors=bounds.collectors,
    )
    return State(store, (Trainer(at=first),) * bounds.attempts)


def successors(rules: Rules, state: State) -> Iterator[tuple[str, State]]:
    """Every step that may come next, and where it leads."""
    for index, trainer in enumerate(state.trainers):
        if index and trainer == state.trainers[index - 1]:
            continue
        for label, store, moved in trainer_steps(rules, state.store, trainer):
            trainers = in_order((*state.trainers[:index], *state.trainers[index + 1 :], moved))
            who = f"attempt {moved.attempt or trainer.attempt or '?'}"
            yield f"{who}: {label}", State(store, trainers, state.collector)
            if trainer.at == "alias" and store.collectors:
                worker = Collector("verify kept", trainer.attempt, trainer.memory)
                started = State(store._replace(collectors=0), trainers, worker)
                yield f"{who}: {label}, starts a collector", started
    if state.collector is not None:
        who = f"collector of attempt {state.collector.attempt}"
        for label, after in collector_steps(rules, state, state.collector):
            yield f"{who}: {label}", after


# --- invariants ------------------------------------------------------------------------------


def check(state: State) -> None:
    """Raise `Violation` unless every promise that concerns a state holds."""
    store = state.store
    _registered_is_committed(store)
    _registered_is_one_history(store)
    _nothing_registered_is_left_behind(store)
    _no_silent_restart(store)
    _records_tell_who_trained(store)
    _no_base_and_no_named_bytes_deleted(state)


def _registered_is_committed(store: Store) -> None:
    if lies := store.registered - store.commits:
        raise Violation(f"{sorted(lies)} registered, but not committed")
    if store.alias and store.alias not in store.registered:
        raise Violation(f"the alias names {store.alias}, which is not registered")


def _kept(store: Store) -> Checkpoints:
    return store.registered - store.quarantined - store.expired


def _extends(later: Checkpoint, earlier: Checkpoint) -> bool:
    return later[: len(earlier)] == earlier


def _registered_is_one_history(store: Store) -> None:
    """Every step was trained once: of two registered checkpoints one continues the other."""
    history = sorted(_kept(store), key=len)
    for earlier, later in pairwise(history):
        if not _extends(later, earlier):
            raise Violation(f"registered {earlier} and {later} tell two histories")


def _nothing_registered_is_left_behind(store: Store) -> None:
    """The newest attempt goes on from all that is registered, unless damaged or expired."""
    newest = store.claims
    base = store.resumed[newest - 1] if newest else None
    if base is None:
        return
    for checkpoint in _kept(store):
        if checkpoint[-1] < newest and not _extends(base, checkpoint):
            raise Violation(f"attempt {newest} resumes from {base}, without {checkpoint}")


def _no_silent_restart(store: Store) -> None:
    for number, base in enumerate(store.resumed, start=1):
        if base == START:
            for checkpoint in store.committed_in_time:
                if checkpoint[-1] < number:
                    raise Violation(f"attempt {number} starts at step 0 after {checkpoint}")


def _records_tell_who_trained(store: Store) -> None:
    """Read backwards, claims and resumed records give each step to the attempt that trained it."""
    counted = lineage(store.resumed)
    for checkpoint in store.commits:
        if on_lineage(checkpoint, counted):
            told: Checkpoint = ()
            part = checkpoint
            while part:
                base = store.resumed[part[-1] - 1]
                if base is None or len(base) >= len(part):
                    raise Violation(f"the records do not tell how {checkpoint} came about")
                told = (part[-1],) * (len(part) - len(base)) + told
                part = base
            if told != checkpoint:
                raise Violation(f"the records tell {told} of {checkpoint}")


def _no_base_and_no_named_bytes_deleted(state: State) -> None:
    store = state.store
    if not store.gone:
        return
    for t in state.trainers:
        restored = t.memory and t.saves == 0 and t.memory[-1] != t.attempt
        if restored and t.attempt == store.claims and t.memory in store.gone:
            raise Violation(f"attempt {t.attempt} trains from {t.memory}, which is deleted")
    for checkpoint in store.commits & store.committed_in_time:
        if store.home(checkpoint) in store.gone:
            raise Violation(f"{checkpoint} names deleted bytes of {store.home(checkpoint)}")
