"""docs/scaling.md, written from a measurement: python -m effattn.bench.scaling page [--check]."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from effattn._files import write_atomically

from . import answers, model, picture, published, ranks
from .allocation import KEPT, MAPPED
from .answers import BATCH, DTYPE, HEAD_DIM, HEADS, PEERS
from .subjects import SUBJECTS, TRAINING
from .text import by_assumption, duration, number, size_text, spread, table, whole_number
from .units import CACHE, CACHES, CHUNK, SEGMENT, STRIPE, WINDOW

ROOT = Path(__file__).resolve().parents[2]
PAGE, PICTURE = ROOT / "docs" / "scaling.md", ROOT / "docs" / "images" / "scaling.png"
GPUS = (2, 8, 16, 64, 512)


def write(found: dict, others: Sequence[dict] = (), *, check: bool = False) -> int:
    """Write page and picture of a measurement, with the errors of others, or tell with the exit status whether it is stale."""
    if not found["ranks"] or not found["longest"]:
        raise ValueError("--json: this measurement was of some operators only (--only); the page needs all")
    if not PAGE.parent.is_dir():
        raise ValueError(f"page needs a checkout: there is no {PAGE.parent}")
    wanted = text(found, others)
    if check:
        return int(PAGE.read_text() != wanted)
    write_atomically(PICTURE, lambda name: picture.draw(found, name))
    write_atomically(PAGE, lambda name: Path(name).write_text(wanted))
    return 0


def text(found: dict, others: Sequence[dict] = ()) -> str:
    sections = (
        _opening(found),
        _time(found, others),
        _memory(found),
        _messages(found),
        _fits(found),
        _pays(found),
        _cluster(),
        _silent(),
    )
    return "\n\n".join(sections) + "\n"


def _opening(found: dict) -> str:
    about = found["machine"]
    clock = "" if about.get("clock", "wall") == "wall" else ", CPU time of the thread and not the wall's"
    busy = [
        session["cores_used_by_others"] for session in found["sessions"] if session["cores_used_by_others"] is not None
    ]
    noise = ""
    if busy and max(busy) > 0.1:
        noise = (
            f" **Other processes kept {max(busy):g} of {about['cores']} cores busy meanwhile: these prices and errors are not "
            "those of an idle machine.**"
        )
    return f"""# Scaling

How time and memory grow with batch, heads, tokens, head_dim and ranks: a model of each operator, checked at sizes that had no
part in it, and what follows from it. `python -m effattn.bench.scaling page` writes this page from
`bench/results/<machine>/scaling.json`, which `python -m effattn.bench.scaling measure --json FILE` measures.
`python -m effattn.bench.scaling predict OPERATOR --tokens N --heads H --head-dim D` answers for one call.

Three kinds of numbers are told apart: **measured** ones, of {about["cpu"]}, {about["threads"]} threads, torch {about["torch"]},
commit {about["commit"]}, {about["date"][:10]}, {found["rounds"]} interleaved round{"s" * (found["rounds"] > 1)}{clock}; **counted** ones, exact; and **published** figures of
GPUs under **assumed** efficiencies. No kernel of effattn has been timed on a GPU.{noise}"""


# ---- time ----

UNITS = f"""* **call**: 1. **tokens**: B H N. **channels**: B H N D.
* **pairs**: entries of the score matrix that are computed, B H N² times a share: 1/2 causal, (h + w) / N of a decomposed grid,
  {WINDOW}² / N of windows of {WINDOW} x {WINDOW}, {STRIPE} (h + w) / 2N of stripes {STRIPE} wide. **products**: pairs times D, of
  `kernelized_rpe_attention` times M + D with M = 32 features.
* **states**: B H N D² of a scan over chunks, B H D² of `retention_step`.
* **butterflies**: L log2 L times B H M (D + 1), with L the transform's length, the least 2^a 3^b 5^c from 2N - 1. **table**: L log2 L, once a call.
* **again**: states of the backward pass of `retention, bidirectional` that are computed a second time: beyond {SEGMENT >> 20} MB of them a
  head, two every {CHUNK} tokens, those of a segment are computed anew from the state at its start.
* **far**: bytes beyond {CACHES >> 20} MB, more than the second-level caches of two cores have: of the result of `binary_matmul`, of old and new
  states of `retention_step`, of the states that all threads of `retention, bidirectional` keep from one sweep to the other.
  **spilled**: bytes that one transform works on beyond {CACHE >> 10} kB, the smallest second-level cache, times the transforms.
* **fresh**: bytes in blocks from {MAPPED >> 20} MB, counted from the tensors that a call makes, of calls that make {KEPT >> 20} MB or more. glibc keeps
  less than that of what is freed and maps such blocks anew at every call, and the operating system clears every page of them.
* **weights**: in x out of `shift_linear`. **words**: pairs times D / 32, of bits.
* Of `bipartite_soft_matching` a quarter of the tokens is merged, N² / 4 pairs; `soft_merge` makes N / 4 tokens of N.
  `shift_linear` has N rows and D inputs and outputs."""


def _sampling(found: dict) -> str:
    how = found.get("sampling")
    if how is None:
        return (
            "Every size was called once to warm up and then, once a round, as often as makes 2 ms; the median counts."
        )
    return f"""A size is sampled once a round, all sizes in turn: its inputs are made, it is called {how["warm_ups"]} times (or until {how["settled"]:g} s have
passed) to warm up, then as often as makes 2 ms; each result is freed before the next call makes its own, as in a user's loop. The
process is one whose heap has grown: blocks below {MAPPED >> 20} MB come from memory that it has used before, larger ones too where there is
room, and calls that make {KEPT >> 20} MB or more pay for fresh memory every time. Sizes whose middle half of samples spreads over more than
{how["spread"]:.0%} get up to {how["more"]} times the rounds; the median counts."""


def _time(found: dict, others: Sequence[dict]) -> str:
    rows, misses = [], []
    for name in [name for name in SUBJECTS if name in found["fits"]]:
        subject = SUBJECTS[name]
        for direction in subject.directions:
            fit = model.Fit(**found["fits"][name][direction])
            prices = " + ".join(f"{duration(price)} {unit}" for unit, price in fit.prices.items())
            mark = "" if fit.worst <= model.LIMIT else " *"
            rows.append(
                (
                    f"`{name}`",
                    direction,
                    prices,
                    f"{fit.median:.0%}",
                    f"{fit.worst:.0%}{mark}",
                    *_elsewhere(others, name, direction),
                )
            )
            if mark:
                misses.append(_miss(found, name, direction, fit))
    good = len(rows) - len(misses)
    return f"""## Time

A time is a sum of units of work, each with a price. Prices are found by non-negative least squares on relative errors at
10 to 13 sizes, so a price of 0 (left out below) means that the unit was not seen beside the others. The errors are those of
4 to 6 further sizes, between and beyond: mostly up to twice the longest sequence that was fitted.

{_sampling(found)}

A row with a held-out call that gets fresh memory (below) is fitted at a size with such a call too.

The held-out sizes have no part in the prices, but the units themselves, with their thresholds, were chosen while looking at the
held-out errors of the Intel machine (commit a456310587eb). Of that machine the errors flatter the model; one measured later is the test.

{UNITS}

![Predicted against measured time at sizes held out of the fit](images/scaling.png)

{table(("operator", "direction", "seconds of a unit", "median error", "largest error", *map(_machine, others)), rows)}

{good} of {len(rows)} are within {model.LIMIT:.0%} at every size that was held out.{_misses(misses)}"""


def _machine(other: dict) -> str:
    return f"largest error on {other['machine']['cpu']}, {other['machine']['date'][:10]}"


def _elsewhere(others: Sequence[dict], name: str, direction: str) -> list[str]:
    """Of the prices that were fitted there."""
    fits = [other["fits"].get(name, {}).get(direction) for other in others]
    return ["-" if fit is None else f"{model.Fit(**fit).worst:.0%}" for fit in fits]


def _misses(misses: list[str]) -> str:
    if not misses:
        return ""
    return (
        " The others (\\*), at their worst size; where samples of one size spread as far as the error, the machine was not quiet "
        "enough to tell:\n\n" + "\n".join(misses)
    )


def _miss(found: dict, name: str, direction: str, fit: model.Fit) -> str:
    subject = SUBJECTS[name]
    error, size = max(zip(fit.errors, subject.held_out), key=lambda one: abs(one[0]))
    where = "beyond" if size.tokens > max(one.tokens for one in subject.fit) else "between"
    spreading = spread(found["points"][name], size, direction)
    return f"* `{name}`, {direction}: {error:+.0%} at {size_text(size)} ({where} the sizes fitted), where {spreading}."


# ---- memory ----


def _memory(found: dict) -> str:
    rows = []
    for name in [name for name in SUBJECTS if name in found["memory"]]:
        for one in found["memory"][name]:
            measured = "-" if one["measured"] is None else number(one["measured"] / 1e6)
            beside = "-" if one["measured"] is None else number((one["measured"] - one["counted"]) / 1e6)
            rows.append(
                (f"`{name}`", one["direction"], size_text(one["size"]), number(one["counted"] / 1e6), measured, beside)
            )
    return f"""## Memory

Counted, not fitted: a call runs on tensors without data, and storages are watched as they come and go
(`bench/scaling/allocation.py`). For tensors it is exact at any size. CPU kernels also pack operands outside of tensors, for each
thread, in proportion to N D and not to B H; the operating system's count of the same call, in a fresh process, has them. `predict`
does not.

{table(("operator, float32", "direction", "B x H x N x D", "counted, MB", "measured, MB", "beside tensors, MB"), rows)}"""


# ---- messages ----


def _messages(found: dict) -> str:
    measured = found["ranks"]
    rows = []
    for direction in (answers.FORWARD, TRAINING):
        each = ranks.slices(measured, direction)
        for size, error in zip(ranks.TOGETHER, each.errors):
            seconds = measured["together"][f"{size.tokens} {direction}"]
            rows.append((direction, size.tokens, duration(seconds), duration(seconds * (1 + error)), f"{error:+.0%}"))
    point, ring = ranks.link(measured), ranks.link(measured, "all_reduce")
    return f"""## Ranks

* **Batch and heads** shard without a message ([the table](distributed.md#what-shards-how)): R ranks take the time of B H / R.
* **`sequence_parallel_retention`**: ceil(log2 R) rounds a pass, forward and backward, of one message of
  4 (B H Dk Dv + 2) bytes each way (`normalize="retnet"`: Dk + 1), whatever N is. Rank r sends as many messages forward as there are
  powers of two below R - r. Beside its retention every rank computes its state, in PyTorch operations on blocks of tokens.
* **DistributedDataParallel** adds up gradients: 2 (R - 1) / R of the parameters' bytes for every rank on a ring.

Measured over gloo between two processes of this machine: a message takes {duration(point.latency)} + bytes /
{number(point.bandwidth / 1e9)} GB/s, an all-reduce of two ranks {duration(ring.latency)} + bytes / {number(ring.bandwidth / 1e9)} GB/s. From one
rank's time on one thread and those messages, for two ranks of one thread each (B = 1, H = 8, D = 64):

{table(("direction", "tokens of a rank", "measured", "predicted", "error"), rows)}"""


# ---- answers ----


def _fits(found: dict) -> str:
    peers = {peer.name for peer in PEERS}
    rows = []
    for name, by_direction in found["longest"].items():
        cells = []
        for direction in (answers.FORWARD, TRAINING):
            one = by_direction.get(direction)
            cells += (
                ["-", "-"] if one is None else [whole_number(one["tokens"]), number(one["bytes"] / one["tokens"] / 1e3)]
            )
        rows.append((f"{name} (not ours)" if name in peers else f"`{name}`", *cells))
    dtype = str(DTYPE).removeprefix("torch.")
    return f"""## How long a sequence fits on one H200

Counted: inputs, parameters, results, what is saved for the backward pass and the Triton launchers' work space, of one call of
B = {BATCH}, H = {HEADS}, D = {HEAD_DIM} in {dtype}. Published: {published.MEMORY.value / 1e9:g} GB. Assumed: tensors may have {published.USABLE:.0%} of it. The longest
sequence of (8 n)² tokens (a square grid, where there is one):

{table(("operator", "forward, tokens", "kB a token", "training step, tokens", "kB a token"), rows)}

One operator's tensors only: a model holds many layers' activations. What holds N² entries, in whatever form, ends at tens of
thousands of tokens; the others at millions, and there time is what ends them. The published mixture formula keeps K of them for its backward
pass. `kernelized_rpe_attention` by FFT is left out: its CUDA work space is sized in C++, which this count does not see.
PyTorch's own attention with a mask is counted without what its GPU kernels take beside the mask."""


def _pays(found: dict) -> str:
    cpu = [
        (count, *(_tokens(answers.cpu_break_even(found["ranks"], d, count)) for d in (answers.FORWARD, TRAINING)))
        for count in (2, 4, 8)
    ]
    gpu = []
    for count in GPUS:
        cells = [count]
        for training in (False, True):
            cells.append(
                by_assumption(*(_tokens(answers.h200_break_even(count, training, how)) for how in published.MACHINES))
            )
            cells.append(
                by_assumption(
                    *(_tokens(answers.messages_break_even(count, training, how)) for how in published.MACHINES)
                )
            )
        gpu.append(tuple(cells))
    return f"""## When to go sequence-parallel

**On this CPU**, from the model above (measured; 4 and 8 ranks as if each had a core of its own): the shortest sequence, in powers
of two, that R one-thread ranks finish before one does. B = 1, H = 8, D = 64.

{table(("ranks", "forward, tokens", "training step, tokens"), cpu)}

**On H200s**, from published figures and two sets of assumptions ([below](#published-and-assumed); low / high), B = 1, H = {HEADS},
D = {HEAD_DIM}, {str(DTYPE).removeprefix("torch.")}; up to {published.GPUS_A_NODE} ranks over NVLink, more over InfiniBand. "Faster" is the length at which R GPUs beat one,
"messages" the length at which the messages take as long as a rank's own retention:

{table(("ranks", "forward: faster", "messages", "training: faster", "messages"), gpu)}

From "faster" on R GPUs beat one; only from "messages" on do they spend more on attention than on messages. Messages do not grow with
N. What does is the state that every rank computes beside its retention: {answers.operations_a_block(False)} PyTorch operations for every {answers.BLOCK} tokens forward and
{answers.operations_a_block(True)} in a training step (counted), which on a GPU take longer to start than to run, and which keep few ranks from ever being faster.
So on paper ranks are taken for memory first: a sequence beyond the table above, or layers whose activations do not fit. For speed,
shard batch and heads while there are any, and tokens after that. A fused kernel of the slice's state is the first thing to write."""


def _tokens(tokens: int | None) -> str:
    return "never" if tokens is None else whole_number(tokens)


def _cluster() -> str:
    gpus, what = 64 * published.GPUS_A_NODE, published.RETNET
    rows = []
    for form, sequence_parallel in (("a sequence on every GPU", False), ("one sequence over all GPUs", True)):
        for tokens in (2048, 8192, 32768):
            low, high = (answers.cluster_step(what, gpus, tokens, sequence_parallel, how) for how in published.MACHINES)
            rows.append(
                (
                    form,
                    whole_number(tokens),
                    whole_number(tokens if not sequence_parallel else tokens * gpus),
                    by_assumption(*(duration(one.compute) for one in (low, high))),
                    by_assumption(*(duration(one.states) for one in (low, high))) if sequence_parallel else "-",
                    by_assumption(*(duration(one.gradients) for one in (low, high))),
                    by_assumption(*(f"{one.tokens_a_second / 1e6:.1f} M" for one in (low, high))),
                )
            )
    return f"""## What 64 nodes would do

64 nodes of {published.GPUS_A_NODE} H200 train {what.name} ({what.source}: {what.layers} layers, {
        what.heads
    } heads, Dk = {what.key_dim}, Dv = {what.value_dim}) in bfloat16,
one step, low / high assumptions. An estimate on paper; nothing here was run.

{table(("form", "tokens a GPU", "sequence", "compute", "states", "gradients, not hidden", "tokens a second"), rows)}

Compute is 6 FLOPs a parameter and token and 3.5 forward passes of retention. States are the messages of
`sequence_parallel_retention`, {ranks.rounds(gpus)} rounds a pass of {
        number(ranks.state_bytes(1, what.heads, what.key_dim, what.value_dim) / 1e6)
    } MB a layer, and what a rank computes for them. Gradients are
{
        number(2 * what.parameters / 1e9)
    } GB in bfloat16 around one ring of all GPUs, hidden behind the backward pass under the high assumptions only. Left
out: the optimiser, recomputation, loading data, checkpoints, failures, and whether activations fit. With short slices the ring of
gradients is most of a step: fewer, larger steps or a hierarchical all-reduce come before sequence parallelism.

### Published and assumed

{
        table(
            ("published, not measured", "value", "source"),
            [(f.what, published.shown(f), f.source) for f in published.FIGURES],
        )
    }

{
        table(
            ("assumed", "low", "high"),
            [
                ("share of the arithmetic peak", *(f"{how.arithmetic:.0%}" for how in published.MACHINES)),
                ("share of the memory bandwidth", *(f"{how.memory:.0%}" for how in published.MACHINES)),
                ("share of a link's bandwidth", *(f"{how.link:.0%}" for how in published.MACHINES)),
                ("to start one PyTorch operation", *(duration(how.operation) for how in published.MACHINES)),
                (
                    "gradients hidden behind the backward pass",
                    *("yes" if how.overlap else "no" for how in published.MACHINES),
                ),
            ],
        )
    }"""


def _silent() -> str:
    return """## What the model cannot say

* Other machines: prices are of one CPU, one number of threads and float32. `measure` takes those of another.
* Odd B H: work is dealt out to threads in whole items, and the sizes here deal out evenly.
* Other strides, dtypes, masks, windows, features and decays than the benchmark's; `method="auto"`, which changes its method.
* A step where a cache ends: beyond the longest size measured, prices are those of the sizes before it.
* How fast any kernel is on any GPU. Published peaks under assumed shares bound an estimate; they do not measure one.
* Contention: of ranks for a network, of processes for a socket's memory."""
