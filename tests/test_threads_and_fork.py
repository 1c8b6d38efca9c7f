"""Calls from many Python threads at once, and in the children of a process that has made some, are right."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import sharded_calls
import torch

import effattn
from effattn import _registry

THREADS = 8
SHAPES = [
    sharded_calls.Shape(
        batch=1 + i % 2, heads=2 + 2 * (i % 2), grid=(2 + i % 3, 3 + i), prefix=1, head_dim=8 * (1 + i % 3)
    )
    for i in range(THREADS)
]


def bits(call) -> list[torch.Tensor]:
    """Results and gradients of a call."""
    results, gradients = sharded_calls.alone(call)
    return [r.detach() for r in results] + list(gradients.values())


def same(ours, theirs) -> bool:
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs))


def in_threads(work, count: int = THREADS) -> list[Exception]:
    """Run ``work(index)`` in so many threads that begin together; what they raised."""
    raised, begin = [], threading.Barrier(count)

    def run(index: int) -> None:
        try:
            begin.wait()
            work(index)
        except Exception as error:  # noqa: BLE001 - whatever it is, the test fails on it
            raised.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def test_every_operator_is_called():
    assert set(sharded_calls.every_operator(SHAPES[0])) == set(_registry.operators())


def test_eight_threads_get_the_bits_that_one_gets():
    """Each thread has another shape, and begins with another operator."""
    work = [list(sharded_calls.every_operator(shape).items()) for shape in SHAPES]
    wanted = [{op: bits(call) for op, call in calls} for calls in work]
    wrong = []

    def run(index: int) -> None:
        turned = work[index][3 * index :] + work[index][: 3 * index]
        wrong.extend((index, op) for op, call in turned * 2 if not same(bits(call), wanted[index][op]))

    assert in_threads(run) == []
    assert wrong == []


def test_threads_that_call_the_same_operator_do_not_share_its_scratch():
    for op in _registry.operators():
        calls = [sharded_calls.every_operator(shape)[op] for shape in SHAPES[:4]]
        wanted = [bits(call) for call in calls]
        wrong = []

        def run(index: int, calls=calls, wanted=wanted, wrong=wrong) -> None:
            wrong.extend(index for _ in range(3) if not same(bits(calls[index]), wanted[index]))

        assert in_threads(run, len(calls)) == []
        assert wrong == [], op


def test_explain_in_one_thread_stops_no_call_of_another(capsys):
    call = sharded_calls.every_operator(SHAPES[0])["retention"]

    def run(index: int) -> None:
        for _ in range(20):
            if index % 2:
                effattn.explain(call.function, **call.tensors)
            else:
                call.function(**call.tensors)

    assert in_threads(run, 4) == []


@pytest.mark.skipif(sys.platform != "linux", reason="fork")
def test_children_of_a_process_that_ran_kernels_are_right():
    """With two threads a child says torch.set_num_threads(1) first, as workers of a DataLoader do: see forked.py."""
    tests = Path(__file__).parent
    finished = subprocess.run(
        [sys.executable, str(tests / "forked.py")], cwd=tests, capture_output=True, text=True, timeout=120
    )
    assert finished.stdout == "one thread: right\ntwo threads: right\nworkers: right\n", (
        finished.stdout + finished.stderr
    )
