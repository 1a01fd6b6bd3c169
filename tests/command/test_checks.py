"""What is refused before anything is made of a configuration, in which words."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import hydra
import pytest
import torch
from omegaconf import DictConfig

from mm_lightning.command import checks
from mm_lightning.command.checks import check_config, check_devices
from mm_lightning.command.configuration import CONF
from mm_lightning.study.epochs import one_number_of_epochs

Compose = Callable[..., DictConfig]


@pytest.fixture
def compose(tmp_path: Path) -> Iterator[Compose]:
    def compose(*overrides: str) -> DictConfig:
        config = hydra.compose("train", [*overrides, f"run_dir={tmp_path}"])
        one_number_of_epochs(config, overrides)
        return config

    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        yield compose


NO_END = "max_epochs must be an integer >= 1, or -1 for no end, got {}. Set max_epochs=10, say."
ALONG = (
    "scheduler=cosine falls to zero over max_epochs, which is {} here. Set max_epochs=10, say, or choose "
    "scheduler=step or scheduler=constant."
)
PATH = "must be the dotted path of a class or a function, got"


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["max_epochs=0"], NO_END.format("0")),
        (["max_epochs=-2"], NO_END.format("-2")),
        (["max_epochs=1.5"], NO_END.format("1.5")),
        (["max_epochs=many"], NO_END.format("'many'")),
        (["max_epochs=true"], NO_END.format("True")),
        (["trainer.max_epochs=0"], NO_END.format("0")),
        (["max_epochs=0", "trainer=smoke"], NO_END.format("0")),
        (["max_epochs=-1", "scheduler=cosine"], ALONG.format("-1")),
        (["max_epochs=null", "scheduler=cosine", "+trainer.max_steps=9"], ALONG.format("null")),
        (
            ["max_epochs=null"],
            "max_epochs is null, and trainer.max_steps sets no end either. Set max_epochs=10, say.",
        ),
        (["+trainer.max_steps=0"], "trainer.max_steps must be an integer >= 1, or -1 for no limit, got 0."),
        (["+trainer.max_steps=9.5"], "trainer.max_steps must be an integer >= 1, or -1 for no limit, got 9.5."),
        (["scheduler=cosine", "scheduler.T_max=0"], "scheduler.T_max must be an integer >= 1, in epochs, got 0."),
        (["optimizer.lr=fast"], "optimizer.lr must be a number, got 'fast' of type str."),
        (["optimizer.lr=null"], "optimizer.lr must be a number, got null."),
        (["optimizer.lr=true"], "optimizer.lr must be a number, got True of type bool."),
        (["optimizer.lr=[0.1]"], "optimizer.lr must be a number, got [0.1] of type list."),
        (["optimizer.fused=maybe"], "optimizer.fused must be true or false or null, got 'maybe' of type str."),
        (["scheduler.step_size=2.5"], "scheduler.step_size must be an integer, got 2.5 of type float."),
        (["model.blocks.sizes=784"], "model.blocks.sizes must be a list of integers or null, got 784 of type int."),
        (
            ["model.blocks.sizes=[4,x]"],
            "model.blocks.sizes must be a list of integers or null, got [4, 'x'] of type list.",
        ),
        (["model.blocks.negative_slope=x"], "model.blocks.negative_slope must be a number, got 'x' of type str."),
        (["trainer.gradient_clip_val=x"], "trainer.gradient_clip_val must be a number or null, got 'x' of type str."),
        (
            ["logger.tensorboard.name=[1]"],
            "logger.tensorboard.name must be a text or null, got [1] of type list.",
        ),
        (
            ["callbacks.checkpoint.save_last=maybe"],
            "callbacks.checkpoint.save_last must be true or false, got 'maybe' of type str.",
        ),
        (
            ["optimizer=sgd", "+optimizer.nesterv=true"],
            "optimizer.nesterv: torch.optim.SGD has no such argument. Did you mean 'nesterov'?",
        ),
        (
            ["+model.blocks.depth=3"],
            "model.blocks.depth: mm_lightning.models.mlp_blocks has no such argument. It takes sizes, mix_before, "
            "negative_slope, dropout, input_shape, num_classes.",
        ),
        (
            ["model._target_=mm_lightning.MixabelModule"],
            "model._target_: there is no 'mm_lightning.MixabelModule'. Did you mean 'mm_lightning.MixableModule'?",
        ),
        (
            ["model._target_=mm_lightnig.MixableModule"],
            "model._target_: there is no 'mm_lightnig.MixableModule'. Did you mean 'mm_lightning.MixableModule'?",
        ),
        (
            ["model._target_=MixableModule"],
            "model._target_: there is no 'MixableModule'. Did you mean 'mm_lightning.MixableModule'?",
        ),
        (
            ["model._target_=mm_lightning.modlue.MixableModule"],
            "model._target_: there is no 'mm_lightning.modlue.MixableModule'. Did you mean "
            "'mm_lightning.module.MixableModule'?",
        ),
        (
            ["model._target_=mm_lightning.Module"],  # mm_lightning.module is nearer, and no class
            "model._target_: there is no 'mm_lightning.Module'. Did you mean 'mm_lightning.MixableModule'?",
        ),
        (
            ["model._target_=mm_lightning.zzz.Net"],
            "model._target_: there is no 'mm_lightning.zzz.Net'. 'mm_lightning' has no 'zzz': name a class or a "
            "function with its modules.",
        ),
        (
            ["model._target_=Nett"],
            "model._target_: there is no 'Nett'. Python cannot import 'Nett': name a class or a function with its "
            "modules.",
        ),
        (
            ["model._target_=rings.Net"],  # not Python's warnings
            "model._target_: there is no 'rings.Net'. Python cannot import 'rings': set PYTHONPATH to the folder that "
            "it is in.",
        ),
        (
            ["model.blocks._target_=mm_lightning.models.mlp_block"],
            "model.blocks._target_: there is no 'mm_lightning.models.mlp_block'. Did you mean "
            "'mm_lightning.models.mlp_blocks'?",
        ),
        (
            ["optimizer._target_=torch.optim.Admm"],
            "optimizer._target_: there is no 'torch.optim.Admm'. Did you mean 'torch.optim.Adam'?",
        ),
        (["model._target_=mm_lightning.models"], f"model._target_ {PATH} 'mm_lightning.models', which is neither."),
        (["model._target_=5"], f"model._target_ {PATH} 5."),
        (
            ["trainer=gpu"],
            f"trainer.accelerator is 'gpu', but torch {torch.__version__} finds no GPU here. Choose trainer=cpu, or "
            "install the driver and a torch that is built for it.",
        ),
        (
            ["trainer.accelerator=cuda"],
            f"trainer.accelerator is 'cuda', but torch {torch.__version__} finds no GPU here. Choose trainer=cpu, or "
            "install the driver and a torch that is built for it.",
        ),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
def test_mistake_is_named_with_its_key(
    overrides: list[str],
    line: str,
    compose: Compose,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for accelerator in (checks.CUDAAccelerator, checks.MPSAccelerator):
        monkeypatch.setattr(accelerator, "is_available", lambda: False)
    config = compose(*overrides)
    with caplog.at_level(logging.WARNING), pytest.raises((ValueError, TypeError)) as refused:
        _check(config)
    assert str(refused.value) == line
    assert caplog.messages == []


def test_a_misspelt_module_of_ones_own_is_found_in_the_folder(
    compose: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my_networks.py").touch()
    with pytest.raises(ValueError, match=r"there is no 'my_network\.Net'\. Did you mean 'my_networks\.Net'\?"):
        check_config(compose("model=own", "model._target_=my_network.Net"))


@pytest.mark.parametrize("got", ["null", "[]", "5", "abc", "['a']", "[2.5, 7]", "[-1, 2]", "[0]", "[True]"])
def test_milestones_must_be_epochs(got: str, compose: Compose) -> None:
    way_out = (
        "Give scheduler.milestones=[100,150], say, or +epochs=field_200, which sets max_epochs with them; "
        "scheduler=constant has none."
    )
    shown = repr(got) if got == "abc" else got
    with pytest.raises(ValueError, match="milestones") as raised:
        check_config(compose("scheduler=milestones", f"scheduler.milestones={got.replace(' ', '')}"))
    assert str(raised.value) == f"scheduler.milestones must be a list of epochs >= 1, got {shown}. {way_out}"


@pytest.mark.parametrize("devices", [2, 3])
def test_more_gpus_than_there_are_name_how_many(
    devices: int, compose: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    config = compose("trainer=ddp", f"trainer.devices={devices}")
    if devices == 2:
        check_devices(config)
        return
    with pytest.raises(ValueError, match=r"^trainer\.devices") as refused:
        check_devices(config)
    assert str(refused.value) == (
        "trainer.devices is 3, but torch finds 2 GPUs. Set trainer.devices=2, or trainer.accelerator=cpu for processes "
        "on the CPU."
    )


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["max_epochs=-1"],
        ["max_epochs=null", "+trainer.max_steps=9"],
        ["max_epochs=1", "scheduler=cosine", "+trainer.max_steps=-1"],
        ["optimizer.lr=1"],
        ["optimizer=sgd", "+optimizer.nesterov=true"],
        ["trainer.devices=auto"],
        ["trainer.devices=[0]"],
        ["trainer.precision=16-mixed"],
        ["trainer.precision=16"],
        ["+trainer.limit_train_batches=0.5"],
        ["+trainer.val_check_interval=0.25"],
        ["+model.blocks.dropout=[0,0.5]"],
        ["logger.tensorboard.version=3"],
        ["callbacks=last"],
        ["diagnostics=[hidden_space,confidence_map,calibration,spectrum,mixup_monitor]"],
        ["mixup.alpha=x"],  # which the callback refuses, and says more
        ["data.root=???"],
    ],
    ids="_".join,
)
def test_what_targets_take_passes(overrides: list[str], compose: Compose) -> None:
    check_config(compose(*overrides))


def test_a_target_that_cannot_be_imported_says_what_is_missing(
    compose: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_module.py").write_text("import not_installed_here\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ImportError, match="my_module") as refused:
        check_config(compose("model._target_=my_module.Net"))
    assert str(refused.value) == (
        "model._target_: 'my_module' cannot be imported: No module named 'not_installed_here'."
    )


@pytest.mark.parametrize(
    ("overrides", "epochs"),
    [
        (["trainer=smoke"], 1),
        (["trainer=smoke", "max_epochs=3"], 3),
        (["max_epochs=3", "trainer=smoke"], 3),
        (["trainer.max_epochs=2"], 2),
        (["trainer.max_epochs=2", "max_epochs=2"], 2),
        (["+experiment=mnist_bottleneck", "trainer=smoke"], 1),
        (["+experiment=mnist_bottleneck", "trainer=smoke", "++max_epochs=2"], 2),
        (["+experiment=mnist_bottleneck"], 14),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else str(value),
)
def test_there_is_one_number_of_epochs(overrides: list[str], epochs: int, compose: Compose) -> None:
    config = compose(*overrides, "scheduler=cosine", "callbacks=last")
    found = config.max_epochs, config.trainer.max_epochs, config.scheduler.T_max
    assert (*found, config.callbacks.checkpoint.every_n_epochs) == (epochs,) * 4


def test_two_numbers_of_epochs_are_refused(compose: Compose) -> None:
    line = r"^max_epochs is 3 and trainer\.max_epochs is 2\. Say max_epochs alone\.$"
    with pytest.raises(ValueError, match=line):
        compose("max_epochs=3", "trainer.max_epochs=2")


def _check(config: DictConfig) -> None:
    check_config(config)
    check_devices(config)
