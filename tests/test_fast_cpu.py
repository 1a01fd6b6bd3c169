"""Float32 products stay float32 products, and settings are put back."""

from __future__ import annotations

import re
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from hydra import compose, initialize_config_dir
from versions import has_onednn

from mm_lightning import fast_cpu
from mm_lightning.command import train
from mm_lightning.command.configuration import CONF


@pytest.fixture
def precision():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("precision")
def test_products_within_the_block_have_the_error_of_float32() -> None:
    generator = torch.Generator().manual_seed(3)
    left, right = (torch.randn(shape, generator=generator) for shape in ((64, 500), (500, 70)))
    with fast_cpu.fast_products():
        product = left @ right
    exact = left.double() @ right.double()
    # 500 terms of size one: rounded to 24 bits the sum is within 1e-4, with factors of 8 bits it would be 0.1 off.
    assert (product.double() - exact).abs().max() < 1e-4


@pytest.mark.usefixtures("precision")
def test_a_torch_without_the_setting_computes_as_always_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends, "mkldnn", SimpleNamespace())
    said = rf"fast_cpu needs torch >= 2\.9 for faster matrix products, and this is {re.escape(torch.__version__)}: they"
    with ExitStack() as stack:
        with pytest.warns(UserWarning, match=said):
            assert not stack.enter_context(fast_cpu.fast_products())
        assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.usefixtures("precision")
def test_setting_is_put_back_after_an_exception() -> None:
    with pytest.raises(KeyError), fast_cpu.fast_products():
        raise KeyError
    assert torch.get_float32_matmul_precision() == "highest"


@has_onednn
@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize("exact", [False, True], ids=["rounded", "exact"])
def test_setting_is_switched_on_where_products_stay_exact(monkeypatch: pytest.MonkeyPatch, exact: bool) -> None:
    asked = []

    def products_are_exact() -> bool:
        asked.append(torch.get_float32_matmul_precision())
        return exact

    monkeypatch.setattr(fast_cpu, "products_are_exact", products_are_exact)
    backends = (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)
    before = [backend.fp32_precision for backend in backends]
    with fast_cpu.fast_products() as is_on:
        assert is_on is exact
        assert torch.get_float32_matmul_precision() == ("medium" if exact else "highest")
    assert asked == ["medium"]
    assert torch.get_float32_matmul_precision() == "highest"
    assert [backend.fp32_precision for backend in backends] == before


@has_onednn
@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("wanted", [True, False], ids=["fast", "plain"])
def test_command_trains_and_tests_with_it_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, device: str, wanted: bool
) -> None:
    class Trainer:
        strategy = SimpleNamespace(root_device=torch.device(device))
        callback_metrics: ClassVar[dict[str, Any]] = {}
        is_global_zero = interrupted = False
        precision = "32-true"
        loggers: ClassVar[list[Any]] = []

        def fit(self, *args: Any, **kwargs: Any) -> None:
            seen.append(torch.get_float32_matmul_precision())

        test = fit

    seen: list[str] = []
    kept: list[bool] = []
    monkeypatch.setattr(fast_cpu, "products_are_exact", lambda: True)
    monkeypatch.setattr(train, "keep_freed_memory", lambda: kept.append(True))
    monkeypatch.setattr(train, "build_trainer", lambda config, extra: Trainer())
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", [f"run_dir={tmp_path}/run", "data.limit=10", f"fast_cpu={str(wanted).lower()}"])
    train.run(config)
    is_on = wanted and device == "cpu"
    assert seen == ["medium" if is_on else "highest"] * 2
    assert kept == [True] * is_on
    assert torch.get_float32_matmul_precision() == "highest"


def test_command_refuses_what_is_neither_true_nor_false(tmp_path: Path) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", [f"run_dir={tmp_path}/run", "fast_cpu=maybe"])
    with pytest.raises(ValueError, match="fast_cpu must be true or false, got 'maybe'"):
        train.run(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("precision")
def test_products_of_eight_bits_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    matmul = torch.Tensor.__matmul__

    def rounded(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        if left.dtype == torch.float32 and torch.get_float32_matmul_precision() == "medium":
            return matmul(left.bfloat16().float(), right.bfloat16().float())  # as processors with AMX do
        return matmul(left, right)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    with fast_cpu.fast_products() as is_on:
        assert not is_on
        assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.usefixtures("precision")
def test_a_precision_that_the_user_chose_stays() -> None:
    torch.set_float32_matmul_precision("high")
    with fast_cpu.fast_products() as is_on:
        assert not is_on
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == "high"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="page faults are counted by Linux's resource module")
def test_freed_memory_is_not_paid_for_again() -> None:
    script = """
import resource, sys, torch
from mm_lightning.fast_cpu import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    print("no glibc"); raise SystemExit
for step in range(30):
    if step == 20:  # glibc finds its places within the first ten
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2 ** 24)  # 64 MiB, freed at once
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    faults = {}
    for mode in ("leave", "keep"):
        done = subprocess.run([sys.executable, "-c", script, mode], capture_output=True, text=True, check=True)
        faults[mode] = done.stdout.strip()
    if faults["keep"] == "no glibc":
        pytest.skip("the C library is not glibc")
    assert int(faults["keep"]) < 10
    assert int(faults["leave"]) >= 10 * 32  # in each of the ten steps all 32 pages of 2 MiB, or 16,384 of 4 KiB
