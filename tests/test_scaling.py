"""The cost model of docs/scaling.md: fits find what is there, counts are exact, the page is that of its measurement."""

from __future__ import annotations

import json
import re

import pytest
import rank_processes
import scaling_ranks
import torch
from effattn.bench.scaling import __main__ as command
from effattn.bench.scaling import allocation, answers, model, page, published, ranks, text, timing, units
from effattn.bench.scaling.subjects import SUBJECTS, TRAINING
from effattn.bench.scaling.units import Size
from torch.autograd import profiler

CALLS = [(name, direction) for name, subject in SUBJECTS.items() for direction in subject.directions]
UNSEEN = {
    "manhattan_attention": 4 * 31 * 31,
    "manhattan_attention, decomposed": 4 * 31,
    "kernelized_rpe_attention, fft": 8,
}
"""Most bytes that a count has and an allocator does not see here: distances kept from the call before, a plan's number."""
INSIDE = {("sequence_parallel_retention, one rank", TRAINING): 4 * 2 * 512 * 66}
"""Most bytes that PyTorch's own operations take inside (a product's copy of an operand), which a count does not see."""


@pytest.fixture(scope="module")
def recorded():
    return command.measurement()


# ---- the fit ----


def _points(prices, sizes):
    return [(units, sum(prices[name] * units[name] for name in units)) for units in map(_units, sizes)]


def _units(tokens):
    return {"call": 1, "tokens": tokens, "pairs": tokens**2}


def test_a_fit_finds_the_prices_that_made_the_times():
    prices = {"call": 2e-5, "tokens": 3e-8, "pairs": 5e-11}
    found = model.fit(_points(prices, (64, 128, 512, 2048, 8192)))
    assert found.prices == pytest.approx(prices, rel=1e-6)
    assert found.seconds(_units(16384)) == pytest.approx(2e-5 + 3e-8 * 16384 + 5e-11 * 16384**2)


def test_no_price_is_negative():
    """A time that falls with the tokens is no reason for a negative price."""
    found = model.fit([(_units(tokens), 1e-3 - 1e-9 * tokens) for tokens in (64, 512, 4096)])
    assert set(found.prices) == {"call"}


def test_errors_are_those_of_the_sizes_held_out():
    fit = model.judged(model.Fit({"call": 1.0}), [({"call": 1}, 0.5), ({"call": 1}, 1.25)])
    assert fit.errors == pytest.approx((1.0, -0.2))
    assert fit.worst == pytest.approx(1.0)
    assert model.Fit({}, (-0.5,)).largest == pytest.approx(1.0)  # the measurement was twice the prediction


def test_sizes_held_out_had_no_part_in_the_fit():
    for subject in SUBJECTS.values():
        assert not set(subject.fit) & set(subject.held_out)
        assert len(subject.fit) > len(subject.units(subject.fit[0]))
        assert max(s.items * s.tokens * s.head_dim for s in subject.held_out) > min(
            s.items * s.tokens * s.head_dim for s in subject.fit
        )


def test_states_are_computed_again_where_a_segment_has_no_room_for_them():
    training, forward = units.bidirectional(2), units.bidirectional(1)
    assert training(Size(1, 2, 16384, 64))["again"] == 0  # 256 chunks of two states of 16 KB: 8 MB
    assert training(Size(1, 2, 16384 + 64, 64))["again"] == 2 * 16384 * 64**2
    assert forward(Size(1, 2, 32768, 64))["again"] == 0
    assert forward(Size(1, 2, 32768, 64))["far"] == 2 * (8 << 20) - units.CACHES


def test_a_unit_that_no_fitted_size_has_gets_no_price():
    found = model.fit([({"call": 1, "fresh": 0}, 1e-3), ({"call": 1, "fresh": 0}, 1e-3)])
    assert found.prices == pytest.approx({"call": 1e-3})


def test_a_row_is_fitted_where_it_is_judged(recorded):
    """Also for the operating system's share: fresh memory."""
    for name, counted in recorded["fresh"].items():
        for direction in SUBJECTS[name].directions:
            held_out, fitted = (
                any(timing.key(size, direction) in counted for size in sizes)
                for sizes in (SUBJECTS[name].held_out, SUBJECTS[name].fit)
            )
            assert fitted or not held_out, (name, direction)


# ---- memory ----


def test_fresh_bytes_are_large_blocks_of_calls_that_no_heap_keeps():
    def counted(*megabytes):
        return allocation.count(lambda: (None, lambda: [torch.empty(size << 18) for size in megabytes])).fresh >> 20

    assert counted(40, 20) == 0  # the heap may have room
    assert counted(40, 30) == 40
    assert counted(31, 31, 31) == 0
    assert counted(64) == 64


def test_fresh_bytes_recorded_are_those_counted(recorded):
    subject = SUBJECTS["masked_product_attention"]
    assert timing.fresh(subject) == recorded["fresh"][subject.name]
    assert recorded["fresh"][subject.name]["1x2x6144x64 training step"] == 2 * 4 * 6144**2


def _smallest(subject):
    return min(subject.fit, key=lambda size: size.items * size.tokens * size.head_dim)


@pytest.mark.parametrize(("name", "direction"), CALLS)
def test_bytes_counted_are_bytes_allocated(name, direction):
    """Against PyTorch's allocator, which also sees what kernels allocate inside."""
    subject = SUBJECTS[name]
    size = _smallest(subject)
    counted = allocation.count(subject.making(size, direction))
    inputs, call = subject.making(size, direction)()
    call()
    with profiler.profile(profile_memory=True) as record:
        results = call()
    del results, inputs
    live = peak = 0
    events = [event for event in record.kineto_results.events() if event.name() == profiler.MEMORY_EVENT_NAME]
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    assert peak
    assert -INSIDE.get((name, direction), 0) <= counted.extra - peak <= UNSEEN.get(name, 0), (counted.extra, peak)


def test_work_space_of_the_triton_launchers_is_counted():
    subject = SUBJECTS["gaussian_mixture_attention"]
    size = Size(1, 2, 64, 16)
    tensors, with_tables = (
        allocation.count(subject.making(size, TRAINING), backend=backend).extra for backend in ("cpu", "triton")
    )
    delta, grid_table = 4 * 2 * 64, 4 * 64
    assert with_tables >= tensors + delta + grid_table


@pytest.mark.parametrize("name", ["retention", "masked_product_attention"])
def test_the_longest_sequence_recorded_is_the_longest(recorded, name):
    memory = published.USABLE * published.MEMORY.value
    for direction, found in recorded["longest"][name].items():
        assert found == answers.longest(SUBJECTS[name], direction, "triton", memory)


# ---- ranks ----


@pytest.fixture(scope="module")
def sent(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    rank_processes.run(scaling_ranks, 4, folder, seconds=60)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(4)]


@pytest.mark.parametrize("members", scaling_ranks.GROUPS, ids=len)
@pytest.mark.parametrize("normalize", ["none", "retnet"])
def test_bytes_sent_are_those_of_the_formula(sent, members, normalize):
    module, count = scaling_ranks, len(members)
    shape = module.BATCH, module.HEADS, module.KEY_DIM, module.VALUE_DIM
    size = ranks.state_bytes(*shape, normalized=normalize == "retnet")
    for place, member in enumerate(members):
        wanted = [ranks.sent(place, count, size), ranks.sent(place, count, size, reverse=True)]
        assert sent[member][f"{count} {normalize}"] == wanted


def test_rounds_are_binary_digits_of_the_ranks():
    assert [ranks.rounds(count) for count in (1, 2, 3, 4, 5, 512)] == [0, 1, 2, 2, 3, 9]
    assert ranks.all_reduce_seconds(2, 8e9, 1e9) == pytest.approx(8.0)


def test_what_a_rank_computes_beside_its_retention_decides_whether_two_are_faster(monkeypatch):
    how = published.HIGH
    assert answers.h200_break_even(2, False, how) is None
    monkeypatch.setattr(answers, "slice_seconds", lambda *arguments: 0.0)
    first = answers.h200_break_even(2, False, how)
    exchange = ranks.exchange_seconds(published.links(2, how), ranks.state_bytes(1, *answers.SHAPE))
    saved = answers.retention_seconds(first / 2, *answers.SHAPE, 1.0, how)
    assert exchange < saved < 4 * exchange  # lengths are powers of two


def test_a_cluster_is_slower_under_low_assumptions_and_over_one_sequence():
    alone, together = (
        [answers.cluster_step(published.RETNET, 512, 8192, one, how) for how in published.MACHINES]
        for one in (False, True)
    )
    for low, high in (alone, together):
        assert low.tokens_a_second < high.tokens_a_second
        assert low.tokens_a_second == pytest.approx(512 * 8192 / sum(low[:3]))
    assert all(one.tokens_a_second > all_.tokens_a_second for one, all_ in zip(alone, together))


# ---- the command ----


def test_a_measurement_goes_on_where_it_was_interrupted(tmp_path, monkeypatch):
    name, path = "shift_add_attention", tmp_path / "found.json"
    tiny = SUBJECTS[name]._replace(
        fit=tuple(Size(1, 2, tokens, 16) for tokens in (16, 32, 64, 128, 256)), held_out=(Size(1, 2, 48, 16),)
    )
    monkeypatch.setitem(timing.SUBJECTS, name, tiny)
    monkeypatch.setattr(timing, "_memory", lambda subject, direction, threads: {"direction": direction})
    monkeypatch.setattr(timing, "MORE", 1)
    sample, taken = timing._sample, []

    def interrupted(*arguments):
        if len(taken) == 20:
            raise KeyboardInterrupt
        taken.append(sample(*arguments))
        return taken[-1]

    monkeypatch.setattr(timing, "_sample", interrupted)
    arguments = ["measure", "--json", str(path), "--rounds", "2", "--only", name]
    assert command.main(arguments) == command.INTERRUPTED
    assert not path.exists()
    kept = json.loads((tmp_path / "found.json.partial").read_text())["points"][name]
    assert all(len(samples) == 1 for samples in kept.values())
    monkeypatch.setattr(timing, "_sample", sample)
    assert command.main(arguments) == 0
    found = json.loads(path.read_text())
    assert list(tmp_path.iterdir()) == [path]
    assert len(found["points"][name]) == 12
    for size, samples in found["points"][name].items():
        assert len(samples) == 2
        assert samples[:1] == kept[size]
    assert set(found["fits"][name]) == {"forward", TRAINING}
    with pytest.raises(ValueError, match="needs all"):
        page.write(found, check=True)


def test_sizes_that_spread_get_more_samples(monkeypatch):
    sizes = (Size(1, 1, 1, 16), Size(1, 1, 2, 16))
    subject = SUBJECTS["retention"]._replace(fit=sizes, held_out=(), trains=False)
    times = {sizes[0]: iter([1.0, 1.02, 1.01] * 2), sizes[1]: iter([1.0, 2.0, 3.0] * 2)}
    monkeypatch.setattr(timing, "_sample", lambda subject, size, *rest: next(times[size]))
    points = {}
    for number in range(1, 7):
        timing._round(subject, points, number, 3, None)
    assert [len(points["retention"][timing.key(size, "forward")]) for size in sizes] == [3, 6]


def test_a_partial_measurement_of_another_machine_is_refused(tmp_path, capsys):
    partial = tmp_path / "found.json.partial"
    partial.write_text(json.dumps({"machine": {"cpu": "another", "threads": 1, "torch": "", "commit": ""}}))
    with pytest.raises(SystemExit):
        command.main(["measure", "--json", str(tmp_path / "found.json")])
    assert "was begun with cpu 'another'" in capsys.readouterr().err


def _predict(*more, operator="retention", tokens="4096"):
    return ["predict", operator, "--tokens", tokens, "--heads", "4", "--head-dim", "64", *more]


def test_a_prediction_is_the_price_list_times_the_units(recorded, capsys):
    assert command.main(_predict("--ranks", "2")) == 0
    said = capsys.readouterr().out
    fit = model.Fit(**recorded["fits"]["retention"]["forward"])
    seconds = fit.seconds(SUBJECTS["retention"].work(Size(1, 2, 4096, 64), "forward", fresh=0))
    assert f"forward: {text.duration(seconds)} (" in said
    assert "a rank of 2 has 1x2x4096x64" in said
    assert "2.097 MB of tensors beside 6.291 MB" in said


def test_ranks_of_sequence_parallel_retention_share_tokens(recorded, capsys):
    assert command.main(_predict("--ranks", "4", operator="sequence_parallel_retention")) == 0
    assert "a rank of 4 has 1x4x1024x64" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (_predict(tokens="0"), "--tokens must be at least 1, got 0"),
        (_predict(operator="attention"), "OPERATOR must be one of"),
        (_predict("--ranks", "3"), "--ranks must divide --batch 1 or --heads 4"),
        (_predict("--ranks", "3", operator="sequence_parallel_retention"), "--ranks must divide --tokens 4096"),
        (_predict("--json", "/nowhere.json"), "nowhere.json"),
        (_predict(operator="window_attention", tokens="4097"), "no such call: window_attention: .* divide"),
        (["measure", "--json", "x", "--only", "nothing"], "--only must name one of"),
        (["measure", "--json", "x", "--rounds", "0"], "--threads and --rounds must be at least 1"),
    ],
)
def test_wrong_arguments_are_refused_by_name(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)


# ---- the page ----


def test_the_page_is_that_of_its_measurement(recorded):
    assert command.main(["page", "--check"]) == 0
    assert page.PICTURE.exists()
    for name, subject in SUBJECTS.items():
        found = timing.fits(subject, recorded["points"], recorded["fresh"])
        for direction, fit in found.items():
            stored = recorded["fits"][name][direction]
            assert stored["prices"] == pytest.approx(fit["prices"], rel=1e-6)
            assert stored["errors"] == pytest.approx(fit["errors"], rel=1e-6)


def test_the_page_has_the_errors_of_other_machines(recorded):
    other = json.loads(json.dumps(recorded))
    other["machine"] |= {"cpu": "Another CPU", "date": "2026-01-02T03:04:05"}
    other["fits"]["retention"]["forward"]["errors"] = [0.01, -0.77]
    written = page.text(recorded, [other])
    assert "largest error on Another CPU, 2026-01-02 |" in written
    assert re.search(r"^\| `retention` \| forward \|.*\| 77% \|$", written, re.MULTILINE)


def test_a_stale_page_is_noticed(recorded, monkeypatch, tmp_path):
    monkeypatch.setattr(page, "PAGE", tmp_path / "scaling.md")
    (tmp_path / "scaling.md").write_text(page.text(recorded).replace("tokens", "words", 1))
    assert page.write(recorded, check=True) == 1
