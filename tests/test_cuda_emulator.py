"""The emulator proves itself: right kernels are right in every order of threads, and every seeded bug is found.

The kernels are in tests/cuda_emulator/kernels; a bug is chosen by its place in the file's `enum Bug`. That nvcc takes the
same files is shown in test_cuda_compile.py.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from ctypes import c_bool, c_char_p, c_int, c_void_p

import cuda_emulator
import numpy as np
import pytest
import torch

SEEDS = range(4)
LANES = np.arange(32)
GROUP, MEMBER = LANES[:, None] >> 2, LANES[:, None] % 4  # the PTX manual's groupID and threadID_in_group


def call(name, *arguments):
    """A kernel by its C name; arrays and tensors go as pointers. Raises what the emulator reports."""
    function = getattr(cuda_emulator.self_test(), "effattn_" + name)
    function.restype = c_char_p
    converted = []
    for argument in arguments:
        if isinstance(argument, np.ndarray):
            converted.append(c_void_p(argument.ctypes.data))
        elif isinstance(argument, torch.Tensor):
            converted.append(c_void_p(argument.data_ptr()))
        else:
            converted.append(c_bool(argument) if isinstance(argument, bool) else c_int(argument))
    message = function(*converted).decode()
    if message:
        raise RuntimeError(message)


def bug(file, name):
    names = re.search(r"enum Bug \{(.*?)\}", (cuda_emulator.KERNELS / file).read_text(), re.S).group(1)
    return [word.strip() for word in names.split(",")].index(name)


def saying(message, file, *codes):
    """The message, every @ in it replaced by file:line of the only line that holds the next of the codes."""
    lines = (cuda_emulator.KERNELS / file).read_text().splitlines()
    for code in codes:
        (found,) = (number for number, text in enumerate(lines, 1) if code in text)
        message = message.replace("@", re.escape(f"{file}:{found}"), 1)
    return message


# ---- Right kernels


def softmax(bug_name="kNone", rows=3, columns=300):
    with cuda_emulator.guard_pages(cuda_emulator.self_test_library()):
        x, y = torch.randn(rows, columns), torch.empty(rows, columns)
        call("softmax", bug("softmax.cu", bug_name), x, y, rows, columns)
        x, y = x.numpy().copy(), y.numpy().copy()
    return x, y


@pytest.mark.parametrize("columns", [1, 31, 128, 300])
def test_softmax_is_right_and_the_same_in_every_order_of_threads(columns):
    results = []
    for seed in SEEDS:
        torch.manual_seed(0)
        with cuda_emulator.seed(seed):
            x, y = softmax(columns=columns)
        weights = np.exp(x.astype(float) - x.max(1, keepdims=True))
        np.testing.assert_allclose(y, weights / weights.sum(1, keepdims=True), rtol=1e-5)
        results.append(y)
    assert all((y == results[0]).all() for y in results)


def product(bug_name="kNone", dtype=torch.bfloat16, length=64):
    a, b = torch.randn(16, length).to(dtype), torch.randn(length, 8).to(dtype)
    c = torch.empty(16, 8)
    call("product", bug("product.cu", bug_name), dtype == torch.float16, a, b, c, length)
    return c, a.double() @ b.double()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", SEEDS)
def test_product_with_asynchronous_copies_is_right_in_every_order_of_threads(dtype, seed):
    with cuda_emulator.seed(seed):
        for length in (16, 32, 64, 80):
            c, expected = product(dtype=dtype, length=length)
            torch.testing.assert_close(c.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("seed", SEEDS)
def test_warp_barrier_orders_shared_memory_within_a_warp(seed):
    x, y = np.arange(64, dtype=np.int32), np.empty(64, np.int32)
    with cuda_emulator.seed(seed):
        call("reverse_in_warps", x, y, True)
    assert (y == x ^ 31).all()


# ---- Bugs

SOFTMAX_BUGS = {
    "kUnorderedRead": (  # of what another has written or, in another order of threads, has yet to write
        r"(missing barrier: thread \d+ reads |read of )element \d .* at @, which (thread \d+ wrote at|nobody has written)",
        "float other = partial[warp];",
    ),
    "kUnorderedWrite": (
        r"missing barrier: thread \d+ writes element \d .* at device.h:\d+, which thread \d+ read at @",
        "float other = partial[warp];",
    ),
    "kDivergentBarrier": (
        r"divergent barrier: thread \d+ waits in sync_block at softmax.cu:\d+, thread \d+ waits in sync_block at "
        r"softmax.cu:\d+",
    ),
    "kEarlyExit": (
        r"divergent warp collective: thread \d+ waits in shuffle_xor at device.h:\d+, thread 77 has exited",
    ),
    "kMissingLane": (
        r"divergent warp collective: thread \d+ waits in shuffle_xor .*, thread (13|45|77|109) waits in sync_block at @",
        "sync_block();  // what the kernel should have",
    ),
    "kDivergentCollective": (
        r"divergent warp collective: thread \d+ waits in shuffle_\w+ at @, thread \d+ waits in shuffle_\w+ at @",
        "largest = lane_index() < 16 ?",
        "largest = lane_index() < 16 ?",
    ),
    "kSharedOverrun": (
        r"out of bounds: write of 4 bytes at byte 1200 of a shared array of 1200 at @",
        "row[kBug == kSharedOverrun",
    ),
    "kSharedUnderrun": (r"out of bounds: write of 4 bytes at byte -4 .* at @ \(thread 5,", "row[-1] = largest"),
    "kGlobalRead": (
        r"out of bounds: read of global memory at @, 0 bytes past the end of a tensor of 3600 bytes",
        "const float value = from[",
    ),
    "kGlobalWrite": (
        r"out of bounds: write of global memory at @, 0 bytes past the end of a tensor of 3600 bytes",
        "to[kBug == kGlobalWrite",
    ),
    "kUnwritten": (r"read of element 150 of .* at @, which nobody has written", "const float weight = exp2_approx("),
    "kCarvedTooMuch": (
        r"out of shared memory: 1232 bytes carved out at @, launched with 1216",
        "auto row = shared.array<float>(",
    ),
    "kMisaligned": (r"misaligned: write of 8 bytes at @", "row.store(1, "),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", SOFTMAX_BUGS)
def test_bugs_of_the_softmax_are_found_in_every_order_of_threads(name, seed):
    message, *codes = SOFTMAX_BUGS[name]
    with (
        cuda_emulator.seed(seed),
        pytest.raises(RuntimeError, match=saying("CUDA emulator: " + message, "softmax.cu", *codes)),
    ):
        softmax(name)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ["kNoWait", "kWaitForTooFew", "kNoCommit"])
def test_reading_a_copy_that_was_not_waited_for_is_found(name, seed):
    message = r"read of element \d+ .* at @ before cp_async_wait for the copy that was started at @"
    message = saying(message, "product.cu", "ldmatrix_x4(x,", "cp_async16(left,")
    with cuda_emulator.seed(seed), pytest.raises(RuntimeError, match=message):
        product(name)


@pytest.mark.parametrize("seed", SEEDS)
def test_refilling_a_stage_that_others_still_read_is_found(seed):
    message = r"missing barrier: thread \d+ writes element \d+ .* at @, which thread \d+ read at @"
    message = saying(message, "product.cu", "cp_async16(left,", "ldmatrix_x4(x,")
    with cuda_emulator.seed(seed), pytest.raises(RuntimeError, match=message):
        product("kOverwrittenEarly")


@pytest.mark.parametrize("name", ["kWrongFragment", "kWrongRow"])
def test_wrong_fragments_give_wrong_numbers(name):
    c, expected = product(name)
    assert (c - expected).abs().max() > 1


@pytest.mark.parametrize("seed", SEEDS)
def test_collective_does_not_order_shared_memory(seed):
    x = np.arange(64, dtype=np.int32)
    message = r"missing barrier: thread \d+ reads .* at @, which thread \d+ wrote at @|at @, which nobody has written"
    message = saying(message, "product.cu", "y[thread] = ", "values[thread] =", "y[thread] = ")
    with cuda_emulator.seed(seed), pytest.raises(RuntimeError, match=message):
        call("reverse_in_warps", x, x.copy(), False)


def test_a_write_into_the_padding_of_a_tensor_is_found():
    def overrun():
        with cuda_emulator.guard_pages(cuda_emulator.self_test_library()):
            x, y = torch.randn(1, 101), torch.empty(1, 101)
            call("softmax", bug("softmax.cu", "kGlobalWrite"), x, y, 1, 101)

    with pytest.raises(RuntimeError, match="CUDA emulator: written past the end of a tensor of 404 bytes"):
        overrun()


def test_kernels_run_after_a_bug_as_before():
    with pytest.raises(RuntimeError):
        softmax("kGlobalRead")
    x, y = softmax()
    assert np.isfinite(x).all()
    assert np.allclose(y.sum(1), 1)


def test_a_fault_outside_of_kernels_still_ends_the_process():
    code = "import cuda_emulator, ctypes, test_cuda_emulator as t; t.softmax(); ctypes.string_at(8)"
    environment = {**os.environ, "PYTHONPATH": str(cuda_emulator.HERE.parent)}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    assert ended.returncode == -11


# ---- Primitives against the layouts of the PTX manual


@pytest.mark.parametrize("matrices", [2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(matrices, transposed):
    tile = np.random.default_rng(0).integers(0, 2**16, (4, 8, 8), dtype=np.uint16)
    out = np.zeros((32, 4), np.uint32)
    call("ldmatrix", matrices, transposed, tile, out)
    loaded = tile.transpose(0, 2, 1) if transposed else tile
    expected = np.ascontiguousarray(loaded[:matrices]).view(np.uint32)  # a matrix has 32 pairs, in the lanes' order
    assert (out[:, :matrices] == expected.reshape(matrices, 32).T).all()


def scatter(fragment, rows, columns, shape):
    """The matrix of which element i of a lane is at (rows[lane, i], columns[lane, i])."""
    matrix = np.full(shape, np.nan)
    matrix[np.broadcast_arrays(rows, columns)[0], np.broadcast_arrays(rows, columns)[1]] = fragment
    assert not np.isnan(matrix).any()
    return matrix


@pytest.mark.parametrize("depth", [16, 8])
def test_sixteen_bit_mma(depth):
    i, j, c = np.arange(8), np.arange(4), np.arange(4)
    for kind, dtype in ((0 if depth == 16 else 3, torch.bfloat16), (1 if depth == 16 else 4, torch.float16)):
        a, b = torch.randn(32, 8).to(dtype), torch.randn(32, 4).to(dtype)
        d = torch.randn(32, 4)
        added = d.numpy().copy()
        call("mma", kind, a, b, d)
        if depth == 8:  # half of the registers
            a[:, 4:], b[:, 2:] = 0, 0
        left = scatter(a.double().numpy(), GROUP + 8 * (i // 2 % 2), 2 * MEMBER + i % 2 + 8 * (i >= 4), (16, 16))
        right = scatter(b.double().numpy(), 2 * MEMBER + j % 2 + 8 * (j >= 2), GROUP + 0 * j, (16, 8))
        place = (GROUP + 8 * (c >= 2), 2 * MEMBER + c % 2)
        np.testing.assert_allclose(d.numpy(), (left @ right)[place] + added, rtol=1e-5, atol=1e-5)


def test_byte_mma():
    random = np.random.default_rng(0)
    i, j, c = np.arange(16), np.arange(8), np.arange(4)
    a = random.integers(-128, 128, (32, 16), dtype=np.int8)
    b = random.integers(-128, 128, (32, 8), dtype=np.int8)
    d = random.integers(-1000, 1000, (32, 4), dtype=np.int32)
    added = d.copy()
    call("mma", 2, a, b, d)
    left = scatter(a, GROUP + 8 * (i // 4 % 2), 4 * MEMBER + i % 4 + 16 * (i >= 8), (16, 32))
    right = scatter(b, 4 * MEMBER + j % 4 + 16 * (j >= 4), GROUP + 0 * j, (32, 8))
    place = (GROUP + 8 * (c >= 2), 2 * MEMBER + c % 2)
    assert (d == (left @ right)[place] + added).all()


def test_warp_collectives_and_integer_arithmetic():
    x = np.random.default_rng(0).integers(-(2**31), 2**31, 32).astype(np.int32)
    out = np.zeros(32 * 10, np.uint32)
    call("collectives", x, out)
    gathered, words = out[: 32 * 7].view(np.int32).reshape(32, 7).T, out[32 * 7 :].reshape(32, 3).T.copy()
    expected = (
        x[[5] * 32],
        x[LANES ^ 9],
        np.where(LANES < 29, x[np.minimum(LANES + 3, 31)], x),
        np.where(LANES >= 4, x[np.maximum(LANES - 4, 0)], x),
        np.packbits(x > 0, bitorder="little").view(np.int32),
        np.full(32, 1 + 4),
        x.reshape(4, 8).sum(1, dtype=np.int32).repeat(8),
    )
    for got, wanted in zip(gathered, expected):
        assert (got == wanted).all()
    a, b, c = x, x[::-1].copy(), x[LANES // 2]
    as_bytes = a.view(np.int8).reshape(32, 4).astype(np.int64), b.view(np.int8).reshape(32, 4).astype(np.int64)
    assert words[0].tolist() == [bin(word).count("1") for word in a.view(np.uint32)]
    assert (words[1].view(np.int32) == ((as_bytes[0] * as_bytes[1]).sum(1) + c).astype(np.int32)).all()
    sources = np.concatenate([a.view(np.uint8).reshape(32, 4), b.view(np.uint8).reshape(32, 4)], axis=1)
    selected = (c[:, None] >> 4 * np.arange(4)) & 7
    assert (words[2].view(np.uint8).reshape(32, 4) == np.take_along_axis(sources, selected, 1)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversions_round_as_torch_does(dtype):
    exponents = torch.linspace(-160, 130, 20_001).exp2()
    values = torch.cat(
        [exponents, -exponents, torch.randn(19_999), torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan])]
    )
    values = torch.cat([values, values.to(dtype).float() * (1 + 2.0**-9), values.to(dtype).float() * (1 + 2.0**-12)])
    values = values[: values.numel() // 2 * 2].contiguous()
    bits, back = torch.empty(values.numel(), dtype=torch.int16), torch.empty_like(values)
    call("round_trip", dtype == torch.float16, values, bits, back, values.numel())
    expected = values.to(dtype)
    finite = ~values.isnan()
    assert torch.equal(bits[finite], expected.view(torch.int16)[finite])
    assert torch.equal(back[finite], expected.float()[finite])
    assert back[~finite].isnan().all()
