"""Reconstruction and generation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.entry import NOT_OF_THE_BATCH, SEVERAL_PASSES, Entry, Module, classes, everything, reals, seeded, targets

K = 3


class Autoencoder(Module):
    """The input is the target."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        self.bottleneck = nn.Sequential(nn.Linear(8, 3), nn.Tanh())
        self.decoder = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, _ = batch
        x = x.view(x.size(0), -1)
        x_hat = self.decoder(self.bottleneck(self.encoder(x)))
        return F.mse_loss(x_hat, x)


class SupervisedAutoencoder(Autoencoder):
    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(3, K)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        z = self.bottleneck(self.encoder(x))
        reconstruction, classification = F.mse_loss(self.decoder(z), x), F.cross_entropy(self.classifier(z), y)
        self.log_dict({"reconstruction": reconstruction, "classification": classification})
        return reconstruction + classification


class VAE(SupervisedAutoencoder):
    def __init__(self) -> None:
        super().__init__()
        self.mu, self.log_var = nn.Linear(8, 3), nn.Linear(8, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        hidden = self.encoder(x)
        mu, log_var = self.mu(hidden), self.log_var(hidden)
        z = mu + torch.randn_like(mu) * torch.exp(0.5 * log_var)
        kl = -0.5 * torch.mean(torch.sum(1 + log_var - mu.pow(2) - log_var.exp(), dim=1))
        reconstruction = F.mse_loss(self.decoder(z), x, reduction="sum") / len(x)
        return reconstruction + 0.1 * kl + F.cross_entropy(self.classifier(z), y)


class NoisePrediction(Autoencoder):
    """Diffusion: the target is noise that the step draws."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, _ = batch
        noise, t = torch.randn_like(x), torch.rand(len(x), 1, dtype=x.dtype)
        predicted = self.decoder(self.bottleneck(self.encoder((1 - t) * x + t * noise)))
        return F.mse_loss(predicted, noise)


class AuxiliaryClassifierGAN(Module):
    """Odena et al., 2017: labels steer the generator, and the discriminator sees real and generated rows."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.label_embedding = nn.Embedding(K, 3)
        self.generator = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
        self.encoder = nn.Sequential(nn.Linear(4, 8), nn.LeakyReLU(0.2))
        self.validity, self.classifier = nn.Linear(8, 1), nn.Linear(8, K)

    def judge(self, x: Tensor, y: Tensor, real: float) -> Tensor:
        hidden = self.encoder(x)
        validity = self.validity(hidden)
        adversarial = F.binary_cross_entropy_with_logits(validity, torch.full_like(validity, real))
        return adversarial + F.cross_entropy(self.classifier(hidden), y)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        opt_g, opt_d = self.optimizers()
        noise = torch.randn(len(x), 3, dtype=x.dtype)
        generated = self.generator(torch.cat([noise, self.label_embedding(y)], dim=1))

        self.toggle_optimizer(opt_g)
        opt_g.zero_grad()
        self.manual_backward(self.judge(generated, y, real=1.0))
        opt_g.step()
        self.untoggle_optimizer(opt_g)

        self.toggle_optimizer(opt_d)
        opt_d.zero_grad()
        self.manual_backward((self.judge(x, y, real=1.0) + self.judge(generated.detach(), y, real=0.0)) / 2)
        opt_d.step()
        self.untoggle_optimizer(opt_d)

    def configure_optimizers(self) -> Any:
        generator = [*self.label_embedding.parameters(), *self.generator.parameters()]
        discriminator = [p for part in (self.encoder, self.validity, self.classifier) for p in part.parameters()]
        return torch.optim.Adam(generator, lr=2e-4), torch.optim.Adam(discriminator, lr=2e-4)


def _batch() -> Any:
    return reals(4), classes(K)


def _entry(name: str, style: str, module: Any, of: Any = everything, **more: Any) -> Entry:
    return Entry(name, "generative", style, seeded(module), _batch, of, ("encoder",), **more)


ENTRIES = [
    _entry("Autoencoder", "F.mse_loss to the input", Autoencoder, moves_inputs=True),
    _entry(
        "SupervisedAutoencoder", "F.mse_loss to the input + F.cross_entropy", SupervisedAutoencoder, moves_inputs=True
    ),
    _entry("VAE", "F.mse_loss to the input + KL + F.cross_entropy, noise drawn", VAE, moves_inputs=True),
    _entry("NoisePrediction", "F.mse_loss to noise drawn in the step", NoisePrediction, refused=NOT_OF_THE_BATCH),
    _entry(
        "AuxiliaryClassifierGAN",
        "BCE + F.cross_entropy, real and generated rows, two optimizers",
        AuxiliaryClassifierGAN,
        targets(1),
        refused=SEVERAL_PASSES,
    ),
]
