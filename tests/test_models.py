"""Whole models on our operators: each learns, and is the same function as its eager form with the same weights."""

from __future__ import annotations

import functools
import json

import pytest
import torch
import torch.nn.functional as F
from conformance import require
from effattn.bench import runner
from effattn.bench.models import DIGITS, EAGER, OURS, PUBLISHED, _compare, models
from effattn.bench.models import __main__ as command
from sklearn.datasets import load_digits
from torch import nn

from effattn.nn import LearnableTokenMerge

STEPS, BATCH, RATE, PIXELS = 120, 64, 4e-3, 32
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
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=0.02, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
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
    for form, network in _compare.forms(model, DIGITS).items():
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
            assert error <= max(1e-3 * expected.abs().max().item(), 1e-5 * largest), name


def test_a_model_compiles_to_one_graph_with_its_gradient():
    network = models()["GMM-ViT"].build(OURS, DIGITS)
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


def test_cswin_has_the_published_names():
    names = set(models()["CSWin-T"].build(OURS, DIGITS).state_dict())
    published = {
        "stage1_conv_embed.2.bias",
        "stage1.0.attns.1.get_v.weight",
        "stage4.0.mlp.fc2.bias",
        "merge3.norm.bias",
    }
    assert published <= names
    assert "stage4.0.attns.1.get_v.weight" not in names


def test_merging_changes_what_the_model_computes():
    images = digits()[1][0][:8]
    networks = _compare.forms(models()["ToMe-ViT-S"], DIGITS)
    with torch.no_grad():
        merged, whole = networks[OURS](images), networks["not merged"](images)
    assert not torch.allclose(merged, whole, rtol=1e-2, atol=1e-2)


def test_learned_masks_agree_once_they_know_the_classes():
    """Until then their step down the bound is none."""
    images, labels = (tensor[:32] for tensor in digits()[1])
    networks = _compare.forms(models()["LTM-ViT-S"], DIGITS)
    with torch.no_grad():
        before = networks[OURS](images)
        for merge in (module for module in networks[OURS].modules() if isinstance(module, LearnableTokenMerge)):
            merge.update_joint(10 * F.one_hot(labels, merge.dim).float(), labels, centroid_steps=2)
            merge.step_size.fill_(50.0)
        networks[EAGER].load_state_dict(networks[OURS].state_dict())
        ours, eager = networks[OURS](images), networks[EAGER](images)
    close(ours, eager, 1e-4)
    assert not torch.allclose(ours, before, rtol=1e-3, atol=1e-3)


# ---- the bench ----

BRIEF = runner.Effort(seconds=0.0, rounds=3, fewest=3)


@pytest.mark.parametrize("direction", ["forward", "training"])
def test_comparison_reports_every_form_and_a_limit_above_its_ratio(direction):
    model = models()["ToMe-ViT-S"]
    found = _compare.compare(model, direction, 4, size=DIGITS, effort=BRIEF)
    assert list(found.results) == [OURS, EAGER, "not merged"]
    assert found.pixels == PIXELS
    assert found.kernels_ms > 0
    assert found.limit > found.ratio()
    assert found.images_per_second(EAGER) * found.ratio() == pytest.approx(found.images_per_second(OURS))


def test_comparison_refuses_forms_that_differ():
    model = models()["GMM-ViT"]

    def build(form, size):
        network = model.build(form, size)
        if form == EAGER:
            network.head.register_forward_hook(lambda module, args, output: output * 1.001)
        return network

    with pytest.raises(AssertionError, match=r"differ by 1\.0e-03"):
        _compare.compare(model._replace(build=build), batch=2, size=DIGITS, effort=BRIEF)
    _compare.compare(model._replace(build=build, exact=False), batch=2, size=DIGITS, effort=BRIEF)


@pytest.fixture
def small_sizes(monkeypatch):
    compare = functools.partial(_compare.compare, size=DIGITS)
    monkeypatch.setattr(command, "compare", lambda *args, effort: compare(*args, effort=BRIEF))


def test_command_prints_a_row_of_each_direction_and_writes_json(small_sizes, tmp_path, capsys):
    target = tmp_path / "models.json"
    assert command.main(["GMM-ViT", "--batch", "2", "--json", str(target), "--threads", "1"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| GMM-ViT")]
    assert len(rows) == 2
    assert all("pass" in line or "miss" in line for line in rows)
    written = json.loads(target.read_text())
    assert [one["direction"] for one in written["comparisons"]] == ["forward", "training"]
    assert {one["batch"] for one in written["comparisons"]} == {2}
    assert list(tmp_path.iterdir()) == [target]


def test_interrupted_command_leaves_the_old_file(monkeypatch, tmp_path, capsys):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "compare", interrupt)
    target = tmp_path / "models.json"
    target.write_text("old")
    assert command.main(["GMM-ViT", "--json", str(target), "--threads", "1"]) == 130
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]
    assert "nothing was written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["RMT-9"], "unknown model RMT-9"), (["--batch", "0"], "must be at least 1"), (["--threads", "0"], "at least 1")],
)
def test_command_says_what_is_wrong_with_its_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
