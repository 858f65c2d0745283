"""A name for everything that a plan depends on, found without tracing or running the model.

It covers structure and settings of every module, shapes and layouts of parameters, the values of
the example and of small buffers, the code that the forward can reach, and versions. Code of
installed packages counts by version and by the functions that are in place now; any other code is
followed through all that it names. What cannot be described has no name, and its plan is not kept.
"""

import enum
import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from functools import partial
from importlib import metadata
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from hairpin.graph.autocast import autocast_now

_PLAIN = (bool, int, float, complex, str, bytes, type(None), range, slice, type(...))
_TORCH = (torch.dtype, torch.device, torch.layout, torch.memory_format)
_KNOWN_ROOTS = frozenset(sys.stdlib_module_names) | {"torch", "numpy", "hairpin", "builtins"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_SMALL = 64  # elements of a float buffer whose values count: code may branch on them
_MOST_ELEMENTS = 2**20  # of a buffer of integers
_DEPTH = 4  # modules of modules: a.b.c.d


class Unnamed(Exception):
    """Something has no description that would be the same in another process."""


def identity(model: nn.Module, *others: Any) -> str | None:
    """A digest of a model and all else that its plan depends on; None where there is none.

    Args:
        others: the example, the budget, and the other arguments of the plan.
    """
    text = _Text()
    try:
        text.add(_surroundings())
        text.add(model)
        text.add(others)
        text.finish()
    except (Unnamed, RecursionError, AttributeError, TypeError, ValueError, RuntimeError):
        return None
    return text.digest()


def _surroundings() -> list[str]:
    """Versions, and the global switches of torch that change what a forward runs."""
    source, ours = hashlib.blake2b(digest_size=16), Path(__file__).parent.parent
    rooms = [path for room in ("graph", "planning") for path in (ours / room).rglob("*.py")]
    for path in sorted([*ours.glob("*.py"), *rooms]):
        source.update(path.read_bytes())
    return [
        sys.version,
        torch.__version__,
        source.hexdigest(),
        *map(str, _switches()),
    ]


def _switches() -> Iterator[object]:
    yield from (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled())
    yield torch.is_inference_mode_enabled()
    yield autocast_now()
    yield torch.are_deterministic_algorithms_enabled()
    yield torch.get_float32_matmul_precision()
    yield torch.backends.mkldnn.enabled
    yield torch.backends.mha.get_fastpath_enabled()
    backends = torch.backends.cuda
    yield from (backends.flash_sdp_enabled(), backends.math_sdp_enabled())
    yield backends.mem_efficient_sdp_enabled()


class _Text:
    """Values written down into a digest. Each object is described once, then called by a number."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        self._numbers: dict[int, int] = {}
        self._kept: list[Any] = []  # alive, so that no id is used twice
        self._waiting: list[Callable[[], None]] = []  # code is described last, not in depth
        self._roots: set[str] = set()

    def digest(self) -> str:
        """The name of all that was added."""
        return self._hash.hexdigest()

    def finish(self) -> None:
        """Describe the code that was named, and the packages it comes from."""
        while self._waiting:
            self._waiting.pop()()
        for root in sorted(self._roots):
            self._write(f"package {root} {_version(root)}")

    def _write(self, words: str) -> None:
        self._hash.update(words.encode("utf-8", "surrogatepass") + b"\0")

    def _again(self, value: Any) -> bool:
        """Whether an object was described before; writes its number."""
        is_old = id(value) in self._numbers
        if not is_old:
            self._numbers[id(value)] = len(self._numbers)
            self._kept.append(value)
        self._write(f"#{self._numbers[id(value)]}")
        return is_old

    def add(self, value: Any) -> None:
        """Describe a value.

        Raises:
            Unnamed: it cannot be described.
        """
        if isinstance(value, enum.Enum):
            self._write(f"{type(value).__qualname__}.{value.name}")
        elif isinstance(value, (*_PLAIN, *_TORCH)) and type(value).__module__ in {
            "builtins",
            "torch",
        }:
            self._write(f"{type(value).__name__} {value!r}")
        elif not self._again(value):
            self._write(type(value).__qualname__)
            self._add_object(value)

    def _add_object(self, value: Any) -> None:
        if isinstance(value, nn.Module):
            self._add_module(value)
        elif isinstance(value, Tensor):
            self._add_tensor(value, values=True)
        elif isinstance(value, (type, FunctionType)):
            self._waiting.append(partial(self._add_code, value))
        elif isinstance(value, Mapping):
            self._add_pairs(value.items())
        elif isinstance(value, AbstractSet):
            self._write(" ".join(sorted(map(_plain_word, value))))
        elif isinstance(value, Sequence):
            self._write(str(len(value)))
            for item in value:
                self.add(item)
        else:
            self._add_other(value)

    def _add_other(self, value: Any) -> None:
        if isinstance(value, MethodType):
            self.add(value.__func__)
            self.add(value.__self__)
        elif isinstance(value, partial):
            self.add((value.func, value.args, value.keywords))
        elif isinstance(value, (BuiltinFunctionType, ModuleType)) or _root(value) == "torch":
            if isinstance(value, (nn.Module, torch.Generator)) or "object at 0x" in repr(value):
                raise Unnamed(repr(value))
            self._write(str(value))
        elif hasattr(value, "__wrapped__"):
            self.add(value.__wrapped__)
        elif isinstance(getattr(value, "__dict__", None), dict) and _is_python(type(value)):
            self.add(type(value))
            self._add_pairs(vars(value).items())
        else:
            raise Unnamed(repr(type(value)))

    def _add_pairs(self, pairs: Any) -> None:
        for key, item in pairs:
            self.add(key)
            self.add(item)
        self._write("end")

    def _add_module(self, module: nn.Module) -> None:
        own = vars(module)
        self.add(type(module))
        for name in ("_parameters", "_buffers"):
            for key, tensor in own[name].items():
                self._write(f"{name} {key}")
                if tensor is not None and not self._again(tensor):
                    self._add_tensor(tensor, values=name == "_buffers" and _matters(tensor))
        for name, value in own.items():
            if name in _HOOKS:
                self._write(name)
                self.add(list(value.values()))
            elif name == "_modules":
                self._add_pairs(value.items())
            elif name == "training" or not _is_bookkeeping(name):
                self._write(name)
                self.add(value)

    def _add_tensor(self, tensor: Tensor, *, values: bool) -> None:
        if type(tensor) not in {Tensor, nn.Parameter, nn.Buffer, FakeTensor}:
            self.add(type(tensor))
        self._write(
            f"{type(tensor).__name__} {tuple(tensor.shape)} {tensor.stride()} {tensor.dtype} "
            f"{tensor.device} {tensor.requires_grad} {tensor.layout} {tensor.is_inference()}"
        )
        if values and not isinstance(tensor, FakeTensor) and tensor.device.type != "meta":
            flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            self._hash.update(flat.numpy().data)

    # ----------------------------------------------------------------------------------- code

    def _add_code(self, value: Any) -> None:
        """A class or a function: of a known package its name, else what it does."""
        root = _root(value)
        self._write(f"{getattr(value, '__module__', '')}.{value.__qualname__}")
        if root in _KNOWN_ROOTS:
            return
        installed = _is_installed(value)
        if installed:
            self._roots.add(root)
        if isinstance(value, type):
            self._add_class(value, follow=not installed)
        else:
            self._add_function(value, follow=not installed)

    def _add_class(self, kind: type, *, follow: bool) -> None:
        for base in kind.__mro__[1:]:
            if _root(base) not in _KNOWN_ROOTS:
                self.add(base)
        for name, value in sorted(vars(kind).items(), key=lambda item: item[0]):
            for function in _functions(value):
                self._write(name)
                self._add_function(function, follow=follow)
            if isinstance(value, _PLAIN) and not name.startswith("__"):
                self._write(f"{name} {value!r}")
            elif follow and not name.startswith("_") and isinstance(value, (tuple, list, dict)):
                self._write(name)
                self._add_loosely(value)

    def _add_function(self, function: FunctionType, *, follow: bool) -> None:
        if self._again(function.__code__) and not function.__closure__:
            return
        names = sorted(set(self._add_bytecode(function.__code__)))
        self._add_loosely((function.__defaults__, function.__kwdefaults__))
        for cell in function.__closure__ or ():
            try:
                self._add_loosely(cell.cell_contents)
            except ValueError:
                self._write("empty cell")
        for name in names:
            if name in function.__globals__:
                self._write(name)
                self._add_named(function.__globals__[name], names, follow=follow, depth=_DEPTH)

    def _add_bytecode(self, code: CodeType) -> Iterator[str]:
        """Write a function's own code; gives the names it looks up."""
        words = [c for c in code.co_consts if not isinstance(c, CodeType)]
        self._hash.update(code.co_code)
        self._write(" ".join(map(_plain_word, words)))
        self._write(f"{code.co_names} {code.co_varnames} {code.co_flags}")
        found = list(code.co_names)
        for inner in code.co_consts:
            if isinstance(inner, CodeType):
                found += self._add_bytecode(inner)
        return iter(found)

    def _add_named(self, value: Any, names: Sequence[str], *, follow: bool, depth: int) -> None:
        """What a name in a function's code stands for."""
        if isinstance(value, ModuleType):
            self._write(value.__name__)
            known = _root(value) in _KNOWN_ROOTS or not depth
            for name in () if known else names:
                if name in vars(value):
                    self._write(name)
                    self._add_named(vars(value)[name], names, follow=follow, depth=depth - 1)
        elif follow:
            self._add_loosely(value)
        else:
            self._add_named_by_package(value)

    def _add_named_by_package(self, value: Any) -> None:
        """What a name in an installed package's code stands for: functions may be replaced."""
        found = value.values() if isinstance(value, Mapping) else (value,)
        for item in found:
            if isinstance(item, FunctionType):
                self._add_borrowed(item)
        if isinstance(value, type):
            self._write(value.__qualname__)
        elif isinstance(value, (bool, int, float, str)):
            self._write(repr(value))

    def _add_borrowed(self, function: FunctionType) -> None:
        """A function that an installed package calls: its own code; all of it if it is ours."""
        if _root(function) in _KNOWN_ROOTS or not _is_installed(function):
            self.add(function)
        else:
            self._write(function.__qualname__)
            if not self._again(function.__code__):
                list(self._add_bytecode(function.__code__))

    def _add_loosely(self, value: Any) -> None:
        """A value that code mentions. What has no description counts by its type."""
        try:
            self.add(value)
        except Unnamed:
            self._write(type(value).__qualname__)


def _plain_word(value: Any) -> str:
    if isinstance(value, (frozenset, set)):
        return "{" + " ".join(sorted(map(_plain_word, value))) + "}"
    if isinstance(value, tuple):
        return "(" + " ".join(map(_plain_word, value)) + ")"
    if not isinstance(value, _PLAIN):
        raise Unnamed(repr(type(value)))
    return repr(value)


def _matters(buffer: Tensor) -> bool:
    """Whether code may branch on a buffer's values."""
    most = _SMALL if buffer.is_floating_point() or buffer.is_complex() else _MOST_ELEMENTS
    return buffer.numel() <= most


def _is_bookkeeping(name: str) -> bool:
    """Attributes that every module has, and that do not change what a forward without hooks is."""
    return name in _MODULE_ATTRIBUTES


_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))


def _functions(value: Any) -> Iterator[FunctionType]:
    """The functions behind an attribute of a class."""
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    candidates = (value.fget, value.fset, value.fdel) if isinstance(value, property) else (value,)
    for candidate in candidates:
        inner = getattr(candidate, "__wrapped__", None)
        for found in (candidate, inner):
            if isinstance(found, FunctionType):
                yield found


def _root(value: Any) -> str:
    """The top package that something comes from."""
    name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
    return str(name or "builtins").partition(".")[0]


def _is_python(kind: type) -> bool:
    """Whether a class is written in Python, so that its objects are what their attributes are."""
    return all(
        base is object or base.__flags__ & (1 << 9)  # Py_TPFLAGS_HEAPTYPE
        for base in kind.__mro__
    )


def _is_installed(value: Any) -> bool:
    module = sys.modules.get(str(getattr(value, "__module__", "")))
    path = str(getattr(module, "__file__", None) or "")
    return "site-packages" in path or "dist-packages" in path


def _version(root: str) -> str:
    """A package's version, as it says itself or as it was installed."""
    own = getattr(sys.modules.get(root), "__version__", None)
    if isinstance(own, str):
        return own
    try:
        return metadata.version(root)
    except metadata.PackageNotFoundError:  # installed under another name: slow to find
        names = metadata.packages_distributions().get(root, [])
        return " ".join(f"{name} {metadata.version(name)}" for name in sorted(set(names)))
