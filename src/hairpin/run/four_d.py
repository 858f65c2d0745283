"""Training a language model whose layers, weights and examples are shared out at once.

One mesh of torch has the axes `pp` (stages of layers), `dp` (other examples), `sp` (parts of each
sequence) and `tp` (slices of each layer's weights). torch's own parts do the work, as they are:
`torch.distributed.pipelining` passes activations from stage to stage, `tensor.parallel` slices
linear maps (Shoeybi et al., 2019, "Megatron-LM"), and DDP or FSDP2 keeps the copies over `dp`
alike. The loss curve is that of one process.

Dims: b rows, s positions, c channels, v vocabulary.
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from hairpin.comm.grads import sync_grads
from hairpin.comm.mesh import Mesh
from hairpin.errors import MeshError
from hairpin.models.llm import IGNORED, LLM, token_losses
from hairpin.run import checkpoint, settings
from hairpin.run.data.text import TokenBatch
from hairpin.run.device import device_of
from hairpin.run.recipes import LLMRecipe
from hairpin.run.sequence_train import (
    Batch,
    Scores,
    Split,
    build_model,
    prepare_batch,
    score_logits,
)
from hairpin.run.steps import update as update_weights

DATA_PARALLEL = ("fsdp", "ddp")


class Stage(nn.Module):
    """Some of a language model's layers; the stages in their order are the model.

    Parameters are called as in the whole model.
    """

    def __init__(self, model: LLM, blocks: range) -> None:
        super().__init__()
        last = blocks.stop == len(model.blocks)
        self.embedding = model.embedding if blocks.start == 0 else None
        self.blocks = nn.ModuleDict({str(index): model.blocks[index] for index in blocks})
        self.norm = model.norm if last else None
        self.head = model.head if last else None

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Tokens `[b, s]` or a stream `[b, s, c]` to the stream, or logits `[b, s, v]`."""
        if self.embedding is not None:
            x = self.embedding(x)
        for block in self.blocks.values():
            x = block(x, positions)
        if self.norm is not None and self.head is not None:
            x = self.head(self.norm(x))
        return x


class FourD:
    """What a step does on a mesh of the axes `pp`, `dp`, `sp` and `tp`; a `Program`."""

    def __init__(
        self,
        recipe: LLMRecipe,
        mesh: Mesh,
        split: Split,
        *,
        data_parallel: str = "fsdp",
        microbatches: int = 1,
    ) -> None:
        """Build this rank's part of the model.

        Args:
            split: how sequences are split over `sp`; its loss is taken over `dp` and `sp`.
            data_parallel: `"fsdp"` or `"ddp"`.
            microbatches: parts that the pipeline cuts this rank's rows into.
        """
        self.recipe, self.mesh, self.microbatches = recipe, mesh, microbatches
        axes = mesh.device_mesh
        self.split = split
        self.device = device_of(mesh)
        self.rows = recipe.batch_size // mesh.size("dp")
        blocks = stage_blocks(recipe.model.depth, mesh.rank("pp"), mesh.size("pp"))
        whole = cast(LLM, build_model(recipe))
        self.stage = Stage(whole, blocks).to(self.device).train()
        split.attach(self.stage)
        if mesh.size("tp") > 1:
            slice_weights(self.stage, axes["tp"])
        self.module = copies_alike(self.stage, mesh, data_parallel)
        self.state = checkpoint.TrainState(
            self.stage,
            _adamw(self.stage, recipe),
            {name: p.detach().clone() for name, p in self.stage.named_parameters()},
        )
        self.schedule = self._schedule() if mesh.size("pp") > 1 else None
        self._count = torch.zeros(())

    def backward(self, batch: Batch) -> float:
        with _quiet():
            return self._backward(self._prepared(batch))

    def _backward(self, batch: TokenBatch) -> float:
        self._count = (batch.labels != IGNORED).sum()
        if self.schedule is None:
            loss = self._loss(self.module(batch.tokens, batch.positions), batch.labels)
            loss.backward()
        else:
            losses: list[Tensor] = []
            given = self._inputs(batch, losses)
            self.schedule.step(*self._tokens(batch), **given, return_outputs=False)
            loss = torch.stack(losses).sum() if losses else torch.zeros((), dtype=torch.float64)
        sync_grads(self.stage, self.mesh, axes=["sp"])
        return self._from_last_stage(loss.detach()[None]).item()

    def update(self, step: int, loss: float) -> float:
        norm = gradient_norm(self.stage.parameters(), self.mesh)
        return update_weights(self.state, self.recipe, step, loss, norm=norm)

    def scores(self, batches: Sequence[Batch]) -> Scores:
        self.stage.eval()
        found = torch.zeros(3, dtype=torch.float64, device=self.device)
        with torch.no_grad(), _quiet():
            for batch in batches:
                whole = self._prepared(_filled_up(cast(TokenBatch, batch), self.rows))
                logits = self._logits(whole)
                if logits is not None:
                    found += score_logits(logits, whole.labels)
        self.stage.train()
        total, correct, count = self._from_last_stage(found)
        return Scores(self.split.loss(total, count).item(), self.split.loss(correct, count).item())

    def load(self, source: Path) -> int:
        info = checkpoint.read_info(source)
        checkpoint.require_model(source, build_model(self.recipe))
        settings.require_same(self.recipe, info.recipe)
        checkpoint.load(source, self.state, part=True)
        return info.step

    def _prepared(self, batch: Batch) -> TokenBatch:
        dtype = getattr(torch, self.recipe.dtype)
        return cast(TokenBatch, prepare_batch(batch, self.split, device=self.device, dtype=dtype))

    def _schedule(self) -> Schedule1F1B:
        stage = PipelineStage(
            self.module,
            self.mesh.rank("pp"),
            self.mesh.size("pp"),
            self.device,
            group=self.mesh.group("pp"),
        )
        return Schedule1F1B(stage, self.microbatches, loss_fn=self._loss, scale_grads=False)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """A microbatch's share of the loss: those of all microbatches add up to it."""
        return self.split.loss(token_losses(logits, labels).total, self._count)

    def _inputs(self, batch: TokenBatch, losses: list[Tensor]) -> dict[str, Any]:
        """What this stage is given from outside; the stream comes from the stage before."""
        given: dict[str, Any] = {"positions": batch.positions}
        if self.mesh.rank("pp") == self.mesh.size("pp") - 1:
            given |= {"target": batch.labels, "losses": losses}
        return given

    def _tokens(self, batch: TokenBatch) -> tuple[Tensor, ...]:
        return (batch.tokens,) if self.mesh.rank("pp") == 0 else ()

    def _logits(self, batch: TokenBatch) -> Tensor | None:
        """The logits of prepared rows, on the last stage; None on others."""
        if self.schedule is None:
            return cast(Tensor, self.module(batch.tokens, batch.positions))
        given = self._inputs(batch, losses=[])  # torch asks for labels here too
        return cast("Tensor | None", self.schedule.eval(*self._tokens(batch), **given))

    def _from_last_stage(self, figures: Tensor) -> Tensor:
        """Figures of the last stage, on every stage, in double precision."""
        figures = figures.double()
        group = self.mesh.group("pp")
        if group is not None:
            dist.broadcast(figures, group=group, group_src=self.mesh.size("pp") - 1)
        return figures


def require_divisible(recipe: LLMRecipe, *, dp: int, tp: int, pp: int, microbatches: int) -> None:
    """Raise unless the model and the batch can be shared out so.

    Raises:
        MeshError: naming what does not divide.
    """
    model = recipe.model
    if pp > model.depth:
        raise MeshError(
            f"pp={pp} stages need a layer each and the model has {model.depth}; give a --pp up to "
            f"that"
        )
    sliced = {"heads": model.heads, "kv_heads": model.kv_heads, "hidden": model.hidden}
    odd = [f"{name}={size}" for name, size in sliced.items() if size % tp]
    if odd:
        raise MeshError(
            f"tp={tp} does not divide {', '.join(odd)} of the model; give a --tp that does"
        )
    if pp > 1 and microbatches < pp:
        raise MeshError(
            f"microbatches={microbatches} leave stages of pp={pp} idle at all times; give "
            f"--microbatches {pp} or more"
        )
    if recipe.batch_size % (dp * (microbatches if pp > 1 else 1)):
        raise MeshError(
            f"a batch of {recipe.batch_size} rows is not shared evenly by dp={dp} ranks and "
            f"{microbatches} microbatches; give a --batch-size that is a multiple of "
            f"{dp * microbatches}"
        )


def require_data_parallel(name: str, *, dp: int, tp: int) -> None:
    """Raise unless copies over `dp` can be kept alike in this way.

    Raises:
        MeshError: there is no such way, or it does not go together with tensor parallelism.
    """
    if name not in DATA_PARALLEL:
        raise MeshError(f"there is no data parallelism {name!r}; choose 'fsdp' or 'ddp'")
    if name == "ddp" and dp > 1 and tp > 1:
        raise MeshError(
            f"torch's DDP does not take the sliced weights of tp={tp}; use --data-parallel fsdp"
        )


def stage_blocks(depth: int, stage: int, stages: int) -> range:
    """The layers of a stage: equal shares, the first stages one more where they do not divide."""
    share, more = divmod(depth, stages)
    start = stage * share + min(stage, more)
    return range(start, start + share + (stage < more))


def slice_weights(stage: Stage, mesh: DeviceMesh) -> None:
    """Megatron's slices: by head in attention, by hidden channel in the MLP, by vocabulary."""
    layer = {
        "attention.to_q": ColwiseParallel(),
        "attention.to_k": ColwiseParallel(),
        "attention.to_v": ColwiseParallel(),
        "attention.to_out": RowwiseParallel(),
        "mlp.gate": ColwiseParallel(),
        "mlp.up": ColwiseParallel(),
        "mlp.down": RowwiseParallel(),
    }
    for block in stage.blocks.values():
        parallelize_module(block, mesh, layer)
    if stage.embedding is not None:
        parallelize_module(stage.embedding, mesh, RowwiseParallel(input_layouts=Replicate()))
    if stage.head is not None:
        parallelize_module(stage.head, mesh, ColwiseParallel(output_layouts=Replicate()))


def copies_alike(stage: Stage, mesh: Mesh, name: str) -> nn.Module:
    """The stage as DDP or FSDP2 runs it, which average its gradients over `dp`."""
    require_data_parallel(name, dp=mesh.size("dp"), tp=mesh.size("tp"))
    if mesh.size("dp") == 1:
        return stage
    if name == "ddp":
        # Several forwards before a backward, as in a pipeline, break DDP's second look at the order
        # of its buckets; where parameters may be unused it does not take that look.
        return DistributedDataParallel(
            stage, process_group=mesh.group("dp"), find_unused_parameters=mesh.size("pp") > 1
        )
    for block in stage.blocks.values():
        fully_shard(block, mesh=mesh.device_mesh["dp"])
    fully_shard(stage, mesh=mesh.device_mesh["dp"])  # in place
    return stage


def gradient_norm(parameters: Iterable[nn.Parameter], mesh: Mesh) -> Tensor:
    """The norm of all gradients of the model, whose stages and slices are on different ranks."""
    squares: dict[tuple[str, ...], Tensor] = {}
    for parameter in parameters:
        if parameter.grad is None:
            continue
        axes, local = _sliced_over(parameter.grad)
        squares[axes] = squares.get(axes, local.new_zeros(())) + local.square().sum()
    for axes in sorted(squares):
        for axis in axes:
            dist.all_reduce(squares[axes], group=mesh.group(axis))
    total = torch.stack(list(squares.values())).sum()
    if mesh.size("pp") > 1:
        dist.all_reduce(total, group=mesh.group("pp"))
    return total.sqrt()


def _sliced_over(grad: Tensor) -> tuple[tuple[str, ...], Tensor]:
    """The axes over which a gradient is sliced, and the slice on this rank."""
    if not isinstance(grad, DTensor):
        return (), grad
    names = grad.device_mesh.mesh_dim_names or ()
    placed = zip(names, grad.placements, strict=True)
    return tuple(name for name, place in placed if not place.is_replicate()), grad.to_local()


def _adamw(stage: Stage, recipe: LLMRecipe) -> torch.optim.AdamW:
    """AdamW; weights that lie on other meshes are groups of their own, as its kernel asks."""
    groups: dict[Any, list[nn.Parameter]] = {}
    for parameter in stage.parameters():
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        groups.setdefault(mesh, []).append(parameter)
    return torch.optim.AdamW(
        [{"params": group} for group in groups.values()],
        lr=recipe.lr,
        betas=recipe.betas,
        weight_decay=recipe.weight_decay,
        fused=True,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without FSDP2's warning that the logits are a view: nothing writes to them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
        yield


def _filled_up(batch: TokenBatch, rows: int) -> TokenBatch:
    """The batch with rows whose labels do not count, for a pipeline takes one size alone."""
    missing = rows - len(batch.tokens)
    if missing == 0:
        return batch
    fill = nn.functional.pad
    length = batch.tokens.shape[1]
    return TokenBatch(
        tokens=fill(batch.tokens, (0, 0, 0, missing)),
        labels=fill(batch.labels, (0, 0, 0, missing), value=IGNORED),
        positions=torch.arange(length).expand(rows, length),
        documents=(*batch.documents, *[(length,)] * missing),
    )
