"""Ways in which the bytes of a file go wrong behind a store's back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def flip(place: float, bit: int = 0) -> Callable[[Path], None]:
    """One bit, `place` of the way through the file: 0 its first byte, 1 its last."""

    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[round(place * (len(data) - 1))] ^= 1 << bit
        path.write_bytes(data)

    return damage


def truncate(path: Path) -> None:
    """Its second half is lost."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def empty(path: Path) -> None:
    """All of it is lost, its name is not."""
    path.write_bytes(b"")


def extend(path: Path) -> None:
    """Something is added."""
    path.write_bytes(path.read_bytes() + b"\0")


def garbage(path: Path) -> None:
    """The right size, and nothing of it right."""
    path.write_bytes(b"\xff" * path.stat().st_size)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "first-bit": flip(0.0),
    "middle-bit": flip(0.5, 3),
    "last-bit": flip(1.0, 7),
    "truncated": truncate,
    "empty": empty,
    "extended": extend,
    "garbage": garbage,
}


def take_away(root: Path) -> Callable[[], None]:
    """A store that does not answer, whoever asks; what this returns gives it back."""
    elsewhere = root.with_name(f"{root.name}-elsewhere")
    root.rename(elsewhere)
    root.symlink_to(root)

    def give_back() -> None:
        root.unlink()
        elsewhere.rename(root)

    return give_back
