"""Whole models on our operators: each learns, and is the same function as its eager form with the same weights."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from conformance import require
from sklearn.datasets import load_digits
from torch import nn

from effattn.bench.models import DIGITS, EAGER, OURS, PUBLISHED, models
from effattn.bench.models._compare import forms

STEPS, BATCH, PIXELS = 80, 128, 32
MODELS = [pytest.param(model, id=name) for name, model in models().items()]
EXACT = [pytest.param(model, id=name) for name, model in models().items() if model.exact]
COUNTED = [pytest.param(model, id=name) for name, model in models().items() if model.parameters is not None]


@functools.cache
def digits():
    """Scikit-learn's 8 x 8 digits as images of three equal channels: to train with, and held out."""
    data = load_digits()
    images, labels = torch.tensor(data.images, dtype=torch.float32) / 8 - 1, torch.tensor(data.target)
    images = F.interpolate(images.unsqueeze(1), size=(PIXELS, PIXELS), mode="bilinear").expand(-1, 3, -1, -1)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return tuple((images[part].contiguous(), labels[part]) for part in (order[360:], order[:360]))


@pytest.fixture(autouse=True)
def _available():
    require("gaussian_mixture_attention", "cpu")


@pytest.mark.parametrize("model", MODELS)
def test_model_learns_to_read_digits(model):
    (images, labels), (held_out, expected) = digits()
    network = model.build(OURS, DIGITS).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.02, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=STEPS)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        batch = torch.randint(len(images), (BATCH,), generator=generator)
        loss = F.cross_entropy(network(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        accuracy = (network.eval()(held_out).argmax(1) == expected).float().mean().item()
    assert accuracy > 0.9


@pytest.mark.parametrize("model", MODELS)
def test_forms_share_state_dict_names_and_shapes(model):
    shapes = {
        form: {name: tensor.shape for name, tensor in model.build(form, DIGITS).state_dict().items()}
        for form in (OURS, EAGER, *model.others)
    }
    for form in (EAGER, *model.others):
        assert shapes[form] == shapes[OURS]


def close(actual, expected, tolerance):
    """Within a share of the largest element."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * max(expected.abs().max().item(), 1e-6))


@pytest.mark.parametrize("model", EXACT)
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_forms_agree_in_output_and_gradient(model, training):
    images, labels = (tensor[:8] for tensor in digits()[1])
    found = {}
    for form, network in forms(model, DIGITS).items():
        logits = network.train(training)(images)
        gradients = torch.autograd.grad(F.cross_entropy(logits, labels), list(network.parameters()), allow_unused=True)
        found[form] = logits.detach(), dict(zip(dict(network.named_parameters()), gradients))
    (ours, our_gradients), (eager, eager_gradients) = found[OURS], found[EAGER]
    close(ours, eager, 1e-4)
    largest = max(gradient.abs().max().item() for gradient in eager_gradients.values() if gradient is not None)
    for name, expected in eager_gradients.items():
        assert (our_gradients[name] is None) == (expected is None), name
        if expected is not None:
            error = (our_gradients[name] - expected).abs().max().item()
            assert error <= 1e-3 * max(expected.abs().max().item(), 1e-3 * largest), name


def test_a_model_compiles_to_one_graph_with_its_gradient():
    network = models()["CSWin-T"].build(OURS, DIGITS)
    images, labels = (tensor[:4] for tensor in digits()[1])
    results = []
    for call in (network, torch.compile(network, fullgraph=True, backend="aot_eager")):
        logits = call(images)
        gradients = torch.autograd.grad(F.cross_entropy(logits, labels), list(network.parameters()))
        results.append([logits.detach(), *gradients])
    for eager, compiled in zip(*results):
        close(compiled, eager, 1e-4)


@pytest.mark.parametrize("model", MODELS)
def test_published_size_builds_without_memory(model):
    with torch.device("meta"):
        network = model.build(OURS, PUBLISHED)
    assert all(tensor.is_meta for tensor in network.state_dict().values())


@pytest.mark.parametrize("model", COUNTED)
def test_published_size_has_as_many_parameters_as_the_paper_says(model):
    with torch.device("meta"):
        network = model.build(OURS, PUBLISHED)
    count = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    assert count == pytest.approx(model.parameters, rel=0.03)
