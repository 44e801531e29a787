"""The steps of the collector: expire one checkpoint, and collect it after a grace."""

from __future__ import annotations

from collections.abc import Iterator

from protocol_state import ENDED, GUARDED, Collector, Rules, State, Violation, in_order, stale


def collector_steps(rules: Rules, state: State, c: Collector) -> Iterator[tuple[str, State]]:
    """The next step of the collector `c`, in each way it may go."""
    store = state.store
    if c.at == "verify kept":
        if rules.mutant == "keeps_unverified":
            yield "does not verify what it keeps", _move(state, c, "fence")
        elif store.intact(c.keep):
            yield "verifies what it keeps", _move(state, c, "fence", verified={c.keep})
        else:
            yield "cannot read what it keeps", state._replace(collector=None)
    elif c.at == "fence":
        yield _fence(state, c, "expire")
    elif c.at == "expire":
        for steps in range(1, len(c.keep)):
            if (victim := c.keep[:steps]) in store.commits:
                chosen = c._replace(victim=victim)
                yield f"expires {victim}", _move(state, chosen, "wait", expired={victim})
    elif c.at == "wait":
        patient = state if rules.mutant == "no_grace" else _grace(state)
        yield "waits for the grace", _move(patient, c, "mark")
    else:
        yield from _collect(rules, state, c)


def _collect(rules: Rules, state: State, c: Collector) -> Iterator[tuple[str, State]]:
    store = state.store
    victim = frozenset({c.victim})
    if c.at == "mark":
        unchecked = rules.mutant == "no_recheck"
        marked = c._replace(late=stale(store, c.attempt), free=unchecked)
        then = "unregister" if unchecked else "fence again"
        yield f"marks {c.victim}", _move(state, marked, then, collecting=victim)
    elif c.at == "fence again":
        yield _fence(state, c, "read records")
    elif c.at == "read records":
        free = not any(store.home(k) == c.victim for k in store.commits - victim)
        yield "reads all records", _move(state, c._replace(free=free), "unregister")
    elif c.at == "unregister":
        if store.alias == c.victim:
            yield "finds an alias, stops", _unmark(state, c)
        else:
            after = store._replace(registered=store.registered - victim)
            yield f"unregisters {c.victim}", _move(state._replace(store=after), c, "delete record")
    elif c.at == "delete record":
        _check_last_copy(state, c)
        after = store._replace(commits=store.commits - victim)
        then = "delete data" if c.free else "unmark"
        yield f"deletes the record of {c.victim}", _move(state._replace(store=after), c, then)
    elif c.at == "delete data":
        yield f"deletes the data of {c.victim}", _move(state, c, "unmark", gone=victim)
    elif c.at == "unmark":
        after = store._replace(expired=store.expired - victim)
        yield "removes its marks", _unmark(state._replace(store=after), c)


def _check_last_copy(state: State, c: Collector) -> None:
    if c.late:
        raise Violation(f"a collection of attempt {c.attempt}, begun after a later claim, deletes")
    newer = [v for v in state.store.verified if v[: len(c.victim)] == c.victim and v != c.victim]
    if not newer:
        raise Violation(f"{c.victim} is deleted, and no newer checkpoint was ever verified")


def _fence(state: State, c: Collector, then: str) -> tuple[str, State]:
    if stale(state.store, c.attempt):
        return "is stale", _unmark(state, c)
    return "passes the fence", _move(state, c, then)


def _move(state: State, c: Collector, then: str, **marks: set | frozenset) -> State:
    added = {name: getattr(state.store, name) | more for name, more in marks.items()}
    return state._replace(store=state.store._replace(**added), collector=c.go(then))


def _unmark(state: State, c: Collector) -> State:
    store = state.store._replace(collecting=state.store.collecting - {c.victim})
    return state._replace(store=store, collector=None)


def _grace(state: State) -> State:
    """No pause between a check and what it guards is as long: who still stands there is dead."""
    trainers = (ENDED if t.at in GUARDED or t.put == "flying" else t for t in state.trainers)
    return state._replace(trainers=in_order(trainers))
