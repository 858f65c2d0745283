"""The table that says which module computes along which dim, and how its tensors are laid out.

``{"blocks.*.spatial": "b t [s] c"}`` reads: every such module takes, as its first tensor argument,
a tensor of dims b, t, s, c, gives one laid out alike, and computes along s. The last dim of a
pattern is the channels, along which every module computes. Dims in no brackets are computed
position by position, so the module may run on a part of them.
"""

import fnmatch
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from hairpin.errors import PlanError
from hairpin.layout import Pattern


@dataclass(frozen=True)
class Seam:
    """How one module's tensors carry dims.

    Attributes:
        stream: pattern of the tensor that flows through the module, dims it computes along in
            brackets: ``"(b t) [s] c"``. In a table, ``"b t s c -> b t s p"`` also gives ``out``.
        args: patterns of other tensor arguments that carry a dim, by parameter name:
            ``{"timestep": "(b t) e"}``. An argument that is not named is the same on every rank.
        out: patterns of the outputs, where they are not one tensor like ``stream``. None stands for
            an output that nothing uses outside the module.
        stream_arg: name of the parameter that takes the stream; the first tensor if left out.
    """

    stream: str
    args: Mapping[str, str] = field(default_factory=dict)
    out: str | Sequence[str | None] | None = None
    stream_arg: str | None = None

    @property
    def along(self) -> tuple[str, ...]:
        """Dims that the module computes along: the bracketed ones and the channels."""
        pattern = Pattern.parse(self.stream)
        return (*pattern.bracketed, *(pattern.groups[-1] if pattern.groups else ()))

    @property
    def outputs(self) -> tuple[str | None, ...]:
        """Pattern of each output."""
        if self.out is None:
            return (Pattern.parse(self.stream).render(brackets=False),)
        return (self.out,) if isinstance(self.out, str) else tuple(self.out)


Attends = Mapping[str, Any]  # path -> pattern, Seam, or a mapping of a Seam's fields
_SEAM_KEYS = frozenset({"stream", "args", "out", "stream_arg"})


@dataclass(frozen=True)
class Table:
    """A seam table matched against one model.

    Attributes:
        seams: seam of each module path, in the model's order.
        keys: the table's key that matched each module path.
        tensors: pattern of each parameter or buffer that carries a dim.
        shapes: shape of each of those.
        inputs: patterns of the model's own arguments (key ``""``), to learn sizes from.
    """

    seams: Mapping[str, Seam]
    keys: Mapping[str, str]
    tensors: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    inputs: Mapping[str, str]


def match_table(model: nn.Module, attends: "Attends", dims: str | None = None) -> Table:
    """Match a user's table against the model.

    Args:
        attends: module path (``*`` stands for one or more characters) -> a pattern, a
            :class:`Seam`, or a mapping of a Seam's fields; with ``dims`` given, also the bare
            names of the dims computed along, ``"s"``. A path of a parameter or buffer -> the
            pattern of the dims it carries. ``""`` -> patterns of the model's own arguments, by
            parameter name.
        dims: pattern of the stream for entries that only name dims, ``"b t s c"``.

    Raises:
        PlanError: an entry that matches nothing, two entries that match one module, a module inside
            another listed one, or a bare dim that is not in ``dims``.
    """
    if not attends:
        raise PlanError(
            "the attends table is empty; name the modules that compute along a dim, for example "
            "attends={'blocks.*.spatial': 'b t [s] c'}"
        )
    modules = dict(model.named_modules())
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    seams: dict[str, Seam] = {}
    keys: dict[str, str] = {}
    carried: dict[str, str] = {}
    inputs: dict[str, str] = {}
    for key, value in attends.items():
        if key == "":
            inputs = _input_patterns(value)
            continue
        paths = [path for path in modules if path and _matches(key, path)]
        names = [name for name in tensors if _matches(key, name)]
        if paths:
            seam = _as_seam(key, value, dims)
            for path in paths:
                if path in keys:
                    raise PlanError(
                        f"attends: module '{path}' is matched by {keys[path]!r} and by {key!r}; "
                        "keep one"
                    )
                seams[path], keys[path] = seam, key
        elif names:
            carried |= dict.fromkeys(names, _as_seam(key, value, dims).stream)
        else:
            raise PlanError(
                f"attends: {key!r} matches no module or parameter; {_nearest(key, modules)}"
            )
    _refuse_nesting(seams)
    ordered = [path for path in modules if path in seams]
    return Table(
        seams={path: seams[path] for path in ordered},
        keys={path: keys[path] for path in ordered},
        tensors=carried,
        shapes={name: tuple(tensors[name].shape) for name in carried},
        inputs=inputs,
    )


def bind(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call by parameter name; those that ``*args`` takes by position ``"0"``."""
    try:
        names = list(inspect.signature(module.forward).parameters.values())
    except (TypeError, ValueError):
        names = []
    named = [p.name for p in names if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    bound = {
        (named[place] if place < len(named) else str(place)): value
        for place, value in enumerate(args)
    }
    return {**bound, **kwargs}


def manner(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, str]:
    """How a call is made, apart from its numbers: what each argument, given or default, is.

    A tensor, a number, or the type of anything else; of a flag, a text and None the value itself,
    since code branches on those.
    """
    try:
        call = inspect.signature(module.forward).bind(*args, **kwargs)
        call.apply_defaults()
        bound = dict(call.arguments)
    except (TypeError, ValueError):
        bound = bind(module, args, kwargs)
    return {name: _manner_of(value) for name, value in bound.items()}


def _manner_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return "tensor"
    if value is None or isinstance(value, (bool, str)):
        return repr(value)
    return "number" if isinstance(value, (int, float)) else type(value).__name__


def stream_name(path: str, seam: Seam, bound: Mapping[str, Any]) -> str:
    """Name of the argument that carries the stream.

    Raises:
        PlanError: it is not among the arguments, or no argument is a tensor.
    """
    if seam.stream_arg is not None:
        if not isinstance(bound.get(seam.stream_arg), Tensor):
            raise PlanError(
                f"module '{path}': argument {seam.stream_arg!r}, named as its stream, is not a "
                f"tensor in this call; its arguments are {', '.join(bound) or 'none'}"
            )
        return seam.stream_arg
    for name, value in bound.items():
        if isinstance(value, Tensor):
            return name
    raise PlanError(f"module '{path}' was called without a tensor argument to split")


def _matches(key: str, path: str) -> bool:
    return re.fullmatch(fnmatch.translate(key), path) is not None and (
        path.count(".") == key.count(".")
    )


def _input_patterns(value: Any) -> dict[str, str]:
    if not isinstance(value, Mapping):
        raise PlanError(
            f"attends: the value of '' is {value!r}; it names the model's own arguments, write "
            "{'': {'x': 'b t s c'}}"
        )
    for pattern in value.values():
        Pattern.parse(pattern)
    return dict(value)


def _as_seam(key: str, value: Any, dims: str | None) -> Seam:
    if isinstance(value, Seam):
        seam = value
    elif isinstance(value, Mapping) and "stream" in value and set(value) <= _SEAM_KEYS:
        seam = Seam(**value)
    elif isinstance(value, str) and dims is not None and not set(" [(") & set(value):
        seam = Seam(_bracket(key, value, dims))
    elif isinstance(value, str):
        stream, arrow, out = (word.strip() for word in value.partition("->"))
        seam = Seam(stream, out=out) if arrow else Seam(stream)
    else:
        raise PlanError(
            f"attends: the value of {key!r} is {value!r}; write a pattern such as 'b t [s] c', a "
            f"hp.Seam, or a mapping with keys among {', '.join(sorted(_SEAM_KEYS))}"
        )
    for pattern in (seam.stream, *seam.args.values(), *(o for o in seam.outputs if o)):
        if Pattern.parse(pattern).splits:
            raise PlanError(
                f"attends: {key!r} has {pattern!r}; leave out '/axis', the planner chooses it"
            )
    return seam


def _bracket(key: str, value: str, dims: str) -> str:
    along = [word.strip() for word in value.split(",") if word.strip()]
    known = Pattern.parse(dims).dims
    for dim in along:
        if dim not in known:
            raise PlanError(
                f"attends: {key!r} computes along {dim!r}, which is not in dims={dims!r}; name one "
                f"of {', '.join(known)}, or write a whole pattern such as 'b t [{dim}] c'"
            )
    return re.sub(r"[A-Za-z_]\w*", lambda m: f"[{m[0]}]" if m[0] in along else m[0], dims)


def _refuse_nesting(seams: Mapping[str, Seam]) -> None:
    for path in seams:
        for outer in seams:
            if path.startswith(outer + "."):
                raise PlanError(
                    f"attends: module '{path}' lies inside '{outer}', which is listed too; list one"
                )


def _nearest(key: str, modules: Mapping[str, Any]) -> str:
    import difflib

    shapes = list(dict.fromkeys(re.sub(r"\.\d+", ".*", path) for path in modules if path))
    close = difflib.get_close_matches(key, shapes, n=3, cutoff=0.3)
    return f"the nearest are {', '.join(close)}" if close else "the model has no submodules"
