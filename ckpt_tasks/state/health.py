"""The health of what was staged: parameters that hold NaN or infinity."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ckpt_tasks.state.tensors import TensorImage

__all__ = ["find_nonfinite"]

_FLOATS = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.float32,
}
"""The numbers that images of these dtypes are made of, which may be NaN or infinite."""

_Place = tuple[TensorImage, int]
"""An image, and where its bytes begin in the buffer."""


def find_nonfinite(
    images: Sequence[TensorImage], buffer: memoryview, offsets: Sequence[int]
) -> list[str]:
    """Names (``model.fc.weight``) of the parameters among `images` that hold NaN or infinity.

    Parameters
    ----------
    images
        Those marked as parameters count: a buffer may hold what it likes.
    buffer, offsets
        Where `copy_images` has copied them.
    """
    checked = [
        (image, offset)
        for image, offset in zip(images, offsets, strict=True)
        if image.is_parameter and image.nbytes and image.dtype in _FLOATS
    ]
    places = sorted(checked, key=lambda place: place[1])
    bad = {
        id(image)
        for run in _runs(places)
        if not _is_finite(run, buffer)
        for image, start in run
        if not _is_finite([(image, start)], buffer)
    }
    if not bad:
        return []
    return list(dict.fromkeys(image.name for image in images if id(image) in bad))


def _runs(places: Sequence[_Place]) -> Iterator[list[_Place]]:
    """Neighbours of one dtype, together: a sum for each of thousands of tensors takes longer."""
    run: list[_Place] = []
    for image, start in places:
        if run:
            last, begin = run[-1]
            if begin + last.nbytes != start or last.dtype != image.dtype:
                yield run
                run = []
        run.append((image, start))
    if run:
        yield run


def _is_finite(run: Sequence[_Place], buffer: memoryview) -> bool:
    (first, start), (last, begin) = run[0], run[-1]
    dtype = _FLOATS[first.dtype]
    values = torch.frombuffer(buffer[start : begin + last.nbytes], dtype=torch.uint8).view(dtype)
    if dtype.itemsize == 1:  # these have no kernels of their own
        values = values.float()
    total = values.sum(dtype=torch.float64 if dtype is torch.float64 else torch.float32)
    # A sum is not finite where a value is not; also where it is too large for its dtype.
    return bool(total.isfinite()) or bool(values.isfinite().all())
