"""The original's Python API as scripts and extensions use it, in lines like theirs."""

import functools
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from ldm.models.diffusion import ddpm
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import DDPM, LatentDiffusion
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.plms import PLMSSampler
from ldm.util import InputError, instantiate_from_config
from tests.support.golden_data import (
    TOLERANCE,
    figure,
    laion_config,
    relative_error,
    tiny_config,
    tiny_model,
)

SAMPLERS = [DDIMSampler, PLMSSampler, DPMSolverSampler]


class Recorder:
    """Predicts half of x as the noise, and records the timesteps of the calls."""

    num_timesteps = 1000

    def __init__(self, tiny):
        self.alphas_cumprod, self.device = tiny.alphas_cumprod, tiny.device
        self.times = []

    def apply_model(self, x, t, cond):
        self.times.append(int(t[0]))
        return 0.5 * x


def draw(sampler, **options):
    x_T = torch.full((1, 4, 2, 2), 0.7)
    return sampler.sample(S=10, batch_size=1, shape=[4, 2, 2], x_T=x_T, verbose=False, **options)[0]


def changed(**params):
    config = tiny_config()
    config["params"].update(params)
    return config


# --- prompts --------------------------------------------------------------------------------------------------


def test_a_single_text_is_one_prompt(tiny):
    for text in ("a red cube", ""):
        expected = tiny.get_learned_conditioning([text])
        assert expected.shape == (1, 77, 64)
        assert torch.equal(tiny.get_learned_conditioning(text), expected)
        assert torch.equal(tiny.cond_stage_model(text), expected)
    assert torch.equal(tiny.get_learned_conditioning(("", "a")), tiny.get_learned_conditioning(["", "a"]))


def test_weighted_subprompts(tiny):
    uc, c = tiny.get_learned_conditioning([""]), torch.zeros(1, 77, 64)
    for text, weight in (("a cat", 0.25), ("a dog", 0.75)):
        c = torch.add(c, tiny.get_learned_conditioning(text), alpha=weight)
    cat, dog = tiny.get_learned_conditioning(["a cat", "a dog"])
    assert c.shape == uc.shape
    assert torch.allclose(c[0], 0.25 * cat + 0.75 * dog, atol=1e-5)


@pytest.mark.parametrize("label", [None, "", [""], ["", ""], "a cat", ["a", "b"]])
def test_null_labels(tiny, label):
    texts = [label or ""] * 2 if not isinstance(label, list) else (label * 2)[:2]
    found = tiny.get_unconditional_conditioning(2, label)
    assert torch.allclose(found, tiny.get_learned_conditioning(texts), atol=1e-5)


def test_null_labels_of_another_number(tiny):
    with pytest.raises(InputError, match="3 null labels for a batch of 2"):
        tiny.get_unconditional_conditioning(2, [""] * 3)


class Conditioner(nn.Module):
    """Another package's conditioner, whose encoding method has another name."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 64)

    def forward(self, texts):
        return self.layer(torch.tensor([[[float(len(text))]] for text in texts]))

    embed = forward


@pytest.mark.parametrize("name", [None, "embed"])
def test_another_packages_text_encoder(name):
    config = {"target": f"{__name__}.Conditioner"}
    model = instantiate_from_config(changed(cond_stage_config=config, cond_stage_forward=name))
    assert model.get_learned_conditioning(["a", "bc"]).shape == (2, 1, 64)


# --- configs --------------------------------------------------------------------------------------------------


class Swallows(nn.Module):
    def __init__(self, a, **kwargs):
        super().__init__()
        self.given = {"a": a, **kwargs}


class PlainSwallows:
    def __init__(self, a, **kwargs):
        self.given = {"a": a, **kwargs}


class TakesAll:
    def __init__(self, *args, **kwargs):
        self.given = kwargs


class Extension(LatentDiffusion):
    def __init__(self, *args, **kwargs):
        self.given = kwargs
        super().__init__(*args, **{k: v for k, v in kwargs.items() if k not in ("a", "b")})


@pytest.mark.parametrize("kind", [Swallows, PlainSwallows, TakesAll, Extension])
def test_keywords_that_a_class_takes_itself(kind):
    params = {"a": 1, "b": 2, **(tiny_config()["params"] if kind is Extension else {})}
    found = instantiate_from_config({"target": f"{__name__}.{kind.__name__}", "params": params})
    assert {name: found.given[name] for name in "ab"} == {"a": 1, "b": 2}


@pytest.mark.parametrize("wraps", [lambda own: lambda wrapper: wrapper, functools.wraps])
def test_a_wrapped_constructor(monkeypatch, wraps):
    own, seen = LatentDiffusion.__init__, []

    @wraps(own)
    def wrapper(self, *args, **kwargs):
        seen.append(kwargs.pop("extra"))
        own(self, *args, **kwargs)

    monkeypatch.setattr(LatentDiffusion, "__init__", wrapper)
    assert instantiate_from_config(changed(extra=3)).num_timesteps == 1000
    assert seen == [3]


def test_a_misspelt_parameter_is_still_named():
    with pytest.raises(InputError, match="takes no parameter 'scale_facter'"):
        instantiate_from_config(changed(scale_facter=1))


def test_words_for_no_model_of_its_own():
    assert instantiate_from_config("__is_first_stage__") is None
    assert instantiate_from_config("__is_unconditional__") is None
    model = instantiate_from_config(changed(cond_stage_config="__is_first_stage__"))
    assert model.cond_stage_model is model.first_stage_model
    assert instantiate_from_config(changed(cond_stage_config="__is_unconditional__")).cond_stage_model is None


NEUTRAL = {
    "loss_type": "l1", "ignore_keys": [], "load_only_unet": False, "clip_denoised": False, "l_simple_weight": 0.5,
    "original_elbo_weight": 0.1, "use_positional_encodings": False, "learn_logvar": False, "logvar_init": 1.0,
    "concat_mode": False, "scale_by_std": False, "cond_stage_forward": None,
}  # fmt: skip


def test_parameters_of_training_configs_pass():
    model = instantiate_from_config(changed(**NEUTRAL))
    assert (model.loss_type, model.l_simple_weight, model.use_scheduler) == ("l1", 0.5, False)


@pytest.mark.parametrize("name", ["learn_logvar", "scale_by_std"])
def test_parameters_that_need_more_are_named(name):
    with pytest.raises(InputError, match=f"LatentDiffusion: {name} is True"):
        instantiate_from_config(changed(**{name: True}))


def test_a_schedule_that_is_patched(monkeypatch):
    seen, own = [], DDPM.register_schedule

    def patched(self, *args, **kwargs):
        seen.append(kwargs["timesteps"])
        own(self, *args, **kwargs)

    monkeypatch.setattr(DDPM, "register_schedule", patched)
    instantiate_from_config(tiny_config())
    assert seen == [1000]


# --- frozen parts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainable", [False, True])
def test_the_text_encoder_is_frozen_unless_it_is_trained(trainable):
    config = {"target": f"{__name__}.Conditioner"}
    model = instantiate_from_config(changed(cond_stage_config=config, cond_stage_trainable=trainable)).train()
    assert model.model.training and not model.first_stage_model.training
    assert model.cond_stage_model.training is trainable
    assert [p.requires_grad for p in model.cond_stage_model.parameters()] == [trainable] * 2
    assert not any(p.requires_grad for p in model.first_stage_model.parameters())


def test_a_frozen_part_stays_itself(tiny):
    assert tiny.first_stage_model.eval() is tiny.first_stage_model
    other = tiny_model().cond_stage_model
    assert other.train() is other and not other.training
    part = nn.Linear(1, 1)
    part.train = ddpm.disabled_train.__get__(part)
    assert part.train(False) is part and part.training


# --- samplers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SAMPLERS)
def test_unknown_keywords_are_ignored_with_one_warning(tiny, kind, caplog):
    sampler = kind(Recorder(tiny), device="cpu")
    assert [record.message for record in caplog.records] == [f"{kind.__name__} ignores device"]
    caplog.clear()
    plain = draw(kind(Recorder(tiny)))
    assert torch.equal(draw(sampler, dynamic_threshold=None, till_T=3), plain)
    assert [record.message for record in caplog.records] == [
        f"{kind.__name__} ignores dynamic_threshold, till_T"
    ]


@pytest.mark.parametrize("kind", SAMPLERS)
def test_a_schedule_that_was_made_and_shortened_before(tiny, kind):
    """Image to image by way of `sample`: the last five steps of ten."""
    sampler = kind(Recorder(tiny))
    sampler.make_schedule(ddim_num_steps=10, ddim_eta=0.0, verbose=False)
    expected = sampler.decode(torch.full((1, 4, 2, 2), 0.7), None, 5)
    times = list(sampler.model.times)
    sampler.model.times.clear()
    sampler.make_schedule = lambda **kwargs: kwargs
    sampler.ddim_timesteps = sampler.ddim_timesteps[:5]
    assert torch.allclose(draw(sampler), expected, atol=1e-5)
    assert sampler.model.times == times and len(times) < 7


@pytest.mark.parametrize("change", ["new", "in place"])
def test_levels_that_were_changed(tiny, change):
    sampler = DDIMSampler(Recorder(tiny))
    sampler.make_schedule(10, ddim_eta=1.0, verbose=False)
    sampler.make_schedule = lambda **kwargs: None
    if change == "new":
        sampler.ddim_sigmas = torch.zeros(10)
    else:
        sampler.ddim_sigmas *= 0
    assert torch.equal(draw(sampler, eta=1.0), draw(DDIMSampler(Recorder(tiny))))


class OwnSchedule(DDIMSampler):
    """A subclass with another schedule, set through `register_buffer`."""

    def make_schedule(self, ddim_num_steps, ddim_discretize="uniform", ddim_eta=0.0, verbose=True):
        alphas = self.model.alphas_cumprod
        self.ddim_timesteps = np.array([1, 101, 501])
        self.register_buffer("alphas_cumprod", alphas.clone())
        self.register_buffer("ddim_alphas", alphas[self.ddim_timesteps])
        self.register_buffer("ddim_alphas_prev", np.asarray([alphas[0], *alphas[[1, 101]]]))
        self.register_buffer("ddim_sigmas", torch.zeros(3))


def test_a_subclass_with_its_own_schedule(tiny):
    model = Recorder(tiny)
    x = draw(OwnSchedule(model))
    assert model.times == [501, 101, 1]
    levels, expected = tiny.alphas_cumprod[[501, 101, 1, 0]].double(), torch.full((1, 4, 2, 2), 0.7).double()
    for now, then in itertools.pairwise(levels):
        eps = 0.5 * expected
        expected = then**0.5 * (expected - (1 - now) ** 0.5 * eps) / now**0.5 + (1 - then) ** 0.5 * eps
    assert torch.allclose(x.double(), expected, atol=1e-5)


@pytest.mark.parametrize(("kind", "name"), [(DDIMSampler, "ddim_sampling"), (PLMSSampler, "plms_sampling")])
def test_the_loop_under_the_name_of_the_original(tiny, kind, name, monkeypatch):
    sampler = kind(tiny)
    sampler.make_schedule(10, verbose=False)
    inputs = {
        "x_T": figure("sample/x_T"),
        "unconditional_guidance_scale": 7.5,
        "unconditional_conditioning": figure("sample/uncond"),
    }
    latents, trail = getattr(sampler, name)(figure("sample/cond"), (2, 4, 8, 8), **inputs)
    expected = figure(f"sample/{name.split('_')[0]}_S10_scale7.5")
    assert relative_error(latents, expected) <= TOLERANCE and set(trail) == {"x_inter", "pred_x0"}
    monkeypatch.setattr(kind, name, lambda self, cond, shape, **kwargs: (shape, kwargs["temperature"]))
    assert kind(tiny).sample(10, 3, [4, 2, 2], temperature=0.5, verbose=False) == ((3, 4, 2, 2), 0.5)


def test_a_part_of_the_loop(tiny):
    model = Recorder(tiny)
    sampler = DDIMSampler(model)
    sampler.make_schedule(10, verbose=False)
    sampler.ddim_sampling(None, (1, 4, 2, 2), timesteps=4)
    sampler.ddim_sampling(None, (1, 4, 2, 2), timesteps=3, ddim_use_original_steps=True)
    assert model.times == [201, 101, 1, 2, 1, 0]


@pytest.mark.parametrize("kind", [DDIMSampler, PLMSSampler])
def test_tables_of_a_sampler(tiny, kind):
    sampler = kind(tiny)
    kept = {}
    sampler.register_buffer = lambda name, attr: kept.update({name: attr}) or setattr(sampler, name, attr)
    sampler.make_schedule(10, verbose=False)
    assert {"ddim_sigmas", "ddim_alphas", "ddim_alphas_prev", "ddim_sqrt_one_minus_alphas"} == set(kept)
    for name in ("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod"):
        assert torch.equal(getattr(sampler, name), getattr(tiny, name))
    assert torch.allclose(sampler.sqrt_one_minus_alphas_cumprod**2 + sampler.alphas_cumprod, torch.ones(1000))
    with pytest.raises(AttributeError, match="no_table"):
        _ = sampler.no_table


def test_sigmas_of_the_whole_schedule(tiny):
    sampler = DDIMSampler(tiny)
    sampler.make_schedule(10, ddim_eta=0.5, verbose=False)
    a, before = tiny.alphas_cumprod.double(), tiny.alphas_cumprod_prev.double()
    expected = 0.5 * ((1 - before) / (1 - a) * (1 - a / before)).sqrt()
    assert torch.allclose(sampler.ddim_sigmas_for_original_num_steps.double(), expected, atol=1e-6)


# --- the model's members ---------------------------------------------------------------------------------------


def test_noise_that_is_known_points_to_the_clean_latent(tiny):
    x0, noise, t = torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 5), torch.tensor([10, 500])
    assert torch.allclose(tiny.predict_start_from_noise(tiny.q_sample(x0, t, noise), t, noise), x0, atol=1e-4)


def test_keywords_of_codebooks(tiny):
    z = torch.zeros(1, 4, 8, 8)
    x = tiny.decode_first_stage(z, predict_cids=False, force_not_quantize=True)
    assert torch.equal(x, tiny.differentiable_decode_first_stage(z))
    t, c = torch.tensor([3]), torch.zeros(1, 77, 64)
    assert tiny.apply_model(z, t, c, return_ids=True).shape == z.shape
    with pytest.raises(InputError, match="predict_cids"):
        tiny.decode_first_stage(z, predict_cids=True)


def test_a_text_encoder_of_bert_takes_one_text(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    params = {"n_embed": 8, "n_layer": 1, "vocab_size": len(words), "version": str(tmp_path)}
    encoder = instantiate_from_config(
        {"target": "ldm.modules.encoders.modules.BERTEmbedder", "params": params}
    )
    assert torch.equal(encoder("a cat"), encoder(["a cat"])) and encoder.encode("").shape == (1, 77, 8)


def test_clip_skip_needs_clip(tiny):
    assert torch.equal(
        tiny.get_learned_conditioning("a cat", clip_skip=1), tiny.get_learned_conditioning("a cat")
    )
    model = tiny_model(laion_config(30))
    with pytest.raises(InputError, match=r"CLIP skip 2 needs CLIP's text encoder, .* has a BERTEmbedder"):
        model.get_learned_conditioning("a cat", clip_skip=2)


# --- the text encoder -----------------------------------------------------------------------------------------


@pytest.fixture
def embedder():
    return tiny_model().cond_stage_model


PROMPT = "a photograph of an astronaut riding a horse"


def test_the_originals_way_from_prompt_to_states(embedder):
    """The body of its FrozenCLIPEmbedder.forward."""
    expected = embedder.encode([PROMPT])
    batch = embedder.tokenizer(
        [PROMPT], truncation=True, max_length=embedder.max_length, return_length=True,
        return_overflowing_tokens=False, padding="max_length", return_tensors="pt",
    )  # fmt: skip
    tokens = batch["input_ids"].to(embedder.device)
    outputs = embedder.transformer(input_ids=tokens)
    assert torch.equal(outputs.last_hidden_state, expected) and torch.equal(outputs[0], expected)
    assert torch.equal(outputs["pooler_output"], expected[:, tokens[0].tolist().index(49407)])
    assert torch.equal(embedder.transformer(tokens, return_dict=False)[1], outputs[1])
    assert torch.equal(embedder.encode([PROMPT]), expected)
    embedder.device = "cuda"  # as forks do; it moves nothing
    assert embedder.device.type == "cpu"


def test_clip_skip(embedder):
    tokenizer, transformer = embedder.tokenizer, embedder.transformer
    tokens = tokenizer([PROMPT], truncation=False, add_special_tokens=False)["input_ids"][0]
    tokens = [tokenizer.bos_token_id, *tokens] + [tokenizer.eos_token_id] * (76 - len(tokens))
    states = transformer(input_ids=torch.tensor([tokens]), output_hidden_states=True).hidden_states
    norm = transformer.text_model.final_layer_norm
    assert torch.equal(norm(states[-1]), embedder.encode(PROMPT))
    first = transformer.text_model.encoder.layers[0](states[0])
    assert len(states) == transformer.config.num_hidden_layers + 1 and torch.equal(first, states[-2])


def test_a_learned_word(embedder):
    """Textual inversion: a new token, a larger table, its row set."""
    before = embedder.encode("a cat")
    assert embedder.tokenizer.add_tokens("<new1>") == 1
    index = embedder.tokenizer.convert_tokens_to_ids("<new1>")
    embedder.transformer.resize_token_embeddings(len(embedder.tokenizer))
    table = embedder.transformer.get_input_embeddings()
    assert table is embedder.transformer.text_model.embeddings.token_embedding
    assert (index, table.num_embeddings) == (49408, 49409)
    cat = embedder.tokenizer.encode("cat")[1]
    table.weight.data[index] = table.weight.data[cat]
    assert torch.equal(embedder.encode("a <new1>"), embedder.encode("a cat"))
    assert torch.equal(embedder.encode("a cat"), before)


def test_another_tokenizer_in_its_place(embedder):
    calls = []

    def letters(texts, **kwargs):
        calls.append(kwargs["max_length"])
        return {"input_ids": torch.tensor([[ord(c) for c in text.ljust(77)] for text in texts])}

    embedder.tokenizer = letters
    ids = torch.tensor([[ord(c) for c in "abc".ljust(77)]])
    assert torch.equal(embedder.encode("abc"), embedder.transformer(ids).last_hidden_state)
    assert calls == [77]


def test_vectors_in_place_of_ids(embedder):
    ids = torch.tensor([embedder.tokenizer.encode(PROMPT)])
    layer, vectors = (
        embedder.transformer.text_model.embeddings,
        embedder.transformer.get_input_embeddings()(ids),
    )
    places = torch.arange(ids.shape[1])[None]
    assert torch.equal(layer(ids), layer(inputs_embeds=vectors, position_ids=places))


def test_what_the_text_encoder_cannot_do_is_named(embedder):
    ids = torch.tensor([[49406, 320, 49407]])
    expected = embedder.transformer(ids)[0]
    assert torch.equal(embedder.transformer(ids, attention_mask=torch.ones(1, 3))[0], expected)
    with pytest.raises(InputError, match="attention_mask"):
        embedder.transformer(ids, attention_mask=torch.tensor([[1, 1, 0]]))
    with pytest.raises(InputError, match="output_attentions"):
        embedder.transformer(ids, output_attentions=True)
