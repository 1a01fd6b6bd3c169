"""Where the configuration is that Hydra composes, and what it calls there."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from omegaconf import OmegaConf

from mm_lightning import conf

__all__ = ["CONF", "folder_name"]

CONF = Path(conf.__file__).parent
_LONGEST = 200  # bytes; file systems take 255, and a number stands before it


def folder_name(text: str) -> str:
    """Return a name for one folder that tells the text: of 200 bytes at most, UTF-8, without slashes.

    Nor has it a sign that a shell or a later ``ckpt_path=...`` would have to quote. Of a longer name the beginning is
    left, and eight digits of its SHA-256 that tell it from others. In ``conf/`` it is ``${folder_name:...}``.
    """
    name = re.sub(r"[^\w.+-]+", "_", re.sub(r"[][{}()'\"~]", "", text))
    encoded = name.encode()
    if len(encoded) <= _LONGEST:
        return name
    digest = "_" + hashlib.sha256(encoded).hexdigest()[:8]
    return encoded[: _LONGEST - len(digest)].decode(errors="ignore") + digest


OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)
