"""Two settings that make training on a CPU faster: who computes matrix products, and who keeps freed memory."""

from __future__ import annotations

import ctypes
import math
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

__all__ = ["fast_products", "keep_freed_memory", "products_are_exact"]

# Rows, inner and columns of the products that are tried: a batch forward, its weights' gradient, small and odd ones.
_SHAPES = ((100, 784, 1024), (1024, 100, 784), (64, 64, 64), (33, 257, 10))
_LARGEST_ERROR = 1e-4  # of a product of standard normal numbers, over sqrt(inner): float32 has 1e-6, bfloat16 1e-2

# Options of mallopt(3) in glibc.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4


@contextmanager
def fast_products() -> Iterator[bool]:
    """Let oneDNN compute float32 matrix products on the CPU, where they stay float32 products.

    PyTorch hands float32 products to MKL, which keeps to narrower instructions on processors of other makers, and to
    oneDNN if ``torch.set_float32_matmul_precision("medium")`` allows bfloat16 inside. Whether oneDNN makes use of that
    permission depends on the processor (those with AMX do), so it is tried: if any product is further from float64 than
    float32's rounding explains, everything stays as it was. The order of summation differs, and so the last digits. A
    call takes some 10 us longer, which tells where networks are tiny.

    Yields:
        Whether oneDNN computes the products in the ``with`` block. False as well where the precision was not
        ``"highest"`` already, which is then the user's choice.
    """
    if not hasattr(torch.backends.mkldnn, "matmul"):
        warnings.warn(
            f"fast_cpu needs torch >= 2.9 for faster matrix products, and this is {torch.__version__}: they are "
            "computed as without it.",
            stacklevel=3,
        )
        yield False
        return
    if _chosen_precision() != "highest":
        yield False
        return
    backends: list[Any] = [torch.backends.mkldnn.matmul, torch.backends.cuda.matmul]
    before = [backend.fp32_precision for backend in backends]

    def put_back() -> None:
        torch.set_float32_matmul_precision("highest")
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision

    torch.set_float32_matmul_precision("medium")
    try:
        is_exact = products_are_exact()
        if not is_exact:
            put_back()
        yield is_exact
    finally:
        put_back()


def _chosen_precision() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # set by the newer functions, which the older one cannot express
        return "mixed"


def products_are_exact() -> bool:
    """Whether float32 matrix products on the CPU are within float32's rounding of float64 ones, as set now."""
    generator = torch.Generator().manual_seed(0)
    for rows, inner, columns in _SHAPES:
        left = torch.randn(rows, inner, generator=generator)
        right = torch.randn(inner, columns, generator=generator)
        exact = left.double() @ right.double()
        found = [left @ right, F.linear(left, right.t(), torch.zeros(columns)), torch.bmm(left[None], right[None])[0]]
        if any((one.double() - exact).abs().max() > _LARGEST_ERROR * math.sqrt(inner) for one in found):
            return False
    return True


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, for the rest of its life.

    glibc gives large blocks back to the system as they are freed, and the next step pays for every page of its
    activations again: it is cleared and mapped at the first touch. The peak of a training's memory grows by some 5 %.

    Returns:
        Whether the C library is one that can be told so (glibc).
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl
        return False
    # Large blocks from the heap, which grows in steps of 64 MiB and never shrinks.
    return all([mallopt(_MMAP_MAX, 0), mallopt(_TOP_PAD, 64 << 20), mallopt(_TRIM_THRESHOLD, -1)])
