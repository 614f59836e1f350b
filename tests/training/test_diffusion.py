"""Training of the U-Net: its loss weights, averages, states to resume from, and the exported file."""

import numpy as np
import pytest
import torch

from ldm.data.scenes import scene_at
from ldm.modules.ema import LitEma
from ldm.training.diffusion import DiffusionTraining, encode_latents, min_snr_weights, noise_batches
from ldm.training.export import export
from ldm.training.runs import Batches, Optimisation, RunSettings, fit, last_state, make_trainer
from ldm.util import InputError
from tests.support.training import moments, tiny_model, tiny_vocabulary


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabulary")
    return tiny_vocabulary(folder)


def train(module, folder, steps, resume=None, first=0):
    trainer = make_trainer(RunSettings(folder, steps, precision="32-true", checkpoint_steps=100))
    fit(
        trainer,
        module,
        Batches(noise_batches(moments(), "train", 4, 1000), first=first).loader(),
        None,
        resume,
    )
    return module


def test_min_snr_weights_follow_the_paper():
    alphas = torch.tensor([0.99, 5 / 6, 0.5, 0.01], dtype=torch.float64)  # signal to noise 99, 5, 1, 1/99
    assert min_snr_weights(alphas, 5.0).tolist() == pytest.approx([5 / 99, 1, 1, 1])


def test_the_average_is_the_weighted_sum_of_all_weights():
    model = torch.nn.Linear(1, 1, bias=False)
    values = [2.0, -1.0, 4.0, 7.0]
    torch.nn.init.constant_(model.weight, values[0])
    ema = LitEma(model, decay=0.2)
    expected = values[0]
    for n, value in enumerate(values[1:], start=1):
        torch.nn.init.constant_(model.weight, value)
        ema(model)
        decay = min(0.2, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * value
    ema.copy_to(model)
    assert model.weight.item() == pytest.approx(expected, rel=1e-6)


def test_a_batch_holds_what_a_step_needs():
    batch = noise_batches(moments(), "train", 200, 1000, drop=0.25)(0, np.random.default_rng(0))
    assert batch.latents.shape == batch.noise.shape == (200, 4, 8, 8)
    assert sorted((batch.t // 5).tolist()) == list(range(200))  # one from each slice of the schedule
    assert 30 <= batch.prompts.count("") <= 70
    assert len(set(batch.prompts)) > 100  # four scenes, many wordings


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_share_of_the_prompts_tells_of_another_scene(share):
    make = noise_batches(np.zeros((500, 2, 4, 8, 8), np.float16), "train", 300, 1000, drop=0, mismatch=share)
    rng = np.random.default_rng(0)
    chosen = np.sort(
        np.random.default_rng(0).integers(500, size=300)
    )  # as the batch draws them, first of all
    own = [
        all(solid.colour in prompt for solid in scene_at(int(i), "train").solids)
        for i, prompt in zip(chosen, make(0, rng).prompts, strict=True)
    ]
    by_chance = 0.15  # another scene has the same colours now and then
    assert sum(own) / 300 == pytest.approx(1 - share * (1 - by_chance), abs=0.07)


@pytest.mark.long
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path, vocabulary):
    settings = Optimisation(1e-3, steps=6, warm_up_steps=2)
    whole = train(DiffusionTraining(tiny_model(vocabulary), settings), tmp_path / "whole", 6)
    train(DiffusionTraining(tiny_model(vocabulary), settings), tmp_path / "parts", 3)
    state, step = last_state(tmp_path / "parts")
    assert step == 3
    other = DiffusionTraining(tiny_model(vocabulary, seed=1), settings)
    resumed = train(other, tmp_path / "parts", 6, state, step)
    assert int(resumed.ema.num_updates) == 6
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_the_state_saved_on_the_way_holds_the_average_of_its_step(tmp_path, vocabulary):
    module = DiffusionTraining(tiny_model(vocabulary), Optimisation(1e-3, steps=3, warm_up_steps=2))
    settings = RunSettings(tmp_path, 3, precision="32-true", checkpoint_steps=2, accumulate=2)
    make_trainer(settings).fit(module, Batches(noise_batches(moments(), "train", 2, 1000)).loader())
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert state["global_step"] == int(state["state_dict"]["ema.num_updates"]) == 2


@pytest.mark.long
def test_training_lowers_the_error(vocabulary, monkeypatch):
    module = DiffusionTraining(tiny_model(vocabulary), Optimisation(1e-3, steps=1), min_snr_gamma=None)
    monkeypatch.setattr(module, "log", lambda *args, **kwargs: None)
    batch = noise_batches(moments(), "train", 4, 1000)(0, np.random.default_rng(0))
    optimizer = torch.optim.AdamW(module.model.model.parameters(), lr=2e-3)
    losses = []
    for _ in range(60):
        loss = module.training_step(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(1.0, rel=0.2)  # the untrained U-Net predicts zero
    assert losses[-1] < losses[0] / 2


def test_the_export_holds_averages_in_half_precision_under_the_models_own_keys(tmp_path, vocabulary):
    model = tiny_model(vocabulary)
    ema = LitEma(model.model, decay=0.5)
    with torch.no_grad():
        for weight in model.model.parameters():
            weight += 1
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export(model, ema, 12, tmp_path / "model.ckpt")
    saved = torch.load(tmp_path / "model.ckpt", weights_only=True)
    assert saved["global_step"] == 12
    assert list(saved["state_dict"]) == list(before)
    for name, value in saved["state_dict"].items():
        shift = 1 if name.startswith("model.") else 0
        expected = before[name] - shift
        assert torch.allclose(value.to(expected.dtype), expected, atol=2e-3), name
    dtypes = {value.dtype for name, value in saved["state_dict"].items() if name.endswith("weight")}
    assert dtypes == {torch.float16}
    assert saved["state_dict"]["alphas_cumprod"].dtype == torch.float32
    tiny_model(vocabulary, seed=5).load_state_dict(saved["state_dict"])


def test_encoded_latents_are_the_posteriors(tmp_path, vocabulary):
    model = tiny_model(vocabulary).first_stage_model.eval()
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    path = encode_latents(model, images, tmp_path / "latents.npy", batch_size=2)
    saved = torch.tensor(np.load(path)).float()
    with torch.no_grad():
        posterior = model.encode(torch.tensor(images).permute(0, 3, 1, 2) / 127.5 - 1)
    assert saved.shape == (5, 2, 4, 8, 8)
    assert torch.allclose(saved[:, 0], posterior.mean, atol=0.05)
    assert torch.allclose(saved[:, 1], posterior.std, atol=0.05)
    assert [file.name for file in tmp_path.iterdir()] == ["latents.npy"]


def test_a_model_of_v_is_not_trained_as_one_of_the_noise(vocabulary):
    model = tiny_model(vocabulary)
    model.parameterization = "v"
    with pytest.raises(InputError, match="predict the noise, not v"):
        DiffusionTraining(model, Optimisation(1e-4, 1))
