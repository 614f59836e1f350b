"""The error that users see, safe display of text, objects built from configs, and small functions of the original."""

from __future__ import annotations

import importlib
import inspect
import itertools
import logging
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import UnionType
from typing import Any, TypeGuard, get_args, get_type_hints

logger = logging.getLogger(__name__)


class InputError(ValueError):
    """Invalid input from the user: one line names the value, the reason and the cure.

    The command line turns it into exit code 2 (faults met before anything is generated).
    """


def need(condition: bool, message: str) -> None:
    """Raises `InputError` with the message unless the condition holds."""
    if not condition:
        raise InputError(message)


_NO_MEMORY = (
    "can't allocate memory",
    "could not create a primitive",
    "out of memory",
)  # torch, oneDNN, drivers


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether memory ran out: torch raises a type for it on a GPU, elsewhere it is known by the text."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def printable(text: object) -> str:
    """Returns `text` with every character that could drive a terminal (controls, bidi marks, surrogates) escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def is_mapping(value: object) -> TypeGuard[Mapping[str, Any]]:
    """Returns whether `value` is a mapping, for type checkers too: one with names as keys."""
    return isinstance(value, Mapping)


def is_list(value: object) -> TypeGuard[list[Any] | tuple[Any, ...]]:
    """Returns whether `value` is a list or a tuple, for type checkers too."""
    return isinstance(value, list | tuple)


def exists(x: object) -> bool:
    """Returns whether `x` is not None."""
    return x is not None


def default(val: Any, d: Any) -> Any:
    """Returns `val` unless it is None, else `d`, or the result of `d` if it is a function."""
    if exists(val):
        return val
    return d() if inspect.isfunction(d) else d


def ismap(x: Any) -> bool:
    """Returns whether `x` is a batch of maps: a tensor [N, C, H, W] of more than three channels."""
    return _is_batch(x) and x.shape[1] > 3


def isimage(x: Any) -> bool:
    """Returns whether `x` is a batch of images: a tensor [N, C, H, W] of one channel or three."""
    return _is_batch(x) and x.shape[1] in (1, 3)


def _is_batch(x: Any) -> bool:
    torch = sys.modules.get("torch")  # unless torch is loaded, `x` cannot be a tensor
    return torch is not None and isinstance(x, torch.Tensor) and x.dim() == 4


def mean_flat(tensor: Any) -> Any:
    """Returns the mean of each entry of a batch [N, ...]: [N]."""
    return tensor.flatten(1).mean(dim=1)


def count_params(model: Any, verbose: bool = False) -> int:
    """Returns the number of parameters of a model; with `verbose` also logs it, in millions."""
    total = sum(p.numel() for p in model.parameters())
    if verbose:
        logger.info("%s has %.2f million parameters", type(model).__name__, total / 1e6)
    return total


def log_txt_as_img(wh: tuple[int, int], xc: Sequence[str], size: int = 10) -> Any:
    """Draws texts in black on white images of (width, height): a tensor [N, 3, height, width] in [-1, 1].

    Lines break every 40 characters for a width of 256, in proportion for others; `size` is the font's.
    """
    import numpy as np
    import torch
    from PIL import Image, ImageDraw, ImageFont

    font, per_line = ImageFont.load_default(size), max(1, 40 * wh[0] // 256)
    images: list[np.ndarray] = []
    for text in xc:
        image = Image.new("RGB", wh, "white")
        lines = [text[start : start + per_line] for start in range(0, len(text), per_line)]
        ImageDraw.Draw(image).text((0, 0), "\n".join(lines), fill="black", font=font)
        images.append(np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1)
    return torch.from_numpy(np.stack(images))


def parallel_data_prefetch(
    func: Callable[..., Any],
    data: Any,
    n_proc: int,
    target_data_type: str = "ndarray",
    cpu_intensive: bool = True,
    use_worker_id: bool = False,
) -> Any:
    """Runs `func` on `n_proc` parts of `data`; returns the results in the order of the data, in one array or list.

    `data` is an array, which is cut along its first axis, or a sequence. Parts are worked on in separate processes if
    `cpu_intensive` (`func` must be a function of a module then), else in threads. With `use_worker_id` the number of
    the part is the keyword argument `worker_id`. `target_data_type` "ndarray" joins the results along their first
    axis, "list" into one list; any other returns them part by part. Raises ValueError without data.
    """
    from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

    import numpy as np

    count = min(n_proc, len(data))
    if count < 1:
        raise ValueError(f"there are {len(data)} values for {n_proc} workers; give at least one of each")
    bounds = [len(data) * i // count for i in range(count + 1)]
    parts = [data[first:last] for first, last in itertools.pairwise(bounds)]
    pool = ProcessPoolExecutor if cpu_intensive else ThreadPoolExecutor
    with pool(count) as workers:
        extra = [{"worker_id": i} if use_worker_id else {} for i in range(count)]
        started = [workers.submit(func, part, **more) for part, more in zip(parts, extra, strict=True)]
        results = [one.result() for one in started]
    if target_data_type == "ndarray":
        return np.concatenate([np.asarray(result) for result in results], axis=0)
    return list(itertools.chain.from_iterable(results)) if target_data_type == "list" else results


def get_obj_from_str(string: str, reload: bool = False) -> Any:
    """Imports the object that a dotted name such as `ldm.models.autoencoder.AutoencoderKL` refers to."""
    module_name, _, name = string.rpartition(".")
    module = importlib.import_module(module_name)
    if reload:
        module = importlib.reload(module)
    return getattr(module, name)


_NOTHING = ("__is_first_stage__", "__is_unconditional__")  # a config's words for "no separate model"


def instantiate_from_config(config: Mapping[str, Any] | str, **overrides: Any) -> Any:
    """Builds `config["target"]` with the keyword arguments in `config["params"]`.

    This function imports whatever the config names. For configs from an untrusted source, check the targets first
    (`ldm.config.read_config` does). An unknown parameter is an `InputError` that names it, unless the target is
    another package's that takes any keyword. "__is_first_stage__" and "__is_unconditional__" give None.
    """
    if config in _NOTHING:
        return None
    if not is_mapping(config):
        raise InputError(f"a config entry is {config!r}; it must be a mapping with `target`")
    if "target" not in config:
        raise InputError(f"a config entry lacks `target`: it has {sorted(map(str, config)) or 'nothing'}")
    cls = get_obj_from_str(config["target"])
    given: Mapping[str, Any] = config.get("params") or {}
    params = {**given, **overrides}
    _check_parameters(config["target"], cls, params)
    return cls(**params)


def _check_parameters(target: str, cls: Any, params: Mapping[str, Any]) -> None:
    accepted = _accepted(cls)
    if accepted is None:
        return
    unknown = [name for name in params if name not in accepted]
    if unknown:
        raise InputError(
            f"{target} takes no parameter {', '.join(map(repr, unknown))}; it takes {', '.join(accepted)}"
        )
    missing = [name for name, p in accepted.items() if p.default is p.empty and name not in params]
    if missing:
        raise InputError(f"{target} needs the parameter {', '.join(map(repr, missing))}")
    if _is_ours(cls):
        hints = {k: v for base in reversed(cls.__mro__) for k, v in get_type_hints(base.__init__).items()}
        for name, value in params.items():
            if not _fits(value, hints.get(name)):
                raise InputError(
                    f"{target}: {name} is {value!r}, but must be of type {accepted[name].annotation}"
                )


def _accepted(cls: Any) -> dict[str, inspect.Parameter] | None:
    """Returns the parameters that `cls` accepts, including those passed on to its bases; None if unknown.

    Keywords that a class of another package does not name have unknown effects.
    """
    accepted: dict[str, inspect.Parameter] = {}
    for base in inspect.getmro(cls) if inspect.isclass(cls) else (cls,):
        try:
            signature = inspect.signature(base, follow_wrapped=False)
        except (TypeError, ValueError):  # builtins without a signature check their own arguments
            return None
        own = signature.parameters.values()
        named = {p.name: p for p in own if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
        accepted = named | accepted
        if all(p.kind is not p.VAR_KEYWORD for p in own):
            return accepted if base is cls or _is_ours(base) else None
        if not (_is_ours(base) and _is_ours(base.__init__)) or hasattr(base.__init__, "__wrapped__"):
            return None
    return None


def _is_ours(cls: Any) -> bool:
    return str(getattr(cls, "__module__", "")).partition(".")[0] == "ldm"


def warn_of_ignored(owner: str, names: Iterable[str]) -> None:
    """Logs a warning that names the keywords of other versions of the original that `owner` does not use, if any."""
    if names := ", ".join(map(printable, names)):
        logger.warning("%s ignores %s", owner, names)


def only_with(owner: str, **given: tuple[object, object]) -> None:
    """Raises `InputError` if a parameter of the original, as name=(value, neutral), has an unsupported value."""
    for name, (value, neutral) in given.items():
        if value != neutral:
            raise InputError(f"{owner}: {name} is {value!r}, which is not supported; it must be {neutral!r}")


_SCALARS: dict[Any, tuple[type, ...]] = {
    int: (int,),
    float: (int, float),
    str: (str,),
    bool: (bool,),
    type(None): (type(None),),
}


def _fits(value: Any, hint: Any) -> bool:
    """Returns whether a value is of a scalar type, or one of several; other types are not checked."""
    options = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    if not all(option in _SCALARS for option in options):
        return True
    return any(
        isinstance(value, _SCALARS[option]) and (option is bool or not isinstance(value, bool))
        for option in options
    )
