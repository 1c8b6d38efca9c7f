"""Every Triton kernel, run (by Triton's interpreter where there is no GPU) against the float64 formula."""

import pytest
import torch

pytest.importorskip("triton")

import quick_interpreter
from effattn.triton_kernels import attention, gaussian_mixture, patches
from triton.runtime import interpreter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-5

# Absent rows and columns may overflow before they are dropped; NumPy tells, a GPU does not.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def random(*shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(shape, dtype=torch.float64) * scale).to(dtype).to(DEVICE)


# ---------------------------------------------------------------- formulas, in the dtype of their arguments


def mixture_matrix(alpha, sigma, grid, prefix):
    y, x = (
        c.reshape(-1)
        for c in torch.meshgrid(*(torch.arange(n, dtype=alpha.dtype, device=alpha.device) for n in grid), indexing="ij")
    )
    r2 = (y[:, None] - y) ** 2 + (x[:, None] - x) ** 2
    mixture = (alpha[..., None, None] * torch.exp(-r2 / (2 * (sigma**2 + EPS))[..., None, None])).sum(0)
    return torch.nn.functional.pad(mixture, (prefix, 0, prefix, 0), value=1.0)


def product_formula(query, key, value, weight, scale):
    logits = (query @ key.mT * scale) * weight.to(query.dtype)
    return logits.softmax(-1) @ value, logits.logsumexp(-1)


def attention_formula(query, key, value, mask, is_causal, scale):
    group = query.shape[1] // key.shape[1]
    logits = query @ key.repeat_interleave(group, 1).mT * scale
    if is_causal:
        mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
    if mask is not None:
        logits = (
            logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask.to(logits.dtype)
        )
    attended = torch.isfinite(logits).any(-1, keepdim=True)
    weights = torch.where(attended, logits, 0).softmax(-1) * attended
    return weights @ value.repeat_interleave(group, 1), logits.logsumexp(-1)


# ---------------------------------------------------------------- the accuracy rule

FACTORS = {"output": 2, "logsumexp": 2}  # 3 for gradients


def measure(formula, tensors, names, grad_output, got):
    """{name: (our error, the error of `formula` in the tensors' own dtype, the largest value)} against `formula` in float64."""
    results = []
    for cast in (torch.Tensor.double, lambda t: t):
        leaves = [cast(t).detach().clone().requires_grad_() for t in tensors]
        output, logsumexp = formula(*leaves)
        gradients = (
            torch.autograd.grad(output, leaves, cast(grad_output))
            if output.numel()
            else [torch.zeros_like(t) for t in leaves]
        )
        results.append((output.detach(), logsumexp.detach(), *gradients))
    measured = {}
    for name, ours, reference, low in zip(("output", "logsumexp", *names), got, *results):
        assert ours.shape == reference.shape, name
        finite = torch.isfinite(reference)
        assert torch.equal(ours.double()[~finite], reference[~finite]), name
        if finite.any():
            measured[name] = tuple(
                t[finite].abs().max().item() for t in (ours.double() - reference, low.double() - reference, reference)
            )
    return measured


def check(draw, run, formula, names):
    """`run(*draw())` keeps to the accuracy rule. On a few elements eager's error is an accident, so a miss is pooled with more draws."""
    pool, misses = {}, []
    for _ in range(8):
        tensors, grad_output = draw()
        dtype = tensors[0].dtype
        forward, gradients = run(*tensors, grad_output)
        for name, measured in measure(formula, tensors, names, grad_output, (*forward, *gradients)).items():
            pool[name] = tuple(map(max, pool.get(name, (0, 0, 0)), measured))
        misses = [
            f"{name}: error {error:.3e}, eager's {low:.3e}, largest value {largest:.3e}"
            for name, (error, low, largest) in pool.items()
            if not error <= FACTORS.get(name, 3) * low + torch.finfo(dtype).eps * largest
        ]
        if not misses:
            return
    raise AssertionError("; ".join(misses))


def run_mixture(query, key, value, alpha, sigma, grad_output, grid, prefix):
    options = (*grid, prefix, EPS, query.shape[-1] ** -0.5)
    forward = gaussian_mixture.gaussian_mixture_fwd(query, key, value, alpha, sigma, *options)
    return forward, gaussian_mixture.gaussian_mixture_bwd(
        grad_output, query, key, value, alpha, sigma, *forward, *options
    )


def check_mixture(grid, prefix=0, sigma=None, **options):
    def draw():
        *tensors, grad_output = mixture_tensors(grid, prefix, **options)
        if sigma is not None:
            tensors[4] = torch.full_like(tensors[4], sigma)
        return tensors, grad_output

    def formula(query, key, value, alpha, sigma):
        return product_formula(query, key, value, mixture_matrix(alpha, sigma, grid, prefix), query.shape[-1] ** -0.5)

    check(
        draw,
        lambda *tensors: run_mixture(*tensors, grid, prefix),
        formula,
        ("grad_query", "grad_key", "grad_value", "grad_alpha", "grad_sigma"),
    )


def mixture_tensors(grid, prefix=0, batch=2, heads=2, head_dim=16, gaussians=2, dtype=torch.float32):
    tokens = prefix + grid[0] * grid[1]
    query, key, value, grad_output = (random(batch, heads, tokens, head_dim, dtype=dtype) for _ in range(4))
    return query, key, value, random(gaussians, heads), random(gaussians, heads, scale=3.0), grad_output


def run_attention(query, key, value, grad_output, mask=None, is_causal=False):
    scale = query.shape[-1] ** -0.5
    forward = attention.attention_fwd(query, key, value, mask, is_causal, scale)
    return forward, attention.attention_bwd(grad_output, query, key, value, mask, *forward, is_causal, scale)


def check_attention(*shape, mask=None, is_causal=False, **options):
    def draw():
        *tensors, grad_output = attention_tensors(*shape, **options)
        return tensors, grad_output

    def formula(query, key, value):
        return attention_formula(query, key, value, mask, is_causal, query.shape[-1] ** -0.5)

    check(
        draw,
        lambda *tensors: run_attention(*tensors, mask, is_causal),
        formula,
        ("grad_query", "grad_key", "grad_value"),
    )


# ---------------------------------------------------------------- Gaussian mixtures


@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [*((head_dim, torch.float32) for head_dim in (1, 3, 16, 24, 80)), (64, torch.bfloat16), (24, torch.float16)],
)
def test_mixture_equals_formula_at_any_head_dim(head_dim, dtype):
    check_mixture((5, 7), 1, batch=1, head_dim=head_dim, dtype=dtype)


@pytest.mark.parametrize(
    ("grid", "prefix"), [((9, 8), 1), ((3, 25), 2), ((1, 70), 0), ((1, 70), 1), ((67, 1), 0), ((2, 1), 0)]
)
def test_mixture_equals_formula_on_any_grid(grid, prefix):
    check_mixture(grid, prefix, batch=1)


@pytest.mark.parametrize("gaussians", [1, 5, 9])
def test_mixture_takes_any_number_of_gaussians(gaussians):
    check_mixture((4, 9), 1, batch=1, gaussians=gaussians, dtype=torch.bfloat16)


@pytest.mark.parametrize("batch", [0, 3])
def test_mixture_parameter_gradients_sum_over_the_batch(batch):
    check_mixture((5, 7), 0, batch=batch, heads=1)


@pytest.mark.parametrize("grid", [(0, 3), (3, 0)])
@pytest.mark.parametrize("prefix", [0, 2])
def test_grid_without_tokens(grid, prefix):
    check_mixture(grid, prefix)


def test_one_token_attends_to_itself():
    query, key, value, alpha, sigma, grad_output = mixture_tensors((1, 1))
    (output, _), gradients = run_mixture(query, key, value, alpha, sigma, grad_output, (1, 1), 0)
    torch.testing.assert_close(output, value)
    torch.testing.assert_close(gradients[2], grad_output)
    for gradient in (*gradients[:2], *gradients[3:]):  # dP - delta, rounded
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-5, rtol=0)


def test_zero_alpha_is_uniform_attention():
    query, key, value, alpha, sigma, grad_output = mixture_tensors((4, 5))
    (output, logsumexp), _ = run_mixture(query, key, value, torch.zeros_like(alpha), sigma, grad_output, (4, 5), 0)
    torch.testing.assert_close(output, value.mean(2, keepdim=True).expand_as(value))
    torch.testing.assert_close(logsumexp, torch.full_like(logsumexp, 20.0).log())


def test_one_wide_gaussian_is_plain_attention():
    query, key, value, _, _, grad_output = mixture_tensors((4, 5), 1)
    alpha, sigma = torch.ones(1, 2, device=DEVICE), torch.full((1, 2), 1e10, device=DEVICE)
    (output, logsumexp), gradients = run_mixture(query, key, value, alpha, sigma, grad_output, (4, 5), 1)
    (plain, plain_logsumexp), plain_gradients = run_attention(query, key, value, grad_output)
    for got, expected in zip((output, logsumexp, *gradients[:3]), (plain, plain_logsumexp, *plain_gradients)):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("sigma", [0.0, -0.5, -2.0])
def test_zero_and_negative_sigma_are_allowed(sigma):
    check_mixture((5, 6), 1, sigma=sigma)


def test_distant_pairs_do_not_underflow_to_zero():
    check_mixture((1, 40), gaussians=1, sigma=30.0)


def rearranged(name, tensor):
    """The same numbers under other strides."""
    if name == "token-major":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if name == "head_dim-strided":
        wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1), float("nan"))
        wide[..., 1::2] = tensor
        return wide[..., 1::2]
    if name == "transposed":
        return tensor.mT.contiguous().mT
    return tensor[:1, :1].expand_as(tensor)


@pytest.mark.parametrize("layout", ["token-major", "head_dim-strided", "transposed", "expanded"])
def test_strides_do_not_matter(layout):
    query, key, value, alpha, sigma, grad_output = mixture_tensors((5, 7), 1, head_dim=17)
    query, key, value, grad_output = (rearranged(layout, t) for t in (query, key, value, grad_output))
    dense = run_mixture(
        *(t.contiguous() for t in (query, key, value)), alpha, sigma, grad_output.contiguous(), (5, 7), 1
    )
    strided = run_mixture(query, key, value, alpha, sigma, grad_output, (5, 7), 1)
    for got, expected in zip((*strided[0], *strided[1]), (*dense[0], *dense[1])):
        assert torch.equal(got, expected)
    if layout == "token-major":
        assert strided[0][0].stride() == query.stride()


def test_neighbours_of_the_inputs_are_neither_read_nor_written():
    tensors = mixture_tensors((5, 7), 1, head_dim=24)
    padded = [
        torch.full((*t.shape[:2], t.shape[2] + 6, t.shape[3] + 9), float("nan"), device=DEVICE)
        for t in (*tensors[:3], tensors[5])
    ]
    views = [p[:, :, 3:-3, 4:-5] for p in padded]
    for view, tensor in zip(views, (*tensors[:3], tensors[5])):
        view.copy_(tensor)
    forward, gradients = run_mixture(*views[:3], *tensors[3:5], views[3], (5, 7), 1)
    assert all(t.isfinite().all() for t in (*forward, *gradients))
    assert all(p.isnan().sum() == p.numel() - v.numel() for p, v in zip(padded, views))


def test_runs_are_bitwise_equal():
    tensors = mixture_tensors((6, 7), 1, dtype=torch.bfloat16)
    first, second = (run_mixture(*tensors, (6, 7), 1) for _ in range(2))
    for a, b in zip((*first[0], *first[1]), (*second[0], *second[1])):
        assert torch.equal(a, b)


def test_splits_of_the_parameter_gradient_agree(monkeypatch):
    tensors = mixture_tensors((4, 12), 0, batch=6, heads=1)
    results = []
    for target in (1, 4096):
        monkeypatch.setattr(patches, "TARGET_PROGRAMS", target)
        results.append(run_mixture(*tensors, (4, 12), 0)[1][3:])
    assert not all(map(torch.equal, *results))  # the order of summation did change
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block", [16, 32, 64])
@pytest.mark.parametrize("grid", [(14, 14), (24, 24), (64, 64), (1, 197), (200, 1), (3, 65), (7, 5)])
def test_patches_cover_the_grid_and_fit_the_block(grid, block):
    tile_h, tile_w = patches.patch_shape(*grid, block)
    assert 1 <= tile_h * tile_w <= block
    assert tile_h <= grid[0]
    assert tile_w <= grid[1]


# ---------------------------------------------------------------- element-wise learnable mask


@pytest.mark.parametrize("shared", [False, True], ids=["per-head", "shared"])
@pytest.mark.parametrize(
    ("tokens", "dtype"), [(2, torch.float32), (70, torch.float32), (33, torch.bfloat16), (20, torch.float16)]
)
def test_masked_product_equals_formula(tokens, shared, dtype):
    scale = 24**-0.5

    def draw():
        query, key, value, grad_output = (random(2, 2, tokens, 24, dtype=dtype) for _ in range(4))
        return (query, key, value, random(1 if shared else 2, tokens, tokens)), grad_output

    def run(query, key, value, weight, grad_output):
        forward = gaussian_mixture.masked_product_fwd(query, key, value, weight, scale)
        return forward, gaussian_mixture.masked_product_bwd(grad_output, query, key, value, weight, *forward, scale)

    def formula(query, key, value, weight):
        return product_formula(query, key, value, weight, scale)

    check(draw, run, formula, ("grad_query", "grad_key", "grad_value", "grad_weight"))


@pytest.mark.parametrize("view", ["transposed", "query dtype"])
def test_masked_product_takes_any_weight_layout_and_dtype(view):
    query, key, value, grad_output = (random(2, 2, 33, 16, dtype=torch.bfloat16) for _ in range(4))
    weight = random(2, 33, 33).bfloat16().float()
    expected = gaussian_mixture.masked_product_fwd(query, key, value, weight, 0.25)
    expected_grads = gaussian_mixture.masked_product_bwd(grad_output, query, key, value, weight, *expected, 0.25)
    other = weight.mT.contiguous().mT if view == "transposed" else weight.bfloat16()
    got = gaussian_mixture.masked_product_fwd(query, key, value, other, 0.25)
    got_grads = gaussian_mixture.masked_product_bwd(grad_output, query, key, value, other, *got, 0.25)
    assert got_grads[3].dtype == other.dtype
    for a, b in zip((*got, *got_grads), (*expected, *expected_grads)):
        assert torch.equal(a, b.to(a.dtype))


def test_masked_product_of_an_empty_batch_has_zero_weight_gradient():
    query = random(0, 2, 9, 16)
    weight = random(1, 9, 9)
    forward = gaussian_mixture.masked_product_fwd(query, query, query, weight, 0.25)
    gradients = gaussian_mixture.masked_product_bwd(query, query, query, query, weight, *forward, 0.25)
    assert forward[0].shape == query.shape
    assert torch.equal(gradients[3], torch.zeros_like(weight))


# ---------------------------------------------------------------- attention


def attention_tensors(queries, keys, heads=4, key_heads=4, head_dim=16, dtype=torch.float32):
    return (
        random(2, heads, queries, head_dim, dtype=dtype),
        random(2, key_heads, keys, head_dim, dtype=dtype),
        random(2, key_heads, keys, head_dim, dtype=dtype),
        random(2, heads, queries, head_dim, dtype=dtype),
    )


@pytest.mark.parametrize(
    ("queries", "keys", "dtype"),
    [(70, 33, torch.float32), (35, 70, torch.float32), (33, 34, torch.bfloat16), (35, 33, torch.float16)],
)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_attention_equals_formula(queries, keys, is_causal, dtype):
    check_attention(queries, keys, heads=2, key_heads=2, dtype=dtype, is_causal=is_causal)


def test_attention_of_one_query():
    check_attention(1, 5)


@pytest.mark.parametrize(("key_heads", "is_causal"), [(1, False), (2, True)])
def test_grouped_heads_share_keys_and_add_their_gradients(key_heads, is_causal):
    check_attention(33, 33, key_heads=key_heads, is_causal=is_causal)


@pytest.mark.parametrize("shape", [(2, 4, 20, 35), (2, 1, 1, 35)])
@pytest.mark.parametrize("kind", ["boolean", "additive", "additive fp32"])
def test_masks_of_any_broadcast_shape(kind, shape):
    mask = (
        torch.rand(shape, device=DEVICE) > 0.3
        if kind == "boolean"
        else random(*shape, dtype=torch.float32 if "fp32" in kind else torch.bfloat16)
    )
    check_attention(20, 35, dtype=torch.bfloat16, mask=mask.expand(2, 4, 20, 35))


@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_fully_masked_rows_give_zeros_and_zero_gradients(kind):
    tensors = attention_tensors(20, 40)
    mask = torch.rand(2, 4, 20, 40, device=DEVICE) > 0.5
    mask[:, :, 3] = False
    mask[0, 0] = False
    given = mask if kind == "boolean" else torch.zeros(mask.shape, device=DEVICE).masked_fill(~mask, float("-inf"))
    (output, logsumexp), gradients = run_attention(*tensors, mask=given)
    assert torch.equal(output[:, :, 3], torch.zeros_like(output[:, :, 3]))
    assert (logsumexp[:, :, 3] == float("-inf")).all()
    assert torch.equal(gradients[0][:, :, 3], torch.zeros_like(gradients[0][:, :, 3]))
    assert torch.equal(gradients[1][0, 0], torch.zeros_like(gradients[1][0, 0]))
    check_attention(20, 40, mask=given)


@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_empty_sequences(queries, keys, is_causal):
    query, key, value, grad_output = attention_tensors(queries, keys)
    (output, logsumexp), gradients = run_attention(query, key, value, grad_output, is_causal=is_causal)
    assert torch.equal(output, torch.zeros_like(query))
    assert torch.equal(logsumexp, torch.full((2, 4, queries), float("-inf"), device=DEVICE))
    for gradient, tensor in zip(gradients, (query, key, value)):
        assert torch.equal(gradient, torch.zeros_like(tensor))


def test_a_row_of_huge_logits_does_not_overflow():
    query, key, value, grad_output = attention_tensors(33, 70)
    query, key = query * 60, key * 60
    (output, logsumexp), gradients = run_attention(query, key, value, grad_output)
    assert all(t.isfinite().all() for t in (output, logsumexp, *gradients))
    expected, expected_logsumexp = attention_formula(*(t.double() for t in (query, key, value)), None, False, 0.25)
    torch.testing.assert_close(logsumexp.double(), expected_logsumexp, rtol=1e-5, atol=0)
    torch.testing.assert_close(output.double(), expected, rtol=1e-2, atol=1e-2)


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
    near = attention_tensors(4, 4, dtype=torch.bfloat16)
    near = [t[:1, :1] for t in near]
    far = [storage.as_strided((1, 1, 4, 16), (0, 0, 1 << 30, 1), 16 * n) for n in range(4)]
    for view, tensor in zip(far, near):
        view.copy_(tensor)
    (forward, gradients), (expected_forward, expected_gradients) = run_attention(*far), run_attention(*near)
    for a, b in zip((*forward, *gradients), (*expected_forward, *expected_gradients)):
        assert torch.equal(a, b)


@pytest.mark.skipif(torch.cuda.is_available(), reason="compiled, not interpreted")
def test_the_interpreter_computes_what_it_did_before_it_was_made_quicker(monkeypatch):
    *tensors, grad_output = mixture_tensors((3, 4), 1)

    def launch():
        forward, gradients = run_mixture(*tensors, grad_output, (3, 4), 1)
        return (*forward, *gradients)

    quick = launch()
    for name, original in quick_interpreter.ORIGINALS.items():
        assert getattr(interpreter, name) is not original
        monkeypatch.setattr(interpreter, name, original)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", quick_interpreter.ORIGINAL_OPTIONS)
    for one, other in zip(quick, launch(), strict=True):
        assert torch.equal(one, other)
