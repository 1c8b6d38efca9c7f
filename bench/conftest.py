"""``pytest bench --benchmark-only``: the bench's cases as pytest-benchmark entries, one group per row of its table."""

from __future__ import annotations

from fnmatch import fnmatch

import pytest
import torch
from effattn.bench.cases import BACKWARD, FORWARD
from effattn.bench.runner import TOLERANCE, prepare, warm_up

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def pytest_addoption(parser):
    parser.addoption("--all-cases", action="store_true", help="bench: every case, not only those of --quick")


def pytest_collect_file(file_path, parent):
    usual = any(fnmatch(file_path.name, pattern) for pattern in parent.config.getini("python_files"))
    if fnmatch(file_path.name, "bench_*.py") and not usual and not parent.session.isinitpath(file_path):
        return pytest.Module.from_parent(parent, path=file_path)
    return None


def pytest_generate_tests(metafunc):
    if "timed_call" not in metafunc.fixturenames:
        return
    family = metafunc.module.FAMILY
    rows = []
    for case in family.cases:
        if not (case.quick or metafunc.config.getoption("--all-cases")):
            continue
        for direction in (FORWARD, BACKWARD) if case.trained else (FORWARD,):
            for name, dtype in DTYPES.items():
                group = f"{case.operator} {case.name} {name} {direction}"
                for contender in family.operators[case.operator].contenders:
                    if direction == FORWARD or contender.trains:
                        row = (family, case, dtype, direction, contender, group)
                        rows.append(pytest.param(row, id=f"{group}-{contender.name}".replace(" ", "-")))
    metafunc.parametrize("timed_call", rows, indirect=True)


@pytest.fixture(scope="session", autouse=True)
def _two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(min(2, before))
    warm_up("cpu")
    yield
    torch.set_num_threads(before)


@pytest.fixture
def timed_call(request, benchmark):
    """Checks one contender of one row against the specification, then times it."""
    family, case, dtype, direction, contender, group = request.param
    benchmark.group = group
    operator = family.operators[case.operator]
    inputs = operator.inputs(case, dtype, "cpu").leaves(gradients=direction == BACKWARD)
    torch._dynamo.reset()
    call = prepare(contender, case, inputs, direction)

    def run():
        output = call()
        if contender.exact:
            heads, expected = operator.expected(case, inputs)
            error = (output.detach()[:, heads].double() - expected).abs().max()
            assert error <= TOLERANCE[dtype] * expected.abs().max()
        benchmark.pedantic(call, rounds=5, iterations=1, warmup_rounds=1)

    return run
