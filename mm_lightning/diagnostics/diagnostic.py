"""What diagnostics of hidden states share: when they look, at which rows, and where their findings go."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypedDict

import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from matplotlib.figure import Figure
from torch import Tensor

from mm_lightning.arguments import check_count
from mm_lightning.diagnostics.drawing import check_folder, figures_folder, publish
from mm_lightning.diagnostics.hidden_states import HiddenStates
from mm_lightning.diagnostics.occasions import is_last_validation
from mm_lightning.diagnostics.training_rows import overhear_training, run_on_first_entry
from mm_lightning.evaluation.rows import IGNORED
from mm_lightning.namespaces import CallbackOfBoth, LightningModule, Trainer

Forward = Callable[[LightningModule, Any], Any]


class Rows(NamedTuple):
    """What one epoch let a diagnostic overhear, from all processes, on the CPU."""

    hidden: dict[str, Tensor]  # by layer, in the order asked for: (N, D)
    targets: Tensor  # class indices, integer, (N,)
    split: str  # "val", "test" or "train"
    occasion: str  # for titles, e.g. "validation set, epoch 3", from 1


class Findings(NamedTuple):
    """What a diagnostic made of its rows."""

    numbers: dict[str, float]  # by what they measure, without split and name
    arrays: dict[str, np.ndarray]  # what the picture is drawn from; kept as ``.npz`` beside it


class SharedArguments(TypedDict, total=False):
    """What a kind of diagnostic takes as it comes and hands on to :class:`Diagnostic`, which says what they are."""

    train_points: int
    dirpath: str | Path | None
    targets: Callable[[Any], Tensor] | None
    forward: Forward | None


class Diagnostic(CallbackOfBoth, ABC):
    """Overhears layers while the module is validated and tested, measures, draws, logs.

    A subclass says what is measured (:meth:`measure`, by every process) and drawn (:meth:`draw`, by rank zero). Where
    hidden states are not finite a warning says so, and nothing is measured.

    The states are overheard while the module's own ``validation_step`` or ``test_step`` runs, so that they cost a copy
    of the layer's output (``max_points`` rows in main memory), not a further forward pass; a hook is on the layer only
    during the epochs that are looked at: validation epochs n - 1, 2n - 1, ... for n = ``every_n_epochs``, the last one
    that ``max_epochs`` or ``max_steps`` allows (an early stop is not foreseen), every ``trainer.validate`` and every
    ``trainer.test``; not the sanity check. Of several dataloaders the first is used. With several processes the shares
    of all are gathered. Rows with the target -100, which torch's losses ignore, are left out. A ``fast_dev_run``
    measures and draws, but writes no files.

    With ``train_points`` the training data are looked at too, unmixed and once, when training ends: ``forward`` runs
    on as many rows in evaluation mode, as the loader gives them. Not after an interruption. A callback that gives the
    module other weights at that moment, such as ``WeightAveraging``, must stand before the diagnostic.

    The picture is logged as ``NAME/SPLIT`` and written as ``NAME_SPLIT.png``, over the one before, with the data behind
    it as ``NAME_SPLIT.npz``; numbers are logged as ``SPLIT/NAME/QUANTITY``. A split is ``val``, ``test`` or ``train``.
    The ``unwritten_name`` of a kind stands in no number's key: a :class:`HiddenSpace` logs ``val/spread_ratio``, and
    ``val/OTHER/spread_ratio`` if it has another name.

    Args:
        name: First part of the picture's tag and file, and part of the log keys; of two diagnostics each needs its own.
        layers: Dotted names of the layers overheard. ``"input"`` is the batch's first floating point tensor,
            ``"output"`` what the module's own ``forward`` returns.
        every_n_epochs: Period of the validation pictures, in epochs; None looks at the last one only.
        max_points: Only the first so many rows of a validation or test epoch are kept, on each process.
        train_points: So many rows of the training data are looked at, on each process; 0 leaves them out.
        dirpath: Folder of the files; default is ``figures`` in ``trainer.default_root_dir``.
        targets: Finds the class indices, integer, (N,), in a batch; default takes the last integer tensor with one
            entry per row.
        forward: Runs the module on a training batch; default hands the batch, or the first entry of a tuple, a list
            or a dict, to ``forward``.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If a number is outside its range.
    """

    unwritten_name: ClassVar[str | None] = None
    run_title: str = ""  # what run the pictures are of, written above their headings; the command says it

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Show the shared arguments in the signature of a subclass that hands them on."""
        super().__init_subclass__(**kwargs)
        _, *shown = inspect.signature(cls.__init__).parameters.values()  # without self
        if shown and "SharedArguments" in str(shown[-1].annotation):
            known = inspect.signature(Diagnostic.__init__).parameters
            shown[-1:] = [known[key].replace(kind=shown[-1].KEYWORD_ONLY) for key in SharedArguments.__annotations__]
        cls.__signature__ = inspect.Signature(shown)

    def __init__(
        self,
        name: str,
        layers: Sequence[str],
        every_n_epochs: int | None = None,
        max_points: int = 10_000,
        train_points: int = 0,
        dirpath: str | Path | None = None,
        targets: Callable[[Any], Tensor] | None = None,
        forward: Forward | None = None,
    ) -> None:
        if every_n_epochs is not None:
            check_count("every_n_epochs", every_n_epochs, 1, "None looks at the last epoch only.")
        check_count("max_points", max_points, 1, "10_000 keeps as many rows.")
        check_count("train_points", train_points, 0, "0 leaves the training data out.")
        check_folder(dirpath)
        self.name = name
        self.layers = list(dict.fromkeys(layers))
        self.every_n_epochs = every_n_epochs
        self.train_points = train_points
        self.dirpath = dirpath
        self.forward = forward or run_on_first_entry
        self._states = HiddenStates(self.layers, max_points, targets)
        self._train_states = HiddenStates(self.layers, train_points, targets)

    @abstractmethod
    def measure(self, trainer: Trainer, pl_module: LightningModule, rows: Rows) -> Findings | str:
        """Return what the rows show, or why they show nothing, as the end of a sentence. Called by every process."""

    @abstractmethod
    def draw(self, findings: Findings, rows: Rows) -> Figure:
        """Draw what was found. Called by rank zero."""

    @property
    def state_key(self) -> str:
        """Two diagnostics of one kind are told apart by their names."""
        return self._generate_state_key(name=self.name)

    def folder(self, trainer: Trainer) -> Path:
        """Return the folder of the pictures."""
        return figures_folder(trainer, self.dirpath)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fail now, not epochs later, where a layer is unknown or two diagnostics have one name."""
        self._check_name(trainer)
        self._states.find(pl_module)  # not in setup, which may come before the module builds its layers

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hook the layers where this epoch is looked at."""
        if not trainer.sanity_checking and (trainer.state.fn != TrainerFn.FITTING or self._is_due(trainer)):
            self._check_name(trainer)
            self._states.open(pl_module)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hook the layers."""
        self._check_name(trainer)
        self._states.open(pl_module)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the hidden states of this batch beside its targets."""
        if dataloader_idx == 0:
            self._states.keep(batch)

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the numbers and the picture."""
        occasion = f"validation set, epoch {trainer.current_epoch + 1}"  # from 1, as the progress bar counts
        pl_module.log_dict(self._look(trainer, pl_module, self._states, "val", occasion), sync_dist=True)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the numbers and the picture."""
        pl_module.log_dict(self._look(trainer, pl_module, self._states, "test", "test set"), sync_dist=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the training data, where asked for."""
        # not in on_fit_end, when the module has left its device
        if not self.train_points:
            return
        overhear_training(trainer, pl_module, self._train_states, self.forward)
        found = self._look(trainer, pl_module, self._train_states, "train", "training set")
        # Lightning's log() is over when training ends
        trainer.callback_metrics.update({key: torch.tensor(number) for key, number in found.items()})
        for logger in trainer.loggers:
            logger.log_metrics(found, step=trainer.global_step)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the hooks off."""
        self._close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the hooks off."""
        self._close()

    def _close(self) -> None:
        self._states.close()
        self._train_states.close()

    def _check_name(self, trainer: Trainer) -> None:
        diagnostics = [callback for callback in trainer.callbacks if isinstance(callback, Diagnostic)]  # type: ignore[attr-defined]
        kinds = [type(one).__name__ for one in diagnostics if one.name == self.name]
        if len(kinds) > 1:
            raise ValueError(
                f"{len(kinds)} diagnostics ({', '.join(kinds)}) have the name {self.name!r} and would overwrite each "
                f"other's pictures. Give each its own: {kinds[1]}(..., name={self.name + '_2'!r})."
            )

    def _is_due(self, trainer: Trainer) -> bool:
        is_nth = self.every_n_epochs is not None and (trainer.current_epoch + 1) % self.every_n_epochs == 0
        return is_nth or is_last_validation(trainer)

    def _look(
        self, trainer: Trainer, pl_module: LightningModule, states: HiddenStates, split: str, occasion: str
    ) -> dict[str, float]:
        if not states.is_open:
            return {}
        collected = states.collected(pl_module)
        states.close()
        rows = None if collected is None else Rows(*_without_ignored(*collected), split, occasion)
        if rows is None:
            findings: Findings | str = "no rows were seen"
        else:
            findings = _obstacle(rows) or self.measure(trainer, pl_module, rows)
        if rows is None or isinstance(findings, str):
            rank_zero_warn(f"{type(self).__name__} neither draws nor logs the {occasion}: {findings}.")
            return {}
        if trainer.is_global_zero:
            figure, folder = self.draw(findings, rows), self.folder(trainer)
            publish(trainer, self.name, split, figure, findings.arrays, folder, self.run_title)
        group = split if self.name == self.unwritten_name else f"{split}/{self.name}"
        return {f"{group}/{quantity}": number for quantity, number in findings.numbers.items()}


def _without_ignored(hidden: dict[str, Tensor], targets: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    kept = targets != IGNORED
    return {layer: states[kept] for layer, states in hidden.items()}, targets[kept]


def _obstacle(rows: Rows) -> str | None:
    if not len(rows.targets):
        return f"all targets are {IGNORED}"
    diverged = [layer for layer, hidden in rows.hidden.items() if not hidden.isfinite().all()]
    return f"layer {diverged[0]!r} has values that are not finite" if diverged else None
