"""Weighted conditioning: bit for bit the plain one where it must be, and closed forms elsewhere."""

import numpy as np
import pytest
import torch
from torch import nn

from ldm.prompts.conditioning import count_chunks, encode_weighted, weigh
from ldm.util import InputError

LONG = "a cat, " * 40


@pytest.fixture(scope="module")
def embedder(tiny):
    return tiny.cond_stage_model


@pytest.mark.parametrize("prompt", ["", "a cat, red", "(a cat:1.0)", r"\(a\) cat", "cat " * 75])
def test_without_weights_it_is_the_plain_conditioning(tiny, embedder, prompt):
    plain = prompt.replace("(a cat:1.0)", "a cat").replace("\\", "")
    assert torch.equal(encode_weighted(embedder, [prompt]), tiny.get_learned_conditioning([plain]))


def test_clip_skip_is_that_of_the_plain_conditioning(tiny, embedder):
    plain = tiny.get_learned_conditioning(["a cat"], clip_skip=2)
    assert torch.equal(encode_weighted(embedder, ["a cat"], clip_skip=2), plain)
    assert not torch.equal(plain, tiny.get_learned_conditioning(["a cat"]))
    with pytest.raises(InputError, match="CLIP skip 3 leaves no layer of a text encoder with 2"):
        encode_weighted(embedder, ["a cat"], clip_skip=3)


def test_chunks_are_encoded_apart_and_joined(tiny, embedder):
    parts = [tiny.get_learned_conditioning([text]) for text in ("a cat", "a dog")]
    assert torch.equal(encode_weighted(embedder, ["a cat BREAK a dog"]), torch.cat(parts, dim=1))


def test_a_prompt_does_not_depend_on_the_others(embedder):
    prompts = ["a (cat:1.3)", "", LONG]
    together = encode_weighted(embedder, prompts)
    assert together.shape == (3, 2 * 77, 64)
    for row, prompt in zip(together, prompts, strict=True):
        assert torch.equal(row[None], encode_weighted(embedder, [prompt], chunks=2))


def test_short_prompts_are_filled_up_with_empty_ones(tiny, embedder):
    empty = tiny.get_learned_conditioning([""])
    filled = encode_weighted(embedder, ["a cat"], chunks=3)
    assert torch.equal(filled, torch.cat([tiny.get_learned_conditioning(["a cat"]), empty, empty], dim=1))


def test_count_of_chunks(embedder):
    assert count_chunks(embedder, ["a cat", LONG, ""]) == 2
    assert count_chunks(embedder, [""]) == 1


def test_weights_scale_tokens_and_keep_the_mean(tiny, embedder):
    plain = tiny.get_learned_conditioning(["a red cat"]).double().numpy()
    weights = np.ones(77)
    weights[2], weights[3] = 1.5, 1 / 1.1
    expected = plain * weights[None, :, None]
    expected *= plain.mean() / expected.mean()
    actual = encode_weighted(embedder, ["a (red:1.5) [cat]"]).numpy()
    np.testing.assert_allclose(actual, expected, rtol=1e-4)  # means lose digits
    assert np.abs(actual - plain).max() > 0.1


def test_each_chunk_keeps_its_own_mean(tiny, embedder):
    both = encode_weighted(embedder, ["(a cat:2) BREAK (a dog:0.5)"])
    for chunk, prompt in zip(both.split(77, dim=1), ("a cat", "a dog"), strict=True):
        plain = tiny.get_learned_conditioning([prompt])
        assert chunk.mean().item() == pytest.approx(plain.mean().item(), rel=1e-4)


def test_equal_weights_on_all_tokens_change_nothing():
    hidden = torch.randn(1, 77, 8, generator=torch.Generator().manual_seed(0)) + 1
    torch.testing.assert_close(weigh(hidden, torch.full((77,), 3.0)), hidden)


def test_half_precision_stays_half():
    hidden = torch.randn(1, 77, 8, generator=torch.Generator().manual_seed(0)) + 1
    weights = torch.linspace(0.5, 1.5, 77)
    half = weigh(hidden.half(), weights)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), weigh(hidden, weights), rtol=5e-3, atol=5e-3)


def test_another_text_model_is_refused():
    with pytest.raises(InputError, match="need a CLIP text encoder"):
        encode_weighted(nn.Linear(1, 1), ["a cat"])
