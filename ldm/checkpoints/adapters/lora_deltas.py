"""How LoRA and its relatives change a weight: low-rank factors to a difference of the weight's own shape.

Everything is float32. A layer's change is a mapping of its parts, named as `lora_names.split_key` names them.
Rank r is that of the factors, and the scale is alpha / r, or 1 without alpha.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

Parts = Mapping[str, Tensor]

_KINDS = {
    "LoRA": {"down", "up"},
    "LoHa": {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
    "difference": {"diff"},
    "norm": {"w_norm"},
}


def weight_change(parts: Parts, weight: Tensor) -> Tensor | None:
    """The change of `weight` at multiplier 1, in float32 and of its shape; None if only a bias changes.

    Raises ValueError for parts that do not belong together or do not fit the weight.
    """
    wide = {name: part if name == "alpha" else part.float() for name, part in parts.items()}
    try:
        difference = _difference(wide)
        if difference is None:
            return None
        fitted = _fitted(difference, weight.shape)
        magnitude = _magnitude(wide, weight)
        return fitted if magnitude is None else _decomposed(weight.float(), fitted, magnitude)
    except (RuntimeError, IndexError, KeyError, TypeError, ZeroDivisionError) as error:
        raise ValueError(
            f"has factors that do not go together ({' '.join(str(error).split())[:100]})"
        ) from None


def bias_change(parts: Parts, bias: Tensor | None) -> Tensor | None:
    """The change of the bias at multiplier 1, in float32; None if nothing is. ValueError as above."""
    found = [parts[name] for name in ("diff_b", "b_norm") if name in parts]
    if not found:
        return None
    if bias is None:
        raise ValueError("changes a bias, but the model's layer has none")
    return _fitted(found[0].float(), bias.shape)


def _difference(parts: Parts) -> Tensor | None:
    kinds = [kind for kind, needed in _KINDS.items() if needed <= parts.keys()]
    if any(name.startswith("lokr_") for name in parts):
        kinds.append("LoKr")
    if len(kinds) > 1:
        raise ValueError(f"is changed in two ways at once: {' and '.join(kinds)}")
    match kinds:
        case ["LoRA"]:
            return _scale(parts, len(parts["down"])) * _low_rank(parts)
        case ["LoHa"]:
            factors = (_hada_factor(parts, name) for name in ("1", "2"))
            return _scale(parts, len(parts["hada_w1_b"])) * torch.mul(*factors)
        case ["LoKr"]:
            return _kronecker(parts)
        case ["difference"]:
            return parts["diff"]
        case ["norm"]:
            return parts["w_norm"]
        case _:
            if parts.keys() - {"diff_b", "b_norm", "alpha"}:
                raise ValueError(f"has only {', '.join(sorted(parts))} of its change")
            return None


def _scale(parts: Parts, rank: int) -> float:
    return float(parts["alpha"]) / rank if "alpha" in parts else 1.0


def _low_rank(parts: Parts) -> Tensor:
    """up @ down, of the kernel's shape; with `mid` the Tucker form."""
    down, up = parts["down"], parts["up"]
    if "mid" in parts:
        return _tucker(parts["mid"], up.flatten(1).T, down.flatten(1))
    return (up.flatten(1) @ down.flatten(1)).reshape(len(up), *down.shape[1:])


def _tucker(core: Tensor, out: Tensor, into: Tensor) -> Tensor:
    """A core [a, b, ...] between out [a, O] and into [b, I]: [O, I, ...]."""
    return torch.einsum("ab...,ao,bi->oi...", core, out, into)


def _hada_factor(parts: Parts, name: str) -> Tensor:
    """One of the two matrices that LoHa multiplies elementwise (Hyeon-Woo et al. 2022)."""
    out, into = parts[f"hada_w{name}_a"], parts[f"hada_w{name}_b"]
    return _tucker(parts[f"hada_t{name}"], out, into) if f"hada_t{name}" in parts else out @ into


def _kronecker(parts: Parts) -> Tensor:
    """kron(w1, w2), either of them whole or in factors; alpha counts only with factors."""
    first, second = _lokr_factor(parts, "1"), _lokr_factor(parts, "2")
    factored = next((parts[key] for key in ("lokr_w2_b", "lokr_w1_b") if key in parts), None)
    scale = 1.0 if factored is None else _scale(parts, len(factored))
    kernel = [1] * (second.dim() - 2)
    return scale * torch.kron(first.reshape(*first.shape[:2], *kernel), second.contiguous())


def _lokr_factor(parts: Parts, name: str) -> Tensor:
    whole = f"lokr_w{name}"
    if whole in parts:
        return parts[whole]
    out, into = parts[f"{whole}_a"], parts[f"{whole}_b"]
    return _tucker(parts[f"lokr_t{name}"], out, into) if f"lokr_t{name}" in parts else out @ into


def _fitted(difference: Tensor, shape: torch.Size) -> Tensor:
    """`difference` in a weight's shape: 1x1 kernels come with and without their axes, kernels come flattened.

    A change of a first convolution that sees 4 channels is filled up with zeros for one that sees 9.
    """
    if _squeezed(difference.shape) == _squeezed(shape) or tuple(difference.shape) == _flattened(shape):
        return difference.reshape(shape)
    padded = torch.Size([shape[0], 4, *shape[2:]]) if len(shape) == 4 and shape[1] == 9 else None
    if padded and (_squeezed(difference.shape) == _squeezed(padded)):
        return torch.cat([difference.reshape(padded), difference.new_zeros(shape[0], 5, *shape[2:])], dim=1)
    raise ValueError(f"changes a weight of shape {list(difference.shape)}, the model's is {list(shape)}")


def _squeezed(shape: torch.Size) -> tuple[int, ...]:
    """A shape without the axes of a 1x1 kernel."""
    return tuple(shape[:2]) if all(side == 1 for side in shape[2:]) else tuple(shape)


def _flattened(shape: torch.Size) -> tuple[int, ...]:
    return shape[0], shape[1:].numel()


# --- magnitude and direction apart (DoRA, Liu et al. 2024) ---------------------------------------------------------


def _magnitude(parts: Parts, weight: Tensor) -> Tensor | None:
    """The lengths that the weight's rows [out, 1, ...] or columns [1, in, ...] get, shaped to multiply with it."""
    if "magnitude" in parts:  # PEFT's, always of the rows
        return parts["magnitude"].reshape(-1, *[1] * (weight.dim() - 1))
    if "dora_scale" not in parts:
        return None
    scale = parts["dora_scale"]
    rows, columns = (len(weight), 1), (1, weight.shape[1])
    if scale.dim() < 2 or tuple(scale.shape[:2]) not in (rows, columns) or scale.shape[2:].numel() != 1:
        raise ValueError(
            f"has a dora_scale of shape {list(scale.shape)}, the weight's is {list(weight.shape)}"
        )
    return scale.reshape(*scale.shape[:2], *[1] * (weight.dim() - 2))


def _decomposed(weight: Tensor, difference: Tensor, magnitude: Tensor) -> Tensor:
    """magnitude * (W + D) / |W + D| - W, with a norm for each row or each column."""
    changed = weight + difference
    kept = 1 if len(magnitude) == 1 and len(weight) > 1 else 0
    axes = [axis for axis in range(weight.dim()) if axis != kept]
    norm = cast("Tensor", torch.linalg.vector_norm(changed, dim=axes, keepdim=True))
    return magnitude * changed / norm.where(norm > 0, 1.0) - weight
