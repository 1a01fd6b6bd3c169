"""Where to mix in an MLP: small real data sets, some choices of layers, ten seeds.

    python scripts/mlp_layers.py            # all runs, docs/results/mlp_layers.json, and the table docs/mlp_layers.md
    python scripts/mlp_layers.py --seeds 2  # the same with fewer, to see that it works; writes nothing

It goes on where it was interrupted. The data sets come with scikit-learn.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from sklearn import datasets
from torch import Tensor, nn

from mm_lightning import ManifoldMixupCallback
from mm_lightning.command.run_folder import environment
from mm_lightning.files import whole_file, write_json
from mm_lightning.study.markdown import gain
from mm_lightning.study.statistics import MARGINS, compare_paired

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "docs/results/mlp_layers.json", ROOT / "docs/mlp_layers.md"
HIDDEN = ["hidden.0", "hidden.1", "hidden.2"]
CHOICES: dict[str, Any] = {
    "none": None,
    "input": "input",
    "auto": "auto",
    "first hidden layer": HIDDEN[:1],
    "last hidden layer": HIDDEN[-1:],
    "input and all hidden layers": ["input", *HIDDEN],
}
DATA = {
    "digits": datasets.load_digits,
    "wine": datasets.load_wine,
    "breast cancer": datasets.load_breast_cancer,
    "diabetes": datasets.load_diabetes,
}
EPOCHS, BATCH, WIDTH, ALPHA, TEST_SHARE = 60, 32, 128, 2.0, 0.3
MADE_BY = {
    "command": "python scripts/mlp_layers.py",
    "epochs": EPOCHS,
    "batch": BATCH,
    "width": WIDTH,
    "alpha": ALPHA,
    "test_share": TEST_SHARE,
}


class MLP(pl.LightningModule):
    """Three hidden layers; classes by cross-entropy, one number by squared error."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        widths = [inputs, WIDTH, WIDTH, WIDTH]
        self.hidden = nn.ModuleList(nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise(widths))
        self.head = nn.Linear(WIDTH, outputs)

    def forward(self, rows: Tensor) -> Tensor:
        """Return the outputs (N, K)."""
        for layer in self.hidden:
            rows = layer(rows)
        return self.head(rows)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        outputs, targets = self(batch[0]), batch[1]
        return F.mse_loss(outputs[:, 0], targets) if targets.is_floating_point() else F.cross_entropy(outputs, targets)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class Batches:
    """The training rows in a new order in every epoch."""

    def __init__(self, inputs: Tensor, targets: Tensor, seed: int) -> None:
        self.inputs, self.targets, self.rng = inputs, targets, torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.inputs) // BATCH

    def __iter__(self) -> Any:
        order = torch.randperm(len(self.inputs), generator=self.rng)
        for i in range(len(self)):
            rows = order[i * BATCH : (i + 1) * BATCH]
            yield self.inputs[rows], self.targets[rows]


def score(data: str, choice: str, seed: int) -> float:
    """Test accuracy in %, or for numbers the share of the variance that is explained, in %. The split is the seed's."""
    found = DATA[data]()
    inputs, targets = found.data.astype(np.float32), found.target
    order = np.random.default_rng(seed).permutation(len(inputs))
    test, train = np.split(order, [int(TEST_SHARE * len(order))])
    mean, deviation = inputs[train].mean(axis=0), inputs[train].std(axis=0) + 1e-6
    inputs = (inputs - mean) / deviation
    is_number = data == "diabetes"
    if is_number:
        targets = (targets - targets[train].mean()) / targets[train].std()
    x = torch.from_numpy(inputs)
    y = torch.from_numpy(targets.astype(np.float32 if is_number else np.int64))
    pl.seed_everything(seed)
    model = MLP(x.shape[1], 1 if is_number else int(y.max()) + 1)
    layers = CHOICES[choice]
    callbacks = [] if layers is None else [ManifoldMixupCallback(ALPHA, layers, seed=seed, schedule=None)]
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tempfile.gettempdir(),
    )
    trainer.fit(model, Batches(x[train], y[train], seed))  # type: ignore[arg-type]
    with torch.no_grad():
        outputs = model.eval()(x[test])
    if is_number:
        return 100 * (1 - float((outputs[:, 0] - y[test]).square().mean() / y[test].var(unbiased=False)))
    return 100 * float((outputs.argmax(dim=1) == y[test]).float().mean())


def table(runs: dict[str, float], seeds: int) -> str:
    """The scores, and what each choice gains on none and on auto, with the intervals of paired differences."""
    lines = ["| data | layers | score, % | over none | over auto |", "| --- | --- | ---: | ---: | ---: |"]
    for data in DATA:
        scores = {choice: np.array([runs[f"{data}/{choice}/{s}"] for s in range(seeds)]) for choice in CHOICES}
        margin = None if data == "diabetes" else 100 * MARGINS["acc"]
        for choice, values in scores.items():
            over = [compare_paired(list(values - scores[other]), "higher", margin) for other in ("none", "auto")]
            gains = [gain(one, 2) if choice != other else "" for one, other in zip(over, ("none", "auto"), strict=True)]
            lines.append(f"| {data} | {choice} | {values.mean():.2f} | {gains[0]} | {gains[1]} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is not there yet, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    seeds = parser.parse_args().seeds
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    keeps = seeds == 10
    content = json.loads(RESULTS.read_text(encoding="utf-8")) if keeps and RESULTS.exists() else {}
    runs: dict[str, float] = content.get("runs", {})
    for seed in range(seeds):
        for data in DATA:
            for choice in CHOICES:
                if (key := f"{data}/{choice}/{seed}") not in runs:
                    runs[key] = round(score(data, choice, seed), 4)
                    if keeps:
                        settings = {"epochs": EPOCHS, "batch": BATCH, "width": WIDTH, "alpha": ALPHA}
                        write_json(
                            RESULTS,
                            {"command": "python scripts/mlp_layers.py", **settings, "runs": runs, **environment()},
                        )
    print(table(runs, seeds))
    if keeps:
        marker = "<!-- made by python scripts/mlp_layers.py -->\n"
        before, after = PAGE.read_text(encoding="utf-8").split(marker)[::2] if PAGE.exists() else ("", "")
        with whole_file(PAGE) as file:
            file.write(f"{before}{marker}{table(runs, seeds)}\n{marker}{after}".encode())


if __name__ == "__main__":
    main()
