import importlib
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from mm_lightning.diagnostics import Evaluation
from mm_lightning.evaluation import (
    FGSM,
    PGD,
    Blur,
    Neighbours,
    Noise,
    Rotation,
    Zoom,
    bounds_of_rows,
    class_spectrum,
    neighbour_accuracy,
    scores,
    spectrum_numbers,
)

SCRIPT = Path(__file__).parents[1] / "scripts" / "evaluate_on_two_processes.py"
MakeTrainer = Callable[..., Trainer]
RNG = torch.Generator().manual_seed(3)
INPUTS = torch.randn(300, 6, generator=RNG)
TARGETS = (INPUTS[:, :3] + torch.randn(300, 3, generator=RNG)).argmax(dim=1)
VAL, TEST = slice(200), slice(200, 300)
SCORES = ["acc", "nll", "ece", "mce", "brier", "overconfidence"]


class _Net(LightningModule):
    """Knows the classes, and is four times too sure."""

    def __init__(self, classes: int = 3, last: nn.Module | None = None, scale: float = 4.0) -> None:
        super().__init__()
        self.head = nn.Linear(6, classes, bias=False)
        self.last = nn.Identity() if last is None else last
        with torch.no_grad():
            self.head.weight.copy_(scale * torch.eye(classes, 6))
        self.modes: list[bool] = []

    def forward(self, inputs: torch.Tensor) -> Any:
        self.modes.append(self.training)
        return self.last(self.head(inputs))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self(batch[0]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class _Data(LightningDataModule):
    def __init__(self, targets: torch.Tensor = TARGETS, val: slice = VAL, test: slice = TEST) -> None:
        super().__init__()
        self.targets, self.val, self.test = targets, val, test
        self.stages: list[str] = []

    def setup(self, stage: str) -> None:
        self.stages.append(stage)

    def _loader(self, rows: slice) -> DataLoader[Any]:
        return DataLoader(TensorDataset(INPUTS[rows], self.targets[rows]), batch_size=32)

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.val)

    def val_dataloader(self) -> DataLoader[Any]:
        assert {"validate", "fit"} & set(self.stages)
        return self._loader(self.val)

    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.test)


class _OnlyTest(_Data):
    val_dataloader = LightningDataModule.val_dataloader


def _logged(trainer: Trainer, split: str = "test", name: str = "evaluation") -> dict[str, float]:
    prefix = f"{split}/{name}/"
    return {k.removeprefix(prefix): v.item() for k, v in trainer.callback_metrics.items() if k.startswith(prefix)}


def _reference_temperature(logits: torch.Tensor, targets: torch.Tensor) -> float:
    z, y = logits.detach().double().numpy(), targets.numpy()
    grid = np.exp(np.linspace(-4, 4, 20_001))
    nll = []
    for t in grid:
        top = (z / t).max(axis=1)
        nll.append(np.mean(top + np.log(np.exp(z / t - top[:, None]).sum(axis=1)) - z[np.arange(len(y)), y] / t))
    return float(grid[np.argmin(nll)])


def test_a_test_logs_scores_and_those_after_temperature_scaling(tmp_path: Path, make_trainer: MakeTrainer) -> None:
    net, callback, logger = _Net(), Evaluation(), TensorBoardLogger(tmp_path, name="tb", version=0)
    trainer = make_trainer(callback, logger=logger)
    trainer.test(net, _Data(), verbose=False)
    logits = net(INPUTS)
    t = _reference_temperature(logits[VAL], TARGETS[VAL])
    assert t > 2
    got = _logged(trainer)
    want = scores(logits[TEST].log_softmax(dim=1), TARGETS[TEST])
    assert {name: got[name] for name in SCORES} == pytest.approx(want, rel=1e-5)
    scaled = scores((logits[TEST].double() / t).log_softmax(dim=1), TARGETS[TEST])
    for name in ("nll", "ece", "brier", "overconfidence"):
        assert got[f"{name}_scaled"] == pytest.approx(scaled[name], rel=2e-3)
        assert got[f"{name}_scaled"] < 0.98 * got[name]
    assert got["temperature"] == pytest.approx(t, rel=1e-3)
    assert got["temperature_low"] < t < got["temperature_high"] < 2 * got["temperature_low"]
    assert callback.scaling is not None
    assert callback.scaling.state_dict()["temperature"].item() == pytest.approx(got["temperature"])
    assert not callback.scaling.temperature.is_inference()
    assert callback.bins["plain"].counts.sum() == callback.bins["scaled"].counts.sum() == 100
    assert EventAccumulator(logger.log_dir).Reload().Scalars("test/evaluation/nll_scaled")[0].value < got["nll"]
    assert callback.remarks == []


def test_the_temperature_is_of_the_weights_that_are_tested(make_trainer: MakeTrainer) -> None:
    net, data, trainer = _Net(), _Data(), make_trainer(Evaluation())
    trainer.fit(net, data)
    with torch.no_grad():
        net.head.weight.copy_(10 * torch.eye(3, 6))
    trainer.test(net, data, verbose=False)
    logits = 10 * INPUTS[:, :3]
    assert _logged(trainer)["temperature"] == pytest.approx(_reference_temperature(logits[VAL], TARGETS[VAL]), rel=1e-3)


def test_the_loaders_of_fit_are_used_in_a_test_without_a_data_module(make_trainer: MakeTrainer) -> None:
    net, data, trainer = _Net(), _Data(), make_trainer(Evaluation(neighbours=Neighbours(layer="head")))
    data.setup("fit")
    trainer.fit(net, data._loader(slice(150)), data.val_dataloader())
    trainer.test(net, data._loader(TEST), verbose=False)
    logits = net(INPUTS).detach()
    assert _logged(trainer)["temperature"] == pytest.approx(_reference_temperature(logits[VAL], TARGETS[VAL]), rel=1e-3)
    acc = neighbour_accuracy(logits[:150], TARGETS[:150], logits[TEST], TARGETS[TEST])
    assert _logged(trainer)["neighbours/acc"] == pytest.approx(acc)


def test_the_last_validation_of_fit_logs_scores(make_trainer: MakeTrainer) -> None:
    seen: list[set[str]] = []

    class Watch(Evaluation):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            seen.append(set(_logged(trainer, "val")))

    net, trainer = _Net(), make_trainer(Watch(), max_epochs=3)
    trainer.fit(net, _Data())
    assert seen == [set(), set(), set(SCORES)]
    want = scores(net(INPUTS[VAL]).log_softmax(dim=1), TARGETS[VAL])
    assert _logged(trainer, "val") == pytest.approx(want, rel=1e-5)
    assert not net._forward_hooks


def test_an_early_stop_logs_the_scores_of_the_validation_before_it(tmp_path: Path, make_trainer: MakeTrainer) -> None:
    class Stopping(_Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            self.log("loss", 1.0)

    net, logger = Stopping(), TensorBoardLogger(tmp_path, name="tb", version=0)
    trainer = make_trainer(Evaluation(), EarlyStopping("loss", patience=1), max_epochs=9, logger=logger)
    trainer.fit(net, _Data())
    assert trainer.current_epoch == 2
    want = scores(net(INPUTS[VAL]).log_softmax(dim=1), TARGETS[VAL])
    assert _logged(trainer, "val") == pytest.approx(want, rel=1e-5)
    assert EventAccumulator(logger.log_dir).Reload().Scalars("val/evaluation/acc")[0].value == pytest.approx(
        want["acc"]
    )


def test_validation_data_come_from_where_they_are_named(make_trainer: MakeTrainer) -> None:
    other = _Data(val=slice(100))
    trainer = make_trainer(Evaluation(data=other))
    trainer.test(_Net(), _Data()._loader(TEST), verbose=False)
    want = _reference_temperature(4 * INPUTS[:100, :3], TARGETS[:100])
    assert _logged(trainer)["temperature"] == pytest.approx(want, rel=1e-3)
    assert other.stages == ["validate"]


@pytest.mark.parametrize("data", [_OnlyTest(), _Data()._loader(TEST)], ids=["data module", "loader"])
def test_without_validation_data_there_is_no_temperature(data: Any, make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(Evaluation())
    with pytest.warns(UserWarning, match="no temperature is fitted: there are no validation data"):
        trainer.test(_Net(), data, verbose=False)
    assert set(_logged(trainer)) == set(SCORES)


@pytest.mark.parametrize("is_own", [True, False], ids=["own data", "named data"])
def test_no_temperature_is_fitted_to_test_rows(is_own: bool, make_trainer: MakeTrainer) -> None:
    data = _Data()
    data.validates_on_test = True
    trainer = make_trainer(Evaluation(data=None if is_own else data))
    with pytest.warns(UserWarning, match="no temperature is fitted: validation sees the test rows"):
        trainer.test(_Net(), data if is_own else data._loader(TEST), verbose=False)
    assert set(_logged(trainer)) == set(SCORES)


def test_temperature_false_leaves_the_validation_data_alone(make_trainer: MakeTrainer) -> None:
    data, trainer = _Data(), make_trainer(Evaluation(temperature=False, name="plain"))
    trainer.test(_Net(), data, verbose=False)
    assert set(_logged(trainer, name="plain")) == set(SCORES)
    assert data.stages == ["test"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (slice(12), r"temperature \S+ \(95 % interval \S+ to \S+, 12 rows\): uncertain, more validation rows"),
        (slice(0, 300, 300), "no temperature is fitted. targets must be those of two validation rows or more"),
    ],
    ids=["few", "one"],
)
def test_few_validation_rows_are_warned_about(rows: slice, message: str, make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(Evaluation())
    with pytest.warns(UserWarning, match=message):
        trainer.test(_Net(scale=1.0), _Data(val=rows), verbose=False)
    assert math.isfinite(_logged(trainer)["nll"])
    assert ("nll_scaled" in _logged(trainer)) == (rows == slice(12))


def test_one_logit_and_probabilities_are_understood(make_trainer: MakeTrainer) -> None:
    targets = (INPUTS[:, 0] + torch.randn(300, generator=torch.Generator().manual_seed(1)) > 0).long()
    logits = torch.stack([torch.zeros(300), 4 * INPUTS[:, 0]], dim=1)
    for last, probabilities in ((nn.Identity(), False), (nn.Flatten(0), False), (nn.Sigmoid(), True)):
        trainer = make_trainer(Evaluation(probabilities=probabilities))
        trainer.test(_Net(1, last), _Data(targets), verbose=False)
        want = scores(logits[TEST].log_softmax(dim=1), targets[TEST])
        assert {name: _logged(trainer)[name] for name in SCORES} == pytest.approx(want, rel=1e-3)
        t = _reference_temperature(logits[VAL], targets[VAL])
        assert _logged(trainer)["temperature"] == pytest.approx(t, rel=2e-3)


def test_a_step_around_forward_is_followed_by_a_call_of_it(make_trainer: MakeTrainer) -> None:
    class Around(_Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.head(batch[0])

        test_step = validation_step

    net, trainer = Around(), make_trainer(Evaluation(temperature=False))
    trainer.test(net, _Data(), verbose=False)
    want = scores(net(INPUTS[TEST]).log_softmax(dim=1), TARGETS[TEST])
    assert _logged(trainer) == pytest.approx(want, rel=1e-5)
    assert not any(net.modes[:-1])


@pytest.mark.parametrize(
    ("net", "targets", "message"),
    [
        (_Net(), torch.randn(300), "No integer tensor with 32 entries is in the batch"),
        (_Net(last=nn.Unflatten(1, (3, 1, 1))), TARGETS, r"'output' gives \(3, 1, 1\) for a row, not a logit for each"),
        (_Net(), TARGETS + 1, r"targets must be in \[0, 3\), got 1 to 3: count from 0"),
        (_Net(scale=math.inf), TARGETS, "'output' has values that are not finite"),
        (_Net(), torch.full((300,), -100), "all targets are -100"),
    ],
    ids=["no classes", "an image", "classes too high", "diverged", "nothing left"],
)
def test_what_is_no_classifier_is_warned_about_once(
    net: _Net, targets: torch.Tensor, message: str, make_trainer: MakeTrainer
) -> None:
    callback = Evaluation()
    trainer = make_trainer(callback, max_epochs=2)
    with pytest.warns(UserWarning, match=f"taken for no classifier, and nothing is logged: .*{message}") as caught:
        trainer.test(net, _Data(targets), verbose=False)
    assert len([one for one in caught if "Evaluation" in str(one.message)]) == 1
    assert len(callback.remarks) == 1
    assert _logged(trainer) == {}
    assert not net._forward_hooks


def test_a_dict_from_forward_is_no_classifier(make_trainer: MakeTrainer) -> None:
    class Dicts(_Net):
        def forward(self, inputs: torch.Tensor) -> Any:
            return {"logits": super().forward(inputs)}

    trainer = make_trainer(Evaluation())
    with pytest.warns(UserWarning, match=r"no classifier.*own forward\(\) returned no tensor"):
        trainer.test(Dicts(), _Data(), verbose=False)
    trainer = make_trainer(Evaluation("head"))
    trainer.test(Dicts(), _Data(), verbose=False)
    assert _logged(trainer)["temperature"] > 2


def test_random_states_and_modes_are_as_they_were(make_trainer: MakeTrainer) -> None:
    class Noisy(_Net):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return super().forward(inputs) + 0 * torch.rand(1)

    def after(*callbacks: Any) -> torch.Tensor:
        torch.manual_seed(7)
        make_trainer(*callbacks).test(Noisy(), _Data(), verbose=False)
        return torch.rand(1)

    everything = {"attacks": True, "shifts": True, "neighbours": True, "spectra": True}
    assert torch.equal(after(Evaluation(**everything)), after())


def test_misuse_is_named() -> None:
    with pytest.raises(TypeError, match="temperature must be True or False, got 'yes' of type str"):
        Evaluation(temperature="yes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_bins must be an integer >= 1, got 0"):
        Evaluation(num_bins=0)
    with pytest.raises(TypeError, match="name must be a text, got 3"):
        Evaluation(name=3)  # type: ignore[arg-type]


@pytest.mark.slow
def test_two_processes_see_the_rows_of_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run([sys.executable, str(SCRIPT), str(tmp_path)], check=True, cwd=tmp_path)
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0] == ranks[1]
    monkeypatch.syspath_prepend(SCRIPT.parent)
    inputs, targets = importlib.import_module(SCRIPT.stem).data()
    weight, bias = torch.load(tmp_path / "weights.pt").values()
    logits = inputs @ weight.T + bias
    val, test = slice(128), slice(128, 192)
    for split, rows in (("val", val), ("test", test)):
        want = scores(logits[rows].log_softmax(dim=1), targets[rows])
        assert {key: ranks[0][f"{split}/evaluation/{key}"] for key in SCORES} == pytest.approx(want, rel=1e-4)
    t = _reference_temperature(logits[val], targets[val])
    assert ranks[0]["test/evaluation/temperature"] == pytest.approx(t, rel=1e-3)
    span = bounds_of_rows(inputs[val])
    attacked = FGSM(0.05)(lambda x: x @ weight.T + bias, inputs[test], targets[test], span)
    want = scores((attacked @ weight.T + bias).log_softmax(dim=1), targets[test])
    assert ranks[0]["test/evaluation/fgsm_0.05/nll"] == pytest.approx(want["nll"], rel=1e-4)
    acc = neighbour_accuracy(inputs[val], targets[val], inputs[test], targets[test])
    assert ranks[0]["test/evaluation/neighbours/acc"] == pytest.approx(acc)


@pytest.mark.slow
def test_it_needs_nothing_to_draw_with() -> None:
    hidden = ["matplotlib", "PIL"]
    code = f"import sys\nimport torchmetrics\nfor name in {hidden}: sys.modules[name] = None\n"
    code += "from mm_lightning.diagnostics import Evaluation"
    subprocess.run([sys.executable, "-c", code], check=True)


# attacks, deformations, shifts, neighbours, spectra


class _Images(_Net):
    """Two channels of 3 x 3 pixels, told apart by their brightness."""

    def __init__(self) -> None:
        super().__init__(classes=2)
        self.head = nn.Linear(18, 2, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(torch.cat([torch.ones(1, 18), -torch.ones(1, 18)]))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(inputs.flatten(1))


class _ImageData(_Data):
    normalization: Any = ((0.5, 0.5), (0.25, 0.5))

    def __init__(self) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(4)
        self.pixels = torch.rand(300, 2, 3, 3, generator=rng)
        self.inputs = (self.pixels - 0.5) / torch.tensor([0.25, 0.5])[:, None, None]
        self.targets = (self.inputs.mean(dim=(1, 2, 3)) + 0.05 * torch.randn(300, generator=rng) < 0).long()

    def _loader(self, rows: slice) -> DataLoader[Any]:
        return DataLoader(TensorDataset(self.inputs[rows], self.targets[rows]), batch_size=32)


def test_attacks_are_in_pixels_where_the_data_say_how_they_were_normalised(make_trainer: MakeTrainer) -> None:
    data, net = _ImageData(), _Images()
    callback = Evaluation(temperature=False, attacks=[FGSM(0.1), PGD(0.1, 0.05, 5)])
    trainer = make_trainer(callback)
    trainer.test(net, data, verbose=False)
    # the gradient has the sign of the class, whatever the input: darker if it is the bright one
    sign = 2 * data.targets[TEST, None, None, None] - 1
    pixels = (data.pixels[TEST] + 0.1 * sign).clamp(0, 1)
    attacked = (pixels - 0.5) / torch.tensor([0.25, 0.5])[:, None, None]
    want = scores(net(attacked).log_softmax(dim=1), data.targets[TEST])
    for name in ("fgsm_0.1", "pgd_0.1"):
        got = {key: _logged(trainer)[f"{name}/{key}"] for key in ("acc", "nll", "ece", "brier")}
        assert got == pytest.approx({key: want[key] for key in got}, rel=1e-4)
    assert _logged(trainer)["fgsm_0.1/acc"] < 0.5 < _logged(trainer)["acc"]
    assert net.head.weight.grad is None
    assert callback.settings["unit"] == "pixels in [0, 1]"
    assert callback.groups["attacks"]["fgsm_0.1"]["acc"] == pytest.approx(want["acc"])


def test_other_inputs_have_the_bounds_of_the_training_data(make_trainer: MakeTrainer) -> None:
    net, trainer = _Net(), make_trainer(callback := Evaluation(temperature=False, attacks=[FGSM(0.05)], shifts=True))
    trainer.test(net, _Data(), verbose=False)
    span = INPUTS[VAL].amax(dim=0) - INPUTS[VAL].amin(dim=0)
    p = net(INPUTS[TEST]).softmax(dim=1) - torch.eye(3)[TARGETS[TEST]]
    moved = INPUTS[TEST] + 0.05 * span * (p @ net.head.weight).sign()
    low, high = (torch.stack([INPUTS[TEST], one.expand(100, 6)]) for one in (INPUTS[VAL].amin(0), INPUTS[VAL].amax(0)))
    want = scores(net(moved.clamp(low.amin(dim=0), high.amax(dim=0))).log_softmax(dim=1), TARGETS[TEST])
    assert _logged(trainer)["fgsm_0.05/nll"] == pytest.approx(want["nll"], rel=1e-4)
    assert callback.settings["unit"] == "the range of the training data, by feature"
    assert {f"noise_{i}" for i in range(1, 6)} == set(callback.groups["shifts"])
    noises = [_logged(trainer)[f"noise_{i}/nll"] for i in range(1, 6)]
    assert noises[4] > noises[0]


def test_deformations_are_those_of_a_pass_by_hand(make_trainer: MakeTrainer) -> None:
    data, net = _ImageData(), _Images()
    trainer = make_trainer(Evaluation(temperature=False, deformations=[Zoom(2.0), Rotation(60)], seed=9))
    trainer.test(net, data, verbose=False)
    rng, parts = torch.Generator().manual_seed(9), data.inputs[TEST].split(32)
    rotated = torch.cat([Rotation(60)(part, rng) for part in parts])
    for name, images in (("zoom_2", Zoom(2.0)(data.inputs[TEST])), ("rotation_60", rotated)):
        want = scores(net(images).log_softmax(dim=1), data.targets[TEST])
        assert _logged(trainer)[f"{name}/nll"] == pytest.approx(want["nll"], rel=1e-5)


def test_what_does_not_fit_is_left_out_and_said(make_trainer: MakeTrainer) -> None:
    callback = Evaluation(temperature=False, deformations=True, shifts=[Blur(1)], attacks=[FGSM(0.1)])
    trainer = make_trainer(callback)
    with pytest.warns(UserWarning, match="left out, for inputs"):
        trainer.test(_Net(), _Data(), verbose=False)
    why = "left out, for inputs are (6,) a row, not images."
    assert callback.remarks == [f"deformations: {why}", f"shifts: {why}"]
    assert set(callback.groups) == {"attacks"}
    callback = Evaluation(temperature=False, attacks=True)
    trainer = make_trainer(callback)
    with pytest.warns(UserWarning, match="Evaluation: attacks: left out, for there are no training data"):
        trainer.test(_Net(), _Data()._loader(TEST), verbose=False)
    assert callback.groups == {}


@pytest.mark.parametrize("normalization", ["imagenet", (0.5, 0.25)])
def test_a_normalization_of_another_form_is_said(normalization: Any, make_trainer: MakeTrainer) -> None:
    data, callback = _ImageData(), Evaluation(temperature=False, attacks=[FGSM(0.1)], deformations=[Zoom(2.0)])
    data.normalization = normalization
    with pytest.warns(UserWarning, match=r"attacks: left out, for the normalization of _ImageData must be \(means"):
        make_trainer(callback).test(_Images(), data, verbose=False)
    assert list(callback.groups) == ["deformations"]


def test_what_forward_does_not_run_on_is_not_changed(make_trainer: MakeTrainer) -> None:
    """A mask beside tokens: noise in it would change no logit, and look like robustness."""

    class Tokens(_Net):
        def forward(self, inputs: torch.Tensor) -> Any:
            return super().forward(inputs.float())

    class TokenData(_Data):
        def _loader(self, rows: slice) -> DataLoader[Any]:
            tokens, mask = (10 * INPUTS[rows]).long(), torch.ones(INPUTS[rows].shape)
            return DataLoader(TensorDataset(tokens, mask, self.targets[rows]), batch_size=32)

    callback = Evaluation(temperature=False, shifts=True)
    with pytest.warns(UserWarning, match="shifts: left out, for forward runs on no floating point tensor of the batch"):
        make_trainer(callback).test(Tokens(), TokenData(), verbose=False)
    assert callback.groups == {}
    assert callback.scores["plain"]["acc"] > 0.5


def test_an_obstacle_in_one_process_is_one_in_all(make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the others would log what this one does not, and wait for it for ever."""
    seen, has_rows = [], []

    def targets(batch: Any) -> torch.Tensor:
        seen.append(batch)
        if len(seen) > 1:
            raise ValueError("no targets in the second batch")
        return batch[1]

    def decide(decision: bool, all: bool) -> bool:
        has_rows.append(decision)
        return decision

    trainer = make_trainer(Evaluation(temperature=False, targets=targets))
    monkeypatch.setattr(trainer.strategy, "reduce_boolean_decision", decide)
    with pytest.warns(UserWarning, match="nothing is logged: no targets in the second batch"):
        trainer.test(_Net(), _Data(), verbose=False)
    assert has_rows == [False]


def test_neighbours_and_spectra_are_of_what_comes_into_the_last_linear_layer(make_trainer: MakeTrainer) -> None:
    class Deep(_Net):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 6)
            self.out = nn.Linear(6, 3)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.out(torch.relu(self.first(inputs)))

    net = Deep()
    callback = Evaluation(temperature=False, neighbours=True, spectra=True)
    trainer = make_trainer(callback)
    trainer.test(net, _Data(), verbose=False)
    hidden = torch.relu(net.first(INPUTS)).detach()
    want = neighbour_accuracy(hidden[VAL], TARGETS[VAL], hidden[TEST], TARGETS[TEST])
    assert _logged(trainer)["neighbours/acc"] == pytest.approx(want)
    values, _ = class_spectrum(hidden[TEST], TARGETS[TEST], centred=True)
    largest = _logged(trainer)["spectrum/out:input/largest_centred"]
    assert largest == pytest.approx(spectrum_numbers(values)["largest"], rel=1e-5)
    assert callback.settings["neighbours"] == {"k": 5, "cosine": True, "layer": "out:input", "rows": 200}
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in net.modules())


def test_changed_inputs_are_not_overheard_as_those_of_the_test(make_trainer: MakeTrainer) -> None:
    class Around(_Net):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            pass

    net, trainer = Around(), make_trainer(Evaluation(temperature=False, attacks=[FGSM(0.3)]))
    trainer.test(net, _Data(), verbose=False)
    want = scores(net(INPUTS[TEST]).log_softmax(dim=1), TARGETS[TEST])
    assert {name: _logged(trainer)[name] for name in SCORES} == pytest.approx(want, rel=1e-5)
    assert _logged(trainer)["fgsm_0.3/nll"] > 2 * want["nll"]


def test_only_so_many_rows_are_looked_at_closer(make_trainer: MakeTrainer) -> None:
    net, trainer = _Net(), make_trainer(Evaluation(temperature=False, shifts=[Noise(1)], extra_points=40))
    trainer.test(net, _Data(), verbose=False)
    bounds = bounds_of_rows(INPUTS[:40])
    rng = torch.Generator().manual_seed(0)
    noisy = torch.cat([Noise(1)(part, bounds, rng) for part in INPUTS[200:264].split(32)])[:40]
    want = scores(net(noisy).log_softmax(dim=1), TARGETS[200:240])
    assert _logged(trainer)["noise_1/nll"] == pytest.approx(want["nll"], rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"attacks": [FGSM(0.1), FGSM(0.1)]}, ValueError, "attacks must be different from each other, got fgsm_0.1 tw"),
        ({"attacks": ["fgsm"]}, TypeError, "attacks must be a list of attacks, got"),
        ({"shifts": "noise"}, TypeError, "shifts must be True, False or a list, got 'noise'"),
        ({"neighbours": 5}, TypeError, r"neighbours must be True, False or Neighbours\(\.\.\.\), got 5"),
        ({"spectra": [3]}, TypeError, "spectra must be a list of layers, got"),
        ({"bounds": (0, 1)}, TypeError, r"bounds must be InputBounds, got \(0, 1\) of type tuple"),
        ({"seed": -1}, ValueError, "seed must be an integer >= 0, got -1"),
    ],
)
def test_wrong_groups_are_named(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Evaluation(**settings)


def test_the_same_remark_is_made_once(make_trainer: MakeTrainer) -> None:
    callback = Evaluation()
    trainer = make_trainer(callback)
    with pytest.warns(UserWarning, match="taken for no classifier") as caught:
        trainer.validate(_Net(), _Data(torch.randn(300)), verbose=False)
    assert len([one for one in caught if "Evaluation" in str(one.message)]) == 1
    trainer.validate(_Net(), _Data(torch.randn(300)), verbose=False)  # warnings are errors
    assert len(callback.remarks) == 1


@pytest.mark.parametrize(("max_points", "is_said"), [(40, True), (99, True), (100, False)])
def test_rows_that_are_left_out_are_said(make_trainer: MakeTrainer, max_points: int, is_said: bool) -> None:
    callback = Evaluation(temperature=False, max_points=max_points)
    text = f"test scores are of the first {max_points} rows of each process: max_points."
    trainer = make_trainer(callback)
    if is_said:
        with pytest.warns(UserWarning, match=text):
            trainer.test(_Net(), _Data(), verbose=False)
    else:
        trainer.test(_Net(), _Data(), verbose=False)
    assert callback.remarks == [text] * is_said
    assert callback.bins["plain"].counts.sum() == max_points


def test_rows_left_out_of_one_split_are_not_said_of_another(make_trainer: MakeTrainer) -> None:
    callback = Evaluation(temperature=False, max_points=150)
    trainer = make_trainer(callback)
    with pytest.warns(UserWarning, match="val scores are of the first 150 rows of each process: max_points"):
        trainer.validate(_Net(), _Data(), verbose=False)
    trainer.test(_Net(), _Data(), verbose=False)  # of 100 rows
    assert callback.remarks == []
