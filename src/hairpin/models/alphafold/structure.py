"""The structure module: residues as frames that attend to one another and move.

Jumper et al. 2021, Suppl. Sec. 1.8, Algs 20 to 24. Submodules carry the names that the public
weight files give them, slashes as dots, so that no table of names is needed.

Dims: r, i, j residues, h heads, d channels of a head, p points of a head, l layers, c channels.
Frames inside are in units of ``position_scale`` Angstrom; what leaves is in Angstrom.
"""

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from hairpin.models.alphafold.atoms import (
    IdealGeometry,
    atom14_to_atom37,
    by_type,
    frames_to_atom14,
    torsions_to_frames,
)
from hairpin.models.alphafold.config import StructureModuleConfig
from hairpin.models.alphafold.geometry import Rigid, own_precision, rotate, turn_quaternion
from hairpin.models.alphafold.primitives import Linear
from hairpin.proteins import residues

MASKED = -1e5  # added to the logits of masked pairs
_ONE = math.log(math.e - 1)  # softplus of it is 1


class StructureModule(nn.Module):
    """The single and pair representations to atoms: Suppl. Alg. 20.

    One `FoldIteration`, its parameters shared, runs ``layers`` times. All of it is computed in the
    parameters' dtype, whatever autocast says, because positions need float32.
    """

    def __init__(self, config: StructureModuleConfig) -> None:
        super().__init__()
        self.config = config
        self.single_layer_norm = nn.LayerNorm(config.c_s)
        self.initial_projection = Linear(config.c_s, config.c_s)
        self.pair_layer_norm = nn.LayerNorm(config.c_z)
        self.fold_iteration = FoldIteration(config)

    def forward(
        self,
        single: Float[Tensor, "r c_s"],
        pair: Float[Tensor, "r r c_z"],
        aatype: Int[Tensor, " r"],
        mask: Float[Tensor, " r"],
    ) -> dict[str, Tensor | dict[str, Tensor]]:
        """Fold.

        Returns:
            ``traj[l, r, 7]``, each layer's backbone frames as a quaternion and a translation;
            ``sidechains``, a dict of ``angles_sin_cos[l, r, 7, 2]``,
            ``unnormalized_angles_sin_cos``, ``frames[l, r, 8, 12]`` (see `Rigid.to_flat12`) and
            ``atom_pos[l, r, 14, 3]``; ``final_affines[r, 7]``, ``final_atom14_positions``,
            ``final_atom14_mask``, ``final_atom_positions[r, 37, 3]``, ``final_atom_mask[r, 37]``;
            ``act[r, c_s]``, the last single representation, which pLDDT is predicted from.
        """
        dtype = self.initial_projection.weight.dtype
        with own_precision(single):
            return self._fold(single.to(dtype), pair.to(dtype), aatype, mask.to(dtype))

    def _fold(
        self, single: Tensor, pair: Tensor, aatype: Tensor, mask: Tensor
    ) -> dict[str, Tensor | dict[str, Tensor]]:
        initial = self.single_layer_norm(single)
        act = self.initial_projection(initial)
        z = self.pair_layer_norm(pair)
        ideal = IdealGeometry.of(aatype, initial)
        quaternion = act.new_tensor([1.0, 0.0, 0.0, 0.0]).expand(len(act), 4)
        translation = act.new_zeros(len(act), 3)

        layers: list[dict[str, Tensor]] = []
        for _ in range(self.config.layers):
            act, quaternion, translation, layer = self.fold_iteration(
                act, quaternion, translation, z, mask, initial=initial, ideal=ideal
            )
            layers.append(layer)
            quaternion = quaternion.detach()  # Suppl. Sec. 1.8.3: torques do not flow back

        stacked = {name: torch.stack([layer[name] for layer in layers]) for name in layers[0]}
        return self._result(act, stacked, aatype, mask)

    def _result(
        self, act: Tensor, layers: dict[str, Tensor], aatype: Tensor, mask: Tensor
    ) -> dict[str, Tensor | dict[str, Tensor]]:
        traj, last = layers.pop("traj"), layers["atom_pos"][-1]
        atom_mask = by_type(residues.atom37_exists(), aatype, act) * mask[:, None]
        return {
            "traj": traj,
            "sidechains": layers,
            "final_affines": traj[-1],
            "final_atom14_positions": last,
            "final_atom14_mask": by_type(residues.atom14_exists(), aatype, act) * mask[:, None],
            "final_atom_positions": atom14_to_atom37(last, aatype) * atom_mask[..., None],
            "final_atom_mask": atom_mask,
            "act": act,
        }


class FoldIteration(nn.Module):
    """One layer: attend, transform, move the frames, place the atoms: Suppl. Alg. 20, l. 5-15."""

    def __init__(self, config: StructureModuleConfig) -> None:
        super().__init__()
        c = config.c_s
        self.config = config
        attention = MultimerPointAttention if config.multimer else InvariantPointAttention
        self.invariant_point_attention = attention(config)
        self.attention_layer_norm = nn.LayerNorm(c)
        for name, last in _numbered("transition", config.transition_layers):
            self.add_module(name, Linear(c, c, init="final" if last else "relu"))
        self.transition_layer_norm = nn.LayerNorm(c)
        self.dropout = nn.Dropout(config.dropout)
        if config.multimer:
            self.quat_rigid = nn.ModuleDict({"rigid": Linear(c, 6, init="final")})
        else:
            self.affine_update = Linear(c, 6, init="final")
        self.rigid_sidechain = RigidSidechain(config)

    def forward(
        self,
        act: Float[Tensor, "r c"],
        quaternion: Float[Tensor, "r 4"],
        translation: Float[Tensor, "r 3"],
        z: Float[Tensor, "r r c_z"],
        mask: Float[Tensor, " r"],
        *,
        initial: Float[Tensor, "r c"],
        ideal: IdealGeometry,
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """The next single representation and frames, and what this layer predicts, in Angstrom."""
        frames = Rigid.from_tensor7(torch.cat([quaternion, translation], dim=-1))
        act = act + self.invariant_point_attention(act, z, mask, frames)
        act = self.attention_layer_norm(self.dropout(act))
        act = self.transition_layer_norm(self.dropout(act + self._transition(act)))

        # Suppl. Alg. 23 "BackboneUpdate": turn by the quaternion (1, b, c, d), then move
        turn, move = self._update(act).split(3, dim=-1)
        translation = translation + rotate(frames.rotation, move)
        quaternion = turn_quaternion(quaternion, turn)

        moved = torch.cat([quaternion, translation * self.config.position_scale], dim=-1)
        layer = self.rigid_sidechain(act, initial, Rigid.from_tensor7(moved), ideal)
        return act, quaternion, translation, layer | {"traj": moved}

    def _transition(self, act: Tensor) -> Tensor:
        for name, last in _numbered("transition", self.config.transition_layers):
            act = getattr(self, name)(act)
            act = act if last else F.relu(act)
        return act

    def _update(self, act: Tensor) -> Tensor:
        linear = self.quat_rigid["rigid"] if self.config.multimer else self.affine_update
        return linear(act)  # type: ignore[no-any-return]


class InvariantPointAttention(nn.Module):
    """Attention by content, by pair and by distance of points: Suppl. Alg. 22.

    A rigid motion of all frames together leaves the result as it is.
    """

    def __init__(self, config: StructureModuleConfig) -> None:
        super().__init__()
        self.config = config
        h = config.heads
        self.trainable_point_weights = nn.Parameter(torch.full((h,), _ONE))
        self.attention_2d = Linear(config.c_z, h)
        features = h * (config.scalar_v + 4 * config.point_v + config.c_z)
        self.output_projection = Linear(features, config.c_s, init="final")
        self._add_projections()

    def _add_projections(self) -> None:
        c = self.config
        points = c.point_qk + c.point_v
        self.q_scalar = Linear(c.c_s, c.heads * c.scalar_qk)
        self.kv_scalar = Linear(c.c_s, c.heads * (c.scalar_qk + c.scalar_v))
        self.q_point_local = Linear(c.c_s, c.heads * 3 * c.point_qk)
        self.kv_point_local = Linear(c.c_s, c.heads * 3 * points)

    def scalars(self, act: Float[Tensor, "r c"]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys ``[h, r, d_qk]`` and values ``[h, r, d_v]``."""
        c = self.config
        q = self.q_scalar(act).unflatten(-1, (c.heads, -1))
        kv = self.kv_scalar(act).unflatten(-1, (c.heads, -1))
        k, v = kv.split([c.scalar_qk, c.scalar_v], dim=-1)
        return q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)

    def points(self, act: Float[Tensor, "r c"]) -> tuple[Tensor, Tensor, Tensor]:
        """Points of queries, keys ``[h, r, p_qk, 3]`` and values in the residues' own frames."""
        c = self.config
        q = self.q_point_local(act).unflatten(-1, (3, c.heads, -1)).permute(2, 0, 3, 1)
        kv = self.kv_point_local(act).unflatten(-1, (3, c.heads, -1)).permute(2, 0, 3, 1)
        k, v = kv.split([c.point_qk, c.point_v], dim=-2)
        return q, k, v

    def lengths(self, points: Float[Tensor, "... 3"]) -> Float[Tensor, "..."]:
        """Lengths with a finite gradient at 0."""
        return (points.square().sum(-1) + 1e-8).sqrt()

    def forward(
        self,
        act: Float[Tensor, "r c"],
        z: Float[Tensor, "r r c_z"],
        mask: Float[Tensor, " r"],
        frames: Rigid,
    ) -> Float[Tensor, "r c"]:
        """What to add to ``act``."""
        q, k, v = self.scalars(act)
        at = frames[None, :, None]  # [1, r, 1]
        q_points, k_points, v_points = (at.apply(points) for points in self.points(act))

        # each of the three terms has variance 1/3 (a point's squared distance has 9/2)
        by_content = (q * (3 * self.config.scalar_qk) ** -0.5) @ k.transpose(-1, -2)
        by_pair = self.attention_2d(z).permute(2, 0, 1) * 3**-0.5
        apart = _squared_distances(q_points.flatten(-2), k_points.flatten(-2))  # [h, i, j]
        weight = F.softplus(self.trainable_point_weights) * (13.5 * self.config.point_qk) ** -0.5
        logits = by_content + by_pair - 0.5 * weight[:, None, None] * apart
        logits = logits + MASKED * (1 - mask[:, None] * mask[None, :])
        attention = logits.softmax(-1)

        content = (attention @ v).transpose(0, 1).flatten(1)  # [r, h d]
        points = (attention @ v_points.flatten(-2)).unflatten(-1, (-1, 3))
        local = at.apply_inverse(points).transpose(0, 1).flatten(1, 2)  # [r, h p, 3]
        pairs = torch.einsum("hij,ijc->ihc", attention, z).flatten(1)
        features = [content, *local.unbind(-1), self.lengths(local), pairs]
        return self.output_projection(torch.cat(features, dim=-1))  # type: ignore[no-any-return]


class MultimerPointAttention(InvariantPointAttention):
    """The same with AlphaFold-Multimer's projections: separate, heads outermost."""

    def _add_projections(self) -> None:
        c, h = self.config, self.config.heads
        self.q_scalar_projection = Linear(c.c_s, h * c.scalar_qk, bias=False, heads=h)
        self.k_scalar_projection = Linear(c.c_s, h * c.scalar_qk, bias=False, heads=h)
        self.v_scalar_projection = Linear(c.c_s, h * c.scalar_v, bias=False, heads=h)
        self.q_point_projection = PointProjection(c.c_s, h, c.point_qk)
        self.k_point_projection = PointProjection(c.c_s, h, c.point_qk)
        self.v_point_projection = PointProjection(c.c_s, h, c.point_v)

    def scalars(self, act: Float[Tensor, "r c"]) -> tuple[Tensor, Tensor, Tensor]:
        """As in `InvariantPointAttention`."""
        flat = self.q_scalar_projection(act), self.k_scalar_projection(act)
        q, k = (x.unflatten(-1, (self.config.heads, -1)).transpose(0, 1) for x in flat)
        v = self.v_scalar_projection(act).unflatten(-1, (self.config.heads, -1)).transpose(0, 1)
        return q, k, v

    def points(self, act: Float[Tensor, "r c"]) -> tuple[Tensor, Tensor, Tensor]:
        """As in `InvariantPointAttention`."""
        return (
            self.q_point_projection(act),
            self.k_point_projection(act),
            self.v_point_projection(act),
        )

    def lengths(self, points: Float[Tensor, "... 3"]) -> Float[Tensor, "..."]:
        """Lengths, at least 1e-8, with a gradient of 0 there."""
        return points.square().sum(-1).clamp(min=1e-16).sqrt()


class PointProjection(nn.Module):
    """Points in each residue's own frame: ``act[r, c] -> [h, r, p, 3]``."""

    def __init__(self, c: int, heads: int, points: int) -> None:
        super().__init__()
        self.point_projection = Linear(c, heads * 3 * points, heads=heads)
        self.heads = heads

    def forward(self, act: Float[Tensor, "r c"]) -> Float[Tensor, "h r p 3"]:
        """The points."""
        flat = self.point_projection(act)
        return flat.unflatten(-1, (self.heads, 3, -1)).permute(1, 0, 3, 2)  # type: ignore[no-any-return]


class RigidSidechain(nn.Module):
    """Torsion angles, and from them all atoms: Suppl. Alg. 20, lines 11 to 15, and Alg. 24."""

    def __init__(self, config: StructureModuleConfig) -> None:
        super().__init__()
        c = config.sidechain_channels
        self.blocks = config.sidechain_blocks
        self.input_projection = Linear(config.c_s, c)
        self.input_projection_1 = Linear(config.c_s, c)
        for name, _ in _numbered("resblock1", self.blocks):
            self.add_module(name, Linear(c, c, init="relu"))
        for name, _ in _numbered("resblock2", self.blocks):
            self.add_module(name, Linear(c, c, init="final"))
        self.unnormalized_angles = Linear(c, 14)

    def forward(
        self,
        act: Float[Tensor, "r c"],
        initial: Float[Tensor, "r c"],
        backbone: Rigid,
        ideal: IdealGeometry,
    ) -> dict[str, Tensor]:
        """Angles ``[r, 7, 2]``, frames ``[r, 8, 12]`` and atoms ``[r, 14, 3]``, in Angstrom."""
        a = self.input_projection(F.relu(act)) + self.input_projection_1(F.relu(initial))
        for (first, _), (second, _) in zip(
            _numbered("resblock1", self.blocks), _numbered("resblock2", self.blocks), strict=True
        ):
            a = a + getattr(self, second)(F.relu(getattr(self, first)(F.relu(a))))
        angles = self.unnormalized_angles(F.relu(a)).unflatten(-1, (7, 2))
        sin_cos = angles / angles.square().sum(-1, keepdim=True).clamp(min=1e-12).sqrt()
        frames = torsions_to_frames(ideal, backbone, sin_cos)
        return {
            "angles_sin_cos": sin_cos,
            "unnormalized_angles_sin_cos": angles,
            "frames": frames.to_flat12(),
            "atom_pos": frames_to_atom14(ideal, frames),
        }


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """``a[h, i, n], b[h, j, n] -> [h, i, j]``, exact where a matrix product would cancel."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square()


def _numbered(name: str, count: int) -> Iterator[tuple[str, bool]]:
    """``name``, ``name_1``, ``name_2``, ... as weight files number them; and whether it is last."""
    for i in range(count):
        yield f"{name}_{i}" if i else name, i == count - 1
