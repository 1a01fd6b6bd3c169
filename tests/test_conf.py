import inspect
import itertools
import pickle
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hydra
import lightning.pytorch as pl
import pytest
import torch
from classifier import Classifier, loader, weights_of
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, MissingConfigException
from hydra.utils import get_object, instantiate
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins import CheckpointIO
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, MultiStepLR, StepLR
from torch.utils.data import DataLoader, TensorDataset

from mm_lightning import BetaRatio, ManifoldMixupCallback, Roll, WarmUp
from mm_lightning.command.checkpoint import WholeCheckpointIO
from mm_lightning.command.configuration import CONF
from mm_lightning.command.run_folder import folder_name
from mm_lightning.command.train import build_trainer
from mm_lightning.data import mnist
from mm_lightning.losses import SoftmaxBCE

pytestmark = pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated")

OPTIONS = sorted(
    path.relative_to(CONF).with_suffix("").as_posix()
    for path in CONF.glob("*/*.yaml")
    # the first are composed by conf/reproduce.yaml, the others need packages of an extra
    if path.parent.name not in ("reproduction", "sweep")
)
GLOBAL = ("epochs", "experiment")  # groups that write to other groups, and are added with a plus
SMALL = ["model=mlp_bottleneck", "model.blocks.sizes=[784,8,8,2,8,8,10]"]

Compose = Callable[..., DictConfig]


@pytest.fixture
def compose(tmp_path: Path) -> Iterator[Compose]:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        # without a job there is no hydra:runtime
        yield lambda *overrides: hydra.compose("train", [*overrides, f"run_dir={tmp_path}"])


def targets_of(node: Any, place: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Everything below ``node`` that is to be constructed, with its place."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield place, node
        for key, value in node.items():
            yield from targets_of(value, f"{place}.{key}" if place else key)
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from targets_of(value, f"{place}[{i}]")


def test_every_group_is_found() -> None:
    groups = {option.split("/")[0] for option in OPTIONS}
    expected = (
        "callbacks data diagnostics epochs experiment logger loss mixup model optimizer scheduler trainer".split()
    )
    assert groups == set(expected)
    assert not [path for path in CONF.rglob("*") if path.is_file() and path.suffix not in (".yaml", ".py", ".pyc")]


@pytest.mark.parametrize("option", OPTIONS)
def test_option_composes_and_its_targets_take_its_keys(option: str, compose: Compose) -> None:
    group, name = option.split("/")
    own = [f"model._target_={Classifier.__module__}.{Classifier.__name__}"] if option == "model/own" else []
    config = compose(f"{'+' if group in GLOBAL else ''}{group}={name}", *own)
    content = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    targets = dict(targets_of(content))
    assert {"data", "model", "optimizer", "scheduler", "trainer"} <= set(targets)
    for place, node in targets.items():
        target = get_object(node["_target_"])
        parameters = inspect.signature(target).parameters
        takes_any = any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values())
        unknown = {key for key in node if not key.startswith("_")} - set(parameters)
        assert takes_any or not unknown, f"{place}: {node['_target_']} does not take {unknown}"


@pytest.mark.parametrize("option", [option for option in OPTIONS if option.split("/")[0] not in GLOBAL])
def test_option_opens_into_a_node_of_its_group(option: str, compose: Compose) -> None:
    # a file with a wrong @package would compose, and its values would stand elsewhere
    group, name = option.split("/")
    own = OmegaConf.load(CONF / f"{option}.yaml")
    keys = {key for key in own if key != "defaults"}
    assert keys <= set(compose(f"{group}={name}")[group])


def test_misspelt_key_is_refused(compose: Compose) -> None:
    with pytest.raises(ConfigCompositionException, match=r"mixup\.alhpa"):
        compose("mixup.alhpa=1")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        pytest.param([], {"seed": 0, "data.seed": 0, "mixup.seed": 0, "mixup.layers": "auto"}, id="defaults"),
        pytest.param(["seed=3"], {"data.seed": 3, "mixup.seed": 3}, id="seed"),
        pytest.param(["seed=3", "mixup=input"], {"mixup.seed": 3, "mixup.layers": "input"}, id="seed of input"),
        pytest.param(["mixup.alpha=0.5"], {"mixup.alpha": 0.5}, id="alpha"),
        pytest.param(["alpha=0.5", "mixup=input"], {"mixup.alpha": 0.5}, id="alpha of input"),
        pytest.param(["mixup.layers=[input,blocks.1]"], {"mixup.layers": ["input", "blocks.1"]}, id="layers"),
        pytest.param(["layers=[input,blocks.1]"], {"mixup.layers": ["input", "blocks.1"]}, id="layers of the run"),
        pytest.param(["layers=blocks.1", "mixup=input"], {"mixup.layers": "input"}, id="layers of input"),
        pytest.param(["layers=blocks.1", "mixup=none"], {"mixup": {}}, id="layers without mixup"),
        pytest.param(
            ["max_epochs=2", "scheduler=cosine"], {"trainer.max_epochs": 2, "scheduler.T_max": 2}, id="epochs"
        ),
        pytest.param(
            ["trainer.max_epochs=2", "scheduler=cosine"], {"scheduler.T_max": 2}, id="epochs of the trainer alone"
        ),
        pytest.param(["trainer=smoke", "scheduler=cosine"], {"scheduler.T_max": 1}, id="epochs of smoke"),
        pytest.param(["optimizer.lr=0.01"], {"model.optimizer.lr": 0.01}, id="learning rate"),
        pytest.param(
            ["+experiment=mnist_bottleneck"],
            {"name": "mnist_bottleneck", "model.blocks.sizes": [784, 1024, 1024, 2, 1024, 1024, 10]},
            id="experiment",
        ),
        pytest.param(
            ["+experiment=mnist_bottleneck", "mixup=none", "trainer=smoke"],
            {"mixup": {}, "trainer.max_epochs": 1},
            id="overrides win over the experiment",
        ),
        pytest.param(["trainer=gpu"], {"trainer.accelerator": "gpu", "trainer.devices": 1}, id="gpu"),
        pytest.param(["trainer=ddp"], {"trainer.strategy": "ddp", "trainer.devices": 2}, id="ddp"),
    ],
)
def test_overrides_reach_what_they_mean(overrides: list[str], expected: dict[str, Any], compose: Compose) -> None:
    config = compose(*overrides)
    found = {key: OmegaConf.select(config, key) for key in expected}
    assert OmegaConf.to_container(OmegaConf.create(found), resolve=True) == expected


@pytest.mark.parametrize(
    ("mixup", "layers"),
    [("manifold", [("mix_before.3", "mix_before.4")]), ("input", [("input",)]), ("none", [])],
)
def test_mixup_options_give_a_callback_with_its_layers(
    mixup: str, layers: list[tuple[str, ...]], compose: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = torch.zeros(40, 28, 28, dtype=torch.uint8), torch.arange(40) % 10
    monkeypatch.setattr(mnist, "load_mnist", lambda root: mnist.MNIST(images, labels, images, labels))
    config = compose(*SMALL, f"mixup={mixup}", "data.batch_size=2", "trainer=smoke", "+data.num_validation=10")
    trainer = build_trainer(config)
    trainer.fit(instantiate(config.model), instantiate(config.data))
    mixing = [callback for callback in trainer.callbacks if isinstance(callback, ManifoldMixupCallback)]
    assert [callback.layer_names for callback in mixing] == layers
    assert trainer.global_step == 15


WAYS = [option.split("/")[1] for option in OPTIONS if option.startswith("mixup/")]


def way(name: str, compose: Compose) -> Any:
    """What an option of the group makes."""
    if "MatchedGroups" in (CONF / "mixup" / f"{name}.yaml").read_text(encoding="utf-8"):
        pytest.importorskip("scipy")
    return instantiate(compose(f"mixup={name}").mixup)


class TwoLayers(pl.LightningModule):
    """Two layers, and the mean over places; the same weights every time."""

    def __init__(self, first: nn.Module, second: nn.Module, places: tuple[int, ...]) -> None:
        super().__init__()
        self.first, self.second, self.head, self.places = first, second, nn.Linear(4, 3), places
        generator = torch.Generator().manual_seed(1)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / 2

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        hidden = torch.tanh(self.second(torch.tanh(self.first(batch[0]))))
        return F.cross_entropy(self.head(hidden.mean(dim=self.places)), batch[1])

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=0.1)


def fitting(callback: Any) -> tuple[pl.LightningModule, DataLoader[Any]]:
    """A network that the way can mix, of images or else of sequences, and five batches for it, of more than 16 rows."""
    problem_with = getattr(getattr(callback, "interpolation", None), "problem_with", lambda shape: "")
    shape: tuple[int, ...] = (100, 2, 6, 6)
    if problem_with(shape):
        shape = (100, 5, 2)
        model = TwoLayers(nn.Linear(2, 4), nn.Linear(4, 4), places=(1,))
    else:
        model = TwoLayers(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3), places=(2, 3))
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    return model, DataLoader(TensorDataset(inputs, torch.arange(100) % 3), batch_size=20)


@pytest.mark.parametrize("name", WAYS)
def test_each_way_is_made_as_its_file_says_and_trains(
    name: str, compose: Compose, make_trainer: Callable[..., pl.Trainer]
) -> None:
    callback = way(name, compose)
    model, data = fitting(callback)
    trainer = make_trainer(*([callback] if callback else []), max_epochs=2)
    trainer.fit(model, data)
    plain, _ = fitting(callback)
    make_trainer(max_epochs=2).fit(plain, data)
    assert all(bool(weight.isfinite().all()) for weight in weights_of(model))
    differs = [not torch.equal(own, other) for own, other in zip(weights_of(model), weights_of(plain), strict=True)]
    assert (any(differs), all(differs)) == (bool(callback), bool(callback))
    if callback:
        assert isinstance(callback, ManifoldMixupCallback)
        own: Any = OmegaConf.to_container(OmegaConf.load(CONF / "mixup" / f"{name}.yaml"))
        for key in ("interpolation", "pairing", "ratio", "schedule"):
            if own.get(key) and "_target_" in own[key]:
                assert isinstance(getattr(callback, key), get_object(own[key]["_target_"]))
        counts = callback.summary()
        assert sum(counts.values()) == 10
        assert sum(count > 0 for count in counts.values()) >= (1 if own.get("layers") == "input" else 2)


def test_every_argument_of_the_callback_can_be_overridden(compose: Compose) -> None:
    assert compose().mixup.keys() == {"_target_", "_convert_", *inspect.signature(ManifoldMixupCallback).parameters}
    callback = instantiate(compose("mixup.clean_weight=1", "mixup.pairing={_target_:mm_lightning.Roll}").mixup)
    assert (callback.clean_weight, callback.pairing) == (1, Roll())
    by_name = "mixup.schedule={alpha: {_target_: mm_lightning.WarmUp, until: 0.5}}"
    assert instantiate(compose(by_name).mixup).schedule == {"alpha": WarmUp(0.5)}


def test_ways_are_swept_over() -> None:
    given = OverridesParser.create().parse_overrides(["mixup=none,input,manifold,patchup", "seed=0,1,2"])
    jobs = list(itertools.product(*(list(override.sweep_string_iterator()) for override in given)))
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        configs = [hydra.compose("train", [f"mixup={mixup}", f"seed={seed}"]) for mixup, seed in jobs]
    assert len(configs) == 12
    assert [config.mixup.get("seed") for config in configs] == [None] * 3 + [0, 1, 2] * 3
    kinds = [str((config.mixup.get("interpolation") or {}).get("_target_")) for config in configs[::3]]
    assert kinds == ["None", "None", "None", "mm_lightning.mixup.PatchUp"]


def test_there_is_one_default_of_each_mixup_setting(compose: Compose) -> None:
    configured, in_code = instantiate(compose().mixup), ManifoldMixupCallback()
    assert in_code.alpha == BetaRatio().alpha == 2.0  # Verma et al. (2019) on CIFAR and SVHN
    # the command's is the paper's, which mixes to the end; the callback's was chosen by docs/evidence.md
    assert (configured.schedule, in_code.schedule) == (None, "auto")
    names = [name for name in inspect.signature(ManifoldMixupCallback).parameters if name not in ("seed", "schedule")]
    assert {name: getattr(configured, name) for name in names} == {name: getattr(in_code, name) for name in names}


@pytest.mark.parametrize(("experiment", "alpha"), [("spiral", 1.0), ("mnist_bottleneck", 1.0), ("mnist_flatness", 2.0)])
def test_experiments_keep_the_alpha_of_their_results(experiment: str, alpha: float, compose: Compose) -> None:
    for mixup in ("manifold", "input"):
        assert instantiate(compose(f"+experiment={experiment}", f"mixup={mixup}").mixup).alpha == alpha
    assert instantiate(compose(f"+experiment={experiment}", "mixup.alpha=0.5").mixup).alpha == 0.5
    assert compose(f"+experiment={experiment}", "mixup=none").mixup == {}


def test_mixup_settings_arrive(compose: Compose) -> None:
    config = compose("mixup.alpha=0.5", "mixup.per_sample=true", "mixup.probability=0.25", "seed=7")
    callback = instantiate(config.mixup)
    settings = callback.ratio.alpha, callback.ratio.per_sample, callback.probability, callback.seed
    assert settings == (0.5, True, 0.25, 7)


@pytest.mark.parametrize(
    ("option", "kind", "settings"),
    [("adam", Adam, {"lr": 1e-3}), ("sgd", SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4})],
)
def test_optimizer_options(option: str, kind: type, settings: dict[str, float], compose: Compose) -> None:
    optimizer = instantiate(compose(*SMALL, f"optimizer={option}").model).configure_optimizers()["optimizer"]
    assert type(optimizer) is kind
    assert {key: optimizer.defaults[key] for key in settings} == settings


@pytest.mark.parametrize("model", [SMALL, ["model=preact_resnet18"], ["model=wrn28_10", "model.network.depth=10"]])
@pytest.mark.parametrize(
    ("chosen", "kind"),
    [([], nn.CrossEntropyLoss), (["loss=bce_softmax"], SoftmaxBCE), (["~loss"], nn.CrossEntropyLoss)],
)
def test_loss_options(model: list[str], chosen: list[str], kind: type, compose: Compose) -> None:
    sizes = {"num_classes": 10, "in_channels": 3}
    config = compose(*model, *chosen)
    if "network" in config.model:
        config.model.num_classes, config.model.network = 10, {**config.model.network, **sizes}
    assert type(instantiate(config.model).loss) is kind


@pytest.mark.parametrize(
    ("option", "kind", "rates"),
    [
        ("constant", ConstantLR, [1.0, 1.0, 1.0, 1.0, 1.0]),
        ("cosine", CosineAnnealingLR, [1.0, 0.853553, 0.5, 0.146447, 0.0]),  # (1 + cos(pi * epoch / 4)) / 2
        ("step", StepLR, [1.0, 1.0, 0.1, 0.1, 0.01]),
        ("milestones", MultiStepLR, [1.0, 1.0, 0.1, 0.01, 0.01]),
    ],
)
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_scheduler_options(option: str, kind: type, rates: list[float], compose: Compose) -> None:
    overrides = {"step": ["scheduler.step_size=2"], "milestones": ["scheduler.milestones=[2,3]"]}.get(option, [])
    config = compose(*SMALL, f"scheduler={option}", "max_epochs=4", *overrides)
    configured = instantiate(config.model).configure_optimizers()
    scheduler = configured["lr_scheduler"]["scheduler"]
    assert type(scheduler) is kind
    found = []
    for _ in rates:
        found.append(configured["optimizer"].param_groups[0]["lr"] / config.optimizer.lr)
        scheduler.step()
    assert found == pytest.approx(rates, abs=1e-6)


@pytest.mark.parametrize(("option", "kind"), [("tensorboard", TensorBoardLogger), ("csv", CSVLogger)])
def test_logger_options_write_below_the_run_folder(option: str, kind: type, compose: Compose, tmp_path: Path) -> None:
    logger = build_trainer(compose(*SMALL, f"logger={option}")).logger
    assert type(logger) is kind
    assert Path(logger.log_dir) == tmp_path / option


def test_several_loggers_at_once_or_none(compose: Compose) -> None:
    for chosen, kinds in (("[csv,tensorboard]", [CSVLogger, TensorBoardLogger]), ("[]", []), ("none", [])):
        assert [type(one) for one in build_trainer(compose(*SMALL, f"logger={chosen}")).loggers] == kinds


def test_a_logger_of_ones_own_needs_no_node_of_its_own(compose: Compose) -> None:
    own = ["logger=none", "+logger._target_=lightning.pytorch.loggers.CSVLogger", "+logger.save_dir=somewhere"]
    assert build_trainer(compose(*SMALL, *own)).logger.save_dir == "somewhere"


@pytest.mark.parametrize("option", ["cpu", "smoke", "ddp"])
def test_trainer_options(option: str, compose: Compose, tmp_path: Path) -> None:
    trainer = build_trainer(compose(f"trainer={option}", "trainer.accelerator=cpu", "seed=5"))
    assert trainer.world_size == (2 if option == "ddp" else 1)
    assert trainer.max_epochs == (1 if option == "smoke" else 10)
    assert trainer.limit_train_batches == (20 if option == "smoke" else 1.0)
    assert isinstance(trainer.strategy.checkpoint_io, WholeCheckpointIO)
    assert trainer.default_root_dir == str(tmp_path)
    assert trainer.checkpoint_callback.dirpath == str(tmp_path / "checkpoints")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_trainer_uses_the_device(compose: Compose) -> None:
    assert build_trainer(compose("trainer=gpu")).strategy.root_device.type == "cuda"


def test_checkpoints_can_be_replaced_by_another_way_to_write(compose: Compose) -> None:
    config = compose("trainer.plugins._target_=lightning.pytorch.plugins.TorchCheckpointIO")
    writer = build_trainer(config).strategy.checkpoint_io
    assert isinstance(writer, CheckpointIO)
    assert not isinstance(writer, WholeCheckpointIO)


DIAGNOSTICS = [option.split("/")[1] for option in OPTIONS if option.startswith("diagnostics/") and "none" not in option]


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        ([], []),
        (["diagnostics=none"], []),
        (["diagnostics=[]"], []),
        (["~diagnostics"], []),
        (["diagnostics=hidden_space"], ["hidden_space"]),
        (["diagnostics=[mixup_monitor,hidden_space]"], ["mixup_monitor", "hidden_space"]),
        (["+experiment=several"], ["hidden_space", "mixup_monitor"]),
        (["+experiment=several", "diagnostics=none"], []),
        (["+experiment=several", "diagnostics=[mixup_monitor]"], ["mixup_monitor"]),
    ],
    ids=lambda value: "_".join(value) or "default" if value is not None else None,
)
def test_diagnostics_are_one_or_several_or_none(
    overrides: list[str], names: list[str], compose: Compose, tmp_path: Path
) -> None:
    experiment = tmp_path / "conf" / "experiment" / "several.yaml"
    experiment.parent.mkdir(parents=True)
    experiment.write_text("# @package _global_\ndefaults:\n  - override /diagnostics: [hidden_space, mixup_monitor]\n")
    config = compose(*overrides, f"hydra.searchpath=[file://{tmp_path / 'conf'}]")
    assert list(config.diagnostics) == names
    kinds = [type(callback).__name__ for callback in build_trainer(config).callbacks]
    wanted = {"hidden_space": "HiddenSpace", "mixup_monitor": "MixupMonitor"}
    assert [kind for kind in kinds if kind in wanted.values()] == [wanted[name] for name in names]


def test_each_diagnostic_opens_into_its_own_node(compose: Compose) -> None:
    together = compose(f"diagnostics=[{','.join(DIAGNOSTICS)}]").diagnostics
    assert list(together) == DIAGNOSTICS
    for option in DIAGNOSTICS:
        assert compose(f"diagnostics={option}").diagnostics == {option: together[option]}
        assert "_target_" in together[option]


def test_settings_of_one_of_several_diagnostics(compose: Compose) -> None:
    config = compose("diagnostics=[hidden_space,mixup_monitor]", "diagnostics.mixup_monitor.every_n_epochs=7")
    assert instantiate(config.diagnostics.mixup_monitor).every_n_epochs == 7
    assert instantiate(config.diagnostics.hidden_space).every_n_epochs == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("hiden_space", "Could not find 'diagnostics/hiden_space'.*Available options.*hidden_space.*mixup_monitor"),
        ("[mixup_monitor,hiden_space]", "Could not load 'diagnostics/hiden_space'"),  # Hydra lists no options there
    ],
    ids=["one", "several"],
)
def test_misspelt_diagnostics_are_named(override: str, message: str, compose: Compose) -> None:
    with pytest.raises(MissingConfigException, match=f"(?s){message}"):
        compose(f"diagnostics={override}")


def test_folders_of_a_sweep_carry_neither_brackets_nor_paths(tmp_path: Path) -> None:
    paths = ["data.root=/images/of/mine", "+data.path=of/mine.npz"]  # which are the same in all runs, mostly
    overrides = ["diagnostics=[hidden_space,mixup_monitor]", "layers=[input,a.b]", "run_dir='my/runs'", *paths]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose("train", ["hydra.job.num=12", *overrides], return_hydra_config=True)
    assert config.hydra.sweep.subdir == "12_layers-input_a.b_run_dir-my_runs"


def test_long_lines_of_a_sweep_have_folders_of_their_own(tmp_path: Path) -> None:
    names = [folder_name("a" * 300 + end) for end in ("0", "1")]
    assert len(set(names)) == 2
    for name in names:
        (tmp_path / f"10000_{name}").mkdir()  # which takes 255 bytes
        assert set(name.rsplit("_", 1)[0]) == {"a"}
    assert folder_name("a" * 200) == "a" * 200


def test_a_folder_of_a_sweep_is_typed_as_it_stands() -> None:
    parser = OverridesParser.create()
    for text, name in (("a-[ä,字]_b-'1 2'", "a-__b-1_2"), ("~x_lr-1e-5_k-{y: z}", "x_lr-1e-5_k-y_z"), (3, "3")):
        assert folder_name(text) == name
        assert parser.parse_override(f"ckpt_path=multirun/0_{name}/last.ckpt").value() == f"multirun/0_{name}/last.ckpt"
        assert shlex.quote(name) == name


def test_callbacks_beyond_the_configuration_come_after_it(compose: Compose) -> None:
    class Extra(pl.Callback):
        pass

    config = compose("+experiment=mnist_bottleneck", "diagnostics=hidden_space")
    callbacks = build_trainer(config, [Extra()]).callbacks
    names = [type(callback).__name__ for callback in callbacks]
    assert sorted(names) == sorted(
        "HiddenSpace EpochLines StopAfterStep ManifoldMixupCallback Extra BestCheckpoint".split()
    )
    assert names.index("Extra") > names.index("ManifoldMixupCallback")


@pytest.mark.parametrize("convert", ["none", "all"])
def test_lists_and_mappings_of_ones_own_configuration_are_taken(
    convert: str, make_trainer: Callable[..., pl.Trainer], tmp_path: Path
) -> None:
    settings = {
        "layers": ["input", "first"],
        "layer_weights": [0, 2],
        "loss": ["loss", "other"],
        "batch_dim": {"first": 0},
        "schedule": None,
    }
    node = {"_target_": "mm_lightning.ManifoldMixupCallback", "_convert_": convert, **settings}
    pairing = {"pairing": {"_target_": "mm_lightning.Roll"}}
    config = OmegaConf.create({"trainer": {"_target_": "builtins.dict", "callbacks": [{**node, **pairing}]}})
    (callback,) = instantiate(config).trainer["callbacks"]
    assert {name: getattr(callback, name) for name in settings} == settings
    assert [type(getattr(callback, name)) for name in settings] == [list, list, list, dict, type(None)]
    trainer = make_trainer(callback)
    trainer.fit(TwoLosses(), loader())
    assert callback.summary() == {"input": 0, "first": 5, "unmixed": 0}
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["mm_lightning"]
    assert (saved["layers"], saved["layer_weights"], saved["pairing"]) == (["input", "first"], [0.0, 2.0], "Roll()")
    assert pickle.loads(pickle.dumps(callback)).batch_dim == {"first": 0}


class TwoLosses(Classifier):
    """Its losses are attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.loss, self.other = torch.nn.CrossEntropyLoss(), torch.nn.CrossEntropyLoss(label_smoothing=0.1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        logits = self(batch[0])
        return self.loss(logits, batch[1]) + self.other(logits, batch[1])
