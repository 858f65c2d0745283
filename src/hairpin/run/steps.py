"""What every training loop shares: its state, moving the weights, seeding, going on with a run."""

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hairpin.comm.mesh import Mesh
from hairpin.errors import CheckpointError, NumericsError, RecipeError
from hairpin.run import checkpoint, metrics, settings
from hairpin.run.device import device_of
from hairpin.run.recipes.schedule import Schedule


def new_state(model: nn.Module, recipe: Schedule) -> checkpoint.TrainState:
    """A model that has done no step, its AdamW, and a copy of its weights to average in."""
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=recipe.lr,
        betas=recipe.betas,
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    ema = {name: p.detach().clone() for name, p in model.named_parameters()}
    return checkpoint.TrainState(model, optimizer, ema)


def load(source: Path, state: checkpoint.TrainState, recipe: Schedule) -> int:
    """Go on from a checkpoint; returns the number of steps it has done.

    Raises:
        CheckpointError: it is damaged, or belongs to another model or recipe.
    """
    info = checkpoint.read_info(source)
    checkpoint.require_model(source, state.model)
    settings.require_same(recipe, info.recipe)
    checkpoint.load(source, state)
    return info.step


def save(
    out_dir: Path, state: checkpoint.TrainState, recipe: Schedule, *, step: int, keep: int
) -> Path:
    """Write the checkpoint of a step of the run in ``out_dir``; the newest ``keep`` stay."""
    folder = out_dir / checkpoint.FOLDER
    return checkpoint.save(folder, state, step=step, recipe=settings.to_plain(recipe), keep=keep)


def held_bytes(model: nn.Module) -> int:
    """What training holds beside activations and gradients.

    Weights, their average and AdamW's two moments; of a sharded weight what this rank has.
    """
    local = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
    return 4 * sum(p.numel() * p.element_size() for p in local)


def update(
    state: checkpoint.TrainState,
    recipe: Schedule,
    step: int,
    loss: float,
    *,
    norm: Tensor | None = None,
) -> float:
    """Clip, move the weights and their average; returns the norm before clipping.

    Args:
        norm: that of all gradients, where this rank has only a part of them.

    Raises:
        NumericsError: the loss or a gradient is not finite; nothing has moved.
    """
    if norm is None:
        norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), recipe.clip_norm)
    else:
        torch.nn.utils.clip_grads_with_norm_(
            state.model.parameters(), recipe.clip_norm, norm, foreach=False
        )
    _require_finite(step, loss, norm)
    for group in state.optimizer.param_groups:
        group["lr"] = recipe.learning_rate(step)
    state.optimizer.step()
    state.optimizer.zero_grad()
    keep = recipe.ema_decay_at(step)
    with torch.no_grad():
        for name, parameter in state.model.named_parameters():
            state.ema[name].lerp_(parameter, 1 - keep)
    return norm.item()


def over_ranks(mesh: Mesh, *figures: int) -> list[tuple[int, ...]]:
    """These whole numbers of every rank, by rank."""
    mine = torch.tensor(figures, device=device_of(mesh))
    if mesh.world == 1:
        return [figures]
    all_ = [torch.empty_like(mine) for _ in range(mesh.world)]
    dist.all_gather(all_, mine)
    return [tuple(theirs.tolist()) for theirs in all_]


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Let torch's generator depend on nothing but the step and the share of the examples."""
    (state,) = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)
    torch.manual_seed(int(state))


def open_log(out_dir: Path, first_step: int, source: Path | None) -> metrics.MetricsLog:
    """The metrics file of a run that is new, or goes on from the checkpoint ``source``."""
    history = None if source is None else checkpoint.history_of(source)
    path = out_dir / checkpoint.METRICS_FILE
    return metrics.MetricsLog(path, after_step=first_step, history=history)


def require_work(first_step: int, last_step: int, source: Path | None) -> None:
    """Raise unless there is a step to do.

    Raises:
        RecipeError: fewer than one step is asked for.
        CheckpointError: the checkpoint has done them all.
    """
    if last_step < 1:
        raise RecipeError(f"got steps={last_step}; train for at least 1 step")
    if last_step <= first_step:
        raise CheckpointError(
            f"{source} has done {first_step} steps already and the run is to stop at {last_step}; "
            f"give --steps above {first_step}"
        )


def _require_finite(step: int, loss: float, norm: Tensor) -> None:
    if np.isfinite(loss) and norm.isfinite():
        return
    what = "the norm of the gradients" if np.isfinite(loss) else "the loss"
    value = norm.item() if np.isfinite(loss) else loss
    raise NumericsError(
        f"{what} is {value} at step {step + 1}; this step was not taken and the last checkpoint is "
        "good: lower lr or clip_norm in the recipe, or try --dtype float64"
    )
