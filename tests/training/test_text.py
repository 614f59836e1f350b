"""Training of the text encoder on the content of captions."""

import numpy as np
import torch

from ldm.data.scenes import Scene, Solid
from ldm.data.vocabulary import train_vocabulary
from ldm.modules.encoders.clip import CLIPTextModel
from ldm.modules.encoders.tokenizer import CLIPTokenizer
from ldm.training.runs import Optimisation
from ldm.training.text import QUESTIONS, TextTraining, answers, caption_batches, ends


def test_answers_of_a_pair_and_of_a_single_solid():
    pair = Scene((Solid("cone", "red", "large"), Solid("cube", "white", "small")), "on top of", "pink")
    named = dict(zip(QUESTIONS, answers(pair), strict=True))
    assert (named["relation"], named["background"]) == (1, 1)
    assert (named["shape 1"], named["colour 1"], named["size 1"], named["solid 1"]) == (2, 0, 1, 2)
    assert (named["shape 2"], named["colour 2"], named["size 2"], named["solid 2"]) == (0, 6, 0, 30)
    single = answers(Scene((Solid("torus", "blue", "small"),), None, "grey"))
    named = dict(zip(QUESTIONS, single, strict=True))
    assert named["relation"] == 0
    assert (named["shape 2"], named["colour 2"], named["size 2"], named["solid 2"]) == (5, 8, 2, 40)
    assert all(0 <= value < classes for value, classes in zip(single, QUESTIONS.values(), strict=True))


def test_the_tower_learns_what_captions_say(tmp_path, monkeypatch):
    train_vocabulary(["a red cube on top of a blue sphere"], 560, tmp_path)
    tokenizer = CLIPTokenizer.from_folder(tmp_path)
    torch.manual_seed(0)
    tower = CLIPTextModel(tokens=tokenizer.size, positions=77, width=32, layers=1, heads=2)
    module = TextTraining(tower, 32, Optimisation(3e-3, steps=30))
    monkeypatch.setattr(module, "log", lambda *args, **kwargs: None)
    make = caption_batches(lambda texts: torch.tensor(tokenizer(texts, max_length=77)), "train", 16)
    batch = make(1, np.random.default_rng(0))
    ids, truth, fractions = batch
    assert truth.shape == (16, len(QUESTIONS))
    assert ids.shape[1] == int(ends(ids).max()) + 5  # cut after the longest caption
    assert make(4, np.random.default_rng(0))[0].shape[1] == 77
    assert fractions.shape == (16, 3)
    state = torch.get_rng_state()
    assert module.training_step(batch) == module.training_step(batch)  # the batch alone decides
    assert torch.equal(torch.get_rng_state(), state)
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    losses = []
    for _ in range(80):
        loss = module.training_step(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4
