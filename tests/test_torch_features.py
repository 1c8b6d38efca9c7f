"""docs/torch_features.md is what torch can do today with every registered operator."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from conformance import backends_of, require
from torch_features import AOT, FEATURES, SAMPLES, cell, checks

from effattn import _library, _registry

SCRIPT = Path(__file__).resolve().parents[1] / "docs" / "torch_features.py"
OPERATORS = sorted(_registry.operators())


@pytest.fixture(scope="module")
def page():
    spec = importlib.util.spec_from_file_location("torch_features_page", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def committed(page):
    return page.parse(page.PAGE.read_text())


def test_every_registered_operator_has_a_sample():
    assert sorted(SAMPLES) == OPERATORS


def test_samples_reach_every_torch_op_of_a_kernel():
    for op in OPERATORS:
        require(op, "cpu")
    reached = {name for op in OPERATORS for names in checks.names_of(SAMPLES[op], "cpu") for name in names}
    options = {"local_enhancement_fwd", "local_enhancement_bwd", "retention_step_"}  # of modes that no sample asks for
    assert reached | options | {"toeplitz_plan"} == set(_library._ops)


def test_committed_page_is_made_of_its_cells(page, committed):
    assert page.render(committed) == page.PAGE.read_text(), "stale; run: python docs/torch_features.py"


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("feature", [f for f in FEATURES if f.name != AOT], ids=lambda f: f.name.replace(" ", "_"))
def test_cell_of_the_page_is_true(op, feature, committed):
    require(op, "cpu")
    assert cell(op, feature) == committed[op, feature.name], "the page is stale; run: python docs/torch_features.py"


@pytest.mark.slow
def test_one_package_of_aot_inductor_holds_every_operator(committed, tmp_path):
    from torch_features.aot import Package

    for op in OPERATORS:
        require(op, "cpu")
    (feature,) = (f for f in FEATURES if f.name == AOT)
    package = Package(tuple(OPERATORS), "cpu", tmp_path)
    for op in OPERATORS:
        assert cell(op, feature, package=package) == committed[op, AOT]


@pytest.mark.parametrize(
    ("op", "backend"),
    [
        pytest.param(op, backend, marks=pytest.mark.gpu)
        for op in OPERATORS
        for backend in backends_of(op)
        if backend in ("cuda", "triton")
    ],
)
def test_captured_in_a_cuda_graph(op, backend):
    require(op, backend)
    checks.is_captured_in_cuda_graphs(SAMPLES[op], backend)


def test_a_check_that_fails_is_no_limit():
    sample = SAMPLES["soft_merge"]
    doubled = type(sample)(**{**vars(sample), "flops": lambda *size: 2 * sample.flops(*size)})
    with pytest.raises(AssertionError):
        checks.counts_flops(doubled, "cpu")


def test_a_stale_cell_changes_the_page(page, committed):
    changed = {**committed, ("soft_merge", "vmap"): ("no", "it is not")}
    assert page.parse(page.render(changed)) == changed
    assert page.render(changed) != page.PAGE.read_text()
