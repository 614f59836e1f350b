"""Textual inversion: the gradient of the vectors against transformers' text encoder, and the files."""

import pytest
import torch

from ldm.checkpoints.adapters.embeddings import read_embedding
from ldm.finetuning.parts import EmbeddingPart
from ldm.util import InputError
from tests.support.golden_data import relative_error, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def test_it_begins_as_the_words_it_is_said_to_be_near_to(model):
    prompts = ["a photo of a small dog", "a photo of a small dog small dog"]
    expected = [model.get_learned_conditioning([prompt]) for prompt in prompts]
    for vectors, context in zip((None, 4), expected, strict=True):
        part = EmbeddingPart(model, "my-style", "small dog", vectors, rate=1.0)
        part.before_step()
        own = model.get_learned_conditioning(["a photo of a my-style"])
        assert relative_error(own.detach(), context) < 1e-6


def test_the_gradient_is_that_of_transformers(model):
    transformers = pytest.importorskip("transformers")
    encoder = model.cond_stage_model
    part = EmbeddingPart(model, "my-style", "dog", 2, rate=1.0)
    part.before_step()
    ids = encoder.reader(["a my-style cat"], max_length=77)
    weights = torch.randn(1, 77, 64, generator=torch.Generator().manual_seed(0))
    (encoder.hidden_states(torch.tensor(ids)) * weights).sum().backward()

    config = transformers.CLIPTextConfig(
        vocab_size=49408, hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        hidden_act="quick_gelu", eos_token_id=49407, bos_token_id=49406,
    )  # fmt: skip
    theirs = transformers.CLIPTextModel(config).eval()
    own = {
        name.removeprefix("text_model."): value for name, value in encoder.transformer.state_dict().items()
    }
    wanted = theirs.state_dict().keys()
    renamed = {(name if name in wanted else f"text_model.{name}"): value for name, value in own.items()}
    theirs.load_state_dict({name: renamed[name] for name in wanted})
    theirs.resize_token_embeddings(49410, mean_resizing=False)
    table = theirs.get_input_embeddings().weight
    table.data[49408:] = part.module.values.detach()
    (theirs(torch.tensor(ids)).last_hidden_state * weights).sum().backward()
    assert relative_error(part.module.values.grad, table.grad[49408:]) < 1e-5


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
def test_the_file_is_read_back(model, tmp_path, ending):
    part = EmbeddingPart(model, "My-Style", "dog", 3, rate=1.0)
    part.module.values.data += 0.01
    path = tmp_path / f"my-style{ending}"
    part.write(path, {"ss_steps": "7"})
    found = read_embedding(path, 64, 75)
    assert torch.equal(found.vectors, part.module.values.detach())
    assert (
        torch.load(path, weights_only=True)["step"] == 7 if ending == ".pt" else found.others == ("my-style",)
    )


def test_lengths_go_to_the_usual_one(model):
    part = EmbeddingPart(model, "x", "dog cat", None, rate=1.0, decay=0.5)
    part.module.values.data *= 10
    before = part.module.values.detach().norm(dim=1)
    part.after_step()
    assert torch.allclose(part.module.values.norm(dim=1), (before + part.length) / 2)


def test_an_empty_beginning_is_refused(model):
    with pytest.raises(InputError, match="--init ' ' has no word"):
        EmbeddingPart(model, "x", " ", None, rate=1.0)
