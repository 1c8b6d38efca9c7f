"""What torch can do with every registered operator: one list of features, one sample call of each operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from . import checks
from .checks import Limit
from .samples import SAMPLES, Sample, sample_of

__all__ = ["AOT", "FEATURES", "SAMPLES", "Feature", "Limit", "Sample", "cell", "checks", "sample_of"]


class Feature(NamedTuple):
    """A column of the matrix.

    Args:
        name: its heading.
        check: (sample, backend) -> a word for the cell, or None; raises `Limit`, or any error where the feature fails.
        meaning: what "yes" says.
    """

    name: str
    check: Callable[[Sample, str], str | None] | None
    meaning: str


AOT = "AOTInductor"

FEATURES = (
    Feature("compile", checks.compiles, "`torch.compile(fullgraph=True, dynamic=False)`: one graph, the same result."),
    Feature(
        "compile, dynamic",
        checks.compiles_for_every_length,
        "`torch.compile(fullgraph=True, dynamic=True)`, forward and backward: one graph serves three lengths and two "
        "batch sizes, without a break or a recompilation, and gives the same bits as eager.",
    ),
    Feature(
        "export",
        checks.exports,
        "`torch.export` with the batch left open; the exported graph holds the op and serves another batch.",
    ),
    Feature(
        AOT,
        None,
        "`torch._inductor.aoti_compile_and_package`: the package gives the same where it was made and in a new Python "
        "process without a compiler, which has imported effattn.",
    ),
    Feature(
        "autocast",
        checks.autocasts,
        "inside `torch.autocast` the call is, bit for bit, the call on arguments of autocast's dtype, and gradients come "
        "in the arguments' own. *keeps its dtype*: the operator computes in the dtype that it is given, inside autocast "
        "too.",
    ),
    Feature("vmap", checks.vmaps, "`torch.func.vmap` is a loop over the examples."),
    Feature(
        "vmap of grad",
        checks.gives_per_example_gradients,
        "`vmap(grad(...))` gives every example its own gradients, those of shared parameters too.",
    ),
    Feature(
        "jvp",
        checks.has_forward_mode,
        "`torch.func.jvp` in the arguments named, compared with float64's; the tangent of any other argument raises "
        "`NotImplementedError`.",
    ),
    Feature(
        "second derivative",
        checks.refuses_second_derivatives,
        "differentiating a gradient.",
    ),
    Feature(
        "selective checkpoint",
        checks.checkpoints_selectively,
        "`create_selective_checkpoint_contexts` with a policy over op names: a saved forward op is not run again, and "
        "without a policy it is, counted by a dispatch mode; gradients keep their bits.",
    ),
    Feature(
        "FLOPs",
        checks.counts_flops,
        "`torch.utils.flop_counter.FlopCounterMode` counts what the operator's convention says, forward and backward.",
    ),
    Feature(
        "profiler", checks.is_named_in_profiles, "`torch.profiler` shows every forward and backward op under its name."
    ),
    Feature(
        "deterministic",
        checks.is_deterministic,
        "`torch.use_deterministic_algorithms(True)`: no error, and the same bits at every run.",
    ),
    Feature(
        "CUDA graph",
        checks.is_captured_in_cuda_graphs,
        "a captured call, replayed on other numbers in the same memory, is the call on those.",
    ),
)


def cell(op: str, feature: Feature, backend: str = "cpu", package=None) -> tuple[str, str]:
    """The word of a cell and, where it is not a plain yes, the reason; found by running the check.

    ``package``: the `aot.Package` that answers for AOTInductor.

    Raises:
        Exception: what the check raised, where the operator should have the feature and has not.
    """
    try:
        word = package.check(op) if feature.name == AOT else feature.check(SAMPLES[op], backend)
    except Limit as limit:
        return limit.mark, str(limit)
    return word or "yes", ""
