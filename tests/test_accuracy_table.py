"""The accuracy table that `make accuracy` writes: every operator stays inside its budget, and the page says so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from conformance import require
from effattn.bench import accuracy

from effattn import _registry

EXACT = {"pack_signs", "binary_matmul", "bipartite_soft_matching"}
"""Operators whose results are integers: right or wrong, with no error to tabulate."""

MEASURED = [op for op in _registry.operators() if op not in EXACT]

PAGE = Path(__file__).resolve().parents[1] / "docs" / "accuracy.md"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)  # the page has float16 too
@pytest.mark.parametrize(
    ("op", "backend"),
    [(op, "cpu") for op in MEASURED],  # the conformance suite holds the slow backends to the same rule
)
def test_operator_stays_in_its_budget(op, backend, dtype):
    require(op, backend)
    entries = accuracy.measure(backend, operators=[op], dtypes=[dtype])
    assert entries
    outside = [f"{e.shape} {e.tensor} uses {e.used:.2f} of its budget" for e in entries if not e.used <= 1]
    assert not outside, "; ".join(outside)


def test_table_covers_every_operator_and_every_gradient():
    assert {problem.operator for problem in accuracy.PROBLEMS} == set(MEASURED)
    tensors = {}
    for problem in accuracy.PROBLEMS:
        tensors.setdefault(problem.operator, set()).update(problem.make(torch.float32, 0))
    for op, expected in {
        "gaussian_mixture_attention": {"alpha", "sigma"},
        "masked_product_attention": {"weight"},
        "shift_add_attention": {"residual_weight"},
        "cross_shaped_window_attention": {"lepe_weight", "lepe_bias"},
        "stripe_attention": {"lepe_weight", "lepe_bias"},
        "window_attention": {"bias_table"},
        "retention": {"log_decay", "initial_state"},
        "retention_step": {"log_decay", "state"},
        "manhattan_attention": {"log_decay", "lce_weight", "lce_bias"},
        "kernelized_rpe_attention": {"rpe_bias", "projection"},
        "urpe_attention": {"coefficient", "rpe_bias"},
        "size_weighted_attention": {"sizes"},
    }.items():
        assert tensors[op] == {"query", "key", "value", *expected}
    assert tensors["toeplitz_linear_attention"] == {"query_features", "key_features", "value", "rpe_bias"}


def _entry(error, low=1.0, largest=1.0):
    return accuracy.Entry("op", "cpu", torch.float32, "shape", "output", error, low, largest)


def test_budget_is_the_rule_of_the_architecture():
    eps = torch.finfo(torch.float32).eps
    assert _entry(0.0, low=3.0, largest=5.0).budget == 6.0 + 5.0 * eps
    assert _entry(0.0, low=3.0, largest=5.0)._replace(tensor="grad_key").budget == 9.0 + 5.0 * eps


@pytest.mark.parametrize("error", [float("nan"), float("inf"), 2.1])
def test_wrong_result_is_out_of_budget(error):
    assert _entry(error).used > 1


def test_operator_out_of_its_budget_is_noticed(monkeypatch):
    problem = next(p for p in accuracy.PROBLEMS if p.small)
    wrong = problem._replace(call=lambda t, backend: problem.call(t, backend) * 1.001)
    entries = accuracy.measure("reference", problems=[wrong], dtypes=[torch.float32])
    assert all(entry.used > 1 for entry in entries if entry.tensor == "output")


def test_committed_page_shows_every_operator_within_its_budget():
    page = PAGE.read_text()
    for op in MEASURED:
        assert f"`{op}`" in page
    for dtype in ("float32", "bfloat16", "float16"):
        assert f"| {dtype} |" in page
    used = [int(percent) for percent in re.findall(r"\| (\d+)% ", page)]
    assert len(used) >= 2 * 3 * len(accuracy.PROBLEMS)
    assert max(used) <= 100
