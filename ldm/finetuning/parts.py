"""The parts of a model that can be trained: each names its parameters and their rates, and writes its file.

The loop knows only `Part`. A new kind of training is a class here and a row of `KINDS` in `kinds.py`.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ldm.checkpoints.adapters.lora_names import TEXT, UNET
from ldm.checkpoints.layouts.prediction import marks_of
from ldm.files import written_whole
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.ema import LitEma
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.modules.encoders.tokenizer import clean
from ldm.training.lora import LoraLayers
from ldm.training.lora_file import lora_tensors, write_lora
from ldm.util import InputError, printable

Groups = list[dict[str, Any]]  # parameters and learning rates, as torch's optimisers take them


class Part(Protocol):
    """One kind of thing to train."""

    @property
    def module(self) -> nn.Module:
        """All of its parameters: what a state to resume from saves."""
        ...

    @property
    def trains_text(self) -> bool:
        """Whether prompts must be encoded with gradients."""
        ...

    def groups(self) -> Groups:
        """Returns the parameters with their learning rates."""
        ...

    def before_step(self) -> None:
        """Is called before each step's prompts are encoded."""
        ...

    def after_step(self) -> None:
        """Is called after each step of the optimiser."""
        ...

    def write(self, path: Path, notes: Mapping[str, str]) -> None:
        """Writes the result; `notes` are facts of the training for the file's metadata."""
        ...


class LoraPart:
    """A LoRA of the U-Net and, with a `text_rate`, of the text encoder.

    `plus_ratio` is how many times faster the upward factors learn (LoRA+, Hayou et al. 2024).
    """

    def __init__(
        self,
        model: LatentDiffusion,
        lora: LoraLayers,
        rate: float,
        text_rate: float,
        plus_ratio: float = 1.0,
        layout: str = "kohya",
        dtype: torch.dtype = torch.float16,
    ) -> None:
        self.model, self.module, self.layout, self.dtype = model, lora, layout, dtype
        self.rates, self.plus_ratio = {UNET: rate, TEXT: text_rate}, plus_ratio

    @property
    def trains_text(self) -> bool:
        return bool(self.module.of(TEXT))

    def groups(self) -> Groups:
        found: Groups = []
        for prefix, rate in self.rates.items():
            layers = self.module.of(prefix)
            slow = [p for layer in layers for p in (layer.down, layer.magnitude) if p is not None]
            fast = [layer.up for layer in layers]
            found += [{"params": slow, "lr": rate}, {"params": fast, "lr": rate * self.plus_ratio}]
        return [group for group in found if group["params"]]

    def before_step(self) -> None:
        pass

    def after_step(self) -> None:
        pass

    def original(self) -> AbstractContextManager[None]:
        """The model is what it was before the training, as long as this lasts."""
        return self.module.off()

    def write(self, path: Path, notes: Mapping[str, str]) -> None:
        write_lora(path, lora_tensors(self.module, self.model, self.layout, self.dtype), notes)


def _lengths(vectors: Tensor) -> Tensor:
    return vectors.square().sum(dim=1).sqrt()


class _Vectors(nn.Module):
    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values)


class EmbeddingPart:
    """The vectors of one word of the user's own (textual inversion, Gal et al. 2022), float32 [n, width].

    Nothing else of the model changes. `decay` pulls their lengths towards the mean length of the vocabulary's, by
    this share each step: long vectors drown the rest of a prompt.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        word: str,
        init: str,
        vectors: int | None,
        rate: float,
        decay: float = 0.0,
    ) -> None:
        encoder = model.cond_stage_model
        if not isinstance(encoder, FrozenCLIPEmbedder):
            raise InputError("this model's text encoder takes no embeddings; they are for CLIP")
        self.word, self.rate, self.decay = clean(word), rate, decay
        self.embeddings = encoder.transformer.text_model.embeddings
        table = self.embeddings.token_embedding.weight.detach().float()
        own = encoder.reader.encode(init)[1:-1]  # without begin and end
        if not own:
            raise InputError(f"--init {printable(init)!r} has no word that this model knows")
        count = vectors or len(own)
        if not 1 <= count <= encoder.max_length - 2:
            raise InputError(f"--vectors {count} is not from 1 to {encoder.max_length - 2}")
        start = table[torch.tensor([own[i % len(own)] for i in range(count)])].clone()
        self.length = float(_lengths(table).mean())
        self.module = _Vectors(start)
        encoder.use_embeddings({self.word: start})

    @property
    def trains_text(self) -> bool:
        return True

    def groups(self) -> Groups:
        return [{"params": [self.module.values], "lr": self.rate, "weight_decay": 0.0}]

    def before_step(self) -> None:
        values = self.module.values
        self.embeddings.added = values.view_as(values)  # a tensor, which a parameter may not replace

    @torch.no_grad()
    def after_step(self) -> None:
        values = self.module.values
        norms = _lengths(values)[:, None]
        values.mul_(1 + self.decay * (self.length / norms - 1))

    def write(self, path: Path, notes: Mapping[str, str]) -> None:
        from ldm.checkpoints.formats.write import write_safetensors, write_torch

        values = self.module.values.detach().cpu().float().contiguous()
        with written_whole(path) as part:
            if path.suffix == ".pt":  # as AUTOMATIC1111's web UI has it, without the classes of the original
                named = {"string_to_token": {"*": 265}, "string_to_param": {"*": values}, "name": self.word}
                write_torch(
                    part, {**named, "step": int(notes.get("ss_steps", 0)), "sd_checkpoint_name": None}
                )
            else:
                write_safetensors(part, {self.word: values}, None, dict(notes))


@dataclass
class NetworkPart:
    """Whole networks of the model: the U-Net, and with a `text_rate` the text encoder; averaged with `ema_decay`.

    With `keep_original` their weights before the training stay in memory.
    """

    model: LatentDiffusion
    rate: float
    text_rate: float
    ema_decay: float | None
    dtype: torch.dtype | None = None
    keep_original: bool = False

    def __post_init__(self) -> None:
        networks: dict[str, nn.Module] = {"unet": self.model.model}
        if self.text_rate:
            networks["text"] = self.model.cond_stage_model
        self._before: list[tuple[nn.Parameter, Tensor]] = []
        for network in networks.values():
            for parameter in network.requires_grad_(True).parameters():
                if self.keep_original:
                    self._before.append((parameter, parameter.data))
                parameter.data = parameter.data.clone()  # those of a mapped file may not change
        if self.ema_decay is not None:
            networks["ema"] = LitEma(self.model.model, self.ema_decay)
        self.module = nn.ModuleDict(networks)

    @property
    def trains_text(self) -> bool:
        return bool(self.text_rate)

    def groups(self) -> Groups:
        rates = {"unet": self.rate, "text": self.text_rate}
        named: Sequence[tuple[str, float]] = [(name, rates[name]) for name in self.module if name != "ema"]
        return [{"params": list(self.module[name].parameters()), "lr": rate} for name, rate in named]

    def before_step(self) -> None:
        pass

    def after_step(self) -> None:
        if "ema" in self.module:
            self.module["ema"](self.model.model)

    @contextmanager
    def original(self) -> Generator[None, None, None]:
        """The model is what it was before the training, as long as this lasts; needs `keep_original`."""
        trained = [parameter.data for parameter, _ in self._before]
        for parameter, before in self._before:
            parameter.data = before
        try:
            yield
        finally:
            for (parameter, _), own in zip(self._before, trained, strict=True):
                parameter.data = own

    def write(self, path: Path, notes: Mapping[str, str]) -> None:
        from ldm.checkpoints.formats.write import types_for, write_safetensors
        from ldm.models.keys import EMA_PREFIX
        from ldm.training.export import save_atomically

        if "ema" in self.module:
            ema = self.module["ema"]
            assert isinstance(ema, LitEma)
            ema.copy_to(self.model.model)
        state = {
            k: v.detach().cpu().contiguous()
            for k, v in self.model.state_dict().items()
            if not k.startswith(EMA_PREFIX)
        }
        state |= marks_of(self.model)
        weights = {name for name, _ in self.model.named_parameters()}
        types = types_for(state, self.dtype, keep=state.keys() - weights)
        if path.suffix == ".safetensors":
            with written_whole(path) as part:
                write_safetensors(part, state, types, dict(notes))
        else:
            cast = {name: value.to(types[name]) for name, value in state.items()}
            save_atomically({"state_dict": cast, "global_step": int(notes.get("ss_steps", 0))}, path)
