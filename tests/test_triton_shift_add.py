"""The shift-add Triton kernels, run (by Triton's interpreter where there is no GPU) against their formulas."""

import math

import pytest
import torch

pytest.importorskip("triton")

from effattn.triton_kernels import shift_add, shift_add_rows
from effattn.triton_kernels import shift_add_configurations as tuned

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PUBLISHED, MEAN_THRESHOLD, PER_HEAD, SIGN = MODES = range(4)
FLOAT, INT8, FIXED = range(3)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def random(*shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(shape, dtype=torch.float64) * scale).to(dtype).to(DEVICE)


def check(draw, run, formula, names):
    """`run(*tensors)` keeps to the accuracy rule against formula(*tensors) in float64. `draw()` gives the tensors and the
    gradient of the output; a miss is pooled with more draws, since on few elements the error of the dtype is an accident."""
    pool, misses = {}, []
    for _ in range(8):
        tensors, grad_output = draw()
        results = []
        for cast in (torch.Tensor.double, lambda t: t):
            leaves = [cast(t).detach().clone().requires_grad_() for t in tensors]
            output = formula(*leaves)
            results.append((output.detach(), *torch.autograd.grad(output, leaves, cast(grad_output))))
        for name, ours, reference, low in zip(names, run(*tensors, grad_output), *results):
            assert ours.shape == reference.shape, name
            assert ours.isfinite().all(), name
            errors = (ours.double() - reference, low.double() - reference, reference)
            if reference.numel():
                pool[name] = tuple(map(max, pool.get(name, (0, 0, 0)), (t.abs().max().item() for t in errors)))
        eps = torch.finfo(tensors[0].dtype).eps
        misses = [
            f"{name}: error {error:.3e}, the dtype's {low:.3e}, largest value {largest:.3e}"
            for name, (error, low, largest) in pool.items()
            if not error <= (2 if name == "output" else 3) * low + eps * largest
        ]
        if not misses:
            return
    raise AssertionError("; ".join(misses))


# ---------------------------------------------------------------- linear layers


def draw_weight(rows, columns, bits):
    """(sign, exponent) of a random weight: every value that `bits` hold, zeros too."""
    exponent = -torch.randint(0, 2 ** (bits - 1) - 1, (rows, columns))
    return torch.randint(-1, 2, (rows, columns)), exponent


def pack(sign, exponent, bits):
    if bits == 5:
        code = torch.where(sign == 0, 0, (sign < 0) * 128 + (exponent + 15) * 4)
    else:
        code = torch.where(sign == 0, 0, (sign < 0) * 8 + exponent + 7)
        code = torch.nn.functional.pad(code, (0, code.shape[1] % 2))
        code = code[:, 0::2] + 16 * code[:, 1::2]
    return code.to(torch.uint8).to(DEVICE)


def dense(sign, exponent, dtype=torch.float64):
    return torch.ldexp(sign.double(), exponent).to(dtype).to(DEVICE)


def run_linear(input, codes, scale, bias, bits, activation=FLOAT):
    return shift_add.shift_linear_fwd(input, codes, scale, bias, bits, activation)


def check_linear(rows, columns, outputs, bits, dtype=torch.float32, with_scale=True, with_bias=True):
    sign, exponent = draw_weight(outputs, columns, bits)
    codes = pack(sign, exponent, bits)
    scale = random(outputs).abs() + 0.5 if with_scale else None
    bias = random(outputs) if with_bias else None

    def formula(input):
        output = input @ dense(sign, exponent, input.dtype).T
        output = output if scale is None else output * scale.to(input.dtype)
        return output if bias is None else output + bias.to(input.dtype)

    def run(input, grad_output):
        output = run_linear(input, codes, scale, bias, bits)
        return output, shift_add.shift_linear_bwd(grad_output, codes, scale, columns, bits)

    def draw():
        return (random(rows, columns, dtype=dtype),), random(rows, outputs, dtype=dtype)

    check(draw, run, formula, ("output", "grad_input"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 5])
def test_linear_equals_formula(bits, dtype):
    check_linear(37, 69, 35, bits, dtype)


@pytest.mark.parametrize("bits", [2, 3])
def test_linear_of_fewer_bits_without_scale_or_bias(bits):
    check_linear(3, 33, 5, bits, torch.bfloat16, with_scale=False, with_bias=False)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 0, 4), (0, 5, 4), (3, 5, 0), (3, 64, 4)])
def test_linear_of_any_size(sizes):
    check_linear(*sizes, bits=4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 5])
def test_every_code_is_exact_in_every_dtype(bits, dtype):
    exponent = -torch.arange(2 ** (bits - 1) - 1).repeat(3)[None]
    sign = torch.tensor([1, -1, 0]).repeat_interleave(exponent.shape[1] // 3)[None]
    identity = torch.eye(exponent.shape[1], dtype=dtype, device=DEVICE)
    values = run_linear(identity, pack(sign, exponent, bits), None, None, bits)
    assert torch.equal(values.T, dense(sign, exponent, dtype))
    one = torch.ones(1, 1, dtype=dtype, device=DEVICE)
    gradient = shift_add.shift_linear_bwd(one, pack(sign, exponent, bits), None, exponent.shape[1], bits)
    assert torch.equal(gradient, dense(sign, exponent, dtype))


def int8_linear(input, sign, exponent, scale, bias):
    x = input.float()
    largest = x.abs().amax(1, keepdim=True)
    step = torch.where(largest == 0, 1.0, largest / 127)
    total = (torch.round(x / step).double() @ (64 * dense(sign, exponent)).T).int()
    output = total.float() * (step * 2.0**-6)
    output = output if scale is None else output * scale
    return (output if bias is None else output + bias).to(input.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_activations_are_bit_exact(dtype):
    sign, exponent = draw_weight(35, 201, 4)
    input = random(37, 201, dtype=dtype)
    input[0] = 0
    input[1] = torch.arange(201) % 128 + 0.5  # ties, once the largest is 127
    input[1, 0] = 127
    input[2] *= 1e-3
    for scale, bias in ((random(35), random(35)), (None, None)):
        got = run_linear(input, pack(sign, exponent, 4), scale, bias, 4, INT8)
        assert torch.equal(got, int8_linear(input, sign, exponent, scale, bias))


def to_fixed_point(x):
    return torch.floor(x.double() * 2**16).clamp(-(2**31), (2**15 - 1) * 2**16).long()


def fixed_point_linear(input, sign, exponent, bias):
    """Over Python integers; wrapped to 32 bits at the end, as two's complement allows."""
    shifted = to_fixed_point(input)[:, None, :] >> -exponent.to(DEVICE)
    total = (sign.to(DEVICE) * shifted).sum(-1) + (0 if bias is None else to_fixed_point(bias))
    return (((total + 2**31) % 2**32 - 2**31).float() * 2.0**-16).to(input.dtype)


@pytest.mark.parametrize(("bits", "dtype"), [(4, torch.float32), (5, torch.float32), (5, torch.bfloat16)])
def test_fixed_point_activations_are_bit_exact_and_wrap_around(bits, dtype):
    sign, exponent = draw_weight(66, 15, bits)
    input = random(34, 15, dtype=dtype, scale=10.0)
    input[0] = 30000.0
    input[1] = -1e9
    input[2] = 1e9
    for bias in (random(66), None):
        got = run_linear(input, pack(sign, exponent, bits), None, bias, bits, FIXED)
        assert torch.equal(got, fixed_point_linear(input, sign, exponent, bias))


@pytest.mark.parametrize("activation", [FLOAT, INT8, FIXED])
def test_strides_of_a_linear_input_do_not_matter(activation):
    codes = pack(*draw_weight(9, 21, 4), 4)
    wide = torch.full((11, 50), float("nan"), device=DEVICE)
    views = {
        "transposed": random(21, 11).T,
        "guarded": wide[:, 3:45:2],
        "one row": random(1, 21).expand(11, 21),
        "one column": random(11, 1).expand(11, 21),
    }
    views["guarded"].copy_(random(11, 21))
    for name, view in views.items():
        got = run_linear(view, codes, None, None, 4, activation)
        assert torch.equal(got, run_linear(view.contiguous(), codes, None, None, 4, activation)), name
    for name, view in views.items():
        got = shift_add.shift_linear_bwd(view[:, :9], codes, None, 21, 4)
        assert torch.equal(got, shift_add.shift_linear_bwd(view[:, :9].contiguous(), codes, None, 21, 4)), name


# ---------------------------------------------------------------- attention


def unit(x):
    norm = x.norm(dim=-1, keepdim=True)
    return torch.where(norm > 0, x / torch.where(norm > 0, norm, 1.0), 0.0)


def binarised(x, mode):
    """b(x^), whose gradient is that of x^ where 0 <= x^ (everywhere in the sign mode)."""
    x = unit(x)
    if mode == SIGN:
        bits, passed = torch.where(x > 0, 1.0, -1.0).to(x.dtype), x
    else:
        mean = {
            PUBLISHED: lambda: x.abs().mean(),
            MEAN_THRESHOLD: lambda: x.mean(),
            PER_HEAD: lambda: x.abs().mean((2, 3), keepdim=True),
        }[mode]()
        bits = (x > mean).to(x.dtype) if mode == MEAN_THRESHOLD else (x > 0) * mean
        passed = torch.where(x >= 0, x, 0.0)
    return bits.detach() + (passed - passed.detach())


def attention_formula(mode):
    def formula(query, key, value, weight=None):
        mixed = unit(0.5 * value + binarised(query, mode) @ (binarised(key, mode).mT @ value) / math.pi)
        if weight is not None:
            taps, tokens = weight.shape[1], value.shape[2]
            padded = torch.nn.functional.pad(value, (0, 0, taps // 2, taps // 2))
            for tap in range(taps):
                mixed = mixed + weight.to(value.dtype)[:, tap, None, None] * padded[:, :, tap : tap + tokens]
        return mixed

    return formula


def run_attention(mode):
    def run(query, key, value, *rest):
        *weight, grad_output = rest
        weight = weight[0] if weight else None
        output, *saved = shift_add.shift_add_attention_fwd(query, key, value, weight, mode)
        gradients = shift_add.shift_add_attention_bwd(grad_output, query, key, value, weight, *saved, mode)
        return output, *gradients

    return run


def attention_tensors(batch, heads, tokens, head_dim, taps=9, dtype=torch.float32):
    *tensors, grad_output = (random(batch, heads, tokens, head_dim, dtype=dtype) for _ in range(4))
    return [*tensors, *([random(heads, taps)] if taps else [])], grad_output


def check_attention(mode, *shape, **options):
    names = ("output", "grad_query", "grad_key", "grad_value", "grad_residual_weight")
    check(lambda: attention_tensors(*shape, **options), run_attention(mode), attention_formula(mode), names)


@pytest.fixture
def short_chunks(monkeypatch):
    """Several partial sums from few tokens."""
    monkeypatch.setattr(shift_add_rows, "CHUNK", 32)


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_attention_equals_formula(mode, dtype):
    check_attention(mode, 1, 2, 35, 17, taps=3, dtype=dtype)


@pytest.mark.parametrize(("head_dim", "mode"), [(1, SIGN), (48, MEAN_THRESHOLD), (130, PER_HEAD), (256, PUBLISHED)])
def test_attention_at_any_head_dim(head_dim, mode):
    check_attention(mode, 1, 1, 5, head_dim, taps=1)


@pytest.mark.parametrize("mode", MODES)
def test_statistics_of_the_whole_batch_or_of_each_head(mode, monkeypatch):
    monkeypatch.setattr(tuned, "LANES", tuned.LANES._replace(block_k=4))
    (query, key, value), _ = attention_tensors(2, 3, 5, 7, taps=0)
    _, context, statistics = shift_add.shift_add_attention_fwd(query, key, value, None, mode)
    for x, (scale, threshold) in zip((query, key), statistics.double().unflatten(2, (2, 2)).permute(2, 3, 0, 1)):
        x = unit(x.double())
        mean = {
            PUBLISHED: x.abs().mean(),
            MEAN_THRESHOLD: x.mean(),
            PER_HEAD: x.abs().mean((2, 3)),
            SIGN: torch.ones((), dtype=torch.float64, device=DEVICE),
        }[mode].expand(2, 3)
        one, zero = torch.ones_like(mean), torch.zeros_like(mean)
        torch.testing.assert_close(scale, one if mode == MEAN_THRESHOLD else mean, rtol=2e-7, atol=0)
        torch.testing.assert_close(threshold, mean if mode == MEAN_THRESHOLD else zero, rtol=1e-6, atol=1e-8)
    chosen = unit(key.double()) > statistics[:, :, 3].double()[..., None, None]
    chosen = 2.0 * chosen - 1 if mode == SIGN else 1.0 * chosen
    torch.testing.assert_close(context.double(), chosen.double().mT @ value.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("tokens", "taps"), [(1, 0), (3, 9), (6, 1)])
def test_attention_of_few_tokens(tokens, taps):
    check_attention(PUBLISHED, 2, 1, tokens, 3, taps=taps)


@pytest.mark.parametrize("shape", [(0, 2, 5, 3), (2, 2, 0, 3)])
@pytest.mark.parametrize("mode", MODES)
def test_attention_of_nothing(shape, mode):
    (query, key, value, weight), grad_output = attention_tensors(*shape)
    output, context, statistics = shift_add.shift_add_attention_fwd(query, key, value, weight, mode)
    gradients = shift_add.shift_add_attention_bwd(grad_output, query, key, value, weight, context, statistics, mode)
    assert output.shape == query.shape
    assert torch.equal(context, torch.zeros(*shape[:2], 3, 3, device=DEVICE))
    assert statistics.shape == (*shape[:2], 4)
    assert [g.shape for g in gradients] == [t.shape for t in (query, key, value, weight)]
    assert torch.equal(gradients[3], torch.zeros_like(weight))


@pytest.mark.parametrize("mode", MODES)
def test_zero_rows_have_zero_gradients(mode):
    (query, key, value), grad_output = attention_tensors(1, 1, 6, 5, taps=0)
    query[:, :, 1] = 0
    key[:, :, 2] = 0
    value[:] = 0
    output, grad_query, grad_key, grad_value, _ = run_attention(mode)(query, key, value, grad_output)
    for zero in (output, grad_query[:, :, 1], grad_key[:, :, 2], grad_value):  # U is 0, and passes no gradient
        assert torch.equal(zero, torch.zeros_like(zero))
    value = random(1, 1, 6, 5)
    output, grad_query, grad_key, _, _ = run_attention(mode)(query, key, value, grad_output)
    assert output.isfinite().all()
    for zero in (grad_query[:, :, 1], grad_key[:, :, 2]):
        assert torch.equal(zero, torch.zeros_like(zero))


def test_strides_and_neighbours_of_attention_inputs_do_not_matter():
    mode = MEAN_THRESHOLD
    (*tensors, weight), grad_output = attention_tensors(2, 2, 7, 5, taps=3)
    tensors.append(grad_output)
    wide = [torch.full((2, 2, 9, 12), float("nan"), device=DEVICE) for _ in tensors]
    guarded = [w[:, :, 1:8, 1:11:2] for w in wide]
    for view, tensor in zip(guarded, tensors):
        view.copy_(tensor)
    token_major = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
    expected = run_attention(mode)(*tensors[:3], weight, grad_output)
    for views in (guarded, token_major):
        got = run_attention(mode)(*views[:3], weight, views[3])
        for a, b, like in zip(got, expected, (views[0], *views)):
            assert torch.equal(a, b)
            assert a.shape != like.shape or a.stride() == torch.empty_like(like).stride()
    expanded = [t[:1, :1, :, :1].expand(2, 2, 7, 5) for t in tensors]
    expected = run_attention(mode)(*(t.contiguous() for t in expanded[:3]), weight, expanded[3].contiguous())
    for a, b in zip(run_attention(mode)(*expanded[:3], weight, expanded[3]), expected):
        assert torch.equal(a, b)


def test_offsets_past_two_to_the_31_elements(tmp_path, monkeypatch):
    """Rows 2^30 elements apart, in a sparse file that is never filled."""
    size = (1 << 32) + 64
    if DEVICE == "cpu":
        storage = torch.from_file(str(tmp_path / "sparse"), shared=True, size=size, dtype=torch.bfloat16)
        monkeypatch.setattr(
            torch.UntypedStorage, "copy_", lambda self, source, *_: self
        )  # the interpreter copies every storage onto itself
    else:
        storage = torch.empty(size, dtype=torch.bfloat16, device=DEVICE)
    near = [random(1, 1, 4, 16, dtype=torch.bfloat16) for _ in range(4)]
    far = [storage.as_strided((1, 1, 4, 16), (0, 0, 1 << 30, 1), 16 * n) for n in range(4)]
    for view, tensor in zip(far, near):
        view.copy_(tensor)
    codes, weight = pack(*draw_weight(3, 16, 4), 4), random(1, 3)
    for activation in (FLOAT, INT8, FIXED):
        got, expected = (run_linear(t[0][0, 0], codes, None, None, 4, activation) for t in (far, near))
        assert torch.equal(got, expected)
    for a, b in zip(*(run_attention(MEAN_THRESHOLD)(*t[:3], weight, t[3]) for t in (far, near))):
        assert torch.equal(a, b)


# ---------------------------------------------------------------- tiles


@pytest.mark.parametrize("family", tuned.table.FAMILIES)
@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_the_tile_of_a_linear_layer_is_filled_and_fills_the_chip(family, kernel, monkeypatch):
    monkeypatch.setattr(tuned.table, "architecture", lambda device: family)

    def tile(rows, columns, dtype=torch.bfloat16, length=1024):
        operand = torch.empty(rows, length, dtype=dtype, device="meta")
        return tuned.linear(kernel, operand, torch.empty(1024, length // 2, dtype=torch.uint8, device="meta"), columns)

    assert tile(1, 4096).block_m == tile(32, 4096).block_m == 16
    assert tile(33, 64).block_m == tile(3136, 64).block_m == 64
    assert tile(25088, 4096).block_m >= 128
    assert tile(25088, 4096, torch.float32).block_m == 64
    assert tile(25088, 4096, length=1021).num_stages == 1
