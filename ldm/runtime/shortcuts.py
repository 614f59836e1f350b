"""Approximations that save products: they wrap the blocks of a U-Net from outside, for the steps of one pass.

Without a setting the network is not touched, so that its results are the same bits.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.modules.attention import BasicTransformerBlock, CrossAttention, SpatialTransformer
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.util import need

_POWER = 1.4  # of the distances from the centre, in DeepCache's program
_WINDOW = 2  # tokens along each side, of which one stays


@contextmanager
def shortcuts(
    network: nn.Module, cache_steps: Sequence[int], merge_tokens: float, steps: int
) -> Generator[Callable[[], None]]:
    """Wraps a network for a pass of `steps` steps; yields a function to be called after each of them.

    `cache_steps` are the arguments of `full_steps` and between them the branch, see `CachedBlocks`: (interval,),
    (interval, branch) or (interval, branch, centre); empty or with interval 1 nothing is cached. `merge_tokens` is
    the share of tokens that self-attention at the largest map does without, see `merged_tokens`.
    """
    interval, branch, *centre = (*cache_steps, 0)[: max(len(cache_steps), 2)] if cache_steps else (1, 0)
    if merge_tokens == 0 and interval == 1:
        yield lambda: None
        return
    check_branch(branch, len(network.output_blocks) if isinstance(network, UNetModel) else 0)
    network = cast("UNetModel", network)
    with ExitStack() as wrapped:
        if merge_tokens > 0:
            wrapped.enter_context(merged_tokens(network, merge_tokens))
        if interval == 1:
            yield lambda: None
            return
        cached = CachedBlocks(network, full_steps(steps, interval, *centre), branch)
        yield wrapped.enter_context(cached).next_step


def check_branch(branch: int, blocks: int) -> None:
    """Raises `InputError` unless the branch is one of a U-Net with this number of output blocks (0: of none)."""
    need(
        blocks > 0,
        "cache_steps and merge_tokens are for this toolkit's U-Net, which this model has not; leave them out",
    )
    need(branch <= blocks - 2, f"cache_steps has branch {branch}; this U-Net has branches 0 to {blocks - 2}")


# --- between steps ------------------------------------------------------------------------------------------------


def full_steps(steps: int, interval: int, centre: int | None = None) -> set[int]:
    """Returns the steps, counted from 0, that run the whole network: the first and every `interval`-th.

    With a `centre` they are as many, and dense around that step: their distances from it grow with the power 1.4
    (Ma et al. 2023, DeepCache, section 4.3).
    """
    if centre is None:
        return set(range(0, steps, interval))
    below, above = -(centre ** (1 / _POWER)), max(steps - centre, 0) ** (1 / _POWER)
    count = -(-steps // interval)
    places = (below + i * (above - below) / count for i in range(1, count))
    found = (int(centre + abs(p) ** _POWER * (1 if p > 0 else -1)) for p in places)
    return {0, *(step for step in found if 0 < step < steps)}


class CachedBlocks:
    """DeepCache (Ma et al. 2023, section 4.2), as a context manager around a network.

    A step that is not one of `full` runs the input blocks up to number `branch`, and as many output blocks at the
    end; what enters these is the map of the last full step. A solver that predicts several times in a step uses it
    for all of them. A call with another conditioning object, or another size, is always a full one.
    """

    def __init__(self, network: UNetModel, full: set[int], branch: int) -> None:
        self._network, self._full, self._kept = network, full, branch + 1
        self._forward = network.forward
        self._step = 0
        self._map: Tensor | None = None  # that entered the last output blocks
        self._made_of: tuple[Tensor | None, torch.Size] | None = None

    def __enter__(self) -> CachedBlocks:
        blocks: Any = self._network.output_blocks
        self._hook = blocks[-self._kept - 1].register_forward_hook(self._keep)
        self._network.forward = self.forward
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()
        del self._network.forward  # the class's own again

    def next_step(self) -> None:
        """Counts a finished step."""
        self._step += 1

    def forward(
        self, x: Tensor, timesteps: Tensor, context: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        made_of = context, x.shape
        known = self._made_of is not None and self._made_of[0] is context and self._made_of[1] == x.shape
        if self._map is None or not known or self._step in self._full:
            self._made_of = made_of
            return self._forward(x, timesteps, context, *args, **kwargs)
        if (
            control := kwargs.get("control")
        ) is not None:  # of the blocks that run; the map has that of the others
            kwargs["control"] = [*control[: self._kept], torch.zeros(1, 1, 1, 1, device=x.device)]
        few: Any = partial(self._encode, self._map)
        self._network.encode = few
        try:
            return self._forward(x, timesteps, context, *args, **kwargs)
        finally:
            del self._network.encode

    def _encode(
        self,
        from_below: Tensor,
        x: Tensor,
        emb: Tensor,
        context: Tensor | None,
        added: Mapping[int, Tensor] | None = None,
    ) -> list[Tensor]:
        """The maps of the input blocks that run, as `UNetModel.encode` gives them, and then that from below."""
        h, added, maps = x.to(self._network.dtype), added or {}, []
        for i, block in enumerate(itertools.islice(self._network.input_blocks, self._kept)):
            h = block(h, emb, context)
            if i in added:
                h = h + added[i].to(h.dtype)
            maps.append(h)
        return [*maps, from_below]

    def _keep(self, block: nn.Module, inputs: Any, output: Tensor) -> None:
        self._map = output


# --- between tokens -----------------------------------------------------------------------------------------------


class Matching:
    """Which tokens of a map are merged into which (Bolya and Hoffman 2023, Token Merging for Stable Diffusion).

    Of each window of 2x2 tokens the first stays. Of the others as many as the share `ratio` of all tokens, those of
    greatest cosine similarity to one that stays, are merged into it, by the mean. `tokens` [B, height * width, C] are
    compared.
    """

    def __init__(self, tokens: Tensor, height: int, width: int, ratio: float) -> None:
        stays = torch.zeros(height, width, dtype=torch.bool, device=tokens.device)
        whole = height // _WINDOW * _WINDOW, width // _WINDOW * _WINDOW
        stays[: whole[0] : _WINDOW, : whole[1] : _WINDOW] = True
        self._stay, self._others = stays.flatten().nonzero()[:, 0], (~stays).flatten().nonzero()[:, 0]
        self._count = min(int(height * width * ratio), len(self._others))
        unit = F.normalize(tokens.float(), dim=-1)
        best = (unit[:, self._others] @ unit[:, self._stay].mT).max(dim=-1)
        order = best.values.argsort(dim=-1, descending=True)
        self._merged, self._alone = order[:, : self._count], order[:, self._count :]
        self._into = best.indices.gather(1, self._merged)

    def merge(self, x: Tensor) -> Tensor:
        """Returns tokens [B, fewer, C] of [B, N, C]: those that are alone, then those that stayed."""
        others, stay = x[:, self._others], x[:, self._stay]
        merged = others.gather(1, _wide(self._merged, x))
        stay = stay.scatter_reduce(1, _wide(self._into, x), merged, reduce="mean")
        return torch.cat([others.gather(1, _wide(self._alone, x)), stay], dim=1)

    def unmerge(self, x: Tensor) -> Tensor:
        """Returns tokens [B, N, C] of [B, fewer, C]: each merged one is that which it was merged into."""
        alone, stay = x[:, : self._alone.shape[1]], x[:, self._alone.shape[1] :]
        others = x.new_empty(len(x), len(self._others), x.shape[2])
        others.scatter_(1, _wide(self._alone, x), alone)
        others.scatter_(1, _wide(self._merged, x), stay.gather(1, _wide(self._into, x)))
        out = x.new_empty(len(x), len(self._stay) + len(self._others), x.shape[2])
        out[:, self._stay], out[:, self._others] = stay, others
        return out


def _wide(index: Tensor, x: Tensor) -> Tensor:
    return index[..., None].expand(-1, -1, x.shape[-1])


@contextmanager
def merged_tokens(network: UNetModel, ratio: float) -> Generator[None]:
    """Merges tokens around self-attention where the map is largest among those with attention."""
    transformers = [layer for layer in network.modules() if isinstance(layer, SpatialTransformer)]
    largest = 0  # tokens of the first transformer, before any other halves the map again

    def size_of(transformer: Any, inputs: tuple[Any, ...]) -> None:
        nonlocal largest
        height, width = inputs[0].shape[2:]
        largest = height * width if transformer is transformers[0] else largest
        for block in transformer.transformer_blocks:
            merging[block].size = (height, width) if height * width >= largest else None

    merging: dict[nn.Module, _Merging] = {}
    with ExitStack() as wrapped:
        for transformer in transformers:
            wrapped.callback(transformer.register_forward_pre_hook(size_of).remove)
            for block in transformer.transformer_blocks:
                assert isinstance(block, BasicTransformerBlock)
                merging[block] = wrapped.enter_context(_Merging(block, ratio))
        yield


class _Merging:
    """Merges tokens in the self-attention of a block, by the similarity of the block's inputs, if `size` is set."""

    def __init__(self, block: BasicTransformerBlock, ratio: float) -> None:
        self._block, self._ratio = block, ratio
        self._attention: CrossAttention = block.attn1
        self._forward: Any = self._attention.forward
        self._input: Tensor | None = None
        self.size: tuple[int, int] | None = None

    def __enter__(self) -> _Merging:
        self._hook = self._block.register_forward_pre_hook(self._look)
        self._attention.forward = self.forward
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()
        del self._attention.forward

    def _look(self, block: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._input = inputs[0]

    def forward(self, x: Tensor, *args: Any, add: Tensor | None = None, **kwargs: Any) -> Tensor:
        if self.size is None or self._input is None:
            return (
                self._forward(x, *args, **kwargs)
                if add is None
                else self._forward(x, *args, add=add, **kwargs)
            )
        matching = Matching(self._input, *self.size, self._ratio)
        out = matching.unmerge(self._forward(matching.merge(x), *args, **kwargs))
        return out if add is None else out + add
