"""DTensors, DDP and FSDP2: what two ranks compute together is what one process computes."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import parallel_training
import pytest
import rank_processes
import ranks_of_sharding
import sharded_calls
import torch
from torch.distributed.tensor import Partial, Replicate, Shard

import effattn
from effattn import _library, _registry

RANKS = 2
CALLS = sharded_calls.calls()
PAIRS = [(op, name) for op, calls in CALLS.items() for name in calls]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """All that the ranks found, started once."""
    folder = tmp_path_factory.mktemp("ranks")
    rank_processes.run(ranks_of_sharding, RANKS, folder, seconds=240)
    return torch.load(folder / "found.pt", weights_only=False)


def assert_as_one_process(call, seen):
    results, gradients = sharded_calls.alone(call)
    assert len(results) == len(seen["results"])
    for ours, one in zip(seen["results"], results):
        torch.testing.assert_close(ours, one.detach(), atol=1e-5, rtol=1e-4)
    assert seen["gradients"].keys() == gradients.keys()
    for name, one in gradients.items():
        torch.testing.assert_close(
            seen["gradients"][name], one, atol=2e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_sharded_as_promised(call, seen):
    wanted = [(Replicate() if dimension is None else Shard(dimension),) for dimension in call.results]
    assert seen["result placements"] == wanted
    for name, placements in seen["gradient placements"].items():
        if name in call.shards:
            assert placements == (Shard(call.shards[name]),), name
        elif call.shards:
            assert placements in ((Partial(),), (Replicate(),)), name
    assert seen["communications of the forward"] == 0
    # In the backward PyTorch's own operations around a kernel may add up the gradient of what is whole on every rank.
    summed = sum(name not in call.shards for name in seen["gradients"]) if call.shards else 0
    assert set(seen["communications"]) <= {"c10d_functional.all_reduce"}
    assert sum(seen["communications"].values()) <= 2 * summed


def test_kernels_send_nothing_forward_or_backward(found):
    """Families whose parameters go to the kernel as they are."""
    for op in ("gaussian_mixture_attention", "masked_product_attention", "urpe_attention", "soft_merge"):
        for name in CALLS[op]:
            assert not found["calls"][op][name]["communications"], (op, name)


def test_every_operator_has_sharded_calls():
    assert set(CALLS) == set(_registry.operators())


def test_every_op_declares_the_axes_of_all_that_it_can_split():
    for op in _library._ops.values():
        schema = op.overload("triton")._schema
        names = {a.name for a in (*schema.arguments, *schema.returns)}
        # A name that the schema does not have would be a slip of the pen; an operator's ops share one declaration.
        declared = {name for name in op.axes if not name.startswith("grad_")}
        assert op.splits, op.name
        for axis in op.splits:
            assert any(axis in op.axes.get(name, ()) for name in names), (op.name, axis)
        assert declared & names, op.name


@pytest.mark.parametrize(("op", "name"), PAIRS)
def test_ranks_compute_what_one_process_computes(found, op, name):
    assert_as_one_process(CALLS[op][name], found["calls"][op][name])


@pytest.mark.parametrize(("op", "name"), [pair for pair in PAIRS if CALLS[pair[0]][pair[1]].free])
def test_slices_are_computed_where_they_are(found, op, name):
    assert_sharded_as_promised(CALLS[op][name], found["calls"][op][name])


@pytest.mark.parametrize("name", sharded_calls.more_calls())
def test_slices_may_differ_in_length(found, name):
    call = sharded_calls.more_calls()[name]
    assert_as_one_process(call, found[name])
    if call.free:
        assert_sharded_as_promised(call, found[name])
    else:
        assert found[name]["communications"]


def test_a_mesh_of_two_dimensions_takes_batch_and_heads(found):
    seen = found["batch and heads"]
    assert_as_one_process(sharded_calls.mixture(), seen)
    assert seen["result placements"] == [(Shard(0), Shard(1))]
    assert seen["gradient placements"]["alpha"] == (Partial(), Shard(1))
    assert not seen["communications"]


def test_a_compiled_call_is_sharded_alike(found):
    seen = found["compiled"]
    assert_as_one_process(sharded_calls.mixture(), seen)
    assert seen["result placements"] == [(Shard(0),)]


def test_the_reference_runs_where_its_own_tables_may_count_as_replicated(found):
    (output,), _ = sharded_calls.alone(sharded_calls.mixture())
    torch.testing.assert_close(found["reference"], output.detach())


def test_a_sharded_state_is_not_written_in_place(found):
    assert "a DTensor cannot be written in place" in found["in place"]


def test_importing_effattn_does_not_import_dtensor():
    code = (
        "import sys, torch, effattn; x = torch.randn(1, 1, 4, 8);"
        "effattn.scaled_dot_product_attention(x, x, x, backend='cpu');"
        "assert 'torch.distributed.tensor' not in sys.modules; assert 'effattn._sharding' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_table_in_the_documentation_is_what_the_ops_declare(tmp_path, monkeypatch):
    script = Path(__file__).resolve().parents[1] / "docs" / "distributed.py"
    spec = importlib.util.spec_from_file_location("distributed_page", script)
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    assert page.main(["--check"]) == 0, "docs/distributed.md is stale; run: python docs/distributed.py"
    stale = tmp_path / "distributed.md"
    stale.write_text(page.PAGE.read_text().replace("`gaussian_mixture` | batch", "`gaussian_mixture` | nothing"))
    monkeypatch.setattr(page, "PAGE", stale)
    assert page.main(["--check"]) == 1
    assert page.main([]) == 0
    assert page.main(["--check"]) == 0


# ---- training ----


@pytest.fixture(scope="module")
def trained_alone():
    return parallel_training.alone()


def test_every_attention_module_is_trained():
    trained = {type(module).__name__ for module in parallel_training.attentions().values()}
    assert trained == {name for name in effattn.nn.__all__ if name.endswith(("Attention", "Retention"))}


@pytest.mark.parametrize("how", ["DDP", "FSDP2"])
def test_a_step_of_training_is_that_of_one_process(found, trained_alone, how):
    torch.testing.assert_close(found[how]["loss"], trained_alone["loss"], rtol=1e-6, atol=1e-6)
    for what in ("gradients", "parameters"):
        assert found[how][what].keys() == trained_alone[what].keys()
        for name, one in trained_alone[what].items():
            torch.testing.assert_close(
                found[how][what][name], one, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_fsdp_in_bfloat16_is_close(found, trained_alone):
    seen = found["FSDP2 in bfloat16"]
    torch.testing.assert_close(seen["loss"], trained_alone["loss"], rtol=2e-2, atol=0)
    ours, one = (
        torch.cat([g.flatten() for g in by.values()]) for by in (seen["gradients"], trained_alone["gradients"])
    )
    assert (ours - one).norm() < 0.05 * one.norm()
    assert {p.dtype for p in seen["parameters"].values()} == {torch.float32}


@pytest.mark.parametrize("how", ["DDP", "FSDP2", "FSDP2 in bfloat16"])
def test_a_state_dict_goes_to_one_process_and_back(found, how):
    assert found[how]["same after loading"]
    assert found[how].get("as one process", True)
