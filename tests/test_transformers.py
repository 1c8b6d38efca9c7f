"""Hugging Face transformers models on attn_implementation="effattn": small random ones against "eager" and "sdpa"."""

import copy

import pytest
import torch
from torch import nn

import effattn

transformers = pytest.importorskip("transformers")

from effattn.integrations.transformers import attention, mask_config, mask_from_config  # noqa: E402

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
TOKENS = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(2))
PADDED = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
VISION = {"image_size": 16, "patch_size": 4}
INPUTS = {
    "vit": {"pixel_values": PIXELS},
    "deit": {"pixel_values": PIXELS},
    "bert": {"input_ids": TOKENS, "attention_mask": PADDED},
    "llama": {"input_ids": TOKENS, "attention_mask": PADDED},
    "mistral": {"input_ids": TOKENS, "attention_mask": PADDED},
    "t5": {"input_ids": TOKENS, "attention_mask": PADDED, "decoder_input_ids": TOKENS},
}


def config_of(name):
    if name in ("vit", "deit"):
        return {"vit": transformers.ViTConfig, "deit": transformers.DeiTConfig}[name](**SIZES, **VISION)
    if name == "bert":
        return transformers.BertConfig(**SIZES, vocab_size=50)
    if name == "t5":
        return transformers.T5Config(d_model=32, d_kv=8, d_ff=40, num_layers=2, num_heads=4, vocab_size=50)
    kind, more = {
        "llama": (transformers.LlamaConfig, {}),
        "mistral": (transformers.MistralConfig, {"sliding_window": 3}),
    }[name]
    return kind(**SIZES, num_key_value_heads=2, vocab_size=50, pad_token_id=0, **more)


def make(name, implementation="sdpa", **options):
    torch.manual_seed(0)
    config = config_of(name)
    for option, value in options.items():
        setattr(config, option, value)
    kind = transformers.AutoModelForCausalLM if name == "llama" else transformers.AutoModel
    return kind.from_config(config, attn_implementation=implementation).eval()


def run(model, name, **options):
    """The first output, without rows of padding: what they attend to differs between eager and sdpa."""
    out = model(**INPUTS[name], **options)[0]
    masked = "attention_mask" in INPUTS[name] and name != "t5"
    return out[PADDED.bool()] if masked else out


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_patched_model_computes_the_same_and_goes_back(name, implementation):
    model = make(name, implementation)
    expected, state = run(model, name), copy.deepcopy(model.state_dict())
    entries = {key: set(vars(module)) for key, module in model.named_modules()}
    done = effattn.patch(model, example=INPUTS[name] if implementation == "sdpa" else None)
    assert len(done.touched) == (6 if name == "t5" else 2)
    assert done.skipped == {}
    assert model.config._attn_implementation == "effattn"
    torch.testing.assert_close(run(model, name), expected, rtol=1e-4, atol=1e-5)
    effattn.unpatch(model)
    assert model.config._attn_implementation == implementation
    assert {key: set(vars(module)) for key, module in model.named_modules()} == entries
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(run(model, name), expected)


def test_the_name_is_accepted_by_from_config_and_set_attn_implementation():
    model, other = make("bert", "effattn"), make("bert")
    torch.testing.assert_close(run(model, "bert"), run(other, "bert"), rtol=1e-4, atol=1e-5)
    other.set_attn_implementation("effattn")
    assert torch.equal(run(model, "bert"), run(other, "bert"))
    assert 'runs attn_implementation="effattn" already' in str(effattn.patch(other))


def test_both_towers_of_clip_are_patched_and_unpatched():
    tower = {**SIZES, "num_hidden_layers": 1}
    text = {**tower, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 2}
    config = transformers.CLIPConfig(text_config=text, vision_config={**tower, **VISION}, projection_dim=16)
    model = transformers.CLIPModel(config).eval()
    inputs = {"input_ids": TOKENS, "pixel_values": PIXELS}
    expected = model(**inputs).logits_per_image
    assert len(effattn.patch(model, example=inputs).touched) == 2
    effattn.unpatch(model)
    assert model.text_model.config._attn_implementation == "sdpa"
    assert torch.equal(model(**inputs).logits_per_image, expected)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_with_a_cache_and_padding_gives_the_same_tokens(cache):
    model = make("llama")
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": PADDED, "disable_compile": True}
    if cache == "static":
        options["cache_implementation"] = "static"
    expected = model.generate(TOKENS, **options)
    effattn.patch(model)
    assert torch.equal(model.generate(TOKENS, **options), expected)


def test_gradients_are_the_same():
    model, other = make("llama"), make("llama")
    effattn.patch(model)
    for each in (model, other):
        each(TOKENS, labels=TOKENS).loss.backward()
    for parameter, expected in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-3, atol=1e-6)


def test_a_patched_model_compiles_in_one_graph_and_is_copied():
    model = make("llama", num_hidden_layers=1)
    expected = model(TOKENS, use_cache=False).logits
    effattn.patch(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(TOKENS, use_cache=False).logits, expected, rtol=1e-4, atol=1e-5)
    copied = copy.deepcopy(model)
    effattn.unpatch(copied)
    assert copied.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == "effattn"
    assert torch.equal(copied(TOKENS, use_cache=False).logits, expected)


def test_weights_are_refused():
    with pytest.raises((NotImplementedError, ValueError), match="output_attentions"):
        make("bert", "effattn")(TOKENS, output_attentions=True)


@pytest.mark.parametrize(("option", "value"), [("softcap", 30.0), ("s_aux", torch.zeros(4)), ("sinks", torch.zeros(4))])
def test_options_that_change_the_scores_are_refused(option, value):
    query = torch.randn(1, 4, 5, 8)
    with pytest.raises(NotImplementedError, match=option):
        attention(nn.Module(), query, query, query, None, **{option: value})


def gaussians(name, module):
    heads = module.config.num_attention_heads
    return effattn.GaussianMixtureMask(
        nn.Parameter(torch.ones(1, heads)), nn.Parameter(torch.ones(1, heads)), (4, 4), 1
    )


def test_a_rule_gives_each_layer_a_mask_with_parameters_of_its_own():
    model = make("vit")
    expected, keys = run(model, "vit"), list(model.state_dict())
    done = effattn.patch(model, {"*0.attention": gaussians})
    assert list(done.touched.values()) == ["GaussianMixtureMask, another function than before"]
    assert list(done.skipped.values()) == ["no rule matches it"]
    run(model, "vit").square().sum().backward()
    assert model.layers[0].attention.effattn_alpha.grad.abs().sum() > 0
    effattn.unpatch(model)
    assert list(model.state_dict()) == keys
    assert torch.equal(run(model, "vit"), expected)


def test_rules_for_some_layers_need_a_model_on_sdpa():
    model = make("vit", "eager")
    with pytest.raises(ValueError, match="'sdpa', but it is 'eager'"):
        effattn.patch(model, {"*0.attention": "exact"})
    assert model.config._attn_implementation == "eager"


def test_a_mask_in_the_configuration_survives_saving():
    mask = effattn.GaussianMixtureMask(torch.rand(2, 4), torch.rand(2, 4) + 0.5, (4, 4), 1)
    config = config_of("vit")
    config.effattn_mask = mask_config(mask)
    config = transformers.ViTConfig.from_dict(config.to_dict())
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config, attn_implementation="effattn").eval()
    other = make("vit")
    effattn.patch(other, mask)
    torch.testing.assert_close(run(model, "vit"), run(other, "vit"))
    assert not torch.allclose(run(model, "vit"), run(make("vit"), "vit"))


def test_a_list_in_the_configuration_gives_each_layer_its_mask():
    decay = [mask_config(effattn.RetentionDecay(effattn.retnet_log_decay(4) * factor)) for factor in (1, 9)]
    model, other = make("llama", "effattn", effattn_mask=decay), make("llama")
    masks = iter(map(mask_from_config, decay))
    effattn.patch(other, lambda name, module: next(masks))
    torch.testing.assert_close(model(TOKENS, use_cache=False).logits, other(TOKENS, use_cache=False).logits)


def test_calls_that_a_mask_cannot_serve_are_refused():
    retention = mask_config(effattn.RetentionDecay(effattn.retnet_log_decay(4)))
    model = make("llama", "effattn", effattn_mask=retention)
    with pytest.raises(NotImplementedError, match="does not combine"):
        model(TOKENS, attention_mask=PADDED)
    with pytest.raises(NotImplementedError, match="use_cache=False"):
        model.generate(TOKENS, max_new_tokens=3, attention_mask=torch.ones_like(TOKENS))
    window = mask_config(effattn.CrossShapedWindow((1, 7), 7))
    with pytest.raises(NotImplementedError, match="this layer is causal"):
        make("llama", "effattn", effattn_mask=window)(TOKENS)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (3, TypeError, "must be a dict"),
        ({"type": "Nothing"}, ValueError, "type must be one of"),
        ({"type": "ShiftAdd", "bits": 3}, ValueError, "ShiftAdd takes binarize"),
    ],
)
def test_wrong_configurations_are_refused(config, error, message):
    with pytest.raises(error, match=message):
        mask_from_config(config)
