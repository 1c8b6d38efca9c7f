"""Whole vision transformers that merge tokens, against ToMe's formulas written out, and back to what they were.

The models are ``bench/vit.py``'s, small, with weights large enough for attention to matter, and timm's where it is
installed.
"""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from effattn.bench import vit
from torch import nn

from effattn.integrations.timm import TokenStream, merge_tokens, restore

PATCHES = 36


def make(architecture=vit.TINY, **options):
    model = vit.VisionTransformer(architecture, **options).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture
def model():
    return make()


@pytest.fixture
def images():
    return torch.randn(2, 3, 24, 24)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


# ---- the published algorithm, one image at a time ----


def published_groups(metric, r, prefix, distilled):
    """The inputs of each output of a layer, as lists; metric (N, d)."""
    metric = metric / metric.norm(dim=-1, keepdim=True)
    first, second = list(range(0, len(metric), 2)), list(range(1, len(metric), 2))
    scores = metric[first] @ metric[second].T
    if prefix:
        scores[0] = -torch.inf
    if distilled:
        scores[:, 0] = -torch.inf
    best, partner = scores.max(1)
    order = best.argsort(descending=True).tolist()
    r = min(r, (len(metric) - prefix) // 2)
    merged, kept = order[:r], order[r:]
    kept = sorted(kept) if prefix else kept
    into = {b: [b] for b in second}
    for index in merged:
        into[second[partner[index]]].append(first[index])
    groups = [[first[index]] for index in kept] + [into[b] for b in second]
    if distilled:  # the distillation token, first of b, stands behind the class token
        groups.insert(1, groups.pop(len(kept)))
    return groups


def published_block(block, x, sizes, r, prefix, distilled, proportional=True):
    """One image's (N, C) and sizes (N,) through a block, and the groups; attention in full."""
    attention, y = block.attn, block.norm1(x)
    q, k, v = attention.qkv(y).unflatten(1, (3, attention.num_heads, -1)).permute(1, 2, 0, 3)
    q, k = attention.q_norm(q), attention.k_norm(k)
    scores = q @ k.mT * q.shape[-1] ** -0.5 + (sizes.log() if proportional else 0.0)
    x = x + block.ls1(attention.proj((scores.softmax(-1) @ v).transpose(0, 1).flatten(1)))
    groups = [[n] for n in range(len(x))]
    if r:
        groups = published_groups(k.mean(0), r, prefix, distilled)
        x = torch.stack([(x[g] * sizes[g, None]).sum(0) / sizes[g].sum() for g in groups])
        sizes = torch.stack([sizes[g].sum() for g in groups])
    return x + block.ls2(block.mlp(block.norm2(x))), sizes, groups


@torch.no_grad()
def published(model, images, schedule, prefix, distilled=False, proportional=True):
    """Features before the final norm, sizes and members of each, of every image."""
    results, blocks = [], model.blocks
    model = copy.copy(model)
    model._modules = dict(model._modules, blocks=nn.Identity(), norm=nn.Identity())
    for x in model.forward_features(images):
        sizes, members = torch.ones(len(x)), [[n] for n in range(len(x))]
        for block, r in zip(blocks, schedule):
            x, sizes, groups = published_block(block, x, sizes, r, prefix, distilled, proportional)
            members = [[n for token in group for n in members[token]] for group in groups]
        results.append((x, sizes, members))
    return results


def source_of(members):
    source = torch.empty(sum(map(len, members)), dtype=torch.int64)
    for token, group in enumerate(members):
        source[group] = token
    return source


PREFIXES = [
    pytest.param({}, 1, False, id="class token"),
    pytest.param({"distilled": True}, 2, True, id="distilled"),
    pytest.param({"class_token": False, "global_pool": "avg"}, 0, False, id="no class token"),
]


@pytest.mark.parametrize(("options", "prefix", "distilled"), PREFIXES)
@pytest.mark.parametrize("r", [5, [0, 7, 3], 100])
@torch.no_grad()
def test_a_merging_model_computes_what_is_published(images, options, prefix, distilled, r):
    model = make(**options)
    expected = published(model, images, r if isinstance(r, list) else [r] * 3, prefix, distilled)
    merging = merge_tokens(model, r, trace_source=True, unmerge=False)
    features = model.forward_features(images)
    close(features, torch.stack([model.norm(x) for x, _, _ in expected]))
    assert torch.equal(merging.source_map(), torch.stack([source_of(members) for *_, members in expected]))
    assert features.shape[1] == merging.num_tokens(prefix + PATCHES)[-1]


@torch.no_grad()
def test_attention_that_is_not_weighted_by_sizes(model, images):
    expected = published(model, images, [6] * 3, 1, proportional=False)
    weighted = published(model, images, [6] * 3, 1)
    merge_tokens(model, 6, size_weighted=False)
    close(model.forward_features(images), torch.stack([model.norm(x) for x, _, _ in expected]))
    assert not torch.allclose(expected[0][0], weighted[0][0], atol=1e-2)


@torch.no_grad()
def test_a_mean_over_patches_counts_each_patch(images):
    model = make(class_token=False, global_pool="avg")
    expected = published(model, images, [8] * 3, 0)
    merge_tokens(model, 8)
    means = [(model.norm(x) * sizes[:, None]).sum(0) / sizes.sum() for x, sizes, _ in expected]
    close(model(images), model.head(torch.stack(means)))


@torch.no_grad()
def test_unmerging_gives_every_patch_the_row_of_its_token(model, images):
    merging = merge_tokens(model, 7, trace_source=True)
    merged, source = model.forward_features(images), merging.source_map()
    merge_tokens(model, 7, unmerge=True)
    features = model.forward_features(images)
    close(features, merged.gather(1, source.unsqueeze(2).expand(-1, -1, merged.shape[2])))
    assert features.shape[1] == 1 + PATCHES


@torch.no_grad()
def test_register_tokens_stay_in_front_unmerged(images):
    model = make(vit.TINY._replace(depth=2), registers=3)
    plain = model.forward_features(images)
    merging = merge_tokens(model, [0, 9], trace_source=True, unmerge=False)
    features = model.forward_features(images)
    source = merging.source_map()
    assert torch.equal(source[:, :4], torch.arange(4).expand(2, -1))
    assert source[:, 4:].min() == 4
    assert features.shape[1] == merging.num_tokens(4 + PATCHES)[-1] == 4 + PATCHES - 9
    close(features[:, :4], plain[:, :4])  # no attention has seen merged tokens yet


# ---- threshold ----


@torch.no_grad()
def test_a_threshold_that_everything_reaches_merges_as_none(model, images):
    merge_tokens(model, 6)
    expected = model(images)
    merging = merge_tokens(model, 6, threshold=-1.0, trace_source=True)
    close(model(images), expected)
    assert merging.num_tokens(1 + PATCHES) == [1 + PATCHES] * 3
    assert len(merging.source_map()[0].unique()) == 1 + PATCHES - 18


@pytest.mark.parametrize("size_weighted", [True, False])
@torch.no_grad()
def test_a_threshold_that_nothing_reaches_merges_nothing(model, images, size_weighted):
    expected = model(images)
    merge_tokens(model, 6, threshold=1.0, size_weighted=size_weighted)
    close(model(images), expected)


@torch.no_grad()
def test_padding_takes_no_part_even_where_sizes_do_not_weigh(model, images):
    merge_tokens(model, 6, size_weighted=False)
    expected = model(images)
    merge_tokens(model, 6, threshold=-1.0, size_weighted=False)
    close(model(images), expected)


@torch.no_grad()
def test_each_image_has_its_own_number_of_merges(model):
    images = torch.cat([torch.zeros(1, 3, 24, 24), torch.randn(1, 3, 24, 24)])
    model.pos_embed.zero_()  # patches of the first image are all alike
    merging = merge_tokens(model, [8, 0, 0], threshold=0.999, trace_source=True)
    model(images)
    counts = [len(source.unique()) for source in merging.source_map()]
    assert counts[0] == 1 + PATCHES - 8
    assert counts[0] < counts[1]


@torch.no_grad()
def test_padding_is_no_patch_of_a_mean(images):
    model = make(class_token=False, global_pool="avg")
    merge_tokens(model, 8)
    expected = model(images)
    merge_tokens(model, 8, threshold=-1.0)
    close(model(images), expected)


# ---- schedules ----


def test_schedules_are_the_published_ones():
    model = vit.VisionTransformer(vit.TINY._replace(depth=12))
    schedules = {
        16: [16] * 12,
        (16, 0.0): [16] * 12,
        (16, -1.0): [32, 29, 26, 23, 20, 17, 14, 11, 8, 5, 2, 0],
        (16, 1.0): [0, 2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32],
        (5, 0.5): [2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 8],
    }
    for r, expected in schedules.items():
        merging = merge_tokens(model, r)
        assert [merging.merged.get(f"blocks.{i}", 0) for i in range(12)] == expected


def test_the_handle_tells_what_merges_and_how_many_tokens_remain(model):
    merging = merge_tokens(model, [4, 0, 30])
    assert merging.merged == {"blocks.0": 4, "blocks.2": 30}
    assert merging.skipped == {"blocks.1": "its r is 0"}
    assert merging.num_tokens(37) == [33, 33, 17]
    assert repr(merging) == "TokenMerging(merged={'blocks.0': 4, 'blocks.2': 30})"


def test_one_block_has_a_schedule_too():
    assert merge_tokens(vit.VisionTransformer(vit.TINY._replace(depth=1)), (4, -1.0)).merged == {"blocks.0": 4}


# ---- there and back ----


def state_of(model):
    """Everything that a patch might leave behind."""
    return {
        name: (
            type(module),
            {key: id(value) for key, value in vars(module).items()},
            list(module._forward_hooks.items()),
        )
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("way", ["restore", "revert"])
def test_a_restored_model_is_what_it_was(model, images, way):
    model.blocks[1].register_forward_hook(lambda *args: None)
    before, outputs = state_of(model), model(images)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merging = merge_tokens(model, 8, trace_source=True)
    assert list(model.state_dict()) == list(weights)
    assert not torch.equal(model(images), outputs)
    restore(model) if way == "restore" else merging.revert()
    assert state_of(model) == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(images), outputs)
    with pytest.raises(ValueError, match="not one that merge_tokens"):
        restore(model)


def test_a_second_call_gives_new_options_and_the_first_handle_lets_go(model, images):
    before = state_of(model)
    first = merge_tokens(model, 8)
    second = merge_tokens(model, 3)
    assert (first.merged, second.merged["blocks.0"]) == ({}, 3)
    first.revert()
    assert type(model.blocks[0]).__name__ == "MergingBlock"
    expected = model(images)
    restore(model)
    merge_tokens(model, 3)
    assert torch.equal(model(images), expected)
    restore(model)
    assert state_of(model) == before


def test_wrong_options_leave_a_merging_model_as_it_is(model, images):
    merge_tokens(model, 8)
    expected = model(images)
    with pytest.raises(ValueError, match="inflection"):
        merge_tokens(model, (8, 3.0))
    assert torch.equal(model(images), expected)


def test_nothing_merged_is_the_plain_model(model, images):
    expected = model(images)
    merging = merge_tokens(model, 0, trace_source=True, unmerge=True)
    close(model(images), expected)
    assert torch.equal(merging.source_map(), torch.arange(37).expand(2, -1))


def test_a_copy_merges_and_is_restored_on_its_own(model, images):
    plain = model(images)
    merging = merge_tokens(model, 8, trace_source=True)
    other = copy.deepcopy(model)
    expected = model(images)
    source = merging.source_map()
    assert torch.equal(other(images[:1]), model(images[:1]))
    model(images)
    restore(other)
    close(other(images), plain)
    assert torch.equal(model(images), expected)
    assert torch.equal(merging.source_map(), source)


def test_a_merging_model_is_saved_and_loaded_whole(model, images):
    merge_tokens(model, 8)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(images), model(images))
    restore(loaded)
    assert type(loaded.blocks[0]) is vit.Block


def test_state_dicts_go_between_merging_and_plain_models(model, images):
    other = vit.VisionTransformer(vit.TINY).eval()
    merge_tokens(other, 8)
    other.load_state_dict(model.state_dict())
    merge_tokens(model, 8)
    assert torch.equal(other(images), model(images))


# ---- use ----


def test_the_batch_may_change_between_calls(model, images):
    merging = merge_tokens(model, 6, trace_source=True)
    both = model(images)
    close(torch.cat([model(images[:1]), model(images[1:])]), both)
    assert merging.source_map().shape == (1, 37)
    assert model(images[:0]).shape == (0, 5)


def test_a_merging_model_trains(model, images):
    merge_tokens(model, 6)
    model.train()
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.003)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        losses.append(F.cross_entropy(model(images), torch.tensor([1, 3])))
        losses[-1].backward()
        assert all(parameter.grad.isfinite().all() for parameter in parameters.values())
        assert all(parameter.grad.any() for name, parameter in parameters.items() if "bias" not in name)
        optimizer.step()
    assert losses[-1] < losses[0]


def test_gradients_are_those_of_the_published_formula(model, images):
    images = images[:1]
    with torch.enable_grad():
        ((x, *_),) = published.__wrapped__(model, images, [6] * 3, 1)
        expected = torch.autograd.grad(model.head(model.norm(x))[0].square().sum(), list(model.parameters()))
    merge_tokens(model, 6)
    found = torch.autograd.grad(model(images).square().sum(), list(model.parameters()))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_checkpointing_gives_the_same_gradients_whatever_ran_in_between(model, images):
    merge_tokens(model, 6)
    plain = torch.autograd.grad(model(images).square().sum(), list(model.parameters()))
    model.grad_checkpointing = True
    loss = model(images).square().sum()
    model(torch.randn(2, 3, 24, 24))
    close(torch.autograd.grad(loss, list(model.parameters())), plain)


def test_the_whole_model_compiles_to_one_graph_for_every_batch(images):
    model = make(vit.TINY._replace(depth=2))
    merging = merge_tokens(model, (5, -0.5), trace_source=True, unmerge=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch._dynamo.mark_dynamic(images, 0)
    out = compiled(images)
    source = merging.source_map()
    expected = model(images)
    close(out, expected)
    assert torch.equal(merging.source_map(), source)
    with torch.compiler.set_stance("fail_on_recompile"):
        close(compiled(torch.cat([images, images[:1]])), torch.cat([expected, expected[:1]]))
    assert merging.source_map().shape == (3, 37)
    parameters = list(model.parameters())
    found, expected = (torch.autograd.grad(result.square().sum(), parameters) for result in (out, expected))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_half_precision_and_autocast(model, images):
    merge_tokens(model, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(images)
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()
    assert model.bfloat16()(images.bfloat16()).isfinite().all()


def test_hooks_on_blocks_see_the_tokens_with_their_sizes(model, images):
    merge_tokens(model, 6)
    seen = []
    handles = [block.register_forward_hook(lambda module, given, result: seen.append(result)) for block in model.blocks]
    model(images)
    assert [type(result) for result in seen] == [TokenStream, TokenStream, torch.Tensor]
    assert seen[0].tokens.shape == (2, 31, 24)
    assert torch.equal(seen[1].sizes.sum(1), torch.full((2, 1), 37.0))
    for handle in handles:
        handle.remove()


def test_dropout_and_drop_path_act_in_training(model, images):
    model.blocks[0].drop_path1, model.blocks[1].attn.attn_drop = nn.Dropout(0.5), nn.Dropout(0.5)
    model.eval()
    merge_tokens(model, 6)
    assert torch.equal(model(images), model(images))
    model.train()
    assert not torch.equal(model(images), model(images))


def test_layer_scale_and_norms_are_part_of_the_block(images):
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.gamma = nn.Parameter(torch.randn(24))

        def forward(self, x):
            return x * self.gamma

    model = make()
    for block in model.blocks:
        block.ls1, block.ls2 = Scale(), Scale()
        block.attn.q_norm, block.attn.k_norm = nn.LayerNorm(8), nn.LayerNorm(8)
        nn.init.normal_(block.attn.k_norm.weight)
    expected = published(model, images, [6] * 3, 1)
    merge_tokens(model, 6)
    with torch.no_grad():
        close(model.forward_features(images), torch.stack([model.norm(x) for x, _, _ in expected]))


class Gated(vit.Attention):
    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.proj(self.norm(out) * self.gate(x).sigmoid())


@torch.no_grad()
def test_a_gate_and_a_norm_of_the_attention_output_are_kept(model, images):
    for block in model.blocks:
        block.attn.gate, block.attn.norm = nn.Linear(24, 24), nn.LayerNorm(24)
        block.attn.__class__ = Gated
    expected = model(images)
    merge_tokens(model, [0, 0, 9])  # the class token sees no merged one
    close(model(images), expected)


# ---- what is refused ----


class Rewritten(vit.Attention):
    def forward(self, x):
        return 1.5 * super().forward(x)


class PostNorm(vit.Block):
    def forward(self, x):
        x = x + self.norm1(self.attn(x))
        return x + self.norm2(self.mlp(x))


class Rotary(vit.Block):
    def forward(self, x, rope=None):
        return super().forward(x)


class FixedTokens(vit.Attention):
    def forward(self, x):
        return super().forward(x.view(-1, 37, 24))


def biased(attention):
    attention.relative_position_bias_table = nn.Parameter(torch.zeros(3))


UNSUPPORTED = [
    pytest.param(lambda block: setattr(block, "window_size", 7), "window_size", id="window"),
    pytest.param(lambda block: biased(block.attn), "relative_position_bias_table", id="relative bias"),
    pytest.param(lambda block: delattr(block.attn, "qkv"), "no qkv", id="no qkv"),
    pytest.param(lambda block: delattr(block.attn, "num_heads"), "no num_heads", id="no heads"),
    pytest.param(lambda block: delattr(block, "norm2"), "no norm2", id="no norm2"),
    pytest.param(lambda block: setattr(block, "adapter", nn.Linear(2, 2)), "has adapter", id="more parts"),
    pytest.param(lambda block: setattr(block.attn, "sr", nn.Linear(2, 2)), "has sr", id="spatial reduction"),
    pytest.param(lambda block: setattr(block, "__class__", PostNorm), "something else", id="post-norm"),
    pytest.param(lambda block: setattr(block.attn, "__class__", Rewritten), "something else", id="other attention"),
    pytest.param(lambda block: setattr(block, "__class__", Rotary), "takes rope", id="rope"),
    pytest.param(lambda block: setattr(block.attn, "__class__", FixedTokens), "5 tokens", id="fixed tokens"),
    pytest.param(lambda block: setattr(block, "forward", lambda x: x), "replaced", id="forward replaced"),
]


@pytest.mark.parametrize(("change", "reason"), UNSUPPORTED)
def test_a_block_of_another_kind_is_refused_by_name_and_nothing_is_patched(model, change, reason):
    change(model.blocks[1])
    before = state_of(model)
    with pytest.raises(ValueError, match=rf"VisionTransformer is not supported: blocks\.1 \(\w+\) .*{reason}") as error:
        merge_tokens(model, 8)
    assert "blocks.0" not in str(error.value)
    assert state_of(model) == before


def test_the_trial_of_a_block_leaves_no_trace(model):
    calls = []
    for module in model.modules():
        module.register_forward_hook(lambda *args: calls.append(args))
        module.register_forward_pre_hook(lambda *args: calls.append(args))
    model.train()
    random = torch.random.get_rng_state()
    merge_tokens(model, 8)
    assert not calls
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), random)


def test_a_block_of_tiny_layer_scales_is_still_told_from_another(model):
    class Smaller(vit.Block):
        def forward(self, x):
            return x + 1e-4 * (super().forward(x) - x)

    model.blocks[2].__class__ = Smaller
    with pytest.raises(ValueError, match="something else"):
        merge_tokens(model, 8)


def test_models_without_a_sequence_of_blocks_are_refused(model):
    with pytest.raises(ValueError, match="no sequence named blocks"):
        merge_tokens(nn.Sequential(nn.Linear(3, 3)), 8)
    stages = nn.Module()
    stages.stages = nn.ModuleList([make(vit.TINY._replace(depth=4)).blocks])
    with pytest.raises(ValueError, match=r"stages\.0\.0 \(Block\) the model does not keep.*; and 1 more") as error:
        merge_tokens(stages, 8)
    assert "stages.0.2 " in str(error.value)
    assert "stages.0.3 " not in str(error.value)
    shared = make()
    shared.blocks[1] = shared.blocks[0]
    with pytest.raises(ValueError, match="more than once"):
        merge_tokens(shared, 8)
    part = nn.Module()
    part.blocks = model.blocks
    merge_tokens(model, 8)
    with pytest.raises(ValueError, match="patched already"):
        merge_tokens(part, 8)


def test_models_on_the_meta_device_are_patched_untried():
    with torch.device("meta"):
        blocks = nn.Sequential(vit.Block(24, 3), vit.Block(24, 3))
    model = nn.Module()
    model.blocks = blocks
    assert len(merge_tokens(model, 4).merged) == 2


@pytest.mark.parametrize(
    ("options", "name", "error"),
    [
        ({"r": -1}, "r must be", ValueError),
        ({"r": 2.5}, "r must be", TypeError),
        ({"r": True}, "r must be", TypeError),
        ({"r": [1, 2]}, "3 blocks", ValueError),
        ({"r": [1, 2, -3]}, "r must be", ValueError),
        ({"r": (1, 2, 3)}, "inflection", ValueError),
        ({"r": (4, 1.5)}, "inflection", ValueError),
        ({"r": (4, "up")}, "inflection", TypeError),
        ({"threshold": 2.0}, "threshold", ValueError),
        ({"threshold": "high"}, "threshold", TypeError),
        ({"trace_source": 1}, "trace_source", TypeError),
        ({"size_weighted": None}, "size_weighted", TypeError),
        ({"unmerge": "yes"}, "unmerge", TypeError),
    ],
)
def test_wrong_options_are_named(model, options, name, error):
    with pytest.raises(error, match=name):
        merge_tokens(model, **({"r": 4} | options))
    with pytest.raises(ValueError, match="not one that"):
        restore(model)


def test_a_backend_that_cannot_serve_is_not_replaced(model, images):
    merge_tokens(model.double(), 4, backend="cpu")
    with pytest.raises(NotImplementedError, match="float64"):
        model(images.double())


def test_wrong_calls_are_refused(model, images):
    with pytest.raises(TypeError, match=r"nn\.Module"):
        merge_tokens([model], 4)
    merging = merge_tokens(model, 4)
    with pytest.raises(RuntimeError, match="trace_source=True"):
        merging.source_map()
    merging = merge_tokens(model, 4, trace_source=True)
    with pytest.raises(RuntimeError, match="not called"):
        merging.source_map()
    with pytest.raises(NotImplementedError, match="attn_mask"):
        model.blocks[0](torch.randn(2, 37, 24), attn_mask=torch.ones(37, 37))


def test_features_on_the_grid_are_refused_while_merging():
    class WithFeatures(vit.VisionTransformer):
        def forward_intermediates(self, images):
            return "features"

    model = WithFeatures(vit.TINY)
    merge_tokens(model, 4)
    with pytest.raises(NotImplementedError, match="grid"):
        model.forward_intermediates(None)
    restore(model)
    assert model.forward_intermediates(None) == "features"


# ---- the real ones ----


@pytest.mark.parametrize(
    ("name", "options", "prefix"),
    [
        ("vit_tiny_patch16_224", {}, 1),
        ("deit_tiny_distilled_patch16_224", {}, 2),
        ("vit_small_patch14_reg4_dinov2", {"img_size": 112}, 5),
        ("vit_base_patch16_siglip_224", {}, 0),
    ],
)
def test_timm_models_merge_and_come_back(name, options, prefix):
    timm = pytest.importorskip("timm", reason="timm is not installed", exc_type=ImportError)
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, depth=2, **options).eval()
    size = model.patch_embed.img_size
    images = torch.randn(1, 3, *size)
    with torch.no_grad():
        before = model(images)
        merging = merge_tokens(model, 20, trace_source=True)
        assert model(images).shape == before.shape
        tokens = merging.source_map().shape[1]
        assert len(merging.source_map()[0].unique()) == merging.num_tokens(tokens)[-1] == tokens - 40
        assert merging._prefix == prefix
        restore(model)
        assert torch.equal(model(images), before)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "resnet18", "vit_relpos_small_patch16_224"])
def test_other_timm_models_are_refused(name):
    timm = pytest.importorskip("timm", reason="timm is not installed", exc_type=ImportError)
    with pytest.raises(ValueError, match="not supported"):
        merge_tokens(timm.create_model(name), 8)
