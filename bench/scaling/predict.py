"""One prediction in words: time with the interval that the held-out sizes give, memory as it is counted."""

from __future__ import annotations

from . import ranks
from .allocation import count
from .model import Fit
from .subjects import SEQUENCE_PARALLEL, SUBJECTS, Subject
from .text import duration
from .units import Size


def say(found: dict, name: str, size: tuple[int, int, int, int], count_of_ranks: int) -> str:
    """Lines about a call of ``size`` (batch, heads, tokens, head_dim) that so many ranks share.

    Raises:
        ValueError: there is no such operator, or the call would be refused; the message names the argument.
    """
    names = ("--batch", "--heads", "--tokens", "--head-dim", "--ranks")
    for argument, value in zip(names, (*size, count_of_ranks)):
        if value < 1:
            raise ValueError(f"{argument} must be at least 1, got {value}")
    name = {"sequence_parallel_retention": SEQUENCE_PARALLEL}.get(name, name)
    if name not in SUBJECTS:
        raise ValueError(f"OPERATOR must be one of {'; '.join(SUBJECTS)}; got {name!r}")
    if name not in found["fits"]:
        raise ValueError(f"OPERATOR {name!r} is not in this measurement, which has {'; '.join(found['fits'])}")
    subject, size = SUBJECTS[name], Size(*size)
    about = found["machine"]
    lines = [
        f"{name}, {'x'.join(map(str, size))} (B x H x N x D), float32, {about['threads']} threads of {about['cpu']}"
    ]
    share = _share(name, size, count_of_ranks)
    if count_of_ranks > 1:
        lines.append(f"a rank of {count_of_ranks} has {'x'.join(map(str, share))}")
    lines += [_line(found, subject, share, count_of_ranks, direction) for direction in subject.directions]
    furthest = max(one.tokens for one in (*subject.fit, *subject.held_out))
    if share.tokens > furthest:
        lines.append(f"beyond what was measured: {furthest} tokens at most")
    return "\n".join(lines)


def _share(name: str, size: Size, count_of_ranks: int) -> Size:
    if name == SEQUENCE_PARALLEL:
        if size.tokens % count_of_ranks:
            raise ValueError(f"--ranks must divide --tokens {size.tokens}, got {count_of_ranks}")
        return size._replace(tokens=size.tokens // count_of_ranks)
    if size.batch % count_of_ranks == 0:
        return size._replace(batch=size.batch // count_of_ranks)
    if size.heads % count_of_ranks == 0:
        return size._replace(heads=size.heads // count_of_ranks)
    raise ValueError(
        f"--ranks must divide --batch {size.batch} or --heads {size.heads}: only sequence_parallel_retention shares "
        f"tokens; got {count_of_ranks}"
    )


def _line(found: dict, subject: Subject, share: Size, count_of_ranks: int, direction: str) -> str:
    try:
        counted = count(subject.making(share, direction))
    except (ValueError, TypeError, RuntimeError) as error:  # what the operator or its inputs have against this size
        raise ValueError(f"no such call: {str(error).splitlines()[0]}") from None
    if subject.name == SEQUENCE_PARALLEL and count_of_ranks > 1:
        prices = ranks.slices(found["ranks"], direction)
        seconds, where = (
            ranks.predicted(found["ranks"], prices, share, count_of_ranks, direction),
            "; ranks of one thread, gloo",
        )
    else:
        prices, where = Fit(**found["fits"][subject.name][direction]), ""
        seconds = prices.seconds(subject.work(share, direction, counted.fresh))
    low, high = (duration(seconds * factor) for factor in (1 / (1 + prices.largest), 1 + prices.largest))
    return (
        f"{direction}: {duration(seconds)} ({low} to {high} by the worst held-out size{where}), "
        f"{counted.extra / 1e6:.4g} MB of tensors beside {counted.held / 1e6:.4g} MB of inputs"
    )
