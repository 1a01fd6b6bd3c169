"""SVHN, cropped digits, from its MATLAB files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mm_lightning.data.download import RemoteFile
from mm_lightning.data.official import Images, OfficialDataModule

__all__ = ["SVHNDataModule"]


class SVHNDataModule(OfficialDataModule):
    """SVHN (Netzer et al., 2011), cropped digits: 73,257 and 26,032 images. See :class:`OfficialDataModule`.

    ``root`` holds ``train_32x32.mat`` and ``test_32x32.mat``; the extra images are not used. Needs scipy.
    """

    # torchvision's prototype has these digests, and its data set the MD5: e26dedcc434d2e4c54c9b2d4a06d8373 and
    # eb5a983be6a315427106f1b164d9cef3
    files = (
        RemoteFile(
            "http://ufldl.stanford.edu/housenumbers/train_32x32.mat",
            182_040_794,
            "435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8",
        ),
        RemoteFile(
            "http://ufldl.stanford.edu/housenumbers/test_32x32.mat",
            64_275_384,
            "cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b",
        ),
    )
    num_train, num_test, num_classes = 73_257, 26_032, 10
    class_names = tuple("0123456789")
    input_shape = (3, 32, 32)
    # of the authors' code: to [-1, 1]
    mean = (0.5, 0.5, 0.5)
    std = (0.5, 0.5, 0.5)

    def require_packages(self) -> None:
        """Raise ImportError where scipy is missing."""
        _loadmat()

    def read(self, folder: Path | None) -> Images:
        """Read both files."""
        train, test = (self.root / file.name for file in self.files)
        return Images(*_read_mat(train), *_read_mat(test))


def _loadmat() -> Callable[..., Any]:
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ImportError("data=svhn needs scipy: pip install mm-lightning[report].") from error
    return loadmat


def _read_mat(path: Path) -> tuple[Tensor, Tensor]:
    loadmat = _loadmat()
    try:
        content = loadmat(path, variable_names=["X", "y"])
        pixels, digits = np.asarray(content["X"], dtype=np.uint8), np.asarray(content["y"], dtype=np.int64)
        images = torch.from_numpy(np.ascontiguousarray(pixels.transpose(3, 2, 0, 1)))  # (H, W, C, N) -> (N, C, H, W)
    except Exception as error:  # whatever scipy meets in a damaged file
        raise ValueError(f"{path} cannot be read ({type(error).__name__}: {error}). Get it again.") from error
    return images, torch.from_numpy(digits.reshape(-1) % 10)  # 10 stands for the digit 0
