"""Images in folders named for their classes: finding, decoding, and counting those that cannot be decoded."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mm_lightning.arguments import no_such

__all__ = ["class_folders", "decode", "find_images", "leave_out_corrupt", "pillow", "read_header", "try_each"]

_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def class_folders(root: Path) -> list[Path]:
    """The folders in ``root`` by name, without hidden ones."""
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def find_images(folder: Path, class_names: Sequence[str]) -> tuple[list[Path], Tensor]:
    """Find the images of a split, class by class, each class by path.

    Args:
        folder: Holds a folder for each class.
        class_names: What they may be called, by class index.

    Returns:
        The files, and class indices int64 (N,).

    Raises:
        ValueError: If a class folder has another name or holds no image.
    """
    files: list[Path] = []
    targets: list[int] = []
    for of_class in class_folders(folder):
        if of_class.name not in class_names:
            known = no_such(of_class.name, class_names, "class")
            raise ValueError(f"{of_class} is of a class that is not trained on. {known} Rename or remove it.")
        found = sorted(path for path in of_class.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())
        if not found:
            raise ValueError(f"{of_class} holds no image ({', '.join(_SUFFIXES)}). Add some, or remove the folder.")
        files += found
        targets += [class_names.index(of_class.name)] * len(found)
    return files, torch.tensor(targets, dtype=torch.int64)


def decode(image: Any, size: int, channels: int) -> Tensor:
    """Decode an image, resized to a square whatever its own shape is.

    Args:
        image: A file, or an image of Pillow's.
        size: Height and width.
        channels: 3 for RGB, 1 for grey.

    Returns:
        uint8 (channels, size, size); of grey images of 16 bits the upper 8.

    Raises:
        ValueError: If the pixels have no known range: integers of 32 bits, floating point numbers.
    """
    module = pillow()
    if isinstance(image, (str, Path)):
        with module.open(image) as opened:
            return decode(opened, size, channels)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        # convert() would make everything above 255 white
        image = module.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"pixels of the mode {image.mode!r} have no known range, save it with 8 or 16 bits")
    mode = "RGB" if channels == 3 else "L"
    converted = image.convert(mode)
    if converted.size != (size, size):
        converted = converted.resize((size, size), module.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(converted))
    return pixels.permute(2, 0, 1).contiguous() if channels == 3 else pixels[None]  # (H, W, C) -> (C, H, W)


def read_header(path: Path) -> None:
    """Raise what Pillow raises at a file that does not begin as an image."""
    with pillow().open(path) as image:
        image.verify()


def try_each(function: Callable[[int], Any], count: int) -> dict[int, str]:
    """Call a function with each number, in threads: Pillow decodes without Python's lock.

    Returns:
        What went wrong, by number.
    """

    def attempt(number: int) -> str | None:
        try:
            function(number)
        except MemoryError:
            raise
        except Exception as error:  # whatever a decoder meets in a damaged file
            return f"{type(error).__name__}: {error}"
        return None

    with ThreadPoolExecutor() as pool:
        return {number: text for number, text in enumerate(pool.map(attempt, range(count))) if text is not None}


def leave_out_corrupt(names: Sequence[str], corrupt: dict[int, str], max_corrupt: float) -> Tensor:
    """Warn of images that cannot be decoded, or refuse them.

    Args:
        names: All images.
        corrupt: What went wrong, by number.
        max_corrupt: Share of the images that may be left out.

    Returns:
        Numbers of the images that stay.

    Raises:
        ValueError: If they are more than that share, or all.
    """
    if corrupt:
        some = ", ".join(str(names[number]) for number in list(corrupt)[:3])
        more = f" and {len(corrupt) - 3} more" if len(corrupt) > 3 else ""
        reason = next(iter(corrupt.values()))
        text = f"{len(corrupt)} of {len(names)} images cannot be decoded: {some}{more} (the first: {reason})."
        if len(corrupt) == len(names):
            raise ValueError(f"{text} No image is left.")
        if len(corrupt) > max_corrupt * len(names):
            raise ValueError(f"{text} Replace or remove them; data.max_corrupt={max_corrupt} of them may be left out.")
        warnings.warn(f"{text} They are left out.", stacklevel=2)
    return torch.tensor([number for number in range(len(names)) if number not in corrupt], dtype=torch.int64)


def pillow() -> Any:
    """Pillow's module ``Image``.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("Reading images needs Pillow: pip install mm-lightning[report].") from error
    return Image
