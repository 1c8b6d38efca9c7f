"""The whole CSWin-T on photographs, with our attention and with the published formula: ``python -m effattn.bench.cswin``.

Both models have the published architecture and parameter names (the official model's state dict loads) and
share one set of random weights. Their outputs are compared, then they take turns; reported are medians of images per
second. Everything outside the attention (projections, MLPs, norms, convolutions) is PyTorch's in both.
"""

from __future__ import annotations

import argparse
import time
from typing import NamedTuple

import torch
from torch import Tensor, nn

import effattn

from . import photographs, report
from .cases import OURS
from .load import ForeignLoad
from .runner import Effort, Result, _quantile, take_turns, warm_up
from .window_peers import published_stripes

EAGER = "eager"
EFFORT, QUICK = Effort(seconds=25.0, rounds=21, fewest=5), Effort(seconds=12.0, rounds=7, fewest=3)
TOLERANCE = 1e-4  # of the outputs' difference, as a share of their largest element


class Architecture(NamedTuple):
    """CSWin-T of the paper's table 1."""

    width: int = 64
    depths: tuple[int, ...] = (1, 2, 21, 1)
    heads: tuple[int, ...] = (2, 4, 8, 16)
    stripes: tuple[int, ...] = (1, 2, 7, 7)
    classes: int = 1000


TINY = Architecture()


class Block(effattn.nn.CrossShapedWindowAttention):
    """x + attention(norm1(x)), then x + mlp(norm2(x)), under the published block's parameter names."""

    def __init__(self, dim: int, heads: int, stripe: int, last_stage: bool):
        super().__init__(dim, heads, split_size=stripe, last_stage=last_stage)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        x = x + super().forward(self.norm1(x), grid)
        hidden = nn.functional.gelu(self.mlp["fc1"](self.norm2(x)))
        return x + self.mlp["fc2"](hidden)


class PublishedBlock(Block):
    """The same parameters; attention by the published sequence of tensor passes."""

    def _operator(self, query, key, value, grid, dropout_p):
        lepe = [(branch.get_v.weight, branch.get_v.bias) for branch in self.attns]
        return published_stripes(query, key, value, grid, self.split_size, self.scale, lepe)


class Merge(nn.Module):
    """Half the resolution, twice the channels."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(dim, 2 * dim, 3, 2, 1), nn.LayerNorm(2 * dim)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        x = self.conv(x.transpose(1, 2).contiguous().unflatten(2, grid))
        return self.norm(x.flatten(2).transpose(1, 2).contiguous()), tuple(x.shape[2:])


class CSWin(nn.Module):
    def __init__(self, block: type[Block], architecture: Architecture = TINY):
        super().__init__()
        width, depths, heads, stripes, classes = architecture
        # The published model has a parameterless rearrangement at index 1.
        self.stage1_conv_embed = nn.Sequential(nn.Conv2d(3, width, 7, 4, 2), _Tokens(), nn.LayerNorm(width))
        for stage in range(4):
            blocks = [block(width << stage, heads[stage], stripes[stage], stage == 3) for _ in range(depths[stage])]
            setattr(self, f"stage{stage + 1}", nn.ModuleList(blocks))
            if stage < 3:
                setattr(self, f"merge{stage + 1}", Merge(width << stage))
        self.norm, self.head = nn.LayerNorm(width << 3), nn.Linear(width << 3, classes)

    def forward(self, images: Tensor) -> Tensor:
        grid = images.shape[2] // 4, images.shape[3] // 4
        x = self.stage1_conv_embed(images)
        for stage in range(1, 5):
            for block in getattr(self, f"stage{stage}"):
                x = block(x, grid)
            if stage < 4:
                x, grid = getattr(self, f"merge{stage}")(x, grid)
        return self.head(self.norm(x).mean(1))


class _Tokens(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return image.flatten(2).transpose(1, 2)


def models(architecture: Architecture = TINY) -> dict[str, CSWin]:
    """One set of random weights in both. Linear weights have the size that training leaves (softmax rows with a peak
    instead of the published initialisation's uniform ones)."""
    torch.manual_seed(0)
    ours, eager = CSWin(Block, architecture).eval(), CSWin(PublishedBlock, architecture).eval()
    with torch.no_grad():
        for module in ours.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5)
    eager.load_state_dict(ours.state_dict())
    return {OURS: ours, EAGER: eager}


class Comparison(NamedTuple):
    batch: int
    pixels: int
    results: dict[str, Result]
    attention_ms: dict[str, float]  # of one pass, in all blocks together
    difference: float  # of the outputs, as a share of their largest element

    def images_per_second(self, name: str) -> float:
        return 1e3 * self.batch / self.results[name].ms

    @property
    def ratio(self) -> float:
        return self.results[EAGER].ms / self.results[OURS].ms

    @property
    def limit(self) -> float:
        """The ratio if our attention took no time at all: everything else is PyTorch's in both."""
        return self.results[EAGER].ms / (self.results[EAGER].ms - self.attention_ms[EAGER])


def compare(batch: int = 8, pixels: int = 224, effort: Effort = EFFORT) -> Comparison:
    """Raises where the two models disagree."""
    images, contenders = photographs.images(batch, (pixels, pixels)), models()
    with torch.no_grad():
        outputs = {name: model(images) for name, model in contenders.items()}
        difference = ((outputs[OURS] - outputs[EAGER]).abs().max() / outputs[EAGER].abs().max()).item()
        if not difference <= TOLERANCE:
            raise AssertionError(f"the two backbones differ by {difference:.1e} of their largest output")
        calls = {name: ((lambda model=model: model(images)), 1.0) for name, model in contenders.items()}
        results = take_turns(calls, effort)
        attention = {name: _attention_ms(model, images) for name, model in contenders.items()}
    return Comparison(batch, pixels, results, attention, difference)


def _attention_ms(model: CSWin, images: Tensor) -> float:
    """Between the projections, by a clock around every block's operator; median of three passes."""
    passes, blocks = [], [module for module in model.modules() if isinstance(module, Block)]

    def timed(operator):
        def call(*arguments):
            begin = time.perf_counter()
            output = operator(*arguments)
            passes[-1] += time.perf_counter() - begin
            return output

        return call

    for block in blocks:
        block._operator = timed(block._operator)
    for _ in range(3):
        passes.append(0.0)
        model(images)
    for block in blocks:
        del block._operator
    return 1e3 * _quantile(passes, 0.5)


def table(found: Comparison) -> str:
    lines = [f"CSWin-T at {found.pixels} x {found.pixels}, forward, float32, batch of photographs: {found.batch}"]
    for name, result in found.results.items():
        speed, attention = found.images_per_second(name), found.attention_ms[name]
        time_of = f"{result.ms:>8.1f} ms, {attention:.1f} of them attention"
        lines.append(f"  {name:<8}{speed:>7.2f} images/s{time_of}, +-{result.noise:.0%} of {result.samples} samples")
    lines.append(
        f"  {found.ratio:.2f}x the images/s of the eager formula, {found.limit:.2f}x if our attention took no time; "
        f"outputs differ by {found.difference:.1e}"
    )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m effattn.bench.cswin", description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=(8, 1), help="default 8 and 1")
    parser.add_argument("--pixels", type=int, default=224, help="side of the photographs; default %(default)s")
    parser.add_argument("--quick", action="store_true", help="fewer samples")
    parser.add_argument("--json", metavar="FILE", help="write the results (atomically)")
    parser.add_argument("--threads", type=int, default=2, help="default %(default)s")
    options = parser.parse_args(argv)
    if photographs.missing():
        parser.error(f"no photographs: {photographs.missing()}")
    if options.pixels < 224 or options.pixels % 224:
        parser.error("--pixels must be a multiple of 224: stripes of 7 divide no other grid")
    if options.threads < 1 or min(options.batch) < 1:
        parser.error("--threads and --batch must be at least 1")
    torch.set_num_threads(options.threads)
    about, load = report.machine("cpu", options.threads), ForeignLoad()
    warm_up("cpu")
    found = [compare(batch, options.pixels, QUICK if options.quick else EFFORT) for batch in options.batch]
    print("\n\n".join(table(comparison) for comparison in found))
    foreign = load.cores()
    if foreign:
        print(f"\nOther processes used {foreign} cores meanwhile.")
    if options.json:
        content = {
            "about": about,
            "foreign_cores": foreign,
            "comparisons": [
                {
                    "batch": one.batch,
                    "pixels": one.pixels,
                    "difference": one.difference,
                    "ratio": one.ratio,
                    "ratio_if_our_attention_took_no_time": one.limit,
                    "attention_ms": one.attention_ms,
                    "images_per_second": {name: one.images_per_second(name) for name in one.results},
                    "results": {name: result._asdict() for name, result in one.results.items()},
                }
                for one in found
            ],
        }

        report.write_json(content, options.json)
    return 0


if __name__ == "__main__":
    from effattn._files import exit_status

    raise SystemExit(exit_status(main))
