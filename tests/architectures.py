"""Tiny networks of many families, with the layers that are safe to mix and those that ``layers="auto"`` chooses.

A layer is safe if every path from the batch to the loss runs through its output; :func:`cuts` finds that by trial. The
layers chosen were worked out by hand. Beside each network stand its weighted layers: the modules that own a parameter
of two dimensions or more and take floats, so neither normalisations nor embeddings. The depth of a layer is the share
of them that have run before it ends; at most three layers are chosen, of depth above 0.1 and up to 0.6.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from mm_lightning.models import preact_resnet18


@dataclass(frozen=True)
class Architecture:
    """A network, a batch for it, and what there is to find in it. Names are those of ``make().named_modules()``."""

    name: str
    family: str
    make: Callable[[], pl.LightningModule]
    batch: Callable[[], Any]
    safe: set[str]
    unsafe: set[str]
    chosen: tuple[str, ...]
    needs: str | None = None  # a package that is not one of the requirements
    since: str | None = None  # the version of it whose layers have these names


def cuts(module: pl.LightningModule, batch: Any, name: str) -> bool:
    """Whether the loss no longer depends on the batch once the output of the module ``name`` is a constant.

    Gradients tell: those of the batch's floats or, if it holds integers alone, those of what they are embedded by.
    """
    module = copy.deepcopy(module)
    batch = tree_map(lambda x: x.clone().requires_grad_() if x.is_floating_point() else x, batch)
    sources = [x for x in tree_leaves(batch) if x.requires_grad]
    integers, looked_up = tree_leaves(batch), set()

    def note(part: nn.Module, args: Any) -> None:
        if any(args[0].shape == x.shape and torch.equal(args[0], x) for x in integers):
            looked_up.add(part)

    if not sources:
        embeddings = [part for part in module.modules() if isinstance(part, nn.Embedding)]
        handles = [part.register_forward_pre_hook(note) for part in embeddings]
        module.training_step(batch, 0)
        [handle.remove() for handle in handles]
        sources = [part.weight for part in looked_up]
    # A copy, because the next module may work in place.
    module.get_submodule(name).register_forward_hook(lambda part, args, output: output.detach().clone())
    loss = module.training_step(batch, 0)
    if not loss.requires_grad:
        return True
    return all(gradient is None for gradient in torch.autograd.grad(loss, sources, allow_unused=True))


def run_once(module: pl.LightningModule, batch: Any) -> set[str]:
    """Names of the modules that run exactly once in a training step and return one tensor."""
    module = copy.deepcopy(module)
    outputs = defaultdict(list)
    for name, part in module.named_modules():
        part.register_forward_hook(lambda part, args, output, name=name: outputs[name].append(output))
    module.training_step(batch, 0)
    return {name for name, runs in outputs.items() if len(runs) == 1 and isinstance(runs[0], Tensor)}


def classify(net: nn.Module, batch: Any) -> Tensor:
    *inputs, targets = batch
    return F.cross_entropy(net(*inputs), targets)


def classify_twice(net: nn.Module, batch: Any) -> Tensor:
    x, *targets = batch
    return sum(F.cross_entropy(logits, y) for logits, y in zip(net(x), targets, strict=True))


def own_loss(net: nn.Module, batch: Any) -> Tensor:
    return net(**batch).loss


class Wrapped(pl.LightningModule):
    """A network and what it is trained on, ``loss(net, batch)``."""

    def __init__(self, net: nn.Module, loss: Callable[[nn.Module, Any], Tensor] = classify) -> None:
        super().__init__()
        self.net = net
        self.loss = loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self.net, batch)


def floats(*shape: int) -> Tensor:
    return torch.randn(4, *shape, generator=torch.Generator().manual_seed(1))


def integers(most: int, *shape: int) -> Tensor:
    return torch.randint(0, most, (4, *shape), generator=torch.Generator().manual_seed(2))


def images() -> tuple[Tensor, Tensor]:
    return floats(3, 8, 8), integers(3)


def tokens() -> tuple[Tensor, Tensor]:
    """Token ids with padding, 0, at the end of two of the four rows."""
    lengths = torch.tensor([6, 4, 6, 2])
    return (integers(15, 6) + 1) * (torch.arange(6) < lengths[:, None]), integers(3)


def chain(**modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))


def conv(channels_in: int, channels: int, size: int = 3, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels, size, stride, size // 2, groups=groups, bias=False)


def conv_norm_relu(channels_in: int, channels: int, size: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(conv(channels_in, channels, size, stride), nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


def pool() -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


ARCHITECTURES: list[Architecture] = []


# 21 weighted layers: conv1; 4 convolutions in layer1, 4 and a shortcut in each of the next three; linear.
# Ends: conv1 1/21 = 0.05, layer1 5/21 = 0.24, layer2 10/21 = 0.48, layer3 15/21 = 0.71. The paper's choice, too.
ARCHITECTURES.append(
    Architecture(
        name="preact_resnet18",
        family="residual network, pre-activation",
        make=lambda: Wrapped(preact_resnet18(num_classes=3, width=4)),
        batch=images,
        safe={
            *("net", "net.conv1", "net.layer1", "net.layer2", "net.layer3", "net.layer4", "net.linear"),
            *(f"net.layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)),
            *("net.layer2.0.bn1", "net.layer3.0.bn1", "net.layer4.0.bn1"),  # here the shortcut starts behind bn1
        },
        unsafe={
            *("net.layer1.0.bn1", "net.layer1.0.conv1", "net.layer1.0.bn2", "net.layer1.0.conv2"),
            *("net.layer2.0.conv1", "net.layer2.0.bn2", "net.layer2.0.conv2", "net.layer2.0.shortcut"),
            *("net.layer4.1.bn1", "net.layer4.1.conv2"),
        },
        chosen=("input", "net.layer1", "net.layer2"),
    )
)


class ResidualBlock(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        norm = nn.BatchNorm2d(channels)
        self.body = nn.Sequential(*conv_norm_relu(channels_in, channels, 3, stride), conv(channels, channels), norm)
        self.shortcut = nn.Sequential()  # returns its input itself
        if stride > 1:
            self.shortcut = nn.Sequential(conv(channels_in, channels, 1, stride), nn.BatchNorm2d(channels))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.body(x) + self.shortcut(x))


# 16 weighted layers: stem; 4 in layer1; 4 and a shortcut in layer2 and layer3; head.
# Ends: stem 1/16 = 0.06, layer1 5/16 = 0.31, layer2 10/16 = 0.63.
ARCHITECTURES.append(
    Architecture(
        name="resnet",
        family="residual network, post-activation",
        make=lambda: Wrapped(
            chain(
                stem=conv_norm_relu(3, 4),
                layer1=nn.Sequential(ResidualBlock(4, 4, 1), ResidualBlock(4, 4, 1)),
                layer2=nn.Sequential(ResidualBlock(4, 8, 2), ResidualBlock(8, 8, 1)),
                layer3=nn.Sequential(ResidualBlock(8, 16, 2), ResidualBlock(16, 16, 1)),
                pool=pool(),
                head=nn.Linear(16, 3),
            )
        ),
        batch=images,
        safe={
            *("net.stem", "net.stem.0", "net.stem.1", "net.stem.2", "net.pool", "net.head"),
            *("net.layer1", "net.layer2", "net.layer3"),
            *(f"net.layer{stage}.{block}" for stage in (1, 2, 3) for block in (0, 1)),
            *("net.layer1.0.relu", "net.layer3.1.relu"),
        },
        unsafe={
            *("net.layer1.0.body", "net.layer1.0.body.0", "net.layer1.0.body.4", "net.layer1.0.shortcut"),
            *("net.layer1.1.body.2", "net.layer1.1.shortcut"),
            *("net.layer2.0.body", "net.layer2.0.shortcut", "net.layer2.0.shortcut.0"),
        },
        chosen=("input", "net.layer1"),
    )
)


class WideBlock(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(channels_in), conv(channels_in, channels, 3, stride)
        self.dropout = nn.Dropout(0.3)
        self.norm2, self.conv2 = nn.BatchNorm2d(channels), conv(channels, channels)
        self.shortcut = nn.Identity() if channels_in == channels else conv(channels_in, channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.norm1(x))
        hidden = self.conv2(self.dropout(F.relu(self.norm2(self.conv1(activated)))))
        hidden += self.shortcut(x)
        return hidden


# 17 weighted layers: conv; 4 and a shortcut in each group; head.
# Ends: conv 1/17 = 0.06, group1 6/17 = 0.35, group2 11/17 = 0.65.
ARCHITECTURES.append(
    Architecture(
        name="wide_resnet",
        family="wide residual network",
        make=lambda: Wrapped(
            chain(
                conv=conv(3, 4),
                group1=nn.Sequential(WideBlock(4, 8, 1), WideBlock(8, 8, 1)),
                group2=nn.Sequential(WideBlock(8, 16, 2), WideBlock(16, 16, 1)),
                group3=nn.Sequential(WideBlock(16, 32, 2), WideBlock(32, 32, 1)),
                norm=nn.BatchNorm2d(32),
                relu=nn.ReLU(inplace=True),
                pool=pool(),
                head=nn.Linear(32, 3),
            )
        ),
        batch=images,
        safe={
            *("net.conv", "net.group1", "net.group2", "net.group3", "net.norm", "net.relu", "net.pool", "net.head"),
            *(f"net.group{group}.{block}" for group in (1, 2, 3) for block in (0, 1)),
        },
        unsafe={
            *("net.group1.0.norm1", "net.group1.0.conv1", "net.group1.0.dropout", "net.group1.0.conv2"),
            *("net.group1.0.shortcut", "net.group1.1.shortcut", "net.group1.1.conv2", "net.group3.1.norm2"),
        },
        chosen=("input", "net.group1"),
    )
)


class DenseBlock(nn.Module):
    """Each layer sees everything before it and adds two channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        widths = (channels, channels + 2, channels + 4)
        self.layers = nn.ModuleList(nn.Sequential(nn.BatchNorm2d(n), nn.ReLU(), conv(n, 2)) for n in widths)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x)], dim=1)
        return x


def transition(channels_in: int, channels: int) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(channels_in), nn.ReLU(), conv(channels_in, channels, 1), nn.AvgPool2d(2))


# 13 weighted layers: stem; 3 in each block; 1 in each transition; head.
# Ends: stem 1/13 = 0.08, block1 4/13 = 0.31, transition1 5/13 = 0.38, block2 8/13 = 0.62.
ARCHITECTURES.append(
    Architecture(
        name="densenet",
        family="densely connected network",
        make=lambda: Wrapped(
            chain(
                stem=conv(3, 4),
                block1=DenseBlock(4),
                transition1=transition(10, 4),
                block2=DenseBlock(4),
                transition2=transition(10, 4),
                block3=DenseBlock(4),
                pool=pool(),
                head=nn.Linear(10, 3),
            )
        ),
        batch=images,
        safe={
            *("net.stem", "net.block1", "net.transition1", "net.block2", "net.transition2", "net.block3", "net.head"),
            *(f"net.transition1.{i}" for i in range(4)),
        },
        unsafe={f"net.block{block}.layers.{layer}" for block in (1, 2, 3) for layer in (0, 1, 2)}
        | {"net.block1.layers.0.0", "net.block3.layers.2.2"},
        chosen=("input", "net.block1", "net.transition1"),
    )
)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode1 = nn.Sequential(conv_norm_relu(3, 4), conv_norm_relu(4, 4))
        self.encode2 = nn.Sequential(conv_norm_relu(4, 8), conv_norm_relu(8, 8))
        self.pool = nn.MaxPool2d(2)
        self.bottom = nn.Sequential(conv_norm_relu(8, 16), conv_norm_relu(16, 16))
        self.up2, self.decode2 = nn.ConvTranspose2d(16, 8, 2, 2), nn.Sequential(*conv_norm_relu(16, 8), conv(8, 8))
        self.up1, self.decode1 = nn.ConvTranspose2d(8, 4, 2, 2), nn.Sequential(*conv_norm_relu(8, 4), conv(4, 4))
        self.head = nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.encode1(x)
        coarse = self.encode2(self.pool(fine))
        hidden = self.up2(self.bottom(self.pool(coarse)))
        hidden = self.up1(self.decode2(torch.cat([coarse, hidden], dim=1)))
        return self.head(self.decode1(torch.cat([fine, hidden], dim=1)))


# 13 weighted layers: 2 in each of encode1, encode2, bottom, decode2 and decode1; up2, up1 and head.
# Everything between encode1 and decode1 has the outer skip around it. Ends: encode1 2/13 = 0.15, decode1 12/13.
ARCHITECTURES.append(
    Architecture(
        name="unet",
        family="encoder and decoder with skips, segmentation",
        make=lambda: Wrapped(UNet()),
        batch=lambda: (floats(3, 8, 8), integers(3, 8, 8)),
        safe={"net.encode1", "net.encode1.0", "net.encode1.1", "net.decode1", "net.decode1.0", "net.head"},
        unsafe={
            *("net.encode2", "net.encode2.0", "net.bottom", "net.up2", "net.decode2", "net.up1"),
            "net.pool",  # runs twice
        },
        chosen=("input", "net.encode1"),
    )
)


class Patches(nn.Module):
    """Images (N, 3, 8, 8) to four patches (N, 4, D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, kernel_size=4, stride=4)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (N, heads, T, D / heads)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def hidden_layer(width_in: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width_in, width), nn.GELU(), nn.Linear(width, width_in))


class TransformerBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads=2)
        self.norm2, self.mlp = nn.LayerNorm(width), hidden_layer(width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = Patches(8)
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 5, 8))
        self.blocks = nn.Sequential(*(TransformerBlock(8) for _ in range(6)))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), self.patches(x)], dim=1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


# 27 weighted layers: the convolution; 4 in each block; head; and the network itself, which owns token and positions
# and ends last. Ends: patches 1/27 = 0.04, blocks 25/27, so one level down: block 0 5/27 = 0.19, 1 9/27 = 0.33,
# 2 13/27 = 0.48, 3 17/27 = 0.63. (Without the network itself: of 26, the same choice.)
ARCHITECTURES.append(
    Architecture(
        name="vit",
        family="vision transformer",
        make=lambda: Wrapped(VisionTransformer()),
        batch=images,
        safe={"net.patches", "net.patches.conv", "net.blocks", *(f"net.blocks.{i}" for i in range(6))}
        | {"net.norm", "net.head"},
        unsafe={
            *("net.blocks.0.norm1", "net.blocks.0.attention", "net.blocks.0.attention.qkv"),
            *("net.blocks.0.attention.out", "net.blocks.0.norm2", "net.blocks.0.mlp", "net.blocks.5.mlp.2"),
        },
        chosen=("input", "net.blocks.0", "net.blocks.1", "net.blocks.2"),
    )
)


class TokenEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(16, 8, padding_idx=0), nn.Parameter(torch.randn(6, 8))
        layer = nn.TransformerEncoderLayer(8, nhead=2, dim_feedforward=16, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=4, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        is_padding = ids == 0
        hidden = self.encoder(self.embedding(ids) + self.positions, src_key_padding_mask=is_padding)
        weights = (~is_padding).float().unsqueeze(2)  # (N, T, 1)
        return self.head((hidden * weights).sum(dim=1) / weights.sum(dim=1))


# 13 weighted layers: self_attn, linear1 and linear2 in each of four layers; head. (The network itself owns positions,
# but takes integers.) Ends: embedding 0, encoder 12/13, so two levels down: layer 0 3/13 = 0.23, 1 6/13 = 0.46,
# 2 9/13 = 0.69. The inputs are integers: "input" is the end of the embedding.
ARCHITECTURES.append(
    Architecture(
        name="encoder",
        family="transformer encoder on padded token ids",
        make=lambda: Wrapped(TokenEncoder()),
        batch=tokens,
        safe={"net.embedding", "net.encoder", *(f"net.encoder.layers.{i}" for i in range(4)), "net.head"}
        | {"net.encoder.layers.0.norm1", "net.encoder.layers.0.norm2", "net.encoder.layers.3.norm1"},
        unsafe={
            *("net.encoder.layers.0.self_attn", "net.encoder.layers.0.dropout1", "net.encoder.layers.0.linear1"),
            *("net.encoder.layers.0.linear2", "net.encoder.layers.0.dropout2", "net.encoder.layers.3.linear1"),
        },
        chosen=("input", "net.encoder.layers.0", "net.encoder.layers.1"),
    )
)


class LastOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(16, 8), nn.LSTM(8, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        output, _ = self.lstm(self.embedding(ids))
        return self.head(output[:, -1])


# 2 weighted layers: lstm 1/2, head 2/2. The state that it also returns is not used.
ARCHITECTURES.append(
    Architecture(
        name="lstm_output",
        family="recurrent network on token ids, last output",
        make=lambda: Wrapped(LastOutput()),
        batch=tokens,
        safe={"net", "net.embedding", "net.head"},
        unsafe=set(),
        chosen=("input", "net.lstm"),
    )
)


class LastHidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project, self.lstm = nn.Linear(5, 8), nn.LSTM(8, 8, num_layers=2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        _, (hidden, _) = self.lstm(self.project(x))
        return self.head(hidden[-1])  # (layers, N, D) -> (N, D)


# 3 weighted layers. Ends: project 1/3 = 0.33, lstm 2/3, head 3/3.
ARCHITECTURES.append(
    Architecture(
        name="lstm_hidden",
        family="recurrent network on features, last hidden state",
        make=lambda: Wrapped(LastHidden()),
        batch=lambda: (floats(6, 5), integers(3)),
        safe={"net", "net.project", "net.lstm", "net.head"},  # the state's rows are in its dimension 1
        unsafe=set(),
        chosen=("input", "net.project"),
    )
)


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with a ReLU between any two."""
    modules: list[nn.Module] = [nn.Linear(widths[0], widths[1])]
    for i in range(1, len(widths) - 1):
        modules += [nn.ReLU(), nn.Linear(widths[i], widths[i + 1])]
    return nn.Sequential(*modules)


# 4 weighted layers: 1, 3, 5 and 7. Ends: 1 and 2 at 1/4, 3 and 4 at 2/4, 5 and 6 at 3/4; of two the later, a ReLU.
ARCHITECTURES.append(
    Architecture(
        name="mlp",
        family="multilayer perceptron",
        make=lambda: Wrapped(nn.Sequential(nn.Flatten(), *mlp(192, 8, 8, 8, 3))),
        batch=images,
        safe={"net", *(f"net.{i}" for i in range(8))},
        unsafe=set(),
        chosen=("input", "net.2", "net.4"),
    )
)


class MixerBlock(nn.Module):
    def __init__(self, patches: int, width: int) -> None:
        super().__init__()
        self.norm1, self.across = nn.LayerNorm(width), hidden_layer(patches, 8)
        self.norm2, self.within = nn.LayerNorm(width), hidden_layer(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.across(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.within(self.norm2(x))


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = Patches(6)
        self.blocks = nn.ModuleList(MixerBlock(4, 6) for _ in range(8))
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(dim=1))


# 34 weighted layers: the convolution; 4 in each block; head. Ends: patches 1/34 = 0.03, block 0 5/34 = 0.15,
# 1 9/34 = 0.26, 2 13/34 = 0.38, 3 17/34 = 0.50, 4 21/34 = 0.62. Of four the nearest to 0.2, 0.4 and 0.6: 0, 2 and 3.
ARCHITECTURES.append(
    Architecture(
        name="mixer",
        family="MLP-Mixer",
        make=lambda: Wrapped(Mixer()),
        batch=images,
        safe={"net.patches", *(f"net.blocks.{i}" for i in range(8)), "net.norm", "net.head"},
        unsafe={"net.blocks.0.norm1", "net.blocks.0.across", "net.blocks.0.norm2", "net.blocks.0.within"}
        | {"net.blocks.7.across.0", "net.blocks.7.within.2"},
        chosen=("input", "net.blocks.0", "net.blocks.2", "net.blocks.3"),
    )
)


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Sequential(nn.Linear(4, 8), nn.ReLU()), nn.Sequential(nn.Linear(6, 8), nn.ReLU())
        self.joint = mlp(16, 8, 8, 8, 3)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.joint(torch.cat([self.left(x), self.right(z)], dim=1))


# 6 weighted layers: left, right, and 4 in joint. Each tower has the other around it; joint 6/6, so one level down:
# joint.0 and joint.1 at 3/6, the later; joint.2 and joint.3 at 4/6 = 0.67.
ARCHITECTURES.append(
    Architecture(
        name="two_towers",
        family="two inputs, a tower for each",
        make=lambda: Wrapped(TwoTowers()),
        batch=lambda: (floats(4), floats(6), integers(3)),
        safe={"net", "net.joint", *(f"net.joint.{i}" for i in range(7))},
        unsafe={"net.left", "net.left.0", "net.left.1", "net.right", "net.right.0", "net.right.1"},
        chosen=("input", "net.joint.1"),
    )
)


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.joint = nn.Sequential(nn.Linear(4, 8), nn.ReLU()), mlp(8, 8, 8, 8, 8, 3)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.joint((self.encoder(x) - self.encoder(z)).abs())


# 6 weighted layers: 1 in encoder, which runs twice; 5 in joint. joint 6/6, so one level down: joint.0 and joint.1 at
# 2/6 = 0.33, joint.2 and joint.3 at 3/6, joint.4 and joint.5 at 4/6. (If encoder's two runs counted: 3/7, 4/7, 5/7.)
ARCHITECTURES.append(
    Architecture(
        name="siamese",
        family="two inputs, one tower for both",
        make=lambda: Wrapped(Siamese()),
        batch=lambda: (floats(4), floats(4).flip(0), integers(3)),
        safe={"net", "net.joint", *(f"net.joint.{i}" for i in range(9))},
        unsafe={"net.encoder", "net.encoder.0", "net.encoder.1"},
        chosen=("input", "net.joint.1", "net.joint.3"),
    )
)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
        self.head1, self.head2 = mlp(8, 8, 3), mlp(8, 8, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.trunk(x)
        return self.head1(hidden), self.head2(hidden)


# 6 weighted layers: 2 in each of trunk, head1 and head2. Each head has the other beside it. End: trunk 2/6 = 0.33.
ARCHITECTURES.append(
    Architecture(
        name="two_heads",
        family="one trunk, two heads, two losses",
        make=lambda: Wrapped(TwoHeads(), classify_twice),
        batch=lambda: (floats(4), integers(3), integers(5)),
        safe={"net.trunk", *(f"net.trunk.{i}" for i in range(4))},
        unsafe={"net.head1", "net.head1.0", "net.head1.2", "net.head2", "net.head2.0", "net.head2.2"},
        chosen=("input", "net.trunk"),
    )
)


class ConvNextBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise, self.norm = conv(channels, channels, 7, groups=channels), nn.LayerNorm(channels)
        self.pointwise = hidden_layer(channels, 2 * channels)
        self.scale = nn.Parameter(torch.full((channels,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.depthwise(x).permute(0, 2, 3, 1))  # channels last
        return x + (self.scale * self.pointwise(hidden)).permute(0, 3, 1, 2)


def shrink(channels_in: int, channels: int) -> nn.Sequential:
    return nn.Sequential(nn.GroupNorm(1, channels_in), nn.Conv2d(channels_in, channels, 2, 2))


# 20 weighted layers: stem; 3 in each of five blocks; 1 in each shrink; head.
# Ends: stem 1/20, stage1 4/20 = 0.20, shrink1 5/20 = 0.25, stage2 8/20 = 0.40, shrink2 9/20 = 0.45, stage3 15/20.
# Of four the nearest to 0.2, 0.4 and 0.6: stage1, stage2, shrink2.
ARCHITECTURES.append(
    Architecture(
        name="convnext",
        family="ConvNeXt",
        make=lambda: Wrapped(
            chain(
                stem=conv(3, 4),
                stage1=nn.Sequential(ConvNextBlock(4)),
                shrink1=shrink(4, 6),
                stage2=nn.Sequential(ConvNextBlock(6)),
                shrink2=shrink(6, 8),
                stage3=nn.Sequential(ConvNextBlock(8), ConvNextBlock(8)),
                shrink3=shrink(8, 10),
                stage4=nn.Sequential(ConvNextBlock(10)),
                pool=pool(),
                head=nn.Linear(10, 3),
            )
        ),
        batch=images,
        safe={
            *("net.stem", "net.stage1", "net.stage2", "net.stage3", "net.stage4", "net.pool", "net.head"),
            *("net.shrink1", "net.shrink1.0", "net.shrink2", "net.shrink3", "net.stage3.0", "net.stage3.1"),
        },
        unsafe={
            *("net.stage1.0.depthwise", "net.stage1.0.norm", "net.stage1.0.pointwise", "net.stage1.0.pointwise.0"),
            *("net.stage3.1.depthwise", "net.stage4.0.pointwise"),
        },
        chosen=("input", "net.stage1", "net.stage2", "net.shrink2"),
    )
)


class Branches(nn.Module):
    """Three parallel branches, concatenated: N to 6 channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [
                conv_norm_relu(channels, 2, 1),
                nn.Sequential(conv_norm_relu(channels, 2, 1), conv_norm_relu(2, 2, 3)),
                nn.Sequential(nn.MaxPool2d(3, 1, 1), conv_norm_relu(channels, 2, 1)),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], dim=1)


# 14 weighted layers: stem; 4 in each of three; head.
# Ends: stem 1/14 = 0.07, mixed1 5/14 = 0.36, mixed2 9/14 = 0.64.
ARCHITECTURES.append(
    Architecture(
        name="inception",
        family="parallel branches, concatenated",
        make=lambda: Wrapped(
            chain(
                stem=conv_norm_relu(3, 4),
                mixed1=Branches(4),
                mixed2=Branches(6),
                mixed3=Branches(6),
                pool=pool(),
                head=nn.Linear(6, 3),
            )
        ),
        batch=images,
        safe={"net.stem", "net.stem.1", "net.mixed1", "net.mixed2", "net.mixed3", "net.pool", "net.head"},
        unsafe={f"net.mixed{i}.branches.{branch}" for i in (1, 2, 3) for branch in (0, 1, 2)}
        | {"net.mixed1.branches.1.0", "net.mixed1.branches.2.0", "net.mixed3.branches.0.2"},
        chosen=("input", "net.mixed1"),
    )
)


class SqueezeBlock(nn.Module):
    """A convolution whose channels are weighted by what is in the whole image. No skip."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.body = conv_norm_relu(channels_in, channels)
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), conv(channels, 2, 1), nn.ReLU(), conv(2, channels, 1), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.body(x)
        return hidden * self.gate(hidden)


# 13 weighted layers: 3 in each of four blocks; head. Ends: blocks 12/13, so one level down: block 0 3/13 = 0.23,
# 1 6/13 = 0.46, 2 9/13 = 0.69.
ARCHITECTURES.append(
    Architecture(
        name="squeeze_excitation",
        family="squeeze and excitation",
        make=lambda: Wrapped(
            chain(
                blocks=nn.Sequential(SqueezeBlock(3, 4), *(SqueezeBlock(4, 4) for _ in range(3))),
                pool=pool(),
                head=nn.Linear(4, 3),
            )
        ),
        batch=images,
        safe={"net.blocks", "net.pool", "net.head"}
        | {f"net.blocks.{i}{part}" for i in range(4) for part in ("", ".body", ".body.0", ".body.1", ".body.2")},
        unsafe={f"net.blocks.{i}.gate" for i in range(4)} | {"net.blocks.0.gate.0", "net.blocks.0.gate.3"},
        chosen=("input", "net.blocks.0", "net.blocks.1"),
    )
)

# Sizes that BERT and the vision transformer share.
TINY = {"hidden_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 16, "num_labels": 3}


def bert() -> Wrapped:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(vocab_size=16, max_position_embeddings=8, **TINY)
    return Wrapped(BertForSequenceClassification(config), own_loss)


def bert_batch() -> dict[str, Tensor]:
    ids, targets = tokens()
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": targets}


# 26 weighted layers: query, key, value and 3 more in each layer; pooler; classifier. Ends: embeddings 0, encoder 24/26
# and it returns no tensor, so two levels down: layer 0 6/26 = 0.23, 1 12/26 = 0.46, 2 18/26 = 0.69.
# The inputs are integers: "input" is the end of the embeddings, where words, positions and types are one.
ARCHITECTURES.append(
    Architecture(
        name="hf_bert",
        family="Hugging Face BertForSequenceClassification, random weights",
        make=bert,
        batch=bert_batch,
        safe={
            *("net.bert.embeddings", "net.bert.embeddings.LayerNorm", "net.bert.embeddings.dropout"),
            "net.bert.embeddings.word_embeddings",  # positions and types are not of the batch
            *(f"net.bert.encoder.layer.{i}" for i in range(4)),
            *("net.bert.encoder.layer.0.attention.output", "net.bert.encoder.layer.0.output"),
            *("net.bert.pooler", "net.bert.pooler.dense", "net.dropout", "net.classifier"),
        },
        unsafe={
            *("net.bert.embeddings.position_embeddings", "net.bert.embeddings.token_type_embeddings"),
            *("net.bert.encoder.layer.0.attention.self.query", "net.bert.encoder.layer.0.attention.output.dense"),
            *("net.bert.encoder.layer.0.intermediate", "net.bert.encoder.layer.3.output.dense"),
        },
        chosen=("input", "net.bert.encoder.layer.0", "net.bert.encoder.layer.1"),
        needs="transformers",
        since="5",
    )
)


def hugging_face_vit() -> Wrapped:
    from transformers import ViTConfig, ViTForImageClassification

    return Wrapped(ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **TINY)), own_loss)


# 27 weighted layers: the convolution; embeddings, which owns token and positions; 6 in each layer; classifier. Ends:
# embeddings 2/27 = 0.07, layers is no module that runs, so one level down: layer 0 8/27 = 0.30, 1 14/27 = 0.52,
# 2 20/27 = 0.74. (Without embeddings: of 26, the same choice.)
ARCHITECTURES.append(
    Architecture(
        name="hf_vit",
        family="Hugging Face ViTForImageClassification, random weights",
        make=hugging_face_vit,
        batch=lambda: dict(zip(("pixel_values", "labels"), images(), strict=True)),
        safe={
            *("net.vit.embeddings", "net.vit.embeddings.patch_embeddings", "net.vit.embeddings.dropout"),
            *(f"net.vit.layers.{i}" for i in range(4)),
            *("net.vit.layernorm", "net.classifier"),
        },
        unsafe={
            *("net.vit.layers.0.layernorm_before", "net.vit.layers.0.attention.q_proj"),
            *("net.vit.layers.0.attention.o_proj", "net.vit.layers.0.layernorm_after", "net.vit.layers.0.mlp"),
            "net.vit.layers.0.dropout",  # runs twice
        },
        chosen=("input", "net.vit.layers.0", "net.vit.layers.1"),
        needs="transformers",
        since="5",
    )
)
