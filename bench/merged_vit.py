"""A whole ViT on photographs, with and without token merging: ``python -m effattn.bench.merged_vit``.

One set of random weights; the model as it is, through F.scaled_dot_product_attention, the same one after
``effattn.integrations.timm.merge_tokens``, and with the published algorithm in eager PyTorch. They take turns; reported are
medians of images per second. Everything else (projections, MLPs, norms) is PyTorch's in all three.
"""

from __future__ import annotations

import argparse
import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from effattn.integrations import timm

from . import photographs, report, vit
from .cases import OURS
from .load import ForeignLoad
from .runner import Effort, Result, take_turns, warm_up
from .token_merging_peers import published_attention, published_merge

WHOLE, PUBLISHED = "not merged", "published"
SIZES = {"S": vit.SMALL, "B": vit.BASE}
EFFORT, QUICK = Effort(seconds=30.0, rounds=21, fewest=5), Effort(seconds=12.0, rounds=7, fewest=3)


class PublishedBlock(nn.Module):
    """A block of the model, merging ``num_merged`` tokens as published."""

    def __init__(self, block: nn.Module, num_merged: int):
        super().__init__()
        self.block, self.num_merged = block, num_merged

    def forward(self, x: Tensor, sizes: Tensor | None) -> tuple[Tensor, Tensor]:
        block, attention = self.block, self.block.attn
        batch, tokens, _ = x.shape
        packed = attention.qkv(block.norm1(x)).unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = packed.unbind(0)
        sizes = x.new_ones(batch, tokens, 1) if sizes is None else sizes
        attended = published_attention(query, key, value, sizes.squeeze(2)).transpose(1, 2).reshape(x.shape)
        x = x + attention.proj(attended)
        num_merged = min(self.num_merged, (tokens - 1) // 2)
        if num_merged > 0:
            x, sizes = published_merge(key.mean(1), x, sizes, num_merged)
        return x + block.mlp(block.norm2(x)), sizes


class PublishedBlocks(nn.Module):
    def __init__(self, blocks, num_merged: int):
        super().__init__()
        self.blocks = nn.ModuleList(PublishedBlock(block, num_merged) for block in blocks)

    def forward(self, x: Tensor) -> Tensor:
        sizes = None
        for block in self.blocks:
            x, sizes = block(x, sizes)
        return x


def models(architecture: vit.Architecture, num_merged: int) -> dict[str, nn.Module]:
    whole = vit.VisionTransformer(architecture).eval()
    ours, published = copy.deepcopy(whole), copy.deepcopy(whole)
    timm.merge_tokens(ours, num_merged)
    published.blocks = PublishedBlocks(published.blocks, num_merged)
    return {OURS: ours, WHOLE: whole, PUBLISHED: published}


class Comparison(NamedTuple):
    size: str
    batch: int
    num_merged: int
    results: dict[str, Result]
    difference: float  # of our outputs and the published algorithm's, as a share of their largest element

    def images_per_second(self, name: str) -> float:
        return 1e3 * self.batch / self.results[name].ms

    @property
    def ratio(self) -> float:
        return self.results[WHOLE].ms / self.results[OURS].ms


def compare(size: str, batch: int = 8, num_merged: int = 16, effort: Effort = EFFORT) -> Comparison:
    images, contenders = photographs.images(batch, (224, 224)), models(SIZES[size], num_merged)
    with torch.no_grad():
        outputs = {name: model(images) for name, model in contenders.items()}
        difference = (outputs[OURS] - outputs[PUBLISHED]).abs().max() / outputs[PUBLISHED].abs().max()
        calls = {name: ((lambda model=model: model(images)), 1.0) for name, model in contenders.items()}
        results = take_turns(calls, effort)
    return Comparison(size, batch, num_merged, results, difference.item())


def table(found: Comparison) -> str:
    lines = [f"ViT-{found.size}/16 at 224, r = {found.num_merged}, forward, float32, {found.batch} photographs"]
    for name, result in found.results.items():
        speed = found.images_per_second(name)
        lines.append(
            f"  {name:<12}{speed:>7.2f} images/s{result.ms:>9.1f} ms, +-{result.noise:.0%} of {result.samples} samples"
        )
    lines.append(
        f"  {found.ratio:.2f}x the images/s of the model that does not merge; ours and the published algorithm's outputs "
        f"differ by {found.difference:.1e}"
    )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m effattn.bench.merged_vit", description=__doc__.splitlines()[0])
    parser.add_argument("--size", nargs="+", choices=SIZES, default=tuple(SIZES), help="default S and B")
    parser.add_argument("--batch", type=int, default=8, help="default %(default)s")
    parser.add_argument(
        "--merged", type=int, nargs="+", default=(8, 16), help="tokens merged per layer; default 8 and 16"
    )
    parser.add_argument("--quick", action="store_true", help="fewer samples")
    parser.add_argument("--json", metavar="FILE", help="write the results (atomically)")
    parser.add_argument("--threads", type=int, default=2, help="default %(default)s")
    options = parser.parse_args(argv)
    if photographs.missing():
        parser.error(f"no photographs: {photographs.missing()}")
    if options.threads < 1 or options.batch < 1:
        parser.error("--threads and --batch must be at least 1")
    torch.set_num_threads(options.threads)
    about, load = report.machine("cpu", options.threads), ForeignLoad()
    warm_up("cpu")
    effort = QUICK if options.quick else EFFORT
    found = [compare(size, options.batch, merged, effort) for size in options.size for merged in options.merged]
    print("\n\n".join(table(comparison) for comparison in found))
    foreign = load.cores()
    if foreign:
        print(f"\nOther processes used {foreign} cores meanwhile.")
    if options.json:
        comparisons = [
            {
                **{name: getattr(one, name) for name in ("size", "batch", "num_merged", "ratio", "difference")},
                "images_per_second": {name: one.images_per_second(name) for name in one.results},
                "results": {name: result._asdict() for name, result in one.results.items()},
            }
            for one in found
        ]

        report.write_json({"about": about, "foreign_cores": foreign, "comparisons": comparisons}, options.json)
    return 0


if __name__ == "__main__":
    from effattn._files import exit_status

    raise SystemExit(exit_status(main))
