"""Row blocks: on request, a tensor is saved as several, each of which holds some of its rows.

Of a large tensor of which few rows change between two saves, such as an embedding table, only the
blocks that have changed are written then: each is digested and referred to by itself.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Final

from ckpt_tasks.errors import ConfigError
from ckpt_tasks.format.tree import Path
from ckpt_tasks.state.tensors import TensorImage
from ckpt_tasks.suggest import did_you_mean

__all__ = ["BLOCK_BYTES", "RowSplitter", "split_rows"]

BLOCK_BYTES: Final = 1024 * 1024
"""Of a block at most, unless one row has more. Changed rows are seldom neighbours, so blocks are
smaller than digested chunks; each takes about 250 bytes of the index."""


class RowSplitter:
    """Knows which tensors are saved in blocks of rows.

    Parameters
    ----------
    patterns
        Names ``<tracked name>.<keys>``, or patterns of such as `fnmatch` has them.
    """

    def __init__(self, patterns: Sequence[str] = ()) -> None:
        self._patterns = tuple(patterns)
        self._unmatched = set(self._patterns)
        self._seen: set[str] = set()

    def asks_for(self, path: Path) -> bool:
        """Whether the tensor at `path` is to be split."""
        if not self._patterns:
            return False
        name = ".".join(map(str, path))
        if self._unmatched:
            self._seen.add(name)
        found = [each for each in self._patterns if each == name or fnmatchcase(name, each)]
        self._unmatched.difference_update(found)
        return bool(found)

    def refuse_if_asked(self, path: Path, why: str) -> None:
        """Raise `ConfigError` where a tensor is to be split that cannot be."""
        if self.asks_for(path):
            raise ConfigError(f"save.row_blocks names {'.'.join(map(str, path))}, {why}")

    def check_matched(self, without_state: Collection[str]) -> None:
        """Raise `ConfigError` for a pattern that no tensor has matched so far.

        Parameters
        ----------
        without_state
            Tracked names whose tensors are still to be made: optimizers before their first step.
        """
        for pattern in sorted(self._unmatched):
            tracked = pattern.partition(".")[0]
            if not any(fnmatchcase(name, tracked) for name in without_state):
                hint = did_you_mean(pattern, self._seen, what="tensors")
                raise ConfigError(f"save.row_blocks names {pattern}, which is no tensor; {hint}")
        self._seen.clear()


def split_rows(image: TensorImage) -> Iterator[tuple[int, int]]:
    """First row of each block, and the row behind its last; one block where that is enough."""
    rows = image.shape[0] if image.shape else 0
    if not image.nbytes or not rows:
        return
    step = max(1, BLOCK_BYTES * rows // image.nbytes)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)
