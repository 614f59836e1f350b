"""Names of one model's weights in the two layouts of the field, CompVis's and diffusers', and the way between them.

Each part of a model (U-Net, autoencoder, text encoder) has one table of pairs, which is read in both directions.
How many levels and blocks there are is counted in the keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ldm.checkpoints.formats.detect import CheckpointError
from ldm.checkpoints.layouts.recognise import COMPVIS_PREFIXES, Part, compvis_parts, kind_of
from ldm.util import printable

Component = Literal["unet", "vae", "text_encoder"]

WORDS: Mapping[Component, Part] = {
    "unet": "U-Net",
    "vae": "autoencoder",
    "text_encoder": "text encoder",
}
PREFIXES: Mapping[Component, str] = {part: COMPVIS_PREFIXES[word] for part, word in WORDS.items()}
CLASSES: Mapping[Component, str] = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
}
SMALL_CLASSES: Mapping[Component, str] = {"vae": "AutoencoderTiny"}  # of TAESD
# where else a part is found in files of one or several parts
_OTHER_PREFIXES: Mapping[str, Component] = {
    "diffusion_model.": "unet",
    "unet.": "unet",
    "vae.": "vae",
    "text_encoder.": "text_encoder",
}
_TEXT_ENCODER = re.compile(r"^(transformer\.)?(text_model\.)?(?=(embeddings|encoder|final_layer_norm)\.)")
_OTHER_HALF = re.compile(r"vision_model\.|(visual|text)_projection\.|logit_scale$")  # of a whole CLIP
_COMPVIS_TEXT = "transformer.text_model."
_DIFFUSERS_TEXT = "text_model."
_DIFFUSERS_BLOCKS = re.compile(r"((encoder|decoder)\.)?(down_blocks|mid_block|up_blocks)\.")
_HALVES = {"encoder": ("encoder.", "quant_conv."), "decoder": ("decoder.", "post_quant_conv.")}
_SMALL_HALF = re.compile(rf"{re.escape(PREFIXES['vae'])}(encoder|decoder)\.\d+\.")
_TAESD_BLOCK = re.compile(r"(?:(?:taesd_)?(encoder|decoder)\.(?:layers\.)?)?\d+\.conv\.")
_TAESD_LAYERS = 20  # in a row
_PIXEL_ATTENTION = re.compile(r"\.attn_1\.(q|k|v|proj_out)\.weight$")
_OLD_PIXEL_ATTENTION = re.compile(r"(?<=\.attentions\.0\.)(query|key|value|proj_attn)(?=\.)")
_NEW_PIXEL_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_INPUT_BLOCK = r"input_blocks\.(\d+)\."
_MOST_BLOCKS = 16  # a forged file may name any number

# what a residual block, and the autoencoder's attention, consist of: CompVis's name, diffusers' name
_UNET_RESNET = (
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("emb_layers.1", "time_emb_proj"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("skip_connection", "conv_shortcut"),
)
_VAE_RESNET = (
    *((name, name) for name in ("norm1", "conv1", "norm2", "conv2")),
    ("nin_shortcut", "conv_shortcut"),
)
_VAE_ATTENTION = (
    ("norm", "group_norm"),
    ("q", "to_q"),
    ("k", "to_k"),
    ("v", "to_v"),
    ("proj_out", "to_out.0"),
)


@dataclass(frozen=True, slots=True)
class Blocks:
    """The size of a network: its levels, the residual blocks of `each` on the way down, the levels with attention."""

    levels: int
    each: int
    attention: frozenset[int] = frozenset()
    middle: bool = True


# CompVis numbers the blocks of a U-Net in one row. diffusers' script for single files, by which small U-Nets are
# published, leaves room for v1's number of blocks in each level.
_ROOM = 3


def to_compvis(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with every part it has under CompVis's names, whatever layout and prefixes they come in.

    Tensors are the same, or views of them. Keys of no part stay as they are; of a whole CLIP only the text
    encoder is used. Two tensors for one name are a `CheckpointError`.
    """
    found: dict[str, Tensor] = {}
    for part, names in _split(state_dict).items():
        to_ours = _to_ours(part, names)
        for name, key in names:
            if part == "text_encoder" and _OTHER_HALF.match(name):
                continue
            ours = key if part is None else PREFIXES[part] + _compvis_name(part, name, to_ours)
            if ours in found:
                raise CheckpointError(f"has two tensors for {printable(ours[:200])}; keep one of them")
            found[ours] = _as_convolution(ours, state_dict[key])
    return found


def to_diffusers(state_dict: Mapping[str, Tensor]) -> dict[Component, dict[str, Tensor]]:
    """The parts of a state dict in CompVis's layout, each under diffusers' names.

    Keys of no part (schedule, averages) and computed position ids are left out; a weight of a part that has no
    place there is a `CheckpointError`.
    """
    parts: dict[Component, dict[str, Tensor]] = {}
    for part, prefix in PREFIXES.items():
        keys = [key for key in state_dict if key.startswith(prefix) and not key.endswith("position_ids")]
        names = [(key.removeprefix(prefix), key) for key in keys]
        table = _table(part, names)
        parts[part] = {
            _diffusers_name(name, key, table): _as_matrix(key, state_dict[key]) for name, key in names
        }
    return parts


def parts_in(state_dict: Iterable[str]) -> set[Component]:
    """The parts that a state dict in CompVis's layout has weights of, or moving averages."""
    words = compvis_parts(list(state_dict))
    return {part for part, word in WORDS.items() if word in words}


def small_halves(state_dict: Iterable[str]) -> tuple[str, ...]:
    """Which halves of the autoencoder, "encoder" and "decoder", are TAESD's in a state dict in CompVis's layout."""
    found = {match[1] for match in map(_SMALL_HALF.match, state_dict) if match}
    return tuple(half for half in _HALVES if half in found)


def keys_of_half(half: str) -> tuple[str, ...]:
    """How the keys of a half of the autoencoder begin, in CompVis's layout."""
    return tuple(PREFIXES["vae"] + name for name in _HALVES[half])


Names = list[tuple[str, str]]  # the name within a part, and its key in the state dict


def _split(state_dict: Mapping[str, Tensor]) -> dict[Component | None, Names]:
    """The names within each part; None for the keys of no part."""
    outer: dict[str, Component] = {prefix: part for part, prefix in PREFIXES.items()}
    outer.update(_OTHER_PREFIXES)
    split: dict[Component | None, Names] = {}
    for key in state_dict:
        prefix = next((prefix for prefix in outer if key.startswith(prefix)), "")
        split.setdefault(outer.get(prefix), []).append((key.removeprefix(prefix), key))
    if set(split) != {None}:
        return split
    kind = kind_of(state_dict).part
    alone: Component | None = next((part for part, word in WORDS.items() if word == kind), None)
    return {alone: split[None]}


def _to_ours(part: Component | None, names: Names) -> dict[str, str]:
    """Other names of the modules of a part -> CompVis's; empty where they have these already."""
    if part == "vae" and _is_taesd(names):
        return _taesd_to_ours([name for name, _ in names])
    with_gaps = part == "unet" and _has_gaps([name for name, _ in names])
    if part not in ("unet", "vae") or not (with_gaps or _is_diffusers(names)):
        return {}
    to_ours = {theirs: ours for ours, theirs in _table(part, names).items()}
    if with_gaps:
        to_ours |= dict(_closed_gaps(unet_blocks([name for name, _ in names])))
    return to_ours


def _is_taesd(names: Names) -> bool:
    return any(_TAESD_BLOCK.match(name) for name, _ in names)


def _taesd_to_ours(names: list[str]) -> dict[str, str]:
    """Names of TAESD's layers in its own files, a half each or both in one, and in diffusers' -> ours."""
    if pooling := next((name for name in names if ".pool." in name), None):
        raise CheckpointError(
            f"is a TAESD whose blocks have a pooling norm ({printable(pooling[:80])}), which this toolkit does not "
            "compute; give the first TAESD"
        )
    half = "encoder" if "0.weight" in names else "decoder"  # whose layer 0 has no weight
    return {
        **{theirs: ours for ours, theirs in _taesd()},
        **{f"taesd_{name}": name for name in _HALVES},
        **{str(i): f"{half}.{i}" for i in range(_TAESD_LAYERS)},
    }


def _taesd() -> Iterator[tuple[str, str]]:
    """In diffusers' decoder the function before the first layer is none of the layers."""
    for i in range(_TAESD_LAYERS):
        yield f"encoder.{i}", f"encoder.layers.{i}"
        yield f"decoder.{i + 1}", f"decoder.layers.{i}"


def _is_diffusers(names: Names) -> bool:
    return any(_DIFFUSERS_BLOCKS.match(name) for name, _ in names)


def _compvis_name(part: Component, name: str, to_ours: Mapping[str, str]) -> str:
    if part == "text_encoder":
        return _TEXT_ENCODER.sub(_COMPVIS_TEXT, name, count=1)
    new = _OLD_PIXEL_ATTENTION.sub(lambda match: _NEW_PIXEL_ATTENTION[match[0]], name)
    return renamed(new, to_ours) or name


def _diffusers_name(name: str, key: str, table: Mapping[str, str]) -> str:
    new = renamed(name, table)
    if new is None:
        raise CheckpointError(f"{printable(key[:200])} has no place in the diffusers layout")
    return new


def renamed(name: str, table: Mapping[str, str]) -> str | None:
    """`name` with the longest beginning that is in the table replaced; None without any."""
    head, tail = name, ""
    while head and head not in table:
        head, _, last = head.rpartition(".")
        tail = f".{last}{tail}"
    return table[head] + tail if head else None


def _as_convolution(key: str, tensor: Tensor) -> Tensor:
    """The matrices of the autoencoder's attention as the 1x1 convolutions that CompVis has there."""
    return tensor[:, :, None, None] if _PIXEL_ATTENTION.search(key) and tensor.ndim == 2 else tensor


def _as_matrix(key: str, tensor: Tensor) -> Tensor:
    return tensor[:, :, 0, 0] if _PIXEL_ATTENTION.search(key) and tensor.ndim == 4 else tensor


# --- the tables ---------------------------------------------------------------------------------------------------


def _table(part: Component, names: Names) -> dict[str, str]:
    """CompVis's names of the modules of a part -> diffusers', for a network whose size is counted in the names."""
    if part == "text_encoder":
        modules = ("embeddings", "encoder", "final_layer_norm")
        return {_COMPVIS_TEXT + module: _DIFFUSERS_TEXT + module for module in modules}
    if part == "vae" and _is_taesd(names):
        return dict(_taesd())
    pairs, blocks = (_unet, unet_blocks) if part == "unet" else (_vae, _vae_blocks)
    return dict(pairs(blocks([name for name, _ in names])))


def _inside(module: str, theirs: str, parts: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    return ((f"{module}.{a}", f"{theirs}.{b}") for a, b in parts)


def encoder_pairs(size: Blocks) -> Iterator[tuple[str, str]]:
    """The names of the modules of a U-Net's way down and its middle: CompVis's, diffusers'."""
    kept = ("time_embed.", "input_blocks.", "middle_block.")
    return (pair for pair in _unet(size) if pair[0].startswith(kept))


def _unet(size: Blocks) -> Iterator[tuple[str, str]]:
    """Levels of `each` blocks and a downsampling; upwards one block more, and an upsampling."""
    yield "time_embed.0", "time_embedding.linear_1"
    yield "time_embed.2", "time_embedding.linear_2"
    yield "time_embedding.cond_proj", "time_embedding.cond_proj"
    yield "input_blocks.0.0", "conv_in"
    yield "out.0", "conv_norm_out"
    yield "out.2", "conv_out"
    yield from _inside("middle_block.0", "mid_block.resnets.0", _UNET_RESNET)
    yield "middle_block.1", "mid_block.attentions.0"
    yield from _inside("middle_block.2", "mid_block.resnets.1", _UNET_RESNET)
    for level in range(size.levels):
        down, up = f"down_blocks.{level}", f"up_blocks.{size.levels - 1 - level}"
        first_up = (size.levels - 1 - level) * (size.each + 1)
        first_down = 1 + level * (size.each + 1)
        for i in range(size.each):
            yield from _inside(f"input_blocks.{first_down + i}.0", f"{down}.resnets.{i}", _UNET_RESNET)
            yield f"input_blocks.{first_down + i}.1", f"{down}.attentions.{i}"
        for i in range(size.each + 1):
            yield from _inside(f"output_blocks.{first_up + i}.0", f"{up}.resnets.{i}", _UNET_RESNET)
            if level in size.attention:
                yield f"output_blocks.{first_up + i}.1", f"{up}.attentions.{i}"
        after = 2 if level in size.attention else 1
        yield f"input_blocks.{first_down + size.each}.0.op", f"{down}.downsamplers.0.conv"
        yield f"output_blocks.{first_up + size.each}.{after}.conv", f"{up}.upsamplers.0.conv"


def _closed_gaps(size: Blocks) -> Iterator[tuple[str, str]]:
    """The blocks of a small U-Net in the numbers of diffusers' script -> in one row."""
    for level in range(size.levels):
        down, up = level * (size.each + 1), (size.levels - 1 - level) * (size.each + 1)
        down_room, up_room = level * _ROOM, (size.levels - 1 - level) * _ROOM
        for i in range(size.each):
            yield f"input_blocks.{down_room + i + 1}", f"input_blocks.{down + i + 1}"
        yield f"input_blocks.{down_room + _ROOM}.0.op", f"input_blocks.{down + size.each + 1}.0.op"
        for i in range(size.each + 1):
            for part in (0, 1):
                yield f"output_blocks.{up_room + i}.{part}", f"output_blocks.{up + i}.{part}"
        after = 2 if level in size.attention else 1
        for written in (1, 2):  # the script counts on attention in all levels but v1's lowest
            yield (
                f"output_blocks.{up_room + _ROOM - 1}.{written}.conv",
                f"output_blocks.{up + size.each}.{after}.conv",
            )


def _vae(size: Blocks) -> Iterator[tuple[str, str]]:
    """CompVis counts the decoder's levels from the finest, diffusers from the one that comes first."""
    yield "quant_conv", "quant_conv"
    yield "post_quant_conv", "post_quant_conv"
    for half in ("encoder", "decoder"):
        yield f"{half}.conv_in", f"{half}.conv_in"
        yield f"{half}.norm_out", f"{half}.conv_norm_out"
        yield f"{half}.conv_out", f"{half}.conv_out"
        mid = f"{half}.mid_block"
        yield from _inside(f"{half}.mid.block_1", f"{mid}.resnets.0", _VAE_RESNET)
        yield from _inside(f"{half}.mid.attn_1", f"{mid}.attentions.0", _VAE_ATTENTION)
        yield from _inside(f"{half}.mid.block_2", f"{mid}.resnets.1", _VAE_RESNET)
    for level in range(size.levels):
        down, their_down = f"encoder.down.{level}", f"encoder.down_blocks.{level}"
        up, their_up = f"decoder.up.{level}", f"decoder.up_blocks.{size.levels - 1 - level}"
        for i in range(size.each):
            yield from _inside(f"{down}.block.{i}", f"{their_down}.resnets.{i}", _VAE_RESNET)
        for i in range(size.each + 1):
            yield from _inside(f"{up}.block.{i}", f"{their_up}.resnets.{i}", _VAE_RESNET)
        yield f"{down}.downsample.conv", f"{their_down}.downsamplers.0.conv"
        yield f"{up}.upsample.conv", f"{their_up}.upsamplers.0.conv"


def unet_blocks(names: list[str]) -> Blocks:
    """The size of the U-Net of these names, in any of the layouts, without the prefix of its part."""
    middle = any(name.startswith(("mid_block.", "middle_block.")) for name in names)
    levels = len(_numbers(names, r"down_blocks\.(\d+)\."))
    if levels and not _numbers(names, _INPUT_BLOCK):
        each = len(_numbers(names, r"down_blocks\.0\.resnets\.(\d+)\."))
        return _bounded(levels, each, _numbers(names, r"down_blocks\.(\d+)\.attentions\."), middle)
    levels = 1 + len(_numbers(names, r"input_blocks\.(\d+)\.0\.op\."))
    each = max(len(_numbers(names, _INPUT_BLOCK)) // levels - 1, 0)
    attention = _numbers(names, r"input_blocks\.(\d+)\.1\.")
    room = _ROOM if _has_gaps(names) else each + 1
    return _bounded(levels, each, {(i - 1) // room for i in attention}, middle)


def _has_gaps(names: list[str]) -> bool:
    """Whether the blocks of a U-Net are numbered as by diffusers' script for single files."""
    found = _numbers(names, _INPUT_BLOCK)
    levels = 1 + len(_numbers(names, r"input_blocks\.(\d+)\.0\.op\."))
    each = max(len(found) // levels - 1, 0)
    blocks = {_ROOM * level + i for level in range(levels) for i in range(1, each + 1)}
    return each < _ROOM - 1 and found == blocks | {_ROOM * level for level in range(levels)}


def _vae_blocks(names: list[str]) -> Blocks:
    levels = _numbers(names, r"encoder\.down(?:_blocks)?\.(\d+)\.")
    each = _numbers(names, r"encoder\.down(?:_blocks)?\.0\.(?:block|resnets)\.(\d+)\.")
    return _bounded(len(levels), len(each), set())


def _numbers(names: list[str], pattern: str) -> set[int]:
    found = (re.match(pattern, name) for name in names)
    return {int(match[1]) for match in found if match and len(match[1]) <= 4}


def _bounded(levels: int, each: int, attention: set[int], middle: bool = True) -> Blocks:
    return Blocks(min(levels, _MOST_BLOCKS), min(each, _MOST_BLOCKS), frozenset(attention), middle)
