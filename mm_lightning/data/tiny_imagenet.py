"""Tiny-ImageNet, from its zip archive."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor

from mm_lightning.data.archives import open_zip
from mm_lightning.data.download import RemoteFile
from mm_lightning.data.image_files import decode, pillow, try_each
from mm_lightning.data.official import Images, OfficialDataModule

__all__ = ["TinyImageNetDataModule"]

_SIZE = 64  # pixels


class TinyImageNetDataModule(OfficialDataModule):
    """Tiny-ImageNet: 100,000 training images of 200 classes, 64 x 64. See :class:`OfficialDataModule`.

    The official test images have no labels: as everywhere, the 10,000 official validation images are the test set.
    ``root`` holds ``tiny-imagenet-200.zip`` or ``tiny-imagenet-200/``. Classes are numbered in the order of their
    WordNet numbers, and take turns among the training images, so that a ``limit`` keeps some of each. All images are
    decoded when training begins, in threads; as uint8 they take 1.4 GB. Needs Pillow.
    """

    # the source gives none; several projects have recorded this one, and the MD5 90528d7ca1a48142e341f4ef8d21d0de
    files = (
        RemoteFile(
            "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
            248_100_043,
            "6198c8ae015e2b3e007c7841da39ec069199b9aa3bfa943a462022fe5e43c821",
        ),
    )
    extracted = "tiny-imagenet-200"
    num_train, num_test, num_classes = 100_000, 10_000, 200
    input_shape = (3, _SIZE, _SIZE)
    # of the authors' code: to [-1, 1]
    mean = (0.5, 0.5, 0.5)
    std = (0.5, 0.5, 0.5)

    def require_packages(self) -> None:
        """Raise ImportError where Pillow is missing."""
        pillow()

    def read(self, folder: Path | None) -> Images:
        """Decode the archive's images, or the extracted ones."""
        if folder is not None:
            files = {path.relative_to(self.root).as_posix(): path for path in folder.rglob("*.*")}
            return self._read(files, lambda name: files[name].read_bytes())
        with open_zip(self.root / self.files[0].name) as archive:
            return self._read(archive.namelist(), archive.read)

    def _read(self, names: Iterable[str], content: Callable[[str], bytes]) -> Images:
        there, top = set(names), self.extracted
        if missing := [name for name in (f"{top}/wnids.txt", f"{top}/val/val_annotations.txt") if name not in there]:
            raise ValueError(f"{self.root} lacks {missing[0]}. Put the official {self.files[0].name} there.")
        self.class_names = tuple(sorted(content(f"{top}/wnids.txt").decode("ascii").split()))
        # TOP/train/CLASS/images/CLASS_0.JPEG
        paths = sorted(name for name in there if name.startswith(f"{top}/train/") and name.endswith(".JPEG"))
        train = _in_turn([(path, path.split("/")[2]) for path in paths])
        # FILE, CLASS and the corners of a box
        lines = content(f"{top}/val/val_annotations.txt").decode("ascii").splitlines()
        rows = [line.split("\t") for line in lines if "\t" in line]
        test = [(f"{top}/val/images/{file}", of_class) for file, of_class, *_ in rows]
        if unknown := {of_class for _, of_class in (*train, *test)}.difference(self.class_names):
            text = f"{self.root / top} has images of the class {min(unknown)!r}, which wnids.txt does not name"
            raise ValueError(f"{text}. {self.way_out()}")
        number = {name: k for k, name in enumerate(self.class_names)}
        return Images(*_decoded(train, number, content), *_decoded(test, number, content))


def _in_turn(rows: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Paths and classes: the first of each class, the second of each, and so on."""
    of_each: dict[str, list[tuple[str, str]]] = {}
    for row in rows:
        of_each.setdefault(row[1], []).append(row)
    return [row for turn in zip_longest(*of_each.values()) for row in turn if row is not None]


def _decoded(
    rows: list[tuple[str, str]], number_of: Mapping[str, int], content: Callable[[str], bytes]
) -> tuple[Tensor, Tensor]:
    """Images uint8 (N, 3, 64, 64) and class indices int64 (N,) of paths and classes."""
    images = torch.empty((len(rows), 3, _SIZE, _SIZE), dtype=torch.uint8)

    def read(number: int) -> None:
        with pillow().open(io.BytesIO(content(rows[number][0]))) as image:
            images[number] = decode(image, _SIZE, 3)

    if unread := try_each(read, len(rows)):
        number, reason = next(iter(unread.items()))
        text = f"{len(unread)} of {len(rows)} images cannot be read, the first of them {rows[number][0]} ({reason})"
        raise ValueError(f"{text}. Get the official archive again.")
    return images, torch.tensor([number_of[of_class] for _, of_class in rows], dtype=torch.int64)
