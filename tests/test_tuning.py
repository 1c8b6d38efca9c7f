"""Choices that a machine decides: the file, its keys, what a call reads of it and what `python -m effattn tune` writes."""

from __future__ import annotations

import itertools
import json
import logging
import os
import random
import subprocess
import sys
import threading

import pytest
import torch
from conformance import require

import effattn
from effattn import _registry, _tune, _tuning, _tuning_defaults
from effattn.__main__ import main
from effattn.ops import toeplitz_costs, toeplitz_methods
from effattn.ops.attention import SMALLEST_WORK, length_class
from effattn.ops.retention import CPU_CHUNK

NEVER = _tuning_defaults.NEVER
F32 = torch.float32
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """The file of a machine of its own."""
    monkeypatch.setenv("EFFATTN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("EFFATTN_TUNING", "1")
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    _tuning.forget()
    yield tmp_path / "tuning-1.json"
    _tuning.forget()


def key(name, *features, threads=None):
    return _tuning.key(name, threads or torch.get_num_threads(), features)


def holding(entries):
    return json.dumps({"format": 1, "entries": {k: {"value": v, "measured": "2026-01-31"} for k, v in entries.items()}})


# ---- keys ----


def looked_up(monkeypatch):
    found, real = set(), _tuning.key
    monkeypatch.setattr(_tuning, "key", lambda *args: found.add(real(*args)) or real(*args))
    return found


def test_ten_thousand_lengths_make_few_keys_and_none_holds_a_length(monkeypatch):
    found, draw = looked_up(monkeypatch), random.Random(0)
    lengths = [draw.randrange(1, 1 << 20) for _ in range(10_000)]
    for tokens in lengths:
        problem = _registry.Problem("cpu", draw.choice(_registry.KERNEL_DTYPES), 64, length=tokens, work=tokens * 64)
        _registry.verdicts("scaled_dot_product_attention", problem)
    assert 0 < len(found) <= 15
    found.clear()
    width_of = sys.modules["effattn.ops.retention"]._width  # the package's attribute is the function
    for tokens in lengths:
        x = torch.empty(1, 1, 1, 1, device="meta").expand(1, 1, tokens, draw.randrange(1, 513))
        _tuning.value(CPU_CHUNK, draw.choice(_registry.KERNEL_DTYPES), width_of(x, x))
        toeplitz_costs.costs()
    assert 0 < len(found) <= 19


def test_calls_of_many_lengths_look_up_few_keys(monkeypatch):
    require("retention", "cpu")
    found, log_decay = looked_up(monkeypatch), torch.zeros(1)
    for tokens in range(37, 337):
        x = torch.empty(1, 1, tokens, 8)
        effattn.scaled_dot_product_attention(x, x, x)
        effattn.retention(x, x, x, log_decay)
    assert 0 < len(found) <= 2
    numbers = {int(part.split()[-1]) for name in found for part in name.split("; ")[4:] if part.split()[-1].isdigit()}
    assert not numbers & set(range(37, 337))


def test_keys_of_tiles_do_not_grow_with_lengths(monkeypatch):
    table = pytest.importorskip("effattn.triton_kernels.configurations")
    from effattn.triton_kernels import (
        cross_shaped_window_configurations,
        retention_configurations,
        shift_add_configurations,
    )

    found, draw = set(), random.Random(0)
    monkeypatch.setattr(table, "architecture", lambda device: "sm_90")

    def launched(kernel, query, config):
        found.add(_tuning.key(table.LAUNCH, "a GPU", (kernel, query.dtype, tuple(config))))

    codes = torch.empty(1024, 512, dtype=torch.uint8, device="meta")
    for _ in range(10_000):
        tokens = draw.randrange(1, 1 << 16)
        x = torch.empty(1, 1, 1, 64, device="meta", dtype=draw.choice((F32, torch.bfloat16))).expand(1, 1, tokens, 64)
        for kernel in table.KERNELS:
            launched(kernel, x, table.configuration(kernel, x))
        launched("scan", x, retention_configurations.scan(x, 64, 0, False))
        launched("window", x, cross_shaped_window_configurations.fitted("window_forward", x, tokens, tokens, "lean", 8))
        launched("linear", x, shift_add_configurations.linear("forward", x[0, 0], codes, 1024))
    assert 0 < len(found) <= 40


def test_a_size_is_no_feature():
    with pytest.raises(ValueError, match=r"queries must be one of \(1, 2, 4, 8, 16\), got 1000"):
        key(SMALLEST_WORK, F32, 1000)
    with pytest.raises(ValueError, match=r"width must be one of"):
        key(CPU_CHUNK, F32, 48)
    with pytest.raises(ValueError, match=r"features must be dtype, queries"):
        key(SMALLEST_WORK, F32)


@pytest.mark.parametrize(
    ("queries", "wanted"), [(0, 1), (1, 1), (2, 2), (3, 2), (7, 4), (15, 8), (16, 16), (10**6, 16)]
)
def test_class_of_a_length(queries, wanted):
    assert length_class(queries) == wanted


def test_a_key_names_version_choice_machine_threads_and_features():
    name = key(SMALLEST_WORK, torch.bfloat16, 4, threads=6)
    assert name == (
        f"effattn {effattn.__version__}; attention.smallest_work 1; {_tuning.cpu()}; 6 threads; dtype bfloat16; queries 4"
    )


# ---- defaults ----


@pytest.mark.parametrize("isa", ["", *_tuning_defaults.LEVELS])
def test_defaults_are_complete_and_valid(isa, monkeypatch):
    monkeypatch.setattr(_tuning._native, "isa", lambda: isa)
    for choice in _tuning.choices("cpu"):
        for features in itertools.product(*choice.fields.values()):
            value, origin = _tuning.find(choice.name, *features)
            assert choice.is_valid(value), (choice.name, features)
            assert origin == "default"
    assert {choice.name for choice in _tuning.choices("cpu")} == {SMALLEST_WORK, CPU_CHUNK, toeplitz_costs.COSTS}


def test_a_level_without_a_row_takes_the_one_below_and_the_lowest_below_all(monkeypatch):
    rows = {"avx2": {"x": 2}, "avx512_bf16": {"x": 4}}
    monkeypatch.setattr(_tuning_defaults, "CPU", rows)
    found = {isa: _tuning_defaults.shipped("x", isa) for isa in ("", *_tuning_defaults.LEVELS)}
    assert found == {"": 2, "baseline": 2, "avx2": 2, "avx512": 2, "avx512_bf16": 4}


# ---- the file ----


def test_the_file_is_read_once(cache):
    assert _tuning.find(CPU_CHUNK, F32, 64) == (64, "default")
    cache.write_text(holding({key(CPU_CHUNK, F32, 64): 32}))
    assert _tuning.find(CPU_CHUNK, F32, 64).value == 64
    _tuning.forget()
    assert _tuning.find(CPU_CHUNK, F32, 64) == (32, "tuned 2026-01-31")
    cache.unlink()
    assert _tuning.find(CPU_CHUNK, F32, 64).value == 32
    assert _tuning.find(CPU_CHUNK, F32, 128).value == 64


def test_tuning_of_zero_means_the_defaults(cache, monkeypatch):
    cache.write_text(holding({key(CPU_CHUNK, F32, 64): 32}))
    monkeypatch.setenv("EFFATTN_TUNING", "0")
    assert _tuning.value(CPU_CHUNK, F32, 64) == 64


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is ignored"),
        ('{"half": ', "is ignored"),
        ("[]", "does not hold entries"),
        ('{"format": 2, "entries": {}}', "its format is 2, and this version reads 1"),
        ('{"format": 1, "entries": {"a": 5}}', "'a' does not hold a value"),
        ('{"format": 1, "entries": {"a": {"value": 1, "measured": "x"}}}', "python -m effattn tune"),
    ],
)
def test_a_file_of_something_else_is_ignored_with_one_line(cache, caplog, text, message):
    caplog.set_level(logging.INFO, logger="effattn")
    cache.write_text(text)
    for width in (64, 128, 64):
        assert _tuning.value(CPU_CHUNK, F32, width) == 64
    (record,) = caplog.records
    assert message in record.getMessage()
    assert str(cache) in record.getMessage()


@pytest.mark.parametrize("value", [0, 1, True, 64.0, "64", None, [64], 1 << 40])
def test_a_value_of_no_use_is_ignored(cache, caplog, value):
    caplog.set_level(logging.INFO, logger="effattn")
    cache.write_text(holding({key(CPU_CHUNK, F32, 64): value}))
    assert _tuning.find(CPU_CHUNK, F32, 64) == (64, "default")
    assert "has no use for" in caplog.text


@pytest.mark.parametrize("costs", [(1, 2, 3), (1, 2, 3, 0), (1, 2, 3, "4"), (1, 2, 3, float("nan")), 4])
def test_costs_that_are_none_are_ignored(cache, costs):
    cache.write_text(holding({key(toeplitz_costs.COSTS): costs}))
    assert toeplitz_costs.costs() == _tuning_defaults.shipped(toeplitz_costs.COSTS, "avx512_bf16")


def test_a_place_that_cannot_be_read_is_no_error(cache, caplog, monkeypatch):
    caplog.set_level(logging.INFO, logger="effattn")
    cache.mkdir()
    assert _tuning.value(CPU_CHUNK, F32, 64) == 64
    assert "not readable" in caplog.text
    monkeypatch.delenv("EFFATTN_CACHE_DIR")
    monkeypatch.setattr(_tuning.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    _tuning.forget()
    assert _tuning.value(CPU_CHUNK, F32, 64) == 64
    assert "no home" in caplog.text


def test_kept_values_stand_beside_those_of_others(cache):
    foreign = "effattn 9.9; retention.chunk 1; another machine; 2 threads; dtype float32; width 64"
    cache.write_text(holding({foreign: 16, key(CPU_CHUNK, F32, 64, threads=77): 128, key(CPU_CHUNK, F32, 64): 16}))
    _tuning.keep({key(CPU_CHUNK, F32, 64): 32, key(toeplitz_costs.COSTS): (1.0, 2.0, 3.0, 4.0)})
    values = {name: entry["value"] for name, entry in json.loads(cache.read_text())["entries"].items()}
    assert values == {
        foreign: 16,
        key(CPU_CHUNK, F32, 64, threads=77): 128,
        key(CPU_CHUNK, F32, 64): 32,
        key(toeplitz_costs.COSTS): [1.0, 2.0, 3.0, 4.0],
    }
    assert toeplitz_costs.costs() == (1.0, 2.0, 3.0, 4.0)
    assert main(["tune", "--clear"]) == 0
    assert set(json.loads(cache.read_text())["entries"]) == {foreign}


@needs_fork
def test_writers_at_once_lose_nothing(cache):
    def write(first):
        for threads in range(first, first + 20):
            _tuning.keep({key(CPU_CHUNK, F32, 64, threads=threads): 32})

    writers = []
    for first in (100, 200, 300):
        writers.append(os.fork())
        if writers[-1] == 0:
            try:
                write(first)
            except BaseException:  # noqa: BLE001 - nothing of a child may go on into pytest
                os._exit(1)
            os._exit(0)
    assert [os.waitpid(writer, 0)[1] for writer in writers] == [0, 0, 0]
    wanted = {key(CPU_CHUNK, F32, 64, threads=first + n) for first in (100, 200, 300) for n in range(20)}
    assert set(json.loads(cache.read_text())["entries"]) == wanted
    assert not [path for path in cache.parent.iterdir() if path.suffix not in (".json", ".lock")]


def test_a_write_that_fails_leaves_the_old_file(cache, monkeypatch, capsys, few):
    cache.write_text(before := holding({key(CPU_CHUNK, F32, 64): 32}))

    def fail(*_):
        raise PermissionError("read-only")

    monkeypatch.setattr(os, "replace", fail)
    assert main(["tune", "retention"]) == 1
    assert "measured, but not kept: read-only" in capsys.readouterr().out
    assert cache.read_text() == before
    assert {path.suffix for path in cache.parent.iterdir()} == {".json", ".lock"}


def test_a_directory_that_cannot_be_made_is_said(monkeypatch, capsys, few, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EFFATTN_CACHE_DIR", str(tmp_path / "file" / "below"))
    assert main(["tune", "retention"]) == 1
    assert "not kept" in capsys.readouterr().out


def test_threads_that_read_at_once_find_the_same(cache):
    cache.write_text(holding({key(CPU_CHUNK, F32, 64): 32}))
    found = []
    readers = [threading.Thread(target=lambda: found.append(_tuning.value(CPU_CHUNK, F32, 64))) for _ in range(8)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert found == [32] * 8


@needs_fork
def test_a_forked_process_finds_what_its_parent_read(cache):
    cache.write_text(holding({key(CPU_CHUNK, F32, 64): 32}))
    assert _tuning.value(CPU_CHUNK, F32, 64) == 32
    cache.unlink()
    child = os.fork()
    if child == 0:
        os._exit(0 if _tuning.value(CPU_CHUNK, F32, 64) == 32 else 1)
    assert os.waitpid(child, 0)[1] == 0


# ---- what a call makes of it ----


def test_a_tuned_crossover_changes_the_backend_and_explain_says_so(capsys):
    require("scaled_dot_product_attention", "cpu")
    query = torch.randn(1, 4, 16, 32)

    def explained():
        return effattn.explain(effattn.scaled_dot_product_attention, query, query, query)

    assert explained().backend == "torch"
    assert "(default)" in explained().notes[0]
    with _tuning.pretend({key(SMALLEST_WORK, F32, 16): 1}):
        assert explained().backend == "cpu"
        assert "from 1 multiply-adds of the scores (tuned on trial)" in explained().notes[0]
    with _tuning.pretend({key(SMALLEST_WORK, F32, 16): NEVER}):
        why = explained()
    assert why.backend == "torch"
    assert why.verdicts[0].reason == "float32: torch's kernel is faster"
    assert "taken nowhere (tuned on trial)" in why.notes[0]


def test_a_tuned_chunk_is_the_one_that_is_used(capsys):
    require("retention", "cpu")
    query, log_decay = torch.randn(1, 2, 200, 32), effattn.retnet_log_decay(2)
    with _tuning.pretend({key(CPU_CHUNK, F32, 32): 48}):
        tuned = effattn.retention(query, query, query, log_decay)
        again = effattn.retention(query, query, query, log_decay)
        notes = effattn.explain(effattn.retention, query, query, query, log_decay).notes
        asked = effattn.explain(effattn.retention, query, query, query, log_decay, chunk_size=16).notes
    assert notes == ("chunks of 48 tokens (tuned on trial)",)
    assert asked == ()
    assert torch.equal(tuned, again)
    assert torch.equal(tuned, effattn.retention(query, query, query, log_decay, chunk_size=48))
    exact = effattn.retention(*(query.double(),) * 3, log_decay)
    assert (tuned - exact).abs().max() < 1e-5 * exact.abs().max()


def test_compiled_calls_of_many_lengths_are_one_graph_with_the_tuned_chunk():
    require("retention", "cpu")
    graphs, log_decay = [], effattn.retnet_log_decay(1)

    def backend(graph, example):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    call = torch.compile(lambda x: effattn.retention(x, x, x, log_decay), backend=backend, dynamic=True, fullgraph=True)
    with _tuning.pretend({key(CPU_CHUNK, F32, 16): 48}):
        for tokens in (70, 129, 333):
            x = torch.randn(1, 1, tokens, 16)
            assert torch.equal(call(x), effattn.retention(x, x, x, log_decay))
    assert len(graphs) == 1
    assert ", 48, " in graphs[0].code
    torch._dynamo.reset()


def test_no_call_measures(monkeypatch):
    def measured(*args, **kwargs):
        raise AssertionError("a call measures")

    for module, name in (
        (_tune, "timer"),
        (toeplitz_costs, "measured"),
        (toeplitz_costs, "_seconds"),
        (_tuning, "keep"),
    ):
        monkeypatch.setattr(module, name, measured)
    x = torch.rand(1, 2, 40, 16)
    effattn.scaled_dot_product_attention(x, x, x)
    effattn.retention(x, x, x, effattn.retnet_log_decay(2))
    effattn.toeplitz_linear_attention(x, x, x, torch.zeros(2, 79))


def test_a_lookup_loads_nothing_that_measures():
    code = "import torch, effattn, sys; x = torch.rand(1, 1, 40, 16); effattn.retention(x, x, x, torch.zeros(1))"
    code += "; print([name for name in sys.modules if 'tune' in name or 'effattn.bench' in name])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


# ---- the command ----

SLOW, FAST = 2.0, 1.0


@pytest.fixture
def few(monkeypatch):
    """Times that no clock took: chunks of 32 win, and our attention from 2^15 multiply-adds."""
    require("retention", "cpu")
    taken = []

    def timer(seconds, device="cpu"):
        def times(calls):
            taken.append(list(calls))
            if "torch" in calls:
                work = calls["cpu"].work
                return {"cpu": FAST if work >= 1 << 15 else SLOW + FAST, "torch": SLOW}
            return {name: FAST if name == "32" else SLOW for name in calls}

        return times

    real = _tune._attention_calls

    def attention_calls(dtype, heads, queries, head_dim, keys):
        calls = real(dtype, heads, queries, head_dim, keys)
        calls["cpu"].work = heads * queries * head_dim * keys
        return calls

    monkeypatch.setattr(_tune, "timer", timer)
    monkeypatch.setattr(_tune, "_attention_calls", attention_calls)
    return taken


def test_tune_writes_what_is_faster_and_says_what_changed(cache, few, capsys):
    assert main(["tune", "attention", "retention"]) == 0
    shown = capsys.readouterr().out
    assert "retention.chunk dtype float32, width 64: changed\n  before 64 (default)\n  now    32" in shown
    assert "predicted 2000.0000 -> 1000.0000 ms (2.00x), measured again 2000.0000 -> 1000.0000 ms (2.00x)" in shown
    assert "33 choices measured, 29 changed" in shown  # 2^16 was the default of the others
    assert _tuning.value(CPU_CHUNK, torch.bfloat16, 512) == 32
    found = [_tuning.value(SMALLEST_WORK, F32, queries) for queries in (1, 2, 4, 8, 16)]
    assert found == [1 << 16, 1 << 15, 1 << 16, 1 << 15, 1 << 15]
    assert main(["tune", "retention"]) == 0
    assert "18 choices measured, 0 changed" in capsys.readouterr().out


def test_dry_run_writes_nothing(cache, few, capsys):
    assert main(["tune", "retention", "--dry-run"]) == 0
    assert few
    assert "18 changed" in (shown := capsys.readouterr().out)
    assert "nothing is written" in shown
    assert list(cache.parent.iterdir()) == []


def test_what_does_not_repeat_is_left(few, monkeypatch, capsys):
    def timer(seconds, device="cpu"):
        def times(calls):
            sweeping = len(calls) > 2
            return {name: FAST if (name == "32") == sweeping else SLOW for name in calls}

        return times

    monkeypatch.setattr(_tune, "timer", timer)
    assert main(["tune", "retention"]) == 0
    shown = capsys.readouterr().out
    assert "18 choices measured, 0 changed, 18 did not repeat" in shown
    assert "32 was not faster again" in shown
    assert _tuning.find(CPU_CHUNK, F32, 64).value == 64


def test_a_busy_machine_is_not_tuned(cache, few, monkeypatch, capsys):
    monkeypatch.setattr(os, "getloadavg", lambda: (1000.0, 0.0, 0.0))
    assert main(["tune", "retention"]) == 1
    assert "load 1000.0" in capsys.readouterr().out
    assert not few
    assert main(["tune", "retention", "--force"]) == 0
    assert cache.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is something to tune")
def test_a_family_of_nothing_to_tune_says_so(cache, capsys):
    require("shift_linear", "cpu")
    assert main(["tune", "shift_add"]) == 0
    assert "there is nothing to tune" in capsys.readouterr().out
    assert not cache.exists()


def test_costs_are_kept_where_they_predict_better(monkeypatch, capsys):
    require("toeplitz_linear_attention", "cpu")
    costs = (1.0, 2.0, 3.0, 4.0)
    heads = toeplitz_costs._heads()
    real = dict(zip(toeplitz_costs.SHAPES, toeplitz_methods.predicted(costs, *_tune.CHECK, heads=heads)))
    monkeypatch.setattr(_tune, "timer", lambda *args: lambda calls: {name: real[name] for name in calls})
    monkeypatch.setattr(toeplitz_costs, "_call", lambda *args: None)
    monkeypatch.setattr(toeplitz_costs, "measured", lambda: costs)
    assert main(["tune", "toeplitz"]) == 0
    assert "before, 1.00 as measured now" in capsys.readouterr().out
    assert toeplitz_costs.costs() == costs
    monkeypatch.setattr(toeplitz_costs, "measured", lambda: (9.0, 9.0, 9.0, 9.0))
    assert main(["tune", "toeplitz"]) == 0
    assert "predicts them no better" in capsys.readouterr().out
    assert toeplitz_costs.costs() == costs


def test_retention_is_really_measured(capsys):
    """One choice, on the clock."""
    require("retention", "cpu")
    outcome = _tune._chunk(F32, 16, _tune.timer(0.05))
    assert outcome.after in (*_tune.CHUNKS, 64)
    if outcome.predicted:
        assert all(0 < seconds < 10 for seconds in (*outcome.predicted, *outcome.measured))


def test_show_tells_every_choice_and_where_it_comes_from(cache, capsys):
    cache.write_text(holding({key(CPU_CHUNK, F32, 64): 32}))
    assert main(["tune", "--show"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["dtype", "float32,", "width", "64", "32", "tuned", "2026-01-31"] for line in lines)
    assert sum("default" in line for line in lines) >= 33
    assert main(["info"]) == 0
    assert "1 choices measured here, last on 2026-01-31" in capsys.readouterr().out


def test_threads_of_the_command_are_those_of_the_key(cache, few, capsys):
    threads = torch.get_num_threads()
    assert main(["tune", "retention", "--threads", "1"]) == 0
    assert torch.get_num_threads() == threads
    assert key(CPU_CHUNK, F32, 64, threads=1) in json.loads(cache.read_text())["entries"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "FAMILY must be one of attention"),
        (["--threads", "0"], "must be above 0, got 0"),
        (["--seconds", "-1"], "must be above 0, got -1"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(["tune", *arguments])
    assert message in capsys.readouterr().err


# ---- tiles of Triton kernels, in the interpreter ----


@pytest.fixture
def tiles(monkeypatch):
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("runs in Triton's interpreter")
    from effattn import _tune_triton

    monkeypatch.setattr(_tune_triton, "BATCH", 1)
    monkeypatch.setattr(_tune_triton, "HEADS", 1)
    return _tune_triton


def test_launchers_take_the_tiles_of_the_file(tiles, cache, monkeypatch):
    from effattn.triton_kernels import configurations as table

    launched, real = [], table.launch

    def launch(kernel, programs, device, config, *arguments, **constants):
        launched.append((config, constants))
        real(kernel, programs, device, config, *arguments, **constants)

    monkeypatch.setattr(table, "launch", launch)
    features = "engine.forward", "single", False, False, 16
    cache.write_text(holding({_tuning.key(table.TILE, _tuning.INTERPRETER, features): [16, 64]}))
    query = torch.randn(1, 1, 40, 16)
    output = effattn.scaled_dot_product_attention(query, query, query, backend="triton")
    (config, constants), *_ = launched
    assert (config.block_m, config.block_n) == (constants["BLOCK_M"], constants["BLOCK_N"]) == (16, 64)
    exact = effattn.scaled_dot_product_attention(*(query.double(),) * 3, backend="reference")
    assert (output - exact).abs().max() < 1e-5


def test_tuning_tiles_keeps_the_fastest_that_is_right(tiles, monkeypatch):
    from effattn.triton_kernels import configurations as table

    def candidates(choice, default):
        return [(16, 32), (32, 16)] if choice == table.TILE else [(2, 1), (8, 2)]

    monkeypatch.setattr(table, "candidates", candidates)
    real = tiles._fits
    tried = iter(itertools.count())
    monkeypatch.setattr(tiles, "_fits", lambda *args: next(tried) % 2 == 1 and real(*args))  # every other does not fit

    def times(calls):
        return {name: 1.0 / (1 + order) for order, name in enumerate(calls)}  # the last is the fastest

    call = tiles._attention(torch.device("cpu"), F32, 16, 33)
    outcomes = list(tiles.tune_call(call, torch.device("cpu"), times, set()))
    assert [o.name for o in outcomes] == [table.TILE] * 3 + [table.LAUNCH] * 4
    assert {o.after for o in outcomes} == {(32, 16), (8, 2)}
    assert all(o.repeats for o in outcomes)
    assert outcomes[3].features == ("forward", F32, (32, 16, 4, 1))  # launched with the tile that was chosen before
    assert table.asked is None


def test_a_candidate_that_is_wrong_or_fails_does_not_fit(tiles):
    exact = [torch.zeros(4, dtype=torch.float64)]
    assert tiles._fits(lambda: [torch.zeros(4)], exact, [1e-6])
    assert not tiles._fits(lambda: [torch.full((4,), 1e-3)], exact, [1e-6])
    assert not tiles._fits(lambda: [torch.full((4,), float("nan"))], exact, [1e-6])
    assert not tiles._fits(lambda: 1 / 0, exact, [1e-6])


def test_candidates_are_a_short_list_without_the_default(tiles):
    from effattn.triton_kernels import configurations as table

    for default in itertools.product(table.BLOCKS, table.BLOCKS):
        found = table.candidates(table.TILE, default)
        assert 3 <= len(found) <= 8
        assert default not in found
        assert all(_tuning.CHOICES[table.TILE].is_valid(pair) for pair in found)


def test_every_family_has_operators_to_tune(tiles):
    assert set(tiles.CALLS) == set(_tune.FAMILIES)
