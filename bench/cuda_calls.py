"""Every CUDA operator, forward and backward, on small shapes with ragged edges: what compute-sanitizer watches.

compute-sanitizer --tool memcheck python -m effattn.bench.cuda_calls
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor

import effattn
from effattn import _native

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def shift_linear(rows: int, device: str) -> Iterator[Tensor]:
    weight = torch.randn(70, 131)
    for bits, scale in ((4, "none"), (4, "channel"), (5, "none")):
        packed = effattn.quantize_power_of_two(weight, bits=bits, scale=scale).to(device)
        bias = torch.randn(70, device=device)
        for dtype in DTYPES:
            x = torch.randn(rows, 131, device=device).to(dtype).requires_grad_()
            for activation in ("float", "int8", "fixed16.16"):
                if (bits, activation) == (5, "int8") or (scale, activation) == ("channel", "fixed16.16"):
                    continue
                yield effattn.shift_linear(x, packed, bias, activation=activation, backend="cuda")


def packed_bits(device: str) -> Iterator[Tensor]:
    for dtype in DTYPES:
        bits = effattn.pack_signs(torch.randn(2, 37, 45, device=device).to(dtype), backend="cuda")
        for values in ("binary", "sign"):
            dense = torch.randn(2, 45, 19, device=device).to(dtype).requires_grad_()
            yield effattn.add_matmul(bits, dense, values=values, backend="cuda")
            yield effattn.binary_matmul(bits, bits[:, :21], 45, values=values, backend="cuda")
            value = torch.randn(2, 1, 37, 19, device=device).to(dtype).requires_grad_()
            yield effattn.hamming_attention(bits[:, None], bits[:, None], value, 45, values=values, backend="cuda")


def shift_add_attention(device: str) -> Iterator[Tensor]:
    weight = torch.randn(3, 1, 9, 1, device=device, requires_grad=True)
    for dtype in DTYPES:
        for head_dim in (24, 64):
            q, k, v = (torch.randn(2, 3, 77, head_dim, device=device).to(dtype).requires_grad_() for _ in range(3))
            for binarize in ("published", "mean_threshold", "per_head", "sign"):
                yield effattn.shift_add_attention(q, k, v, binarize=binarize, residual_weight=weight, backend="cuda")


def retention(device: str) -> Iterator[Tensor]:
    decay = effattn.retnet_log_decay(2, dtype=torch.float32, device=device).requires_grad_()
    packed = torch.tensor([0, 5, 5, 70], dtype=torch.int32, device=device)
    for dtype in DTYPES:
        for key_dim, value_dim in ((24, 33), (130, 40), (20, 260)):
            q, k = (torch.randn(1, 2, 70, key_dim, device=device).to(dtype).requires_grad_() for _ in range(2))
            v = torch.randn(1, 2, 70, value_dim, device=device).to(dtype).requires_grad_()
            state = torch.randn(3, 2, key_dim, value_dim, device=device, requires_grad=True)
            with_state = {"initial_state": state, "return_state": True, "cu_seqlens": packed}
            yield torch.cat([x.flatten() for x in effattn.retention(q, k, v, decay, **with_state, backend="cuda")])
            for options in ({"normalize": "retnet", "chunk_size": 17}, {"is_causal": False}):
                yield effattn.retention(q, k, v, decay, **options, backend="cuda")
            token = [x.detach()[:, :, :1] for x in (q, k, v)]
            for inplace in (False, True):
                one = state.detach()[:1].clone()
                yield effattn.retention_step(*token, decay.detach(), one, inplace=inplace, backend="cuda")[0]


def toeplitz(device: str) -> Iterator[Tensor]:
    for dtype in DTYPES:
        for tokens, grid, head_dim in ((77, None, 24), (6 * 11, (6, 11), 33)):
            sizes = [2 * extent - 1 for extent in grid or (tokens,)]
            bias = (0.3 * torch.randn(2, *sizes, device=device)).requires_grad_()
            projection = effattn.random_features(5, head_dim).to(device).requires_grad_()
            q, k, v = (torch.randn(2, 2, tokens, head_dim, device=device).to(dtype).requires_grad_() for _ in range(3))
            padding = torch.arange(tokens, device=device)[None].expand(2, -1) > tokens - 4
            where = {"grid": grid, "method": "fft", "backend": "cuda"}
            for options in ({}, {"key_padding_mask": padding}, {"feature_map": "trigonometric", "eps": 1e-3}):
                yield effattn.kernelized_rpe_attention(q, k, v, bias, projection, **where, **options)
            features = [x.exp() for x in (q, k)]
            yield effattn.toeplitz_linear_attention(*features, v, bias, is_causal=True, **where)


def token_merging(device: str) -> Iterator[Tensor]:
    for dtype in DTYPES:
        for tokens, width, channels in ((77, 45, 88), (1031, 5, 33)):
            metric = torch.randn(2, tokens, width, device=device).to(dtype)
            x, residual = (torch.randn(2, tokens, channels, device=device).to(dtype).requires_grad_() for _ in range(2))
            sizes = torch.rand(2, tokens, device=device, requires_grad=True)
            for options in ({"num_protected": 1}, {"threshold": 0.1, "sizes": sizes}, {"distill_token": True}):
                plan = effattn.bipartite_soft_matching(metric, tokens // 3, backend="cuda", **options)
                merged, totals = plan.merge_weighted(x, sizes, residual=residual, backend="cuda")
                yield torch.cat([merged.flatten(), totals.flatten().to(dtype)])
                for mode in ("mean", "sum", "max"):
                    yield plan.merge(x, mode, backend="cuda")
                yield plan.unmerge(merged.detach().requires_grad_(), backend="cuda")


def windows(device: str) -> Iterator[Tensor]:
    for dtype in DTYPES[1:]:
        for head_dim in (24, 30, 64):
            q, k, v = (torch.randn(2, 2, 15 * 14, head_dim, device=device).to(dtype).requires_grad_() for _ in range(3))
            lepe = {"lepe_weight": torch.randn(2 * head_dim, 1, 3, 3, device=device, requires_grad=True)}
            for width in (1, 4, 15):
                yield effattn.cross_shaped_window_attention(
                    q, k, v, (15, 14), width, **lepe, padding="zero_key", backend="cuda"
                )
            for window in ((7, 7), (8, 9)):
                table = torch.randn((2 * window[0] - 1) * (2 * window[1] - 1), 2, device=device, requires_grad=True)
                for padding in ("zero_key", "mask"):
                    yield effattn.window_attention(
                        *(q, k, v, (15, 14), window),
                        shift=(3, 3),
                        bias_table=table,
                        padding=padding,
                        backend="cuda",
                    )


def main() -> int:
    if not _native.cuda_loaded:
        print(f"no CUDA kernels: {_native.cuda_problem}")
        return 2
    device, calls = _native.cuda_device, 0
    for results in (
        shift_linear(3, device),
        shift_linear(67, device),
        packed_bits(device),
        shift_add_attention(device),
        retention(device),
        toeplitz(device),
        token_merging(device),
        windows(device),
    ):
        for result in results:
            if result.requires_grad:
                result.backward(torch.randn_like(result))
            calls += 1
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{calls} calls")
    return 0


if __name__ == "__main__":
    sys.exit(main())
