"""Tensors that an earlier write of the run holds already: they are referred to, not written again.

A reference names the file that holds the bytes, never another reference, so that there are no
chains. It is made only to files of which at least half is still in use: else one small tensor that
never changes would keep a whole checkpoint's bytes for ever.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import msgspec

from ckpt_tasks.checkpointer.image import FileImage, Image
from ckpt_tasks.format.records import FileEntry, Index, TensorEntry
from ckpt_tasks.format.safetensors import TensorSpec

__all__ = ["Earlier", "Held", "probe_all"]

_PROBE_BYTES = 1024
_LEAST_SHARE = 0.5  # of a file's bytes, for a reference into it


class Held(msgspec.Struct, frozen=True):
    """A tensor in a file of an earlier write."""

    file: FileEntry
    tensor: TensorEntry


class Earlier:
    """What the latest checkpoint holds, by content.

    Parameters
    ----------
    index
        Its index; ``None`` where there is none, or where nothing is to be referred to.
    probes
        What `probe_all` gave of each tensor as this process has written it, by file and name:
        what has changed, as most tensors of a training do, is known without digesting all of it.
    """

    def __init__(
        self, index: Index | None = None, probes: Mapping[tuple[str, str], int] | None = None
    ) -> None:
        self._probes = probes
        self._files = index.files if index is not None else []
        self._tensors = index.tensors if index is not None else []

    def candidates(self, image: Image, probes: Mapping[int, int]) -> list[int]:
        """Positions of the tensors that are worth digesting to find out if they are held."""
        if not self._tensors:
            return []
        return [
            position
            for position, probe in probes.items()
            if self._probes is None or self._probes.get(image.name_of(position), probe) == probe
        ]

    def find(
        self, image: Image, chunks: Mapping[int, list[str]], file_name: Callable[[FileImage], str]
    ) -> dict[int, Held]:
        """Those of the digested tensors that are held, by position.

        Parameters
        ----------
        file_name
            Of a file of the image. A tensor is held under its own name only, by which other ranks
            may know it too.
        """
        found: dict[int, Held] = {}
        by_name = self._by_name() if chunks else {}
        for file in image.files:
            name = file_name(file)
            for position in file.positions:
                spec = image.specs[position]
                held = by_name.get((name, spec.key)) if chunks.get(position) else None
                if held is not None and _is_like(held.tensor, spec, chunks[position]):
                    found[position] = held
        return _worthwhile({position: found[position] for position in sorted(found)})

    def _by_name(self) -> dict[tuple[str, str], Held]:
        """What is held, by the name of its file without the folder, and its own in there."""
        names = [file.path.rpartition("/")[2] for file in self._files]
        return {
            (names[tensor.file], tensor.key): Held(self._files[tensor.file], tensor)
            for tensor in self._tensors
        }


def probe_all(image: Image, memory: memoryview) -> dict[int, int]:
    """A hash of the first bytes of each tensor that has any, by position. It is another one in
    another process.
    """
    return {
        position: hash(bytes(memory[start : start + min(spec.size, _PROBE_BYTES)]))
        for position, (spec, start) in enumerate(zip(image.specs, image.offsets, strict=True))
        if spec.size
    }


def _is_like(tensor: TensorEntry, spec: TensorSpec, chunks: Sequence[str]) -> bool:
    return (tensor.chunks, tensor.dtype, tuple(tensor.shape)) == (chunks, spec.dtype, spec.shape)


def _worthwhile(found: dict[int, Held]) -> dict[int, Held]:
    used = {path: sum(size for _, size in places) for path, places in _places(found).items()}
    return {
        position: held
        for position, held in found.items()
        if used[held.file.path] >= _LEAST_SHARE * (held.file.size - held.file.header_size)
    }


def _places(found: Mapping[int, Held]) -> dict[str, set[tuple[int, int]]]:
    """Places in each file that are referred to, each once."""
    places: defaultdict[str, set[tuple[int, int]]] = defaultdict(set)
    for held in found.values():
        places[held.file.path].add((held.tensor.offset, held.tensor.size))
    return places
