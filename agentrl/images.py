"""Pictures on their way from an environment into files and models.

An environment hands over pixels (`image_part`). From then on an `ImagePart` carries the PNG file's content in memory
under the name that the file will have: ``images/HASH.png``, where HASH is that of the pixels, so that the same picture
is stored once. Whoever writes a trajectory file saves its pictures beside it (`save_images`); whoever reads one tells
its parts which folder they belong to (`attach_images`), and pixels are read when a model wants them (`read_pixels`).
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from agentrl.errors import DataError, UserError
from agentrl.files import atomic_write
from agentrl.types import Content, ImagePart, Trajectory

FOLDER = "images"
"""Folder of the pictures, beside the trajectory file."""


def image_part(pixels: np.ndarray, *, alt: str = "") -> ImagePart:
    """Returns the part of a message that shows `pixels`.

    Args:
        pixels: (height, width, 3) uint8, RGB.
        alt: the same in words, for readers that take text only.

    Raises:
        UserError: another shape or type, or Pillow is not installed.
    """
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        got = f"{getattr(pixels, 'dtype', type(pixels).__name__)} {getattr(pixels, 'shape', '')}".strip()
        raise UserError(f"a picture is an array (height, width, 3) of uint8, not {got}")
    if 0 in pixels.shape:
        raise UserError(f"a picture of {pixels.shape[0]} x {pixels.shape[1]} pixels shows nothing")
    digest = hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).hexdigest()[:32]
    part = ImagePart(path=f"{FOLDER}/{digest}.png", alt=alt)
    file = io.BytesIO()
    _pillow().fromarray(pixels).save(file, format="PNG")
    part._source = file.getvalue()
    return part


def images_of(content: Content | None) -> list[ImagePart]:
    """Returns the pictures of `content`, in order."""
    if content is None or isinstance(content, str):
        return []
    return [part for part in content if isinstance(part, ImagePart)]


def png_bytes(part: ImagePart) -> bytes:
    """Returns the PNG file of a picture.

    Raises:
        DataError: the file is missing, or nobody said where it lies.
    """
    source = part._source
    if isinstance(source, bytes):
        return source
    if source is None:
        raise DataError(
            f"picture {part.path!r} has no pixels here: make it with agentrl.images.image_part, or read its trajectory "
            "with agentrl.buffer.read_jsonl, which knows the folder"
        )
    path = PurePosixPath(part.path)
    if path.is_absolute() or ".." in path.parts:
        raise DataError(f"picture {part.path!r} lies outside the folder of its trajectory file, {source}")
    try:
        return (source / path).read_bytes()
    except OSError as error:
        raise DataError(
            f"cannot read picture {source / path}: {error.strerror or error}; "
            f"copy the folder {FOLDER!r} together with its trajectory file"
        ) from error


def read_pixels(part: ImagePart) -> np.ndarray:
    """Returns the pixels of a picture: (height, width, 3) uint8, RGB.

    Raises:
        DataError: as `png_bytes`, or the file holds no picture.
        UserError: Pillow is not installed.
    """
    content, pillow = png_bytes(part), _pillow()
    try:
        return np.asarray(pillow.open(io.BytesIO(content)).convert("RGB"))
    except (OSError, ValueError) as error:
        raise DataError(f"{part.path!r} is no readable picture: {error}") from error


def save_images(folder: Path, trajectories: Iterable[Trajectory]) -> None:
    """Writes the pictures of `trajectories` below `folder`, each whole or not at all, those already there not again.

    Raises:
        DataError: a picture of another folder cannot be read.
        UserError: a file cannot be written.
    """
    seen: set[str] = set()
    for part in _parts(trajectories):
        if part.path in seen:
            continue
        seen.add(part.path)
        if part._source is None or (folder / part.path).exists():
            continue
        content = png_bytes(part)
        with atomic_write(folder / part.path) as file:
            file.write(content)


def attach_images(folder: Path, trajectories: Iterable[Trajectory]) -> None:
    """Tells the pictures of `trajectories`, just read from a file in `folder`, where they lie."""
    for part in _parts(trajectories):
        part._source = folder


def _parts(trajectories: Iterable[Trajectory]) -> Iterator[ImagePart]:
    for trajectory in trajectories:
        for turn in trajectory.turns:
            yield from images_of(turn.observation)
            for span in turn.prompt_images:
                yield span.image
        yield from images_of(trajectory.final_observation)


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise UserError('pictures are written and read with Pillow: pip install "agentrl[images]"') from error
    return Image
