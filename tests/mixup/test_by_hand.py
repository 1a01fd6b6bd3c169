"""A training step of a small network, against formulas written in numpy from the paper's equations."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from mm_lightning.mixup import INPUT, Layer, Mixer, MixPlan, mix, mixed_cross_entropy

N, SIZES = 5, (3, 4, 6, 2)
PARTNER = np.array([3, 0, 4, 1, 2])
REPEATING = np.array([1, 1, 1, 4, 0])
TARGETS = np.array([0, 1, 1, 0, 1])
# Short binary fractions, so that lam in float32 is the number that stands here.
PER_BATCH, PER_SAMPLE = np.full(N, 0.3125), np.array([1.0, 0.0, 0.625, 0.25, 0.5])

every_block = pytest.mark.parametrize("block", [0, 1, 2], ids=["input", "hidden_1", "hidden_2"])
every_ratio = pytest.mark.parametrize("lam", [PER_BATCH, PER_SAMPLE], ids=["per_batch", "per_sample"])
every_pairing = pytest.mark.parametrize("partner", [PARTNER, REPEATING], ids=["permutation", "repeating"])

Parameters = list[tuple[np.ndarray, np.ndarray]]


def make_parameters() -> tuple[Parameters, np.ndarray]:
    rng = np.random.default_rng(0)
    parameters = [(rng.normal(size=(o, i)), rng.normal(size=o)) for i, o in pairwise(SIZES)]
    return parameters, rng.normal(size=(N, SIZES[0]))


def make_net(parameters: Parameters) -> nn.Sequential:
    net = nn.Sequential()
    for i, (weight, bias) in enumerate(parameters):
        linear = nn.Linear(weight.shape[1], weight.shape[0], dtype=torch.float64)
        linear.load_state_dict({"weight": torch.from_numpy(weight), "bias": torch.from_numpy(bias)})
        last = i == len(parameters) - 1
        net.add_module(f"block{i}", linear if last else nn.Sequential(linear, nn.Tanh()))
    return net


def make_plan(block: int, partner: np.ndarray, lam: np.ndarray) -> MixPlan:
    lams = torch.from_numpy(lam).float()
    if (lam == lam[0]).all():
        lams = lams[0].expand(N)
    inverse = torch.from_numpy(np.argsort(partner)) if len(set(partner)) == N else None
    return MixPlan(INPUT if block == 0 else f"block{block - 1}", torch.from_numpy(partner.copy()), lams, inverse)


def _reference_step(
    parameters: Parameters, rows: np.ndarray, block: int, partner: np.ndarray, lam: np.ndarray
) -> tuple[float, list[np.ndarray]]:
    """Loss and gradients of a tanh network that is mixed before ``block``, by explicit formulas."""
    mixing = np.zeros((N, N))  # mixed = mixing @ hidden
    for i in range(N):
        mixing[i, i] += lam[i]
        mixing[i, partner[i]] += 1 - lam[i]
    one_hot = np.eye(SIZES[-1])[TARGETS]
    soft = mixing @ one_hot

    hidden, inputs = rows, []
    for k, (weight, bias) in enumerate(parameters):
        if k == block:
            hidden = mixing @ hidden
        inputs.append(hidden)
        hidden = hidden @ weight.T + bias
        if k < len(parameters) - 1:
            hidden = np.tanh(hidden)
    probabilities = np.exp(hidden) / np.exp(hidden).sum(axis=1, keepdims=True)
    loss = -(soft * np.log(probabilities)).sum() / N

    grads: list[np.ndarray] = []
    grad = (probabilities - soft) / N  # of the last block's output
    for k in reversed(range(len(parameters))):
        grads = [grad.T @ inputs[k], grad.sum(axis=0), *grads]
        grad = grad @ parameters[k][0]
        if k == block:
            grad = mixing.T @ grad
        if k > 0:
            # tanh' = 1 - tanh^2, at the unmixed output of the block below
            below = inputs[k] if k != block else _output(parameters[:k], rows)
            grad = grad * (1 - below**2)
    return float(loss), [*grads, grad]


def _output(parameters: Parameters, hidden: np.ndarray) -> np.ndarray:
    for weight, bias in parameters:
        hidden = np.tanh(hidden @ weight.T + bias)
    return hidden


def assert_step(
    loss: Tensor, net: nn.Sequential, rows: Tensor, expected_loss: float, expected_grads: list[np.ndarray]
) -> None:
    assert_close(loss.item(), expected_loss, rtol=0, atol=1e-10)
    grads = torch.autograd.grad(loss, [*net.parameters(), rows])
    assert_close(list(grads), [torch.from_numpy(grad) for grad in expected_grads], rtol=0, atol=1e-10)


@every_block
@every_ratio
@every_pairing
def test_step_with_the_functions_equals_the_formulas(block: int, lam: np.ndarray, partner: np.ndarray) -> None:
    parameters, inputs = make_parameters()
    net, plan = make_net(parameters), make_plan(block, partner, lam)
    rows = torch.from_numpy(inputs).requires_grad_()
    hidden = rows
    for k, module in enumerate(net):
        hidden = module(mix(hidden, plan) if k == block else hidden)
    loss = mixed_cross_entropy(hidden, torch.from_numpy(TARGETS), plan)
    assert_step(loss, net, rows, *_reference_step(parameters, inputs, block, partner, lam))


@every_block
@every_ratio
@every_pairing
def test_step_with_hooks_equals_the_formulas(block: int, lam: np.ndarray, partner: np.ndarray) -> None:
    parameters, inputs = make_parameters()
    net, plan = make_net(parameters), make_plan(block, partner, lam)
    mixer = Mixer([Layer(INPUT), Layer("block0", (net.block0,)), Layer("block1", (net.block1,))])
    mixer.attach()
    mixer.start(plan)
    rows = torch.from_numpy(inputs).requires_grad_()
    logits = net(mixer.mix_input(rows) if plan.layer == INPUT else rows)
    mixer.detach()
    loss = mixed_cross_entropy(logits, torch.from_numpy(TARGETS), plan)
    assert_step(loss, net, rows, *_reference_step(parameters, inputs, block, partner, lam))


@every_ratio
def test_in_an_affine_network_the_block_makes_no_difference_to_the_logits(lam: np.ndarray) -> None:
    parameters, inputs = make_parameters()
    logits = []
    for block in range(3):
        hidden, plan = torch.from_numpy(inputs), make_plan(block, PARTNER, lam)
        for k, (weight, bias) in enumerate(parameters):
            hidden = mix(hidden, plan) if k == block else hidden
            hidden = F.linear(hidden, torch.from_numpy(weight), torch.from_numpy(bias))
        logits.append(hidden)
    assert_close(logits[1:], [logits[0], logits[0]], rtol=0, atol=1e-12)
