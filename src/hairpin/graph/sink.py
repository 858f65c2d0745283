"""Arguments of blocks that are large and cheap to make: made inside the block, part by part.

A model builds its attention mask once, ``[1, 1, t, t]`` from a few vectors of positions, and hands
it to every block. Held whole it soon is the largest tensor of all. Where the graph around the
blocks shows how such an argument is made, the vectors are handed over instead.
"""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from hairpin.graph.export import Port, Traced
from hairpin.graph.leaf import Recipe, run_block
from hairpin.graph.lengths import hint, is_open

_LEAST_GAIN = 16  # times smaller than the argument is what it is made of
_CHEAP = frozenset(
    f"aten.{name}"
    for name in [
        "arange",
        "full",
        "zeros",
        "ones",
        "scalar_tensor",
        "index",
        "cat",
        "stack",
        "_to_copy",
        "to",
        "expand",
        "where",
        "masked_fill",
        "__and__",
        "__or__",
        "__xor__",
    ]
)


@dataclass(frozen=True, eq=False)
class Sunk:
    """A graph whose blocks make some of their arguments themselves.

    Attributes:
        around: the graph, with other arguments for these blocks.
        calls: path of a block -> traced values of the tensors that it is given now.
    """

    around: Traced
    calls: Mapping[str, tuple[Tensor, ...]]


def sink(around: Traced, groups: Sequence[Sequence[str]], least_bytes: int) -> Sunk | None:
    """Let blocks make what is large and cheap; None where there is nothing of that kind.

    Args:
        around: a graph with calls of blocks; it is changed.
        groups: paths of the blocks that share one graph: their calls stay alike.
        least_bytes: of an argument worth it.
    """
    nodes = {
        port.name: next(iter(node.users))
        for node, port in zip(around.placeholders, around.inputs, strict=True)
        if port.kind == "block"
    }
    ports = list(around.inputs)
    calls: dict[str, tuple[Tensor, ...]] = {}
    for paths in groups:
        called = [path for path in paths if path in nodes]
        found = [_Sinking(nodes[path], least_bytes).found() for path in called]
        if not called or not found[0] or any(_words(f) != _words(found[0]) for f in found):
            continue
        for path, recipes in zip(called, found, strict=True):
            node = nodes[path]
            block: Any = node.args[0]
            place = around.placeholders.index(block)
            node.args = (block, *_arguments(node, recipes))
            made = tuple(each.recipe for each in recipes)
            ports[place] = Port("block", path, replace(ports[place].call, recipes=made))
            calls[path] = tuple(n.meta["val"] for n in node.args[1:])  # type: ignore[union-attr]
    if not calls:
        return None
    around.graph.eliminate_dead_code()
    return Sunk(replace(around, inputs=tuple(ports)), calls)


@dataclass(frozen=True, eq=False)
class _Made:
    """A recipe, and the nodes around that it takes beside the call's own arguments."""

    recipe: Recipe
    extra: tuple[fx.Node, ...]


def _words(recipes: Sequence[_Made]) -> list[tuple[Any, ...]]:
    return [(each.recipe.place, each.recipe.takes, each.recipe.words) for each in recipes]


def _arguments(node: fx.Node, recipes: Sequence[_Made]) -> list[fx.Node]:
    made = {each.recipe.place for each in recipes}
    kept: list[Any] = [arg for place, arg in enumerate(node.args[1:]) if place not in made]
    return kept + [extra for each in recipes for extra in each.extra]


@dataclass(eq=False)
class _Sinking:
    """One call of a block, and which of its tensors it can make itself."""

    node: fx.Node
    least_bytes: int
    extra: list[fx.Node] = field(default_factory=list)

    def found(self) -> list[_Made]:
        """Recipes for all of its large and cheap arguments."""
        arguments: list[Any] = list(self.node.args[1:])
        sunk = {}
        for place, argument in enumerate(arguments):
            nbytes = _storage_bytes(argument)
            if nbytes < self.least_bytes:
                continue
            body = _Body.of(argument)
            if body is not None and body.new_bytes(arguments) * _LEAST_GAIN <= nbytes:
                sunk[place] = body
        kept = [a for place, a in enumerate(arguments) if place not in sunk]
        return [self._made(place, body, kept) for place, body in sunk.items()]

    def _made(self, place: int, body: "_Body", kept: Sequence[fx.Node]) -> _Made:
        new = []
        takes = []
        for source in body.inputs:
            if source in kept:
                takes.append(kept.index(source))
                continue
            if source not in self.extra:
                self.extra.append(source)
                new.append(source)
            takes.append(len(kept) + self.extra.index(source))
        graph = body.written()
        return _Made(Recipe(place, tuple(takes), graph, graph.code), tuple(new))


@dataclass(eq=False)
class _Body:
    """The steps that make a tensor, and what they begin with."""

    result: fx.Node
    steps: list[fx.Node]
    inputs: list[fx.Node]

    @classmethod
    def of(cls, result: fx.Node) -> "_Body | None":
        """Everything cheap that leads to a tensor; None where it is not cheap itself."""
        if not _is_cheap(result):
            return None
        steps: set[fx.Node] = set()
        inputs: dict[fx.Node, None] = {}
        waiting = [result]
        while waiting:
            node = waiting.pop()
            if node in steps or node in inputs:
                continue
            if _is_cheap(node):
                steps.add(node)
                waiting += node.all_input_nodes
            elif isinstance(node.meta.get("val"), Tensor):
                inputs[node] = None
            else:
                return None
        ordered = [node for node in result.graph.nodes if node in steps]
        given = [node for node in result.graph.nodes if node in inputs]
        return cls(result, ordered, given) if given else None

    def new_bytes(self, given: Sequence[fx.Node]) -> int:
        """Of what it begins with, beside what the block is given anyway."""
        return sum(_storage_bytes(node) for node in self.inputs if node not in given)

    def written(self) -> fx.GraphModule:
        """The steps as a function of the inputs."""
        graph = fx.Graph()
        env: dict[fx.Node, fx.Node] = {
            node: graph.placeholder(f"given_{number}") for number, node in enumerate(self.inputs)
        }
        for step in self.steps:
            env[step] = graph.node_copy(step, env.__getitem__)
            env[step].meta = {}
        graph.output(env[self.result])
        return fx.GraphModule(nn.Module(), graph)


def _is_cheap(node: fx.Node) -> bool:
    """Whether a step may as well be done again in every block: no product, no sum, no lookup."""
    if node.op != "call_function" or node.target is run_block:
        return False
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return target is not operator.getitem and is_open(node.meta.get("val"))
    packet = str(target.overloadpacket)
    return torch.Tag.nondeterministic_seeded not in target.tags and (
        packet in _CHEAP
        or packet.startswith("aten.sym_")
        or torch.Tag.pointwise in target.tags
        or target.is_view
    )


def _storage_bytes(node: Any) -> int:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return hint(value.untyped_storage().nbytes()) if isinstance(value, Tensor) else 0
