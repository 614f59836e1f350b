"""Reads the pickle of a torch checkpoint as a description, without the power to call anything.

A pickle is a program for a small stack machine; Python's own machine imports and calls what it names. The
one below knows only the instructions that `torch.save` needs for tensors, containers, numbers and text. A
name is looked up in a short table of strings: nothing is ever imported, no object of the file's choosing is
called, and `BUILD` sets no attribute. A name or instruction outside the tables is refused and named.
"""

from __future__ import annotations

import pickletools
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, TypeGuard

import torch

from ldm.checkpoints.formats.detect import CheckpointError
from ldm.checkpoints.formats.tensor_bytes import FLOAT8, MAX_TENSORS, Storage, TensorSpec
from ldm.util import is_list, is_mapping

MAX_PICKLE_BYTES = 64 * 2**20
MAX_INSTRUCTIONS = 1_000_000  # a v1 training checkpoint with EMA and optimizer has about 200,000
_MAX_NUMBERS_AS_KEYS = 8192  # each costs up to the number of those before it; optimizers have one a weight

DTYPES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.storage.UntypedStorage": torch.uint8,  # bytes, which a tensor of a newer type is rebuilt from
}
_NEWER_TYPES = {str(dtype): dtype for dtype in FLOAT8}

_OTHER_TYPE = re.compile(r"torch\.(bfloat|bits|complex|float|q?u?int)[0-9]\w*")

# Leftovers of a training run, and protocol 2's way to write bytes: accepted by name, nothing is kept of them.
_INERT = frozenset(
    {
        "_codecs.encode",
        "builtins.set",
        "numpy.core.multiarray._reconstruct",
        "numpy.core.multiarray.scalar",
        "numpy.dtype",
        "numpy.ndarray",
        "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    }
)


@dataclass(frozen=True, slots=True)
class _Name:
    """A name from the tables, in place of the object that the file asks to import."""

    name: str


class _Inert:
    """In place of an object that was accepted by name and not built."""

    __slots__ = ()


class _ParameterDict:
    """A pickled `torch.nn.ParameterDict`: its state, which follows it, holds the tensors."""

    __slots__ = ("parameters",)

    def __init__(self) -> None:
        self.parameters: Any = None


_NOTHING = _Inert()


def _is_tuple(value: object) -> TypeGuard[tuple[Any, ...]]:
    return type(value) is tuple


def _is_list(value: object) -> TypeGuard[list[Any]]:
    return type(value) is list


def _ordered_dict(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    if arguments:
        raise CheckpointError(
            "builds an OrderedDict in an old way (Python 2?); save it again with a current torch"
        )
    return {}


def _tensor(arguments: tuple[Any, ...]) -> TensorSpec:
    storage, offset, size, stride = arguments[:4]
    if any(arguments[6:]):
        raise CheckpointError("is a lazily negated or conjugated view; save it again after .resolve_neg()")
    if type(storage) is not Storage or not _is_tuple(size) or not _is_tuple(stride):
        raise CheckpointError("describes a tensor in an unknown way")
    return TensorSpec(storage, offset, size, stride, storage.dtype)


def _tensor_of_bytes(arguments: tuple[Any, ...]) -> TensorSpec:
    """A tensor whose type is named after the arguments that others have."""
    dtype = arguments[6]
    spec = _tensor((*arguments[:6], *arguments[7:]))
    if type(dtype) is not _Name or dtype.name not in _NEWER_TYPES or spec.dtype is not torch.uint8:
        raise CheckpointError("describes a tensor in an unknown way")
    return replace(spec, dtype=_NEWER_TYPES[dtype.name])


def _parameter(arguments: tuple[Any, ...]) -> TensorSpec:
    if type(arguments[0]) is not TensorSpec:
        raise CheckpointError("describes a parameter that is not a tensor")
    return arguments[0]


_BUILDERS: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "torch.nn.modules.container.ParameterDict": lambda arguments: _ParameterDict(),
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_bytes,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    **dict.fromkeys(_INERT, lambda arguments: _NOTHING),
}


class _Machine:
    """The stack machine: one method for each kind of instruction."""

    def __init__(self, declared: dict[str, Storage]) -> None:
        self.declared = declared
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[str, Any] = {}  # by text, whose hashes a file cannot make equal
        self.tensors = 0
        self.numbers_as_keys = 0

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def protocol(self, version: int) -> None:
        if version not in (2, 3, 4):
            raise CheckpointError(f"is a pickle of protocol {version}; torch.save writes 2")

    def nothing(self, _: Any) -> None:
        """For instructions that only help a reader to buffer."""

    def mark(self, _: Any) -> None:
        self.marks.append(len(self.stack))

    def _since_mark(self) -> list[Any]:
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def put(self, index: int) -> None:
        self.memo[str(index)] = self.stack[-1]

    def memoize(self, _: Any) -> None:
        self.put(len(self.memo))

    def get(self, index: int) -> None:
        self.stack.append(self.memo[str(index)])

    def tuple_since_mark(self, _: Any) -> None:
        self.stack.append(tuple(self._since_mark()))

    def tuple_of(self, n: int) -> None:
        values = tuple(self.stack[-n:])
        if len(values) != n:
            raise CheckpointError("takes more from its stack than there is")
        self.stack[-n:] = [values]

    def append(self, _: Any) -> None:
        self._extend([self.stack.pop()])

    def appends(self, _: Any) -> None:
        self._extend(self._since_mark())

    def _extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if not _is_list(target):
            raise CheckpointError("appends to something that is not a list")
        target.extend(values)

    def set_item(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._update([key, value])

    def set_items(self, _: Any) -> None:
        self._update(self._since_mark())

    def _update(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise CheckpointError("sets items of something that is not a mapping")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if type(key) in (str, int, float, bool, type(None)):
                self.numbers_as_keys += type(key) is not str
                if self.numbers_as_keys > _MAX_NUMBERS_AS_KEYS:
                    raise CheckpointError(f"has more than {_MAX_NUMBERS_AS_KEYS} numbers as mapping keys")
                target[key] = value
            elif type(key) not in (_Name, _Inert):  # Lightning keyed its callbacks by class: dropped
                raise CheckpointError(f"has a mapping key of type {type(key).__name__}")

    def global_name(self, text: str) -> None:
        self._push_name(text.replace(" ", "."))

    def stack_global(self, _: Any) -> None:
        attribute, module = self.stack.pop(), self.stack.pop()
        if type(module) is not str or type(attribute) is not str:
            raise CheckpointError("asks to import something whose name is not text; refused, nothing was run")
        self._push_name(f"{module}.{attribute}")

    def _push_name(self, asked: str) -> None:
        name = _today(asked)
        if _OTHER_TYPE.fullmatch(name) and not is_known(name):
            raise CheckpointError(
                f"asks for the type {name[:50]}, which is not read here; save the weights as float16 or float32"
            )
        if not is_known(name):
            raise CheckpointError(
                f"asks to import {asked[:200]}; refused, nothing was run "
                "(only state dicts are read, no whole pickled models)"
            )
        self.stack.append(_Name(name))

    def call(self, _: Any) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if type(function) is not _Name or function.name not in _BUILDERS or not _is_tuple(arguments):
            raise CheckpointError("calls something that cannot be called; refused, nothing was run")
        result = _BUILDERS[function.name](arguments)
        self.tensors += type(result) is TensorSpec
        if self.tensors > MAX_TENSORS:
            raise CheckpointError(f"describes more than {MAX_TENSORS} tensors")
        self.stack.append(result)

    def build(self, _: Any) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, _ParameterDict):
            target.parameters = state["_parameters"]
        elif type(target) not in (dict, _Inert):  # on an OrderedDict it is a module's `_metadata`: dropped
            raise CheckpointError("changes the attributes of an object; refused, nothing was run")

    def persistent_id(self, _: Any) -> None:
        storage = _storage(self.stack.pop())
        if self.declared.setdefault(storage.key, storage) != storage:
            raise CheckpointError(f"declares record {storage.key[:100]!r} with two types or sizes")
        self.stack.append(storage)


def _today(name: str) -> str:
    """A name of Python 2 or of NumPy 2 as it is in the tables."""
    return name.replace("__builtin__.", "builtins.", 1).replace("numpy._core.", "numpy.core.", 1)


def is_known(name: str) -> bool:
    """Whether a checkpoint may name this without being refused."""
    return any(_today(name) in table for table in (_BUILDERS, DTYPES, _NEWER_TYPES))


def _storage(pid: Any) -> Storage:
    """A storage from its id: the word, a type, a key, a device (ignored), a count; legacy files add None."""
    if not _is_tuple(pid) or not pid or pid[0] != "storage":
        raise CheckpointError("refers to something outside that is not a tensor (a whole pickled model?)")
    if len(pid) not in (5, 6) or any(view is not None for view in pid[5:]):
        raise CheckpointError("has a tensor that is a view of another record")
    kind, key, count = pid[1], pid[2], pid[4]
    if type(kind) is not _Name or kind.name not in DTYPES:
        raise CheckpointError("has a tensor of an unknown type")
    if type(key) is not str or type(count) is not int or count < 0:
        raise CheckpointError("has a tensor whose record or size is not understood")
    return Storage(key, DTYPES[kind.name], count)


_push = _Machine.push
_INSTRUCTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _Machine.protocol,
    "FRAME": _Machine.nothing,
    "STOP": _Machine.nothing,
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    **dict.fromkeys(["BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"], _push),
    **dict.fromkeys(["BINUNICODE", "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES"], _push),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "MARK": _Machine.mark,
    "TUPLE": _Machine.tuple_since_mark,
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": _Machine.memoize,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "GLOBAL": _Machine.global_name,
    "STACK_GLOBAL": _Machine.stack_global,
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.call,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent_id,
}


def read_pickle(stream: BinaryIO, declared: dict[str, Storage] | None = None) -> Any:
    """The object that the next pickle of `stream` describes, with a `TensorSpec` in place of every tensor.

    Every storage that the pickle names goes into `declared` by its key, even one whose tensor is dropped
    later. The stream is left at the end of the pickle. Raises `CheckpointError` for what is refused, and other
    exceptions for damage: call it inside `reading`.
    """
    machine = _Machine({} if declared is None else declared)
    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if count > MAX_INSTRUCTIONS:
            raise CheckpointError(f"has a pickle of more than {MAX_INSTRUCTIONS} instructions")
        instruction = _INSTRUCTIONS.get(opcode.name)
        if instruction is None:
            raise CheckpointError(
                f"uses the pickle instruction {opcode.name}, which torch.save does not write"
            )
        instruction(machine, argument)
    (result,) = machine.stack
    return result


def build_tree(node: Any, make_tensor: Callable[[TensorSpec], torch.Tensor]) -> Any:
    """`node` with a tensor for every `TensorSpec`, and None for what was accepted only by name.

    A container that occurs several times is built once; one that contains itself is a `CheckpointError`.
    Errors of `make_tensor` are prefixed with the key of the tensor.
    """
    return _Tree(make_tensor).build(node, None)


class _Tree:
    def __init__(self, make_tensor: Callable[[TensorSpec], torch.Tensor]) -> None:
        self._make_tensor = make_tensor
        self._built: dict[int, Any] = {}  # by id; the nodes outlive this, so no id is used twice
        self._open: set[int] = set()

    def build(self, node: Any, key: Any) -> Any:
        if isinstance(node, _ParameterDict):
            node = node.parameters
        if isinstance(node, (_Name, _Inert, Storage, _ParameterDict)):
            return None
        if not (is_mapping(node) or is_list(node) or isinstance(node, TensorSpec)):
            return node
        identity = id(node)
        if identity in self._open:
            raise CheckpointError("has a container that contains itself")
        if identity not in self._built:
            self._open.add(identity)
            self._built[identity] = self._convert(node, key)
            self._open.remove(identity)
        return self._built[identity]

    def _convert(self, node: Any, key: Any) -> Any:
        if isinstance(node, TensorSpec):
            return self._tensor(node, key)
        if is_mapping(node):
            return {name: self.build(value, name) for name, value in node.items()}
        return type(node)(self.build(value, key) for value in node)

    def _tensor(self, spec: TensorSpec, key: Any) -> torch.Tensor:
        try:
            spec.check()
            return self._make_tensor(spec)
        except CheckpointError as error:
            raise CheckpointError(
                f"tensor {str(key)[:200]!r} (record {spec.storage.key[:100]!r}) {error}"
            ) from None
