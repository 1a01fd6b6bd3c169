"""The common base of the diagnostics, with one that only keeps what it is handed."""

import inspect
import io
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from warnings import catch_warnings, simplefilter

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import CombinedLoader
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset
from versions import WeightAveraging, answers, averages

from mm_lightning import ManifoldMixupCallback
from mm_lightning.data.tensor_data_module import TensorDataModule
from mm_lightning.diagnostics import Calibration, ConfidenceMap, HiddenSpace, Spectrum
from mm_lightning.diagnostics.diagnostic import Diagnostic, Findings, Rows
from mm_lightning.diagnostics.occasions import is_last_validation
from mm_lightning.diagnostics.training_rows import overhear_training

MakeTrainer = Callable[..., pl.Trainer]

_GENERATOR = torch.Generator().manual_seed(7)
INPUTS = torch.randn(24, 4, generator=_GENERATOR)
TARGETS = torch.arange(24) % 3


class Spy(Diagnostic):
    """Keeps the rows of each look."""

    def __init__(self, layers: tuple[str, ...] = ("body",), name: str = "spy", **settings: Any) -> None:
        super().__init__(name, layers, **settings)
        self.seen: list[Rows] = []

    def measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule, rows: Rows) -> Findings | str:
        self.seen.append(rows)
        hidden = rows.hidden[self.layers[0]].float()
        return Findings({"power": hidden.square().mean().item()}, {"hidden": hidden.numpy()})

    def draw(self, findings: Findings, rows: Rows) -> Figure:
        return Figure(figsize=(1, 1), dpi=50)

    @property
    def splits(self) -> list[str]:
        return [rows.split for rows in self.seen]


class Net(pl.LightningModule):
    """4-6-3 with what behaves differently in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5))
        self.head = nn.Linear(6, 3)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / 2
        self.validated: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", F.cross_entropy(self(batch[0]), batch[1]))
        self.validated.append(self.trainer.global_step)

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def states(self, inputs: Tensor = INPUTS) -> Tensor:
        """The body's output in evaluation mode, the module left as it was."""
        linear, norm = self.body[0], self.body[1]
        with torch.no_grad():
            hidden = inputs.to(linear.weight) @ linear.weight.T + linear.bias
            centred = (hidden - norm.running_mean) / (norm.running_var + norm.eps).sqrt()
            return centred * norm.weight + norm.bias


def loader(rows: int = 24, **settings: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(INPUTS[:rows], TARGETS[:rows]), **{"batch_size": 8, **settings})


# the training data


@pytest.mark.parametrize(("points", "rows"), [(10, 10), (100, 24)], ids=["cut", "all"])
@pytest.mark.parametrize("mixed", [False, True], ids=["plain", "with mixup"])
def test_training_rows_are_those_of_the_trained_module(
    make_trainer: MakeTrainer, points: int, rows: int, mixed: bool
) -> None:
    net, spy = Net(), Spy(("body", "input", "output"), train_points=points)
    mixup = [ManifoldMixupCallback(alpha=1.0, layers=["input", "body"], seed=0, schedule=None)] if mixed else []
    make_trainer(spy, *mixup, max_epochs=2).fit(net, loader())
    assert spy.splits == ["train"]
    seen = spy.seen[0]
    assert seen.occasion == "training set"
    assert torch.equal(seen.targets, TARGETS[:rows])
    assert_close(seen.hidden["input"], INPUTS[:rows])
    want = net.states(INPUTS[:rows])
    assert_close(seen.hidden["body"], want)
    assert_close(seen.hidden["output"], net.head(want).detach())


def test_training_numbers_and_pictures_reach_loggers_and_files(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    loggers = [TensorBoardLogger(tmp_path, "tb"), CSVLogger(tmp_path, "csv")]
    net, spy = Net(), Spy(train_points=100)
    trainer = make_trainer(spy, max_epochs=2, logger=loggers)
    trainer.fit(net, loader())
    want = float(net.states().square().mean())
    assert float(trainer.callback_metrics["train/spy/power"]) == pytest.approx(want, rel=1e-5)
    events = EventAccumulator(loggers[0].log_dir).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/spy/power")] == [
        (6, pytest.approx(want, rel=1e-5))
    ]
    assert [image.step for image in events.Images("spy/train")] == [6]
    with Image.open(io.BytesIO(events.Images("spy/train")[0].encoded_image_string)) as image:
        assert image.size == (50, 50)
    lines = (Path(loggers[1].log_dir) / "metrics.csv").read_text().splitlines()
    assert "train/spy/power" in lines[0]
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"spy_train.png", "spy_train.npz"}
    with np.load(tmp_path / "figures" / "spy_train.npz") as arrays:
        assert_close(arrays["hidden"], net.states().numpy())


@pytest.mark.parametrize("own", [True, False], ids=["own generator", "global generator"])
def test_a_pass_over_training_data_leaves_no_trace(make_trainer: MakeTrainer, own: bool) -> None:
    results = []
    for points in (0, 20):
        net, generator = Net(), torch.Generator().manual_seed(4)
        net.body[0].eval()  # as of a frozen part
        torch.manual_seed(9)
        with catch_warnings():
            simplefilter("ignore", UserWarning)  # of the part in eval mode
            make_trainer(Spy(train_points=points), max_epochs=2).fit(
                net, loader(shuffle=True, generator=generator if own else None)
            )
        assert [name for name, one in net.named_modules() if not one.training] == ["body.0"]
        assert not any(one._forward_hooks or one._forward_pre_hooks for one in net.modules())
        results.append((net.state_dict(), torch.get_rng_state(), generator.get_state()))
    assert_close(results[0], results[1], rtol=0, atol=0)


def test_shuffled_training_rows_keep_their_targets(make_trainer: MakeTrainer) -> None:
    spy = Spy(("input",), train_points=10)
    make_trainer(spy).fit(Net(), loader(shuffle=True))
    hidden, targets = spy.seen[0].hidden["input"], spy.seen[0].targets
    places = [int((row == INPUTS).all(dim=1).nonzero()) for row in hidden]
    assert len(set(places)) == 10
    assert places != list(range(10))
    assert torch.equal(targets, TARGETS[places])


class _Dicts(Net):
    """Takes batches that are dicts."""

    def forward(self, batch: Any) -> Tensor:
        return super().forward(batch["x"] if isinstance(batch, dict) else batch)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch["x"]), batch["y"])


@pytest.mark.parametrize("keys", ["xy", "yx"])
def test_batches_may_be_dicts(make_trainer: MakeTrainer, keys: str) -> None:
    columns = {"x": INPUTS, "y": TARGETS}
    data = [{key: columns[key][i] for key in keys} for i in range(24)]
    net = _Dicts()
    # the first entry is handed to forward; where that is not the inputs, the caller says how to run the module
    spy = Spy(train_points=12, forward=None if keys == "xy" else lambda module, batch: module(batch))
    make_trainer(spy).fit(net, DataLoader(data, batch_size=8))
    assert_close(spy.seen[0].hidden["body"], net.states(INPUTS[:12]))
    assert torch.equal(spy.seen[0].targets, TARGETS[:12])


def test_a_batch_that_forward_does_not_take_is_explained(make_trainer: MakeTrainer) -> None:
    data = [{"y": TARGETS[i], "x": INPUTS[i]} for i in range(24)]
    message = r"_Dicts did not run on the first entry of a batch \(.*\)\. Pass f"
    with pytest.raises(RuntimeError, match=message):
        make_trainer(Spy(train_points=12)).fit(_Dicts(), DataLoader(data, batch_size=8))


@pytest.mark.parametrize(
    ("precision", "dtype", "error"), [("bf16-mixed", torch.bfloat16, 0.02), ("64-true", torch.float64, 1e-12)]
)
def test_training_rows_follow_the_precision(
    make_trainer: MakeTrainer, precision: str, dtype: torch.dtype, error: float
) -> None:
    net, spy = Net(), Spy(("head", "input"), train_points=12)
    make_trainer(spy, precision=precision).fit(net, loader())
    assert spy.seen[0].hidden["head"].dtype == dtype
    assert spy.seen[0].hidden["input"].dtype == (torch.float64 if precision == "64-true" else torch.float32)
    want = net.head(net.states(INPUTS[:12])).detach()
    assert_close(spy.seen[0].hidden["head"], want.to(dtype), rtol=error, atol=error)


class _Data(TensorDataModule):
    def load_splits(self) -> dict[str, tuple[Tensor, Tensor]]:
        return dict.fromkeys(("train", "val", "test"), (INPUTS, TARGETS))


@pytest.mark.parametrize("limits", [{"max_epochs": 2}, {"max_steps": 4}], ids=["epoch's end", "mid-epoch"])
def test_loaders_that_continue_where_training_stopped_begin_anew(
    make_trainer: MakeTrainer, limits: dict[str, int]
) -> None:
    net, spy = Net(), Spy(("input",), train_points=100, max_points=1)
    make_trainer(spy, limit_val_batches=0, **{"max_epochs": -1, **limits}).fit(net, _Data(8, 8, 0))
    hidden = spy.seen[-1].hidden["input"]
    assert_close(hidden[hidden[:, 0].argsort()], INPUTS[INPUTS[:, 0].argsort()])


@pytest.mark.parametrize(
    ("settings", "rows"),
    [({"limit_train_batches": 2}, 16), ({"limit_train_batches": 0}, 0), ({"overfit_batches": 1}, 8)],
    ids=["two", "none", "overfit"],
)
def test_no_more_batches_than_an_epoch_has(make_trainer: MakeTrainer, settings: dict[str, int], rows: int) -> None:
    spy = Spy(train_points=100)
    make_trainer(spy, limit_val_batches=0, **settings).fit(Net(), loader())
    assert sum(len(seen.targets) for seen in spy.seen) == rows


def test_iterable_data_without_length(make_trainer: MakeTrainer) -> None:
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return iter(zip(INPUTS, TARGETS, strict=True))

    net, spy = Net(), Spy(train_points=100)
    make_trainer(spy).fit(net, DataLoader(Stream(), batch_size=8))
    assert_close(spy.seen[0].hidden["body"], net.states())


def test_data_that_can_be_read_only_once_are_warned_about(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    class Once:
        def __init__(self) -> None:
            self.batches = iter([(INPUTS[:8], TARGETS[:8]), (INPUTS[8:16], TARGETS[8:16])])

        def __iter__(self) -> Any:
            return self.batches

    with pytest.warns(UserWarning, match="Spy neither draws nor logs the training set: no rows were seen"):
        make_trainer(Spy(train_points=100)).fit(Net(), Once())
    assert not (tmp_path / "figures").exists()


@pytest.mark.parametrize("combined", [False, True], ids=["dict", "combined loader"])
def test_several_training_loaders_give_their_batches_together(make_trainer: MakeTrainer, combined: bool) -> None:
    class Pairs(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch["a"], 0) + super().training_step(batch["b"], 0)

    loaders: Any = {"a": loader(), "b": loader(16)}
    loaders = CombinedLoader(loaders, "max_size_cycle") if combined else loaders
    net, spy = Pairs(), Spy(train_points=100, forward=lambda module, batch: module(batch["a"][0]))
    make_trainer(spy).fit(net, loaders)
    assert_close(spy.seen[0].hidden["body"], net.states(INPUTS[:16]))  # as many as both have


@pytest.mark.parametrize("by_data", [False, True], ids=["module", "datamodule"])
def test_batch_hooks_run_as_in_validation(make_trainer: MakeTrainer, by_data: bool) -> None:
    class Hooks:
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [batch[0] + 1, batch[1]]

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [batch[0] + 100, batch[1]] if self.trainer.training else batch  # an augmentation

    class Hooked(Hooks, Net):
        pass

    class Data(Hooks, pl.LightningDataModule):
        def train_dataloader(self) -> Any:
            return loader()

    net, spy = Net() if by_data else Hooked(), Spy(("input",), train_points=100)
    trainer = make_trainer(spy)
    trainer.fit(net, Data() if by_data else loader())
    assert_close(spy.seen[0].hidden["input"], INPUTS + 1)


def test_the_trainer_trains_again_after_the_pass(make_trainer: MakeTrainer) -> None:
    class Stage(pl.Callback):
        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.is_training = trainer.training

    stage, spy = Stage(), Spy(train_points=100)
    make_trainer(spy, stage).fit(Net(), loader())
    assert stage.is_training
    assert spy.splits == ["train"]


def test_early_stop_still_looks_at_the_training_data(make_trainer: MakeTrainer) -> None:
    spy = Spy(train_points=100, every_n_epochs=100)
    stop = EarlyStopping("loss", patience=1, min_delta=100, check_on_train_epoch_end=False)
    trainer = make_trainer(spy, stop, max_epochs=50)
    trainer.fit(Net(), loader(), loader())
    assert trainer.current_epoch == 2
    assert spy.splits == ["train"]


@averages
def test_averaged_weights_are_looked_at_where_the_averaging_stands_before(make_trainer: MakeTrainer) -> None:
    net, spy = Net(), Spy(train_points=100)
    make_trainer(WeightAveraging(), spy, max_epochs=2).fit(net, loader())
    assert_close(spy.seen[0].hidden["body"], net.states())


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()], ids=["exception", "ctrl-c"])
def test_an_interrupted_training_is_not_looked_at(
    make_trainer: MakeTrainer, tmp_path: Path, error: BaseException
) -> None:
    class Stops(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            if args[-1] == 1:
                raise error

    spy = Spy(train_points=100)
    with answers(type(error), match=r"boom|1"):
        make_trainer(spy, Stops(), max_epochs=2).fit(Net(), loader(), loader())
    assert spy.seen == []
    assert not (tmp_path / "figures").exists()


def test_a_pass_that_fails_leaves_no_hook_and_the_modes(make_trainer: MakeTrainer) -> None:
    def fail(module: pl.LightningModule, batch: Any) -> None:
        raise RuntimeError("boom")

    net = Net()
    with pytest.raises(RuntimeError, match="boom"):
        make_trainer(Spy(train_points=100, forward=fail)).fit(net, loader())
    assert all(one.training for one in net.modules())
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in net.modules())


def test_rows_stop_the_pass_when_there_are_enough() -> None:
    ran = []
    trainer = SimpleNamespace(
        train_dataloader=loader(),
        num_training_batches=math.inf,
        state=SimpleNamespace(stage="fit"),
        precision_plugin=pl.plugins.precision.Precision(),
        datamodule=None,
        strategy=SimpleNamespace(batch_to_device=lambda batch: batch),
    )
    spy = Spy(("input",), train_points=9)

    def forward(module: pl.LightningModule, batch: Any) -> None:
        assert not torch.is_grad_enabled()
        ran.append(len(batch[0]))

    overhear_training(trainer, Net(), spy._train_states, forward)
    assert ran == [8, 8]
    assert trainer.validating
    assert trainer.state.stage == "fit"


# validation and test


def test_validation_and_test_alone(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    net, spy = Net(), Spy(("output", "input"), train_points=100)
    net.eval()
    trainer = make_trainer(spy)
    trainer.validate(net, loader(), verbose=False)
    trainer.test(net, loader(10), verbose=False)
    assert [(rows.split, rows.occasion) for rows in spy.seen] == [
        ("val", "validation set, epoch 1"),
        ("test", "test set"),
    ]
    for rows, length in zip(spy.seen, (24, 10), strict=True):
        assert_close(rows.hidden["output"], net.head(net.states(INPUTS[:length])).detach())
        assert_close(rows.hidden["input"], INPUTS[:length])
        assert torch.equal(rows.targets, TARGETS[:length])
    names = {f"spy_{split}.{ending}" for split in ("val", "test") for ending in ("png", "npz")}
    assert {path.name for path in (tmp_path / "figures").iterdir()} == names


@pytest.mark.parametrize("inference_mode", [True, False])
def test_inference_mode_makes_no_difference(make_trainer: MakeTrainer, inference_mode: bool) -> None:
    net, spy = Net(), Spy(train_points=100)
    make_trainer(spy, inference_mode=inference_mode).fit(net, loader(), loader())
    assert spy.splits == ["val", "train"]
    for rows in spy.seen:
        assert_close(rows.hidden["body"], net.states())
        assert not rows.hidden["body"].requires_grad


def test_a_dev_run_measures_but_writes_no_files(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    spy = Spy(train_points=100)
    make_trainer(spy, fast_dev_run=True).fit(Net(), loader(), loader())
    assert [(rows.split, len(rows.targets)) for rows in spy.seen] == [("val", 8), ("train", 8)]
    assert not (tmp_path / "figures").exists()


def test_without_validation_batches_nothing_is_drawn(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    spy = Spy(every_n_epochs=1)
    make_trainer(spy, limit_val_batches=0).fit(Net(), loader(), loader())
    assert spy.seen == []
    assert not (tmp_path / "figures").exists()


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"max_steps": 6}, [6]),
        ({"max_steps": 7}, [6]),  # of three steps an epoch: at 9 it would be over
        ({"max_steps": 9, "check_val_every_n_epoch": 2}, [6]),
        ({"max_steps": 4, "accumulate_grad_batches": 2}, [4]),  # two steps an epoch
        ({"max_steps": 5, "accumulate_grad_batches": 2}, [4]),
        ({"max_steps": 8, "val_check_interval": 2, "check_val_every_n_epoch": None}, [8]),
        ({"max_steps": 9, "val_check_interval": 2, "check_val_every_n_epoch": None}, [8]),
        ({"max_epochs": 3}, [9]),
        ({"max_epochs": 5, "check_val_every_n_epoch": 2}, [12]),
        ({"max_epochs": 2, "max_steps": 100}, [6]),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_the_last_validation_is_looked_at(
    make_trainer: MakeTrainer, settings: dict[str, Any], steps: list[int], tmp_path: Path
) -> None:
    class Steps(Spy):
        def measure(self, trainer: pl.Trainer, *args: Any) -> str:
            self.steps.append(trainer.global_step)
            return "only the steps matter"

    spy, net = Steps(), Net()
    spy.steps = []
    with pytest.warns(UserWarning, match="only the steps matter"):
        make_trainer(spy, num_sanity_val_steps=0, **{"max_epochs": -1, **settings}).fit(net, loader(), loader(8))
    assert spy.steps == steps == net.validated[-1:]


def test_the_last_validation_of_a_loader_without_length() -> None:
    trainer = SimpleNamespace(current_epoch=3, check_val_every_n_epoch=1, max_epochs=-1, max_steps=10, global_step=9)
    trainer.val_check_batch, trainer.accumulate_grad_batches = math.inf, 1
    assert not is_last_validation(trainer)
    trainer.global_step = 10
    assert is_last_validation(trainer)


def test_states_that_are_not_finite_are_not_measured(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    net, spy = Net(), Spy(("input", "head", "output"))
    net.head.bias.data[0] = math.inf
    message = "Spy neither draws nor logs the test set: layer 'head' has values that are not finite"
    with pytest.warns(UserWarning, match=message):
        make_trainer(spy).test(net, loader(), verbose=False)
    assert spy.seen == []
    assert not (tmp_path / "figures").exists()


# names and arguments


@pytest.mark.parametrize(
    ("name", "key"), [("spy", "test/power"), ("other", "test/other/power")], ids=["unwritten", "another"]
)
def test_a_kind_may_leave_its_name_out_of_the_keys(make_trainer: MakeTrainer, name: str, key: str) -> None:
    class Quiet(Spy):
        unwritten_name = "spy"

    trainer = make_trainer(Quiet(name=name))
    trainer.test(Net(), loader(), verbose=False)
    assert {key} == {key for key in trainer.callback_metrics if key.endswith("power")}


SHARED = ["train_points", "dirpath", "targets", "forward"]


@pytest.mark.parametrize(
    ("kind", "own", "defaults"),
    [
        (Calibration, ["layer", "num_bins", "probabilities"], (5, 100_000, "calibration")),
        (HiddenSpace, ["layer", "subsets", "class_names"], (5, 10_000, "hidden_space")),
        (Spectrum, ["layers", "class_names"], (None, 10_000, "spectrum")),
    ],
)
def test_signatures_show_every_argument(kind: type[Diagnostic], own: list[str], defaults: tuple[Any, ...]) -> None:
    shown = inspect.signature(kind).parameters
    assert list(shown) == [*own, "every_n_epochs", "max_points", "name", *SHARED]
    assert tuple(shown[key].default for key in ("every_n_epochs", "max_points", "name")) == defaults
    assert [shown[key].default for key in SHARED] == [0, None, None, None]
    first, *others = shown.values()
    assert first.kind is first.POSITIONAL_OR_KEYWORD
    assert all(one.kind is one.KEYWORD_ONLY for one in others)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"max_pionts": 3}, "unexpected keyword argument 'max_pionts'"), ({"layers": ["a"]}, "argument 'layers'")],
    ids=["misspelt", "named as elsewhere"],
)
def test_unknown_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        HiddenSpace("body", **arguments)


# several of them, and checkpoints


def test_two_with_names_of_their_own_are_kept_apart(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    net, logger = Net(), TensorBoardLogger(tmp_path, "tb")
    spies = [Spy(("body",)), Spy(("body.0",), name="body.0")]
    trainer = make_trainer(*spies, logger=logger)
    trainer.test(net, loader(), verbose=False)
    linear = net.body[0](INPUTS).detach()
    assert_close(spies[1].seen[0].hidden["body.0"], linear)
    assert float(trainer.callback_metrics["test/spy/power"]) == pytest.approx(
        float(net.states().square().mean()), rel=1e-5
    )
    assert float(trainer.callback_metrics["test/body.0/power"]) == pytest.approx(
        float(linear.square().mean()), rel=1e-5
    )
    assert EventAccumulator(logger.log_dir).Reload().Tags()["images"] == ["spy/test", "body.0/test"]
    files = {"spy_test.png", "spy_test.npz", "body.0_test.png", "body.0_test.npz"}
    assert {path.name for path in (tmp_path / "figures").iterdir()} == files
    assert spies[0].state_key != spies[1].state_key


@pytest.mark.parametrize("start", ["fit", "validate", "test"])
def test_two_with_one_name_are_refused(make_trainer: MakeTrainer, start: str) -> None:
    class Other(Spy):
        pass

    trainer = make_trainer(Spy(), Other())
    message = (
        r"2 diagnostics \(Spy, Other\) have the name 'spy' and .* Give each its own: Other\(\.\.\., name='spy_2'\)"
    )
    with pytest.raises(ValueError, match=message):
        getattr(trainer, start)(Net(), loader())
    assert trainer.global_step == 0


def test_a_resumed_training_finds_what_the_straight_one_does(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    def fit(folder: Path, epochs: int, resumed_from: Path | None = None) -> list[Rows]:
        net, spy = Net(), Spy(every_n_epochs=2, train_points=100)
        net.body[2].p = 0.0  # for torch's random state is not in the checkpoint
        save = ModelCheckpoint(folder, save_last=True, enable_version_counter=False)
        trainer = make_trainer(spy, save, max_epochs=epochs, enable_checkpointing=True, default_root_dir=folder)
        trainer.fit(net, loader(), loader(), ckpt_path=resumed_from)
        return spy.seen

    straight = fit(tmp_path / "straight", 4)
    first, second = fit(tmp_path / "resumed", 2), fit(tmp_path / "resumed", 4, tmp_path / "resumed" / "last.ckpt")
    val_1, val_3, train = ("validation set, epoch 2", "validation set, epoch 4", "training set")
    assert [rows.occasion for rows in straight] == [val_1, val_3, train]
    assert [rows.occasion for rows in first] == [val_1, train]
    assert [rows.occasion for rows in second] == [val_3, train]
    for wanted, got in zip(straight, [first[0], *second], strict=True):
        assert_close(got.hidden["body"], wanted.hidden["body"], rtol=0, atol=0)
    # the training is over: nothing to look at
    assert fit(tmp_path / "resumed", 4, tmp_path / "resumed" / "last.ckpt") == []


@pytest.mark.parametrize(
    ("setting", "least"), [("every_n_epochs", 1), ("max_points", 1), ("train_points", 0)], ids=lambda value: str(value)
)
def test_settings_below_their_least_are_refused(setting: str, least: int) -> None:
    with pytest.raises(ValueError, match=f"{setting} must be an integer >= {least}, got {least - 1}"):
        Spy(**{setting: least - 1})


@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [
        ("every_n_epochs", "often", "an integer >= 1"),
        ("every_n_epochs", 2.5, "an integer >= 1"),
        ("max_points", None, "an integer >= 1"),
        ("train_points", [5], "an integer >= 0"),
        ("dirpath", 5, "a path"),
    ],
)
def test_settings_of_another_type_are_refused(setting: str, value: Any, expected: str) -> None:
    got = f"{value!r} of type {type(value).__name__}"
    with pytest.raises(TypeError, match=re.escape(f"{setting} must be {expected}, got {got}. ")):
        Spy(**{setting: value})


def test_a_layer_named_twice_is_looked_at_once(make_trainer: MakeTrainer) -> None:
    spy = Spy(("body", "input", "body"))
    make_trainer(spy).test(Net(), loader(), verbose=False)
    assert list(spy.seen[0].hidden) == ["body", "input"]


@pytest.mark.parametrize(
    ("diagnostic", "period"),
    [(HiddenSpace("0"), 5), (Calibration(), 5), (ConfidenceMap(), 1), (Spectrum("0"), None)],
    ids=lambda value: type(value).__name__,
)
def test_periods_are_those_of_the_documentation(diagnostic: Diagnostic, period: int | None) -> None:
    assert diagnostic.every_n_epochs == period
