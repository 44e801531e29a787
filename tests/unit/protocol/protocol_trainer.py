"""The steps of a trainer: claim, choose, commit, register (see `protocol_state`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from protocol_state import (
    ENDED,
    NONE,
    START,
    Checkpoint,
    Rules,
    Store,
    Trainer,
    Violation,
    lineage,
    on_lineage,
    stale,
)

Step = tuple[str, Store, Trainer]


def trainer_steps(rules: Rules, store: Store, t: Trainer) -> Iterator[Step]:
    """The next step of the trainer `t`, in each way it may go; none when it has ended."""
    if t.put == "flying":
        yield _land(store, t)
    if t.at != "ended":
        yield from STEPS[t.at](rules, store, t)


# --- claim -----------------------------------------------------------------------------------


def list_claims(rules: Rules, store: Store, t: Trainer) -> Iterator[Step]:
    known = store.resumed if rules.mutant == "lineage_read_before_claim" else ()
    yield "lists claims", store, t.go("claim", attempt=store.claims + 1, put="", resumed=known)


def claim(rules: Rules, store: Store, t: Trainer) -> Iterator[Step]:
    if store.claims >= t.attempt:
        yield "finds its number taken", store, t.go("check claim")
        return
    claimed = store._replace(claims=t.attempt)
    yield "claims", claimed, _claimed(rules, t)
    if store.lost_answers and not t.put:
        yield "claims, no answer", _lose(store), t.go("check claim", put="flying")


def check_claim(rules: Rules, store: Store, t: Trainer) -> Iterator[Step]:
    if store.claims < t.attempt:
        yield "reads back no claim", store, t.go("claim")
    elif t.put == "landed":
        yield "reads back its own claim", store, _claimed(rules, t)
    else:
        yield "reads back another's claim", store, t.go("list claims", attempt=0, put="")


def _claimed(rules: Rules, t: Trainer) -> Trainer:
    if rules.mutant == "choose_before_claim":
        return t.go("verify" if t.candidates else "write resumed", put="")
    return t.go(listings(rules)[0], put="")


def _lose(store: Store) -> Store:
    return store._replace(lost_answers=store.lost_answers - 1)


def _land(store: Store, t: Trainer) -> Step:
    """A create whose answer was lost takes effect, unless another got there first."""
    if t.at in ("check claim", "claim"):
        if store.claims >= t.attempt:
            return "lost claim fails", store, t._replace(put="")
        return "lost claim lands", store._replace(claims=t.attempt), t._replace(put="landed")
    return "lost commit lands", _commit(store, t), t._replace(put="landed")


# --- choose ----------------------------------------------------------------------------------


LISTINGS = {
    "": ("list marks", "list commits", "list attempts"),
    "attempts_listed_first": ("list attempts", "list marks", "list commits"),
    "marks_listed_last": ("list commits", "list attempts", "list marks"),
    "lineage_read_before_claim": ("list marks", "list commits"),
}
"""The order of the three listings. Marks first, so that a mark that is already removed belongs to
a record that is removed too. Attempts last: where no later claim is found, nobody has touched what
was listed before."""


def listings(rules: Rules) -> tuple[str, ...]:
    return LISTINGS.get(rules.mutant, LISTINGS[""])


def list_marks(rules: Rules, store: Store, t: Trainer) -> Iterator[Step]:
    marks = store.collecting | store.expired | store.quarantined
    yield _listed(rules, store, t._replace(marks=marks))


def list_commits(rules: Rules, store: Store, t: Trainer) -> Iterator[Step]:
    commits = store.commits
    if rules.mutant == "newest_timestamp":
        commits = frozenset({store.last_commit} - {START})
    yield _listed(rules, store, t._replace(commits=commits))


def list_attempts(rules: Rules, store: Store, t: Trainer) -> Iterator[Step]:
    if t.attempt and stale(store, t.attempt):
        yield "lists attempts, is stale", store, ENDED
    else:
        yield _listed(rules, store, t._replace(resumed=store.resumed))


def _listed(rules: Rules, store: Store, t: Trainer) -> Step:
    order = listings(rules)
    following = order[order.index(t.at) + 1 :]
    if following:
        return t.at.replace("list", "lists"), store, t.go(following[0])
    return _choose(rules, store, t)


def _choose(rules: Rules, store: Store, t: Trainer) -> Step:
    counted = lineage(t.resumed)
    by_time = rules.mutant == "newest_timestamp"
    valid = [c for c in t.commits if by_time or on_lineage(c, counted)]
    usable = sorted(set(valid) - t.marks, key=lambda c: (c[-1], len(c)), reverse=True)
    chooser = t._replace(marks=NONE, commits=NONE, resumed=(), candidates=tuple(usable))
    label = t.at.replace("list", "lists")
    if not t.attempt:
        return f"{label}, chooses", store, chooser.go("list claims")
    if usable:
        return label, store, chooser.go("verify")
    if (valid or any(t.resumed)) and rules.mutant != "silent_restart":
        return f"{label}, ends: nothing restorable", store, ENDED
    return label, store, chooser.go("write resumed")


def verify(rules: Rules, store: Store, t: Trainer) -> Iterator[Step]:
    chosen = t.candidates[0]
    unfenced = rules.mutant == "unfenced_quarantine"
    unreadable = t.go("quarantine" if unfenced else "fence quarantine")
    if store.intact(chosen):
        early = rules.mutant == "adopt_before_resumed" and chosen not in store.registered
        restored = t.go("adopt" if early else "write resumed", memory=chosen, candidates=())
        seen = store._replace(verified=store.verified | {chosen})
        yield f"verifies {chosen}", seen, restored
        if store.damages:
            hurt = store._replace(damages=store.damages - 1, damaged=store.damaged | {chosen})
            yield f"finds {chosen} damaged", hurt, unreadable
    else:
        yield f"cannot read {chosen}", store, unreadable


def fence_quarantine(rules: Rules, store: Store, t: Trainer) -> Iterator[Step]:
    """A later attempt may have collected what cannot be read: that is no damage."""
    yield _fence(store, t, "quarantine")


def quarantine(rules: Rules, store: Store, t: Trainer) -> Iterator[Step]:
    bad, *rest = t.candidates
    if not {bad, store.home(bad)} & store.damaged:
        raise Violation(f"{bad} was removed, and is quarantined as damaged")
    marked = store._replace(quarantined=store.quarantined | {bad})
    if rest:
        yield f"quarantines {bad}", marked, t.go("verify", candidates=tuple(rest))
    elif rules.mutant == "silent_restart":
        yield f"quarantines {bad}", marked, t.go("write resumed", candidates=())
    else:
        yield f"quarantines {bad}, ends: nothing restorable", marked, ENDED


def write_resumed(rules: Rules, store: Store, t: Trainer) -> Iterator[Step]:
    records = list(store.resumed)
    records[t.attempt - 1] = t.memory
    known = t.memory in (START, *store.registered) or rules.mutant == "adopt_before_resumed"
    after = t.go("write data" if known else "fence adopt")
    yield f"resumes from {t.memory or 'the start'}", store._replace(resumed=tuple(records)), after


def fence_adopt(rules: Rules, store: Store, t: Trainer) -> Iterator[Step]:
    yield _fence(store, t, "adopt")


def adopt(rules: Rules, store: Store, t: Trainer) -> Iterator[Step]:
    """Register what was committed, but not registered, by the attempt that it goes on from."""
    then = "write resumed" if rules.mutant == "adopt_before_resumed" else "write data"
    yield f"registers {t.memory}", _register(store, t.memory), t.go(then)


# --- commit ----------------------------------------------------------------------------------


def write_data(rules: Rules, store: Store, t: Trainer) -> Iterator[Step]:
    """All bytes, or where incremental all but those that an earlier checkpoint has already."""
    new = (*t.memory, t.attempt)
    homes = [new]
    if rules.bounds.incremental:
        homes += [new[:steps] for steps in range(1, len(new))]
    for home in homes:
        label = f"trains and writes {new}" + (f", naming bytes of {home}" if home != new else "")
        late = stale(store, t.attempt)
        yield label, store, t.go("fence commit", memory=new, home=home, late=late)


def fence_commit(rules: Rules, store: Store, t: Trainer) -> Iterator[Step]:
    then = "commit" if t.home == t.memory else "check tombstones"
    if rules.mutant == "commit_without_fence":
        yield "skips the fence", store, t.go(then)
    else:
        yield _fence(store, t, then)


def check_tombstones(rules: Rules, store: Store, t: Trainer) -> Iterator[Step]:
    dead = store.expired | store.collecting | store.gone
    if t.home in dead and rules.mutant != "no_tombstone_check":
        whole = t.go("fence commit", home=t.memory, late=stale(store, t.attempt))
        yield "finds a tombstone, writes all bytes itself", store, whole
    else:
        yield "finds no tombstone", store, t.go("commit")


def commit(rules: Rules, store: Store, t: Trainer) -> Iterator[Step]:
    yield f"commits {t.memory}", _commit(store, t), t.go("fence register", put="")
    if store.lost_answers and not t.put:
        yield "commits, no answer", _lose(store), t.go("check commit", put="flying")


def _commit(store: Store, t: Trainer) -> Store:
    """The conditional create of the commit record; the same record again changes nothing."""
    if t.late:
        raise Violation(f"attempt {t.attempt} commits what it wrote after a later claim")
    if t.memory in store.commits:
        return store
    named = {(t.memory, t.home)} if t.home != t.memory else set()
    in_time = NONE if stale(store, t.attempt) else frozenset({t.memory})
    return store._replace(
        commits=store.commits | {t.memory},
        names_bytes_of=store.names_bytes_of | named,
        committed_in_time=store.committed_in_time | in_time,
        last_commit=t.memory,
    )


def check_commit(rules: Rules, store: Store, t: Trainer) -> Iterator[Step]:
    if t.memory in store.commits:
        yield "reads back its own record", store, t.go("fence register", put="")
    else:
        yield "reads back no record", store, t.go("commit")


def fence_register(rules: Rules, store: Store, t: Trainer) -> Iterator[Step]:
    if rules.mutant == "no_second_fence":
        yield "skips the fence", store, t.go("register")
    else:
        yield _fence(store, t, "register")


def register(rules: Rules, store: Store, t: Trainer) -> Iterator[Step]:
    if t.memory not in store.committed_in_time:
        raise Violation(f"attempt {t.attempt} registers what it committed after a later claim")
    yield f"registers {t.memory}", _register(store, t.memory), t.go("alias")


def alias(rules: Rules, store: Store, t: Trainer) -> Iterator[Step]:
    saves = t.saves + 1
    after = t.go("write data", saves=saves) if saves < rules.bounds.commits else ENDED
    yield f"moves the alias to {t.memory}", store._replace(alias=t.memory), after


def _fence(store: Store, t: Trainer, then: str) -> Step:
    if stale(store, t.attempt):
        return "is stale", store, ENDED
    return "passes the fence", store, t.go(then)


def _register(store: Store, checkpoint: Checkpoint) -> Store:
    return store._replace(registered=store.registered | {checkpoint})


STEPS: dict[str, Callable[[Rules, Store, Trainer], Iterator[Step]]] = {
    "list claims": list_claims,
    "claim": claim,
    "check claim": check_claim,
    "list marks": list_marks,
    "list commits": list_commits,
    "list attempts": list_attempts,
    "verify": verify,
    "fence quarantine": fence_quarantine,
    "quarantine": quarantine,
    "write resumed": write_resumed,
    "fence adopt": fence_adopt,
    "adopt": adopt,
    "write data": write_data,
    "fence commit": fence_commit,
    "check tombstones": check_tombstones,
    "commit": commit,
    "check commit": check_commit,
    "fence register": fence_register,
    "register": register,
    "alias": alias,
}
