"""A model with one module of each attention class, trained for a step alone, under DDP and under FSDP2."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import effattn

BATCH, GRID, DIM, HEADS, CLASSES = 4, (4, 4), 16, 2, 5
TOKENS = GRID[0] * GRID[1]


def attentions() -> dict[str, nn.Module]:
    make = effattn.nn
    return {
        "CrossShapedWindowAttention": make.CrossShapedWindowAttention(DIM, HEADS, split_size=2, resolution=GRID),
        "WindowAttention": make.WindowAttention(DIM, window=2, num_heads=HEADS, shift=1),
        "OverlappingCrossAttention": make.OverlappingCrossAttention(DIM, window=2, num_heads=HEADS, overlap_ratio=1),
        "GaussianMixtureAttention": make.GaussianMixtureAttention(DIM, GRID, num_heads=HEADS, head_dim=8),
        "ManhattanAttention": make.ManhattanAttention(DIM, HEADS, learnable_decay=True),
        "MultiScaleRetention": make.MultiScaleRetention(DIM, HEADS),
        "VisionRetention": make.VisionRetention(DIM, HEADS, learnable_decay=True),
        "ShiftAddAttention": make.ShiftAddAttention(DIM, HEADS),
        "KernelizedRPEAttention": make.KernelizedRPEAttention(DIM, HEADS, num_features=8, num_tokens=TOKENS),
        "URPEAttention": make.URPEAttention(DIM, HEADS, grid=GRID),
    }


class Model(nn.Module):
    """Attentions with residuals, then mergers and a classifier of shifts."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleDict(attentions())
        self.norms = nn.ModuleDict({name: nn.LayerNorm(DIM) for name in self.blocks})
        self.learned = effattn.nn.LearnableTokenMerge(DIM, TOKENS, CLASSES, compression_ratio=0.5)
        self.merger = effattn.nn.PatchMerger(DIM, 4)
        self.head = effattn.nn.ShiftLinear(DIM, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for name, block in self.blocks.items():
            y = self.norms[name](x)
            if name.startswith(("CrossShaped", "Window", "Overlapping", "Manhattan")):
                y = y.unflatten(1, GRID)
            x = x + block(y).reshape(x.shape)
        merged, _ = self.learned(x)
        return self.head(self.merger(merged.to(x.dtype)).mean(1))


def model() -> Model:
    torch.manual_seed(0)
    return Model()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(BATCH, TOKENS, DIM, generator=generator), torch.arange(BATCH) % CLASSES


def step(run: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """One step of SGD; the gradients stay."""
    optimizer = torch.optim.SGD(run.parameters(), lr=0.1, momentum=0.9)
    loss = nn.functional.cross_entropy(run(x).float(), target)
    loss.backward()
    optimizer.step()
    return loss.detach()


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def found(run: nn.Module, loss: Tensor) -> dict:
    names = [(name.removeprefix("module."), p) for name, p in run.named_parameters()]
    return {
        "loss": loss,
        "gradients": {name: whole(p.grad) for name, p in names if p.grad is not None},
        "parameters": {name: whole(p) for name, p in names},
    }


def alone() -> dict:
    run = model()
    return found(run, step(run, *batch()))


def _mean_over_ranks(loss: Tensor) -> Tensor:
    dist.all_reduce(loss)
    return loss / dist.get_world_size()


def _own_part() -> tuple[Tensor, Tensor]:
    size = BATCH // dist.get_world_size()
    part = slice(dist.get_rank() * size, (dist.get_rank() + 1) * size)
    return tuple(t[part] for t in batch())


def data_parallel() -> dict:
    run = DistributedDataParallel(model())
    result = found(run, _mean_over_ranks(step(run, *_own_part())))
    again = model()
    again.load_state_dict(run.module.state_dict())
    x, _ = batch()
    with torch.no_grad():
        return {**result, "same after loading": torch.equal(again(x), run.module(x))}


def fully_sharded(mesh, mixed_precision: bool = False) -> dict:
    run = model()
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if mixed_precision else MixedPrecisionPolicy()
    for block in (*run.blocks.values(), run.learned, run.merger, run.head):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(run, mesh=mesh, mp_policy=policy)
    result = found(run, _mean_over_ranks(step(run, *_own_part())))
    state = get_model_state_dict(run, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=False))
    again, x = model(), batch()[0]
    again.load_state_dict(state)
    with torch.no_grad():
        before = run(x)
        run.reshard()  # the outermost module keeps its parameters whole after a forward pass
        for p in run.parameters():
            p.zero_()
        set_model_state_dict(run, state, options=StateDictOptions(full_state_dict=True))
        return {
            **result,
            "same after loading": torch.equal(run(x), before),
            "as one process": torch.allclose(again(x), before.float(), atol=0.1 if mixed_precision else 1e-5),
        }
