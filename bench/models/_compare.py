"""One model in its forms, in turns: images per second of each, and what is left to gain."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .. import photographs
from ..runner import Effort, Result, take_turns
from . import EAGER, OURS, PUBLISHED, Model

FORWARD, TRAINING = "forward", "training"
EFFORT, QUICK = Effort(seconds=25.0, rounds=21, fewest=5), Effort(seconds=6.0, rounds=5, fewest=3)
ASKED = 1.3  # times the images/s of the eager form, in each direction
TOLERANCE = 1e-4  # of the outputs' difference, as a share of their largest element
DIGITS_PIXELS = 32


class Comparison(NamedTuple):
    model: str
    direction: str
    batch: int
    pixels: int
    difference: float  # of our outputs and the eager form's, as a share of the largest element
    kernels_ms: float  # what our operators take of one call
    results: dict[str, Result]

    def images_per_second(self, form: str) -> float:
        return 1e3 * self.batch / self.results[form].ms

    def ratio(self, form: str = EAGER) -> float:
        """How many times the images/s of another form ours has."""
        return self.results[form].ms / self.results[OURS].ms

    @property
    def limit(self) -> float:
        """The ratio to eager if our operators took no time at all: everything else is PyTorch's in all forms."""
        return self.results[EAGER].ms / (self.results[OURS].ms - self.kernels_ms)

    @property
    def met(self) -> bool:
        return self.ratio() >= ASKED


def forms(model: Model, size: str = PUBLISHED) -> dict[str, nn.Module]:
    """The model in all its forms, with one set of random weights. Linear weights have the size that training leaves:
    softmax rows with a peak instead of the initialisation's nearly uniform ones."""
    torch.manual_seed(0)
    built = {form: model.build(form, size) for form in (OURS, EAGER, *model.others)}
    with torch.no_grad():
        for module in built[OURS].modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5)
    for form in (EAGER, *model.others):
        built[form].load_state_dict(built[OURS].state_dict())
    return built


def compare(
    model: Model, direction: str = FORWARD, batch: int | None = None, *, size: str = PUBLISHED, effort: Effort = EFFORT
) -> Comparison:
    """Raises where our form and the eager one differ though they are meant to be the same function."""
    batch, pixels = batch or model.batch, model.pixels if size == PUBLISHED else DIGITS_PIXELS
    images, networks = photographs.images(batch, (pixels, pixels)), forms(model, size)
    outputs = {}
    for form, network in networks.items():
        network.train(direction == TRAINING)
        with torch.no_grad():
            outputs[form] = network(images)
    difference = _difference(outputs[OURS], outputs[EAGER])
    if model.exact and not difference <= TOLERANCE:
        raise AssertionError(
            f"{model.name}: our form and the eager one differ by {difference:.1e} of the largest output"
        )
    call = training_step if direction == TRAINING else forward
    calls = {form: call(network, images) for form, network in networks.items()}
    results = take_turns({form: (once, 1.0) for form, once in calls.items()}, effort)
    return Comparison(model.name, direction, batch, pixels, difference, _kernels_ms(calls[OURS]), results)


def _difference(output: Tensor, expected: Tensor) -> float:
    return ((output - expected).abs().max() / expected.abs().max()).item()


def forward(network: nn.Module, images: Tensor) -> Callable[[], object]:
    def once():
        with torch.no_grad():
            return network(images)

    return once


def training_step(network: nn.Module, images: Tensor) -> Callable[[], object]:
    """Forward, cross-entropy, backward and a step of AdamW so small that every step does the same work."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-6, fused=True)
    labels = torch.arange(len(images))

    def once():
        optimizer.zero_grad(set_to_none=True)
        logits = network(images)
        F.cross_entropy(logits, labels % logits.shape[1]).backward()
        optimizer.step()

    once()  # makes the optimizer's state
    return once


def _kernels_ms(call: Callable[[], object], passes: int = 3) -> float:
    """Time in operators of ours, forward and backward: the least of some passes."""
    found = []
    for _ in range(passes):
        with _Clock() as clock:
            call()
        found.append(1e3 * clock.seconds)
    return min(found)


class _Clock(TorchDispatchMode):
    """Sees every operator, and not those that an operator calls."""

    def __init__(self):
        super().__init__()
        self.seconds = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        begin = time.perf_counter()
        output = func(*args, **(kwargs or {}))
        if func.namespace == "effattn":
            self.seconds += time.perf_counter() - begin
        return output
