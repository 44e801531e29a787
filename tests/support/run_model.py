"""What a run must look like after anything that may happen to it: a model of sets and dicts.

It knows nothing of stores and records. A checkpoint goes by its age (attempt, sequence), an object
by its path. Whoever drives the model tells it what was asked for, and compares the real run with
what it says. Times are its own `now`, in seconds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

Age = tuple[int, int]


class Lost(Exception):  # noqa: N818 - an answer of the model
    """Nothing is left that the run could go on from; `damaged` was found on the way."""

    def __init__(self, damaged: list[Age]) -> None:
        super().__init__(f"nothing to go on from; damaged: {damaged}")
        self.damaged = damaged


@dataclass(frozen=True)
class Write:
    """One write of a checkpoint, committed or not.

    Parameters
    ----------
    index
        Path of its index.
    spans
        What it needs of each file: path, first byte, and the byte behind the last.
    tensors
        The bytes that it restores.
    """

    age: Age
    step: int
    folder: str
    index: str
    spans: frozenset[tuple[str, int, int]]
    tensors: dict[int, bytes]
    healthy: bool = True
    loss: float = 0.0

    @property
    def files(self) -> frozenset[str]:
        return frozenset(path for path, _, _ in self.spans)

    @property
    def id(self) -> str:
        return f"step-{self.step:08d}-a{self.age[0]}-s{self.age[1]}"


@dataclass
class RunModel:
    """A run: what stands in its store, and in the registry.

    Attributes
    ----------
    starts
        What each attempt that came to training went on from; ``None``: the beginning.
    asked
        What attempts were told to start from.
    sign
        When the newest attempt last showed that it lives.
    completed
        The attempt that has completed the run, if any has.
    writes
        Every write that got as far as its index.
    committed, data
        Records, and the objects of writes with the time of their writing.
    damaged
        Bytes that are wrong, each by path and place; `known_bad` are those because of which a
        checkpoint has been quarantined.
    """

    grace: float
    now: float = 0.0
    attempts: int = 0
    sign: float = 0.0
    completed: int = 0
    starts: dict[int, Age | None] = field(default_factory=dict)
    asked: dict[int, Age] = field(default_factory=dict)
    writes: dict[Age, Write] = field(default_factory=dict)
    committed: set[Age] = field(default_factory=set)
    data: dict[str, float] = field(default_factory=dict)
    damaged: set[tuple[str, int]] = field(default_factory=set)
    known_bad: set[tuple[str, int]] = field(default_factory=set)
    pins: set[Age] = field(default_factory=set)
    quarantined: set[Age] = field(default_factory=set)
    verified: set[Age] = field(default_factory=set)
    expired: dict[Age, float] = field(default_factory=dict)
    collecting: dict[Age, float] = field(default_factory=dict)
    registered: set[Age] = field(default_factory=set)
    aliases: dict[str, Age] = field(default_factory=dict)

    @property
    def marks(self) -> dict[str, set[Age]]:
        """Which checkpoints have which mark."""
        return {
            "pins": self.pins,
            "quarantined": self.quarantined,
            "verified": self.verified,
            "expired": set(self.expired),
            "collecting": set(self.collecting),
        }

    # -- which checkpoints are the run's, and can be gone on from ----------------------------------

    def lineage(self) -> list[Age]:
        """Committed, and not done again by a later attempt; newest first."""
        found: list[Age] = []
        attempt, last = max(self.starts, default=0), float("inf")
        while attempt:
            own = [one for one in self.committed if one[0] == attempt and one[1] <= last]
            found += sorted(own, reverse=True)
            attempt, last = self.starts[attempt] or (0, 0)
        return found

    def could_start(self, age: Age) -> bool:
        """Whether a retry would go on from it, had nobody given it up."""
        return age in self.lineage() and self.writes[age].healthy and age not in self.quarantined

    def is_given_up(self, age: Age) -> bool:
        return age in self.collecting or (age in self.expired and age not in self.pins)

    def is_damaged(self, age: Age) -> bool:
        return not self.needs(age) <= self.data.keys() or bool(self.damage_of(age))

    def damage_of(self, age: Age) -> set[tuple[str, int]]:
        """The wrong bytes among those that it needs."""
        write = self.writes[age]
        whole = {(write.index, 0, 10**9), *write.spans}
        return {
            (path, place)
            for path, place in self.damaged
            if any(path == needed and start <= place < stop for needed, start, stop in whole)
        }

    def has_index(self, age: Age) -> bool:
        """Whether it can be told which files a checkpoint needs."""
        index = self.writes[age].index
        return index in self.data and all(path != index for path, _ in self.damaged)

    def unmarked(self) -> list[Age]:
        given_up = {one for one in self.committed if self.is_given_up(one)}
        return [one for one in self.lineage() if one not in given_up | self.quarantined]

    def startable(self) -> list[Age]:
        """What a retry would try, newest first."""
        return [one for one in self.unmarked() if self.writes[one].healthy]

    def newest(self) -> Age | None:
        return next(iter(self.startable()), None)

    def pick(self) -> tuple[Age | None, list[Age]]:
        """What the next attempt goes on from, and what it finds damaged before; or `Lost`."""
        lineage = self.lineage()
        if not lineage:
            if self.starts and self.starts[max(self.starts)] is not None:
                raise Lost([])
            return None, []
        last_resort = [
            one
            for one in lineage
            if self.is_given_up(one) and one not in self.collecting and one not in self.quarantined
        ]
        found = []
        for age in [*self.unmarked(), *last_resort]:
            if not self.writes[age].healthy:
                continue
            if not self.is_damaged(age):
                return age, found
            found.append(age)
        raise Lost(found)

    def quarantine(self, ages: Iterable[Age]) -> None:
        """They were found damaged."""
        for age in ages:
            self.quarantined.add(age)
            self.known_bad |= self.damage_of(age)

    # -- retention ---------------------------------------------------------------------------------

    def protected(self) -> set[Age]:
        """What nothing lets go."""
        kept = self.pins | set(self.aliases.values()) | self._starts_under_way() | {self.newest()}
        return {age for age in kept if age in self.committed}

    def _starts_under_way(self) -> set[Age]:
        """Of attempts that have no checkpoint of their own yet."""
        newest = self.newest()
        found: set[Age] = set()
        for attempt in range(self.attempts, newest[0] if newest is not None else 0, -1):
            start = self.starts.get(attempt, self.asked.get(attempt))
            found |= {start} if start is not None else set()
            if attempt in self.starts:
                break
        return found

    def to_expire(self, latest: int) -> set[Age]:
        """What rules let go that keep the `latest`."""
        startable = self.startable()
        if not startable:
            return set()
        newest, lineage = startable[0], set(self.lineage())
        kept = self.protected() | set(startable[:latest])
        for age in self.committed - self.quarantined:
            was_replaced = newest[0] == max(self.starts)
            is_unhealthy = age in lineage and not self.writes[age].healthy
            if self.is_given_up(age) or (is_unhealthy and age > newest):
                kept.add(age)
            if age not in lineage and not was_replaced:
                kept.add(age)
        kept |= {age for age in self.quarantined if age > newest}
        return self.committed - kept

    def due(self) -> set[Age]:
        """Whose grace is over, be the record there or not."""
        newest, protected = self.newest(), self.protected()
        found = set()
        for age, since in {**self.collecting, **self.expired}.items():
            if age in protected or (newest is not None and self.could_start(age) and age > newest):
                continue
            if age in self.collecting or self.now - since > self.grace:
                found.add(age)
        return found

    def needs(self, age: Age) -> set[str]:
        return {self.writes[age].index, *self.writes[age].files}

    def needed(self, without: Iterable[Age] = ()) -> set[str]:
        """Objects that committed checkpoints need; of one known to be damaged whose index is, only
        those of its own write.
        """
        found: set[str] = set()
        for age in self.committed - set(without):
            found |= self.own(age)
            if age not in self.quarantined or self.has_index(age):
                found |= self.needs(age)
        return found

    def own(self, age: Age) -> set[str]:
        return {path for path in self.data if path.startswith(self.writes[age].folder)}

    def leftovers(self) -> set[str]:
        """Objects of writes that never became checkpoints, or that are none any more."""
        known = [
            self.writes[age].folder
            for age in {*self.committed, *self.expired, *self.collecting}
            if age in self.writes
        ]
        folders: dict[str, float] = {}
        for path, at in self.data.items():
            folder = path[: path.rindex("/") + 1]
            if folder not in known:
                folders[folder] = max(at, folders.get(folder, at))
        idle = {f for f, at in folders.items() if self.now - at > self.grace and self._is_over(f)}
        return {path for path in self.data if path[: path.rindex("/") + 1] in idle}

    def _is_over(self, folder: str) -> bool:
        """Whether no attempt that may live may go on to need what a write has left."""
        attempt = int(folder.rsplit("/", 2)[1][1:5])
        return attempt < self.attempts or self.now - self.sign > self.grace

    def cannot_tell_what_is_needed(self, without: Iterable[Age]) -> bool:
        remaining = self.committed - set(without) - self.quarantined
        return not all(map(self.has_index, remaining))

    def claimed_by_others(self) -> set[Age]:
        """What a collection that may still go on has begun to remove."""
        return {age for age, at in self.collecting.items() if self.now - at <= self.grace}

    def refuses(self, due: set[Age], going: set[Age]) -> bool:
        """Whether a collection must not delete anything: it has found nothing whole for which what
        was `due` could go, or cannot tell what is needed.
        """
        if due and self.newest() is None and self.committed:
            return True
        return bool(going or self.leftovers()) and self.cannot_tell_what_is_needed(going)

    def removable(self, going: set[Age]) -> set[str]:
        """Objects that a collection of `going` removes."""
        found = self.leftovers()
        for age in going & self.writes.keys():
            found |= self.own(age)
            if self.has_index(age):
                found |= self.writes[age].files
        return (found & self.data.keys()) - self.needed(without=going)

    def collect(self, going: set[Age]) -> None:
        for path in self.removable(going):
            self.remove(path)
        for age in going:
            self.forget(age)

    def remove(self, path: str) -> None:
        del self.data[path]
        self.damaged = {(other, place) for other, place in self.damaged if other != path}

    def forget(self, age: Age) -> None:
        """A checkpoint is none any more."""
        for marks in (self.committed, self.quarantined, self.verified, self.registered):
            marks.discard(age)
        self.expired.pop(age, None)
        self.collecting.pop(age, None)

    def unmark(self, kind: str, age: Age) -> None:
        if kind == "expired":
            self.expired.pop(age, None)
        else:
            self.marks[kind].discard(age)

    def is_complete(self) -> bool:
        """Whether the run ended, and nobody has trained on since."""
        return self.completed >= max(self.starts, default=0) > 0

    # -- the registry ------------------------------------------------------------------------------

    def publish(self, queue: Iterable[Age] = (), *, anew: bool) -> None:
        """Register what an attempt has committed; who begins `anew` finds the rest as well."""
        found = [age for age in queue if age in self.committed]
        if anew:
            found = self.unmarked()
        self.registered |= set(found)
        healthy = [age for age in found if self.writes[age].healthy]
        held = self.aliases.get("resume")
        if healthy and (anew or held is None or max(healthy) > held):
            self.aliases["resume"] = max(healthy)

    def reconcile(self) -> None:
        """What is not in the store is forgotten, and what is gets registered."""
        for age in self.registered - self.committed:
            self.unregister(age)
        self.publish(anew=True)

    def unregister(self, age: Age) -> None:
        self.registered.discard(age)
        self.aliases = {name: held for name, held in self.aliases.items() if held != age}

    def best(self) -> float | None:
        """The best value of what is registered and could be gone on from."""
        losses = [self.writes[age].loss for age in self.startable() if age in self.registered]
        return min(losses, default=None)
