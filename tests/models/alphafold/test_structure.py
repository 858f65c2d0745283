"""The structure module: against DeepMind's outputs, its symmetry, its gradients."""

import pytest
import torch
from torch.nn import functional as F

import structure_oracle as oracle
from hairpin.models.alphafold.config import StructureModuleConfig
from hairpin.models.alphafold.geometry import Rigid, quaternion_to_rotation
from hairpin.models.alphafold.losses import labelled, structure_loss
from hairpin.models.alphafold.losses.heads import plddt_loss
from hairpin.models.alphafold.structure import (
    InvariantPointAttention,
    MultimerPointAttention,
    StructureModule,
)

FILES = [
    "monomer_notemplates_recycle0",
    "monomer_ptm_templates_recycle1",
    "monomer5_ptm_recycle2",
    "multimer_v3_three_chains",
]


@pytest.mark.parametrize("name", FILES)
def test_everything_is_what_deepmind_computes(name):
    features, truth = oracle.features(name), oracle.outputs(name)
    representations = truth["representations"]
    with torch.no_grad():
        out = oracle.structure_module(name)(
            representations["single"],
            representations["pair"],
            features["aatype"],
            features["seq_mask"],
        )
    torch.testing.assert_close(
        out["act"], representations["structure_module"], rtol=1e-4, atol=2e-5
    )
    wanted = truth["structure_module"]
    for key in {"final_atom_positions", "final_atom14_positions", "traj", "final_affines"} & {
        *wanted
    }:
        torch.testing.assert_close(out[key], wanted[key], rtol=0, atol=1e-3)
    for key in {"final_atom_mask", "final_atom14_mask"} & {*wanted}:
        assert torch.equal(out[key], wanted[key])
    for key, value in wanted.get("sidechains", {}).items():
        torch.testing.assert_close(out["sidechains"][key], value, rtol=1e-4, atol=1e-3)


def test_parameter_gradients_are_deepminds():
    """Those of the structure module come from its own losses and, through pLDDT, its head's."""
    name = "monomer_ptm_templates_recycle1"
    features, truth = oracle.features(name), oracle.outputs(name)
    config = oracle.config(aligned_error=True)
    module = oracle.structure_module(name)
    representations = truth["representations"]
    out = module(
        representations["single"], representations["pair"], features["aatype"], features["seq_mask"]
    )
    loss = structure_loss(config, labelled(features), out)["loss"]
    logits = plddt_logits(name, out["act"])
    positions, mask = features["all_atom_positions"], features["all_atom_mask"]
    head = plddt_loss(logits, out["final_atom_positions"], positions, mask)
    (loss + config.loss.plddt * head).backward()
    for key, parameter in module.named_parameters():
        truth = oracle.gradient(name, module, key)
        error, largest = (parameter.grad - truth).abs().max(), truth.abs().max()
        if key.endswith("attention_2d.bias"):  # a softmax does not see it: 0 but for rounding
            assert max(largest, parameter.grad.abs().max()) < 1e-6
            continue
        assert error < 1e-4 * largest, (key, float(error / largest))


def plddt_logits(name, act):
    """The pLDDT head by hand, with the oracle's parameters."""
    x = F.layer_norm(act, act.shape[-1:], *oracle.head(name, "input_layer_norm"))
    for layer in ("act_0", "act_1"):
        x = F.relu(F.linear(x, *oracle.head(name, layer)))
    return F.linear(x, *oracle.head(name, "logits"))


def small(*, multimer: bool = False) -> StructureModuleConfig:
    return StructureModuleConfig(
        c_s=12, c_z=8, layers=2, heads=3, sidechain_channels=8, multimer=multimer
    )


def shake(module: torch.nn.Module) -> None:
    """Give every parameter a value, since many start at 0."""
    torch.manual_seed(7)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)


@pytest.mark.parametrize("kind", [InvariantPointAttention, MultimerPointAttention])
def test_point_attention_does_not_see_a_rigid_motion_of_all(kind):
    torch.manual_seed(0)
    attention = kind(small(multimer=kind is MultimerPointAttention)).double()
    shake(attention)
    r = 7
    act, z = torch.randn(r, 12).double(), torch.randn(r, r, 8).double()
    mask = torch.tensor([1.0] * 6 + [0.0]).double()
    q = torch.nn.functional.normalize(torch.randn(r + 1, 4).double(), dim=-1)
    frames = Rigid(quaternion_to_rotation(q[:r]), torch.randn(r, 3).double())
    motion = Rigid(quaternion_to_rotation(q[r]), torch.tensor([3.0, -20.0, 5.0]).double())

    here = attention(act, z, mask, frames)
    there = attention(act, z, mask, motion.compose(frames))

    torch.testing.assert_close(here, there, rtol=1e-9, atol=1e-9)
    frames.translation[0] += 1
    assert (attention(act, z, mask, frames) - here).abs().max() > 1e-3


def test_masked_residues_do_not_matter():
    torch.manual_seed(0)
    module = StructureModule(small()).double().eval()
    shake(module)
    single, pair = torch.randn(6, 12).double(), torch.randn(6, 6, 8).double()
    aatype, mask = torch.arange(6), torch.tensor([1.0, 1, 1, 1, 1, 0]).double()

    whole = module(single, pair, aatype, mask)
    cut = module(single[:5], pair[:5, :5], aatype[:5], mask[:5])

    torch.testing.assert_close(whole["act"][:5], cut["act"])
    torch.testing.assert_close(whole["final_atom_positions"][:5], cut["final_atom_positions"])
    assert not whole["final_atom_positions"][5].any()
    assert not whole["final_atom_mask"][5].any()


@pytest.mark.parametrize("multimer", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_finite_from_the_very_start(multimer, dtype):
    """All residues begin at the origin, where every distance is 0."""
    module = StructureModule(small(multimer=multimer)).to(dtype)
    single = torch.zeros(5, 12, dtype=dtype, requires_grad=True)
    pair = torch.zeros(5, 5, 8, dtype=dtype, requires_grad=True)
    out = module(single, pair, torch.tensor([0, 7, 17, 14, 20]), torch.ones(5, dtype=dtype))
    total = out["traj"].square().sum() + out["sidechains"]["atom_pos"].square().sum()
    (total + out["act"].sum()).backward()
    grads = {name: p.grad for name, p in module.named_parameters()}
    grads |= {"single": single.grad, "pair": pair.grad}
    assert all(grad is not None and grad.isfinite().all() for grad in grads.values())


def test_a_rotation_is_learnt_by_its_own_layer_only():
    """Suppl. Sec. 1.8.3: no gradient flows through the rotations between layers."""
    module = StructureModule(small()).double()
    shake(module)
    seen = []
    update = module.fold_iteration.affine_update
    update.register_forward_hook(lambda *_args: seen.append(_args[2]) or _args[2].retain_grad())
    single, pair = torch.randn(4, 12).double(), torch.randn(4, 4, 8).double()
    module.fold_iteration.invariant_point_attention.output_projection.weight.data.zero_()
    out = module(single, pair, torch.arange(4), torch.ones(4).double())
    out["traj"][-1].square().sum().backward()
    first, last = (update.grad for update in seen)
    assert not first[:, :3].any()  # the first layer's turn has no part in the last layer's frames
    assert first[:, 3:].any()  # but its move has
    assert last[:, :3].any()


def test_the_public_sizes_have_the_public_number_of_parameters():
    module = StructureModule(StructureModuleConfig())
    assert sum(p.numel() for p in module.parameters()) == 2_019_116


def test_autocast_does_not_coarsen_positions():
    module = StructureModule(small()).eval()
    shake(module)
    single, pair, aatype = torch.randn(5, 12), torch.randn(5, 5, 8), torch.arange(5)
    plain = module(single, pair, aatype, torch.ones(5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = module(single, pair, aatype, torch.ones(5))
        coarse = module.initial_projection(single)
    assert coarse.dtype == torch.bfloat16  # so autocast was at work
    assert torch.equal(cast["final_atom_positions"], plain["final_atom_positions"])
