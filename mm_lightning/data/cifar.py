"""CIFAR-10 and CIFAR-100, from the binary version of their archives, which needs no pickle."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from mm_lightning.data.archives import read_tar
from mm_lightning.data.download import RemoteFile
from mm_lightning.data.official import Images, OfficialDataModule

__all__ = ["CIFAR10DataModule", "CIFAR100DataModule"]

_SHAPE = (3, 32, 32)
_PIXELS = 3 * 32 * 32


class _CIFARDataModule(OfficialDataModule):
    """An image is its labels, one byte each, of which the last is the class, and 3,072 bytes (3, 32, 32)."""

    input_shape = _SHAPE
    extracted: ClassVar[str]
    train_files: ClassVar[tuple[str, ...]]
    test_file: ClassVar[str]
    names_file: ClassVar[str]  # names of the classes, one a line
    num_labels: ClassVar[int]  # of an image

    def read(self, folder: Path | None) -> Images:
        """Read the archive's files, or the extracted ones."""
        wanted = [*self.train_files, self.test_file, self.names_file]
        if folder is None:
            members = read_tar(self.root / self.files[0].name, [f"{self.extracted}/{name}" for name in wanted])
            contents = {name: members[f"{self.extracted}/{name}"] for name in wanted}
        else:
            if missing := [name for name in wanted if not (folder / name).is_file()]:
                raise ValueError(f"{folder} holds no {missing[0]}. {self.way_out()}")
            contents = {name: (folder / name).read_bytes() for name in wanted}
        self.class_names = tuple(contents[self.names_file].decode("ascii").split())
        # file by file: one that is cut within an image would shift all that follows
        images, labels = zip(*(self._parsed(name, contents[name]) for name in self.train_files), strict=True)
        return Images(torch.cat(images), torch.cat(labels), *self._parsed(self.test_file, contents[self.test_file]))

    def _parsed(self, name: str, content: bytes) -> tuple[Tensor, Tensor]:
        record = self.num_labels + _PIXELS
        if not content or len(content) % record:
            text = f"{name} holds {len(content):,} bytes, which are no whole images of {record:,}"
            raise ValueError(f"{self.root / self.extracted}: {text}. {self.way_out()}")
        rows = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, record)
        return rows[:, self.num_labels :].reshape(-1, *_SHAPE), rows[:, self.num_labels - 1].long()


class CIFAR10DataModule(_CIFARDataModule):
    """CIFAR-10 (Krizhevsky, 2009): 50,000 and 10,000 images of 10 classes. See :class:`OfficialDataModule`.

    ``root`` holds ``cifar-10-binary.tar.gz`` or ``cifar-10-batches-bin/``.
    """

    # several projects pin this digest, MLDatasets.jl and GoMLX among them; the home page gives the MD5,
    # c32a1d4ab5d03f1284b67883e8d87530
    files = (
        RemoteFile(
            "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
            170_052_171,
            "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        ),
    )
    extracted = "cifar-10-batches-bin"
    train_files = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
    test_file = "test_batch.bin"
    names_file = "batches.meta.txt"
    num_labels = 1
    num_train, num_test, num_classes = 50_000, 10_000, 10
    # of the authors' code: of the training images, in units of 255
    mean = (125.3 / 255, 123.0 / 255, 113.9 / 255)
    std = (63.0 / 255, 62.1 / 255, 66.7 / 255)


class CIFAR100DataModule(_CIFARDataModule):
    """CIFAR-100 (Krizhevsky, 2009): 50,000 and 10,000 images of 100 classes. See :class:`OfficialDataModule`.

    ``root`` holds ``cifar-100-binary.tar.gz`` or ``cifar-100-binary/``. The label is the fine one.
    """

    # several projects pin this digest, MLDatasets.jl and GoMLX among them; the home page gives the MD5,
    # 03b5dce01913d631647c71ecec9e9cb8
    files = (
        RemoteFile(
            "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
            168_513_733,
            "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
        ),
    )
    extracted = "cifar-100-binary"
    train_files = ("train.bin",)
    test_file = "test.bin"
    names_file = "fine_label_names.txt"
    num_labels = 2  # the coarse one, and the fine one
    num_train, num_test, num_classes = 50_000, 10_000, 100
    # of the authors' code: of the training images, in units of 255
    mean = (129.3 / 255, 124.1 / 255, 112.4 / 255)
    std = (68.2 / 255, 65.4 / 255, 70.4 / 255)
