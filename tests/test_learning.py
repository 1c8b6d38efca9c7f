"""A model that learns: a small vision transformer with Gaussian-mixture attention, on scikit-learn's digits."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from conformance import require
from sklearn.datasets import load_digits
from torch import nn

from effattn.nn import GaussianMixtureAttention

GRID, WIDTH, STEPS, BATCH = (4, 4), 48, 240, 128


class Block(nn.Module):
    def __init__(self, backend: str):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.attention = GaussianMixtureAttention(
            WIDTH, GRID, num_heads=3, head_dim=16, num_prefix_tokens=1, backend=backend
        )
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x):
        x = x + self.attention(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class VisionTransformer(nn.Module):
    """8 x 8 images as a class token and 4 x 4 patches of 2 x 2 pixels."""

    def __init__(self, backend: str):
        super().__init__()
        self.embed = nn.Linear(4, WIDTH)
        self.class_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.position = nn.Parameter(0.02 * torch.randn(1, 17, WIDTH))
        self.blocks = nn.Sequential(*(Block(backend) for _ in range(2)))
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10))

    def forward(self, images):
        patches = images.unflatten(1, (4, 2)).unflatten(3, (4, 2)).transpose(2, 3).reshape(-1, 16, 4)
        tokens = torch.cat([self.class_token.expand(len(images), -1, -1), self.embed(patches)], 1)
        return self.head(self.blocks(tokens + self.position)[:, 0])


@functools.cache
def digits():
    data = load_digits()
    images, labels = torch.tensor(data.images, dtype=torch.float32) / 16, torch.tensor(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    held_out = order[:360]
    return (images[order[360:]], labels[order[360:]]), (images[held_out], labels[held_out])


@functools.cache
def train(backend: str, steps: int = STEPS):
    """Loss of every step, the trained model, and the mixtures it began with."""
    torch.manual_seed(0)
    model = VisionTransformer(backend)
    start = [parameter.detach().clone() for parameter in model.blocks[0].attention.mask.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    (images, labels), _ = digits()
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        batch = torch.randint(len(images), (BATCH,), generator=generator)
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return torch.tensor(losses), model.eval(), start


def accuracy(model) -> float:
    _, (images, labels) = digits()
    with torch.no_grad():
        return (model(images).argmax(1) == labels).float().mean().item()


@pytest.fixture(autouse=True)
def _available():
    require("gaussian_mixture_attention", "cpu")


def test_model_learns_to_read_digits():
    losses, model, _ = train("cpu")
    assert losses[:5].mean() > 2.0
    assert losses[-20:].mean() < 0.3
    assert accuracy(model) > 0.9


def test_loss_curve_is_that_of_the_reference():
    """Step by step while rounding has not been amplified, then in the mean."""
    ours, reference = train("cpu")[0], train("reference")[0]
    torch.testing.assert_close(ours[:30], reference[:30], rtol=2e-3, atol=2e-3)
    windows, expected = (losses.unflatten(0, (12, STEPS // 12)).mean(1) for losses in (ours, reference))
    torch.testing.assert_close(windows, expected, rtol=0.1, atol=0.03)


def test_model_trained_on_one_backend_predicts_the_same_on_another():
    _, model, _ = train("cpu")
    other = VisionTransformer("reference")
    other.load_state_dict(model.state_dict())
    _, (images, _) = digits()
    with torch.no_grad():
        torch.testing.assert_close(model(images), other.eval()(images), rtol=1e-3, atol=1e-3)


def test_the_mixtures_themselves_have_learned():
    _, model, start = train("cpu")
    for before, after in zip(start, model.blocks[0].attention.mask.parameters()):
        assert (after - before).abs().max() > 1e-2
