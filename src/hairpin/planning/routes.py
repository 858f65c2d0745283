"""Attaching a sequence plan to a model: every attention along the sequence goes over the ranks.

Nothing of the model's code or of its library is changed. Modules of one model are given another
way to attend: our own by their forward, those of transformers by an attention implementation that
is registered beside the library's own, all others by watching for
``F.scaled_dot_product_attention`` while a named module runs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from hairpin.errors import SequenceError
from hairpin.exchange.api import attention
from hairpin.exchange.mask import Mask
from hairpin.exchange.stream import put_together, take
from hairpin.kernels.random import uniform
from hairpin.kernels.routed import GatedLinearAttention, SoftmaxAttention
from hairpin.planning.sequence import SequencePlan

_MARK = "_hairpin_route"
_NAME = "hairpin"  # of the attention implementation in transformers


@dataclass(frozen=True)
class Route:
    """Where a model's stream is split, and which of its modules attend along it.

    Patterns are module paths with ``*`` as in file names.

    Attributes:
        attention: modules that call ``F.scaled_dot_product_attention`` along the sequence.
        blocks: path of the list of blocks whose stream ``[b, s, c]`` is split before the first and
            put together after the last; None where the caller splits the batch
            (``plan.shard``).
        along: arguments of the blocks that go along the sequence too, and their dim.
    """

    attention: tuple[str, ...] = ()
    blocks: str | None = None
    along: Mapping[str, int] = field(default_factory=dict)


# by the class that a library gives its model; whatever holds one of them is routed inside
_KNOWN: Mapping[str, Route] = {
    "transformers.models.vit.modeling_vit.ViTModel": Route(blocks="layers"),
    "timm.models.vision_transformer.VisionTransformer": Route(
        attention=("blocks.*.attn",), blocks="blocks"
    ),
    "diffusers.models.transformers.transformer_wan.WanTransformer3DModel": Route(
        attention=("blocks.*.attn1",), blocks="blocks", along={"rotary_emb": 1}
    ),
    "hairpin.models.vit.model.ViT": Route(blocks="blocks"),
}


def route(model: nn.Module, plan: SequencePlan, way: Route | None = None) -> nn.Module:
    """Send every attention of ``model`` along the plan's sequence over the ranks.

    Args:
        way: where to, for a model that is not known.

    Raises:
        SequenceError: the model already has a route, or nothing in it can be routed.
    """
    if any(_MARK in module.__dict__ for module in model.modules()):
        raise SequenceError(
            f"this {type(model).__name__} already carries a sequence plan; call hp.detach(model) "
            "first"
        )
    attachment = Attached(plan)
    try:
        _route(model, attachment, way)
    except BaseException:
        _take_off(model)
        raise
    return model


def _route(model: nn.Module, attachment: "Attached", way: Route | None) -> None:
    prefix, way = (("", way) if way is not None else _known(model)) or ("", Route())
    attachment.mark(model)
    counts = [
        _route_own(model, attachment),
        _route_transformers(model, attachment),
        _route_named(model, prefix, way, attachment),
    ]
    if not sum(counts):
        raise SequenceError(
            f"no attention of this {type(model).__name__} can be routed: it has no hairpin "
            "SoftmaxAttention, is no model of transformers with an attention interface, and is not "
            "known; name its modules that call F.scaled_dot_product_attention with "
            "hp.Route(attention=['blocks.*.attn'])"
        )
    if way.blocks is not None:
        _route_stream(model, prefix + way.blocks, way, attachment)
    _route_dropout(model, attachment)


def unroute(model: nn.Module) -> SequencePlan | None:
    """Take a sequence plan off a model; None if it carries none."""
    attachment = model.__dict__.get(_MARK)
    if not isinstance(attachment, Attached):
        return None
    _take_off(model)
    return attachment.plan


def _take_off(model: nn.Module) -> None:
    """Take off what the modules of this model carry; a copy of it keeps its own."""
    for module in model.modules():
        attachment = module.__dict__.pop(_MARK, None)
        if isinstance(module.__dict__.get("forward"), _ROUTED):
            del module.__dict__["forward"]
        drop_hooks(module, lambda hook: isinstance(hook, _STREAM))
        if isinstance(attachment, Attached) and attachment.before is not None:
            named: Any = module
            if _is_transformers(module) and named.config._attn_implementation == _NAME:
                named.set_attn_implementation(attachment.before)


def drop_hooks(module: nn.Module, is_ours: Callable[[object], bool]) -> None:
    """Remove the forward hooks of a module that are ours."""
    registries: list[list[dict[int, Any]]] = [
        [module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs],
        [
            module._forward_hooks,
            module._forward_hooks_with_kwargs,
            module._forward_hooks_always_called,
        ],
    ]
    for hooks, *flags in registries:
        for key in [key for key, hook in hooks.items() if is_ours(hook)]:
            for registry in (hooks, *flags):
                registry.pop(key, None)


class Attached:
    """One plan on one model.

    Attributes:
        before: attention implementation that a model of transformers had; None for other models.
    """

    def __init__(self, plan: SequencePlan) -> None:
        self.plan = plan
        self.before: str | None = None

    def mark(self, module: nn.Module) -> None:
        """Let a module know the plan."""
        module.__dict__[_MARK] = self

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """Attention over the ranks; ``mask`` refines that of the plan."""
        if options.get("dropout"):
            options["seed"] = _seed()
        return attention(q, k, v, self.plan.split, **options)

    def replace_forward(self, module: nn.Module, forward: Callable[..., object]) -> None:
        """Give one module another forward."""
        module.__dict__["forward"] = forward


def _seed() -> int:
    """One draw from torch's CPU generator: alike on all ranks, and again when recomputed."""
    return int(torch.randint(2**62, ()).item())


def _name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _known(model: nn.Module) -> tuple[str, Route] | None:
    for path, module in model.named_modules():
        for kind in type(module).__mro__:
            known = _KNOWN.get(f"{kind.__module__}.{kind.__qualname__}")
            if known is not None:
                return (f"{path}." if path else ""), known
    return None


# ---------------------------------------------------------------------------------- our own models


def _route_own(model: nn.Module, attachment: Attached) -> int:
    count = 0
    for path, module in model.named_modules():
        if isinstance(module, SoftmaxAttention):
            mask = replace(attachment.plan.mask, causal=module.causal)
            attachment.replace_forward(module, _Softmax(attachment, mask))
        elif isinstance(module, GatedLinearAttention):
            attachment.replace_forward(module, _linear(attachment, path))
        else:
            continue
        count += 1
    return count


@dataclass(frozen=True)
class _Softmax:
    attached: Attached
    mask: Mask

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attached.attend(q, k, v, mask=self.mask)


def _linear(attachment: Attached, path: str) -> Callable[..., Tensor]:
    plan = attachment.plan
    if plan.split.order.kind != "contiguous" or plan.split.heads > 1:
        raise SequenceError(
            f"module '{path}' is linear attention, whose states pass from one part of the sequence "
            f"to the next, and the plan deals it {plan.split.order.kind} over "
            f"{plan.split.heads} heads places; plan with method='linear'"
        )
    return _Linear(plan)


@dataclass(frozen=True)
class _Linear:
    plan: SequencePlan

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
        return self.plan.linear_attention(q, k, v, log_decay)


# ----------------------------------------------------------------------------------- transformers


def _route_transformers(model: nn.Module, attachment: Attached) -> int:
    models: list[Any] = [m for m in model.modules() if _is_transformers(m)]
    if not models:
        return 0
    inner = models[0]
    if not type(inner)._can_set_attn_implementation():
        raise SequenceError(
            f"{type(inner).__name__} does not take attention implementations (transformers' "
            "attention interface), so its attention cannot be routed; use a version or model that "
            "does, or name its modules with hp.Route(attention=[...])"
        )
    _register()
    attachment.before = inner.config._attn_implementation
    inner.set_attn_implementation(_NAME)
    for module in inner.modules():
        attachment.mark(module)
    return 1


def _is_transformers(module: nn.Module) -> bool:
    kinds = {f"{k.__module__}.{k.__qualname__}" for k in type(module).__mro__}
    return "transformers.modeling_utils.PreTrainedModel" in kinds


def _register() -> None:
    """Add our implementation beside the library's own; it keeps no state, modules know the plan."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(_NAME, transformers_attention)
    AttentionMaskInterface.register(_NAME, transformers_mask)


def transformers_mask(*args: Any, attention_mask: Tensor | None = None, **options: Any) -> Any:
    """The padding mask ``[b, s]`` as it is: what a position may see follows from the plan."""
    return attention_mask


def transformers_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in each attention of a routed model.

    Raises:
        SequenceError: something that attention over ranks does not do.
    """
    attachment = module.__dict__.get(_MARK)
    label = type(module).__name__
    if not isinstance(attachment, Attached):
        raise SequenceError(
            f"{label} has attention implementation 'hairpin' but carries no sequence plan; attach "
            "one with hp.parallelize(model, plan)"
        )
    for name in ("softcap", "position_bias", "s_aux", "cache"):
        if options.get(name) is not None:
            raise SequenceError(
                f"{label} attends with {name!r}, which attention over ranks does not do yet"
            )
    if attention_mask is not None and attention_mask.dim() != 2:
        raise SequenceError(
            f"{label} got a mask of shape {tuple(attention_mask.shape)}; give the padding mask "
            "[b, s] that plan.shard cuts, or none"
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    mask = replace(attachment.plan.mask, causal=bool(causal))
    if sliding_window is not None:
        mask = replace(mask, window=sliding_window)
    key_mask = None if attention_mask is None else attention_mask.bool()
    out = attachment.attend(
        query, key, value, mask=mask, key_mask=key_mask, scale=scaling, dropout=dropout
    )
    return out.transpose(1, 2).contiguous(), None


# -------------------------------------------------------------------------- modules that are named


def _route_named(model: nn.Module, prefix: str, way: Route, attachment: Attached) -> int:
    patterns = [prefix + pattern for pattern in way.attention]
    found = [
        (path, module)
        for path, module in model.named_modules()
        if any(fnmatchcase(path, pattern) for pattern in patterns)
    ]
    missing = [p for p in patterns if not any(fnmatchcase(path, p) for path, _ in found)]
    if missing:
        raise SequenceError(
            f"this {type(model).__name__} has no module {missing[0]!r}; its modules are named "
            f"like {', '.join(path for path, _ in list(model.named_modules())[1:6])}"
        )
    for path, module in found:
        attachment.replace_forward(module, _Watched(module, path, attachment))
    return len(found)


class _Watched:
    """Runs a module's own forward, its one call of torch's attention going over the ranks."""

    def __init__(self, module: nn.Module, path: str, attachment: Attached) -> None:
        self.forward = type(module).forward.__get__(module)
        self.path, self.attachment = path, attachment

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        watch = _Watch(self.path, self.attachment)
        with watch:
            result = self.forward(*args, **kwargs)
        if not watch.calls:
            raise SequenceError(
                f"module '{self.path}' did not call F.scaled_dot_product_attention, so its "
                "attention along the sequence was not seen; switch its fused attention on, or name "
                "the module that attends"
            )
        return result


_SDPA = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")  # in torch's order


class _Watch(TorchFunctionMode):
    def __init__(self, path: str, attachment: Attached) -> None:
        super().__init__()
        self.path, self.attachment, self.calls = path, attachment, 0

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        self.calls += 1
        call = dict(zip(_SDPA, args, strict=False)) | kwargs
        hides = call.get("attn_mask")
        if hides is not None:
            raise SequenceError(
                f"module '{self.path}' attends with a mask of shape {tuple(hides.shape)}, which is "
                "of this rank's part alone; masks follow from the plan"
            )
        mask = replace(self.attachment.plan.mask, causal=bool(call.get("is_causal", False)))
        return self.attachment.attend(
            *(call[name] for name in _SDPA[:3]),
            mask=mask,
            scale=call.get("scale"),
            dropout=call.get("dropout_p", 0.0),
        )


# --------------------------------------------------------------------------------------- the stream


def _route_stream(model: nn.Module, path: str, way: Route, attachment: Attached) -> None:
    blocks = dict(model.named_modules()).get(path)
    if not isinstance(blocks, (nn.ModuleList, nn.Sequential)) or not len(blocks):
        raise SequenceError(
            f"this {type(model).__name__} has no list of blocks at {path!r}; name it with "
            "hp.Route(blocks='...')"
        )
    plan = attachment.plan
    blocks[0].register_forward_pre_hook(_Enter(plan), with_kwargs=True)
    if way.along:
        for block in blocks:
            block.register_forward_pre_hook(_Beside(plan, way.along), with_kwargs=True)
    blocks[len(blocks) - 1].register_forward_hook(_Leave(plan))


Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class _Enter:
    """Cuts the stream before the first block."""

    plan: SequencePlan

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
        if args:
            return (take(args[0], self.plan.split, 1), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: take(kwargs[name], self.plan.split, 1)}


@dataclass(frozen=True)
class _Beside:
    """Cuts what goes along the stream, before each block."""

    plan: SequencePlan
    along: Mapping[str, int]

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
        bound = _bound(block, args, kwargs)
        along = {name: dim for name, dim in self.along.items() if name in bound}
        parts = {name: _taken(bound[name], self.plan, dim) for name, dim in along.items()}
        new = tuple(parts.get(name, x) for name, x in zip(bound, args, strict=False))
        return new, {name: parts.get(name, x) for name, x in kwargs.items()}


@dataclass(frozen=True)
class _Leave:
    """Puts the stream together after the last block."""

    plan: SequencePlan

    def __call__(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            whole = put_together(output[0], self.plan.split, 1, grad="replicated")
            return (whole, *output[1:])
        return put_together(output, self.plan.split, 1, grad="replicated")


def _bound(block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    from inspect import signature

    return dict(signature(block.forward).bind_partial(*args, **kwargs).arguments)


def _taken(x: Any, plan: SequencePlan, dim: int) -> Any:
    if isinstance(x, (tuple, list)):
        return type(x)(_taken(item, plan, dim) for item in x)
    return take(x, plan.split, dim) if isinstance(x, Tensor) else x


# -------------------------------------------------------------------------------------- dropout


def _route_dropout(model: nn.Module, attachment: Attached) -> None:
    for module in model.modules():
        if type(module) is nn.Dropout:
            attachment.replace_forward(module, _Dropout(module, attachment.plan))


@dataclass(frozen=True)
class _Dropout:
    """Dropout of ``[b, s, ...]`` by global position: the same mask on any number of ranks.

    A tensor whose dim 1 is not this rank's part of the sequence is taken as whole.
    """

    module: nn.Dropout
    plan: SequencePlan

    def __call__(self, x: Tensor) -> Tensor:
        p = float(self.module.p)
        if not self.module.training or p == 0.0:
            return x
        seed = _seed()
        positions, length = self.plan.positions, self.plan.length
        if x.dim() < 2 or x.shape[1] != len(positions):
            index = torch.arange(x.numel(), device=x.device).view(x.shape)
        else:
            rest = x[0, 0].numel()
            rows = torch.arange(x.shape[0])[:, None] * length + positions
            index = (rows[..., None] * rest + torch.arange(rest)).view(x.shape).to(x.device)
        kept = uniform(index, seed) >= p
        return torch.where(kept, x / (1.0 - p), torch.zeros((), dtype=x.dtype, device=x.device))


_ROUTED = (_Softmax, _Linear, _Watched, _Dropout)
_STREAM = (_Enter, _Beside, _Leave)
