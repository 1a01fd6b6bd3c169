"""A few images in the form of the official files of CIFAR-10, CIFAR-100, SVHN and Tiny-ImageNet."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from mm_lightning.data import CIFAR10DataModule, CIFAR100DataModule, SVHNDataModule, TinyImageNetDataModule
from mm_lightning.data.download import RemoteFile

TRAIN, TEST = 40, 20  # images
KINDS: dict[str, Any] = {
    "cifar10": CIFAR10DataModule,
    "cifar100": CIFAR100DataModule,
    "svhn": SVHNDataModule,
    "tiny_imagenet": TinyImageNetDataModule,
}


def pixels(count: int, seed: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """(N, 3, 32, 32)."""
    return np.random.default_rng(seed).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)


def labels(count: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """0 to 9 in turn, (N,)."""
    return np.arange(count, dtype=np.uint8) % 10


def contents(name: str) -> dict[str, bytes]:
    """The files that the official one holds, by their names in it; of SVHN, the official ones themselves."""
    if name == "cifar10":
        rows = np.concatenate([labels(TRAIN)[:, None], pixels(TRAIN, 0).reshape(TRAIN, -1)], axis=1)
        batches = {f"data_batch_{i + 1}.bin": rows[i * 8 : i * 8 + 8].tobytes() for i in range(5)}
        names = b"airplane\nautomobile\nbird\ncat\ndeer\ndog\nfrog\nhorse\nship\ntruck\n\n"
        test = np.concatenate([labels(TEST)[:, None], pixels(TEST, 1).reshape(TEST, -1)], axis=1).tobytes()
        files = {**batches, "test_batch.bin": test, "batches.meta.txt": names, "readme.html": b"<html>"}
        return {f"cifar-10-batches-bin/{file}": content for file, content in files.items()}
    if name == "cifar100":
        files = {"fine_label_names.txt": "\n".join(f"class{k}" for k in range(100)).encode()}
        for file, count, seed in (("train.bin", TRAIN, 0), ("test.bin", TEST, 1)):
            both = np.stack([labels(count) // 2, labels(count) + 90], axis=1)  # coarse, fine
            files[file] = np.concatenate([both, pixels(count, seed).reshape(count, -1)], axis=1).tobytes()
        return {f"cifar-100-binary/{file}": content for file, content in files.items()}
    if name == "svhn":
        savemat = pytest.importorskip("scipy.io").savemat
        files = {}
        for file, count, seed in (("train_32x32.mat", TRAIN, 0), ("test_32x32.mat", TEST, 1)):
            digits = np.where(labels(count) == 0, 10, labels(count))[:, None]  # 10 is the digit 0
            buffer = io.BytesIO()
            savemat(buffer, {"X": pixels(count, seed).transpose(2, 3, 1, 0), "y": digits}, do_compression=True)
            files[file] = buffer.getvalue()
        return files
    classes = [f"n{k:08}" for k in range(200)]
    files = {"wnids.txt": "\n".join(reversed(classes)).encode(), "words.txt": b"n00000000\tthing"}
    for i, (grey, label) in enumerate(zip(pixels(TRAIN, 0)[:, 0, 0, 0], labels(TRAIN), strict=True)):
        files[f"train/{classes[label]}/images/{classes[label]}_{i}.JPEG"] = jpeg(int(grey), "L" if i == 3 else "RGB")
    lines = []
    for i, (grey, label) in enumerate(zip(pixels(TEST, 1)[:, 0, 0, 0], labels(TEST), strict=True)):
        files[f"val/images/val_{i}.JPEG"] = jpeg(int(grey), "RGB")
        lines.append(f"val_{i}.JPEG\t{classes[label]}\t0\t0\t63\t63")
    files["val/val_annotations.txt"] = "\n".join(lines).encode()
    files["test/images/test_0.JPEG"] = jpeg(0, "RGB")
    return {f"tiny-imagenet-200/{file}": content for file, content in files.items()}


def jpeg(grey: int, mode: str) -> bytes:
    """A grey image, 64 x 64."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (grey, grey, grey)).convert(mode).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def packed(name: str, members: Mapping[str, bytes]) -> dict[str, bytes]:
    """The official files by name."""
    buffer = io.BytesIO()
    if name == "svhn":
        return dict(members)
    if name == "tiny_imagenet":
        with zipfile.ZipFile(buffer, "w") as archive:
            for member, content in members.items():
                archive.writestr(member, content)
        return {"tiny-imagenet-200.zip": buffer.getvalue()}
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for member, content in members.items():
            info = tarfile.TarInfo(member)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return {f"cifar-{name[5:]}-binary.tar.gz": buffer.getvalue()}


def as_official(
    monkeypatch: pytest.MonkeyPatch, name: str, files: Mapping[str, bytes], url: str = "http://nowhere"
) -> None:
    """Take these files for the official ones: their sizes, digests and numbers of images."""
    kind = KINDS[name]
    known = [
        RemoteFile(f"{url}/{file}", len(content), hashlib.sha256(content).hexdigest())
        for file, content in files.items()
    ]
    monkeypatch.setattr(kind, "files", tuple(known))
    monkeypatch.setattr(kind, "num_train", TRAIN)
    monkeypatch.setattr(kind, "num_test", TEST)


def write_official(monkeypatch: pytest.MonkeyPatch, name: str, root: Path) -> Path:
    """Write the official files of a few images into the folder, and take them for the official ones."""
    files = packed(name, contents(name))
    as_official(monkeypatch, name, files)
    root.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        (root / file).write_bytes(content)
    return root


def extract(name: str, root: Path) -> Path:
    """Write the files that the official one holds into the folder."""
    for member, content in contents(name).items():
        (root / member).parent.mkdir(parents=True, exist_ok=True)
        (root / member).write_bytes(content)
    return root


def held(data: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """What a data module has loaded, by split."""
    return {name: tuple(data.split(name)) for name in ("train", "val", "test")}  # type: ignore[misc]
