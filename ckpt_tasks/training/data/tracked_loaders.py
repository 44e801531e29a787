"""The loaders that a training run tracks, together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ckpt_tasks.errors import StateError
from ckpt_tasks.training.data.loader_kinds import loader_state
from ckpt_tasks.training.data.loaders import LoaderState

__all__ = ["TrackedLoaders"]


class TrackedLoaders:
    """The states of tracked loaders, by loader.

    Parameters
    ----------
    warn
        Tells people, once, what the loaders cannot do or take long for.
    """

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._states: dict[int, LoaderState] = {}
        self._names: dict[int, str] = {}

    def add(self, name: str, item: Any) -> LoaderState | None:
        """The state to track for `item`; ``None`` if it is no loader.

        Raises `StateError` for a loader whose order cannot be reproduced, or with two names.
        """
        state = loader_state(name, item, self._warn)
        if state is None:
            return None
        if id(item) in self._states:
            first = self._names[id(item)]
            raise StateError(f"{first!r} and {name!r} are the same loader; track it once")
        self._states[id(item)] = state
        self._names[id(item)] = name
        return state

    def of(self, loader: Any) -> LoaderState | None:
        """The state of a tracked loader."""
        return self._states.get(id(loader))

    def prepare(self) -> None:
        """Bring all restored loaders to their places. Draws random numbers."""
        for state in self._states.values():
            state.prepare()

    def begin_epoch(self, epoch: int) -> None:
        """Tell seeded data sets and resumable samplers the epoch."""
        for state in self._states.values():
            state.begin_epoch(epoch)

    def close(self, *, but: LoaderState | None = None) -> None:
        """The next iterators start anew; that of `but` goes on."""
        for state in self._states.values():
            if state is not but:
                state.is_open = False

    def hold(self) -> None:
        """The user iterates by hand: whichever loader is in its midst goes on there.

        Raises `StateError` where a restored place is one in other data.
        """
        for state in self._states.values():
            state.check_data()
            state.is_open = True

    @property
    def without_position(self) -> list[str]:
        """Names of the loaders that come back to their place only through `TrainingRun.steps`."""
        return [
            self._names[key] for key, state in self._states.items() if not state.goes_on_by_hand
        ]

    def is_exact(self) -> bool:
        """Whether random numbers drawn while samples are made are restored, too; warns if not."""
        exact = all(state.exact for state in self._states.values())
        if not exact:
            self._warn(
                "the loader's workers may draw random numbers that no checkpoint holds, so only "
                "the order of the data is restored exactly; wrap the data set in SeededDataset, "
                "or give it state_dict/load_state_dict"
            )
        return exact
