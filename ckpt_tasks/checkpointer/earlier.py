"""Tensors that an earlier write of the run holds already: they are referred to, not written again.

A reference names the file that holds the bytes, never another reference, so that there are no
chains. It is made only to files of which at least half is still in use: else one small tensor that
never changes would keep a whole checkpoint's bytes for ever.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

import msgspec

from ckpt_tasks.checkpointer.image import FileImage, Image
from ckpt_tasks.format.digest import digest
from ckpt_tasks.format.records import FileEntry, Index, TensorEntry
from ckpt_tasks.format.safetensors import TensorSpec

__all__ = ["Earlier", "Held", "probe_all"]

_PROBE_BYTES = 4096
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
        Digest of the first bytes of each tensor as this process has written it, by file and name:
        what has changed, as most tensors of a training do, is known without digesting all of it.
    """

    def __init__(
        self, index: Index | None = None, probes: Mapping[tuple[str, str], str] | None = None
    ) -> None:
        self._probes = probes
        self._held: dict[object, Held] = {}
        if index is not None:
            self._held = {
                _content(index.files[tensor.file].path, tensor.key, tensor.chunks): Held(
                    index.files[tensor.file], tensor
                )
                for tensor in index.tensors
                if tensor.chunks
            }

    def candidates(self, image: Image, probes: Mapping[int, str]) -> list[int]:
        """Positions of the tensors that are worth digesting to find out if they are held."""
        if not self._held:
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
        found = {}
        files = {file_name(file): file for file in image.files}
        names = {position: name for name, file in files.items() for position in file.positions}
        for position, digests in chunks.items():
            spec = image.specs[position]
            held = self._held.get(_content(names[position], spec.key, digests))
            if held is not None and _is_like(held.tensor, spec):
                found[position] = held
        return _worthwhile(found)


def probe_all(image: Image, memory: memoryview) -> dict[int, str]:
    """Digest of the first bytes of each tensor that has any, by position."""
    return {
        position: digest(memory[start : start + min(spec.size, _PROBE_BYTES)])
        for position, (spec, start) in enumerate(zip(image.specs, image.offsets, strict=True))
        if spec.size
    }


def _content(path: str, key: str, chunks: Iterable[str]) -> object:
    return path.rpartition("/")[2], key, tuple(chunks)


def _is_like(tensor: TensorEntry, spec: TensorSpec) -> bool:
    return (tensor.dtype, tuple(tensor.shape)) == (spec.dtype, spec.shape)


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
