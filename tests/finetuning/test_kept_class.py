"""What a model made of images of the class before a training, as their target (`class_target`)."""

import copy

import pytest
import torch
from PIL import Image

from ldm.finetuning.batches import Batch
from ldm.finetuning.data import Example
from ldm.finetuning.kinds import KINDS
from ldm.finetuning.latents import Placed
from ldm.finetuning.module import FineTuning
from ldm.finetuning.run import Training
from ldm.finetuning.settings import make_settings
from tests.support.golden_data import relative_error, tiny_model

KIND = [("lora", {"rank": 4}), ("lora", {"rank": 4, "text_rate": 1e-3}), ("dreambooth", {"text_rate": 1e-3})]


def batch_of(*regular):
    latents, noise = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    placed = [Placed(Example(None, "", regular=one), None, ()) for one in regular]
    return Batch(
        latents, ["a cube", "a ball"], torch.tensor([100, 700]), noise, torch.ones(2), placed, [0, 0]
    )


@pytest.mark.long
@pytest.mark.parametrize(("kind", "values"), KIND, ids=["lora", "lora and text", "dreambooth"])
def test_the_target_is_what_the_model_predicted_before(kind, values):
    model = tiny_model()
    before = copy.deepcopy(model)
    settings = make_settings(kind, {**values, "class_target": "model"})
    module = FineTuning(model, KINDS[kind].part(model, settings), settings)
    general, both = batch_of(True, True), batch_of(False, True)
    assert float(module.loss(general).detach()) < 1e-12  # nothing has changed yet
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.part.module.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    losses = []
    for batch in (general, both):
        loss = module.loss(batch)
        loss.backward()
        losses.append(float(loss.detach()))
    with torch.no_grad():
        x = before.q_sample(model.scale_factor * general.latents, general.t, general.noise)
        old, new = (
            one.apply_model(x, general.t, one.get_learned_conditioning(general.captions))
            for one in (before, model)
        )
    assert losses[0] == pytest.approx(float((new - old).square().mean()), rel=1e-4)
    own = (new[:1] - general.noise[:1]).square().mean(), (new[1:] - old[1:]).square().mean()
    assert losses[1] == pytest.approx(float(sum(own)) / 2, rel=1e-4)
    assert relative_error(new, old) > 1e-3
    assert all(parameter.grad is not None for group in module.part.groups() for parameter in group["params"])


def test_no_caption_keeps_its_meaning(tmp_path):
    for name in ("own", "general"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "a.png")
    shares = {}
    for target in ("image", "model"):
        values = {"class_target": target, "class_data": str(tmp_path / "general"), "class_caption": "a thing"}
        settings = make_settings("lora", {**values, "caption": "my thing", "drop_captions": 0.2})
        found = Training("lora", tmp_path / "own", tmp_path / "x.safetensors", settings).examples()
        shares[target] = [(example.caption, example.drop) for example in found]
    assert shares["image"] == [("my thing", 0.2), ("a thing", 0.2)]
    assert shares["model"] == [("my thing", 0.0), ("a thing", 0.2)]
