"""The losses: DeepMind's values, cases by hand, symmetries, gradients."""

import itertools

import pytest
import torch

import structure_oracle as oracle
from hairpin.errors import DataError
from hairpin.models.alphafold.atoms import atom14_to_atom37, by_type
from hairpin.models.alphafold.config import AlphaFoldConfig, LossConfig, StructureModuleConfig
from hairpin.models.alphafold.geometry import (
    Rigid,
    quaternion_to_rotation,
    rigid_from_three_points,
)
from hairpin.models.alphafold.losses import labelled, total_loss
from hairpin.models.alphafold.losses.fape import backbone_fape, frame_aligned_point_error
from hairpin.models.alphafold.losses.heads import (
    aligned_error_bins,
    aligned_error_loss,
    distogram_loss,
    lddt_ca,
    masked_msa_loss,
    resolved_loss,
)
from hairpin.models.alphafold.losses.naming import renamed_labels
from hairpin.models.alphafold.losses.torsions import angle_norm_loss, chi_loss
from hairpin.models.alphafold.losses.violations import (
    Atoms,
    find_violations,
    violation_loss,
    violation_metrics,
)
from hairpin.models.alphafold.structure import StructureModule
from hairpin.proteins import residues

PLAIN, FULL = "monomer_notemplates_recycle0", "monomer_ptm_templates_recycle1"
GIVEN = (
    *("aatype", "residue_index", "seq_mask", "all_atom_positions", "all_atom_mask"),
    *("true_msa", "bert_mask", "resolution", "use_clamped_fape"),
)


def leaves(parts, prefix=""):
    for key, value in parts.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


# ------------------------------------------------------------------------------- against DeepMind


@pytest.mark.parametrize("derive", [False, True])
@pytest.mark.parametrize("name", [PLAIN, FULL])
def test_every_part_is_what_deepmind_computes(name, derive):
    """All of about 30 parts, with DeepMind's labels and with labels derived from positions."""
    batch = oracle.features(name)
    batch = {key: batch[key] for key in GIVEN} if derive else batch
    loss, parts = total_loss(oracle.config(aligned_error=name == FULL), batch, oracle.outputs(name))
    wanted = {key: value for key, value in oracle.arrays(name).items() if key.startswith("out/")}
    compared = 0
    for key, value in leaves(parts):
        if f"out/{key}" in wanted and key != "predicted_aligned_error/loss":
            torch.testing.assert_close(value, wanted[f"out/{key}"], rtol=1e-4, atol=2e-5, msg=key)
            compared += 1
    assert compared == 29
    if name == PLAIN:
        torch.testing.assert_close(loss, oracle.arrays(name)["loss"][0], rtol=1e-5, atol=1e-4)


def test_the_aligned_error_loss_is_deepminds_but_for_rounding_on_the_diagonal():
    """A residue's error as seen by itself is 0, which is bin 0, since bin 1 begins above 0.

    In the oracle rounding left about 1e-7 Angstrom there (a product and a difference fused into
    one operation), so that most of the diagonal fell in bin 1. Its loss lies between the two.
    """
    batch, out = oracle.features(FULL), oracle.outputs(FULL)
    head, frames = out["predicted_aligned_error"], out["structure_module"]["final_affines"]
    known, mask = batch["backbone_affine_tensor"], batch["backbone_affine_mask"]
    bins = aligned_error_bins(head["breaks"], frames, known)
    assert not bins.diagonal().any()
    low = aligned_error_loss(head["logits"], bins, mask)
    high = aligned_error_loss(head["logits"], bins.fill_diagonal_(1), mask)
    assert low < head["loss"] < high < low + 0.25

    total, _ = total_loss(oracle.config(aligned_error=True), batch, out)
    rounded = total + 0.1 * (head["loss"] - low)
    torch.testing.assert_close(rounded, oracle.arrays(FULL)["loss"][0], rtol=1e-5, atol=1e-4)


def test_gradients_of_the_aligned_error_are_deepminds():
    """With the oracle's two zeros on the diagonal, which its gradients tell."""
    batch, out = oracle.features(FULL), oracle.outputs(FULL)
    head, pair = out["predicted_aligned_error"], out["representations"]["pair"]
    path = "alphafold/alphafold_iteration/predicted_aligned_error_head/logits//"
    weights, bias = (oracle.arrays(FULL)[f"param/{path}{leaf}"] for leaf in ("weights", "bias"))
    weights, bias = weights.requires_grad_(), bias.requires_grad_()
    logits = pair @ weights + bias
    torch.testing.assert_close(logits, head["logits"], rtol=1e-4, atol=2e-5)

    frames, known = out["structure_module"]["final_affines"], batch["backbone_affine_tensor"]
    bins = aligned_error_bins(head["breaks"], frames, known).fill_diagonal_(1)
    zeros = oracle_zeros(logits.detach().double(), pair.double(), path)
    bins[zeros, zeros] = 0
    loss = 0.1 * aligned_error_loss(logits, bins, batch["backbone_affine_mask"])
    for leaf, grad in zip(
        ("weights", "bias"), torch.autograd.grad(loss, (weights, bias)), strict=True
    ):
        truth = oracle.arrays(FULL)[f"grad/{path}{leaf}"]
        assert (grad - truth).abs().max() < 1e-4 * truth.abs().max()


def oracle_zeros(logits, pair, path):
    """The residues whose own error was exactly 0 when the oracle's gradients were made.

    The bias's gradient counts the entries of bin 0, the weights' adds up their pair channels.
    """
    n = len(logits)
    by_bias, by_weight = (
        oracle.arrays(FULL)[f"grad/{path}{leaf}"].double()[..., 0] * n * n / 0.1
        for leaf in ("bias", "weights")
    )
    share = logits.softmax(-1)[..., 0]
    assert abs(float(share.sum() - by_bias) - 2) < 1e-3
    sums = torch.einsum("ij,ijc->c", share, pair) - by_weight
    own = pair.diagonal(dim1=0, dim2=1).T
    errors = {
        (i, j): float((own[i] + own[j] - sums).abs().max())
        for i, j in itertools.combinations(range(n), 2)
    }
    best, second = sorted(errors.values())[:2]
    assert best < 1e-3
    assert second > 0.1
    return torch.tensor(min(errors, key=errors.get))


# ------------------------------------------------------------------------------------------- FAPE


def chain(r=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(r, 4, generator=generator).double()
    translation = 6 * torch.randn(r, 3, generator=generator).double()
    return torch.cat([q / q.norm(dim=-1, keepdim=True), translation], dim=-1)


def moved(frames, motion):
    rigid = motion.compose(Rigid.from_tensor7(frames))
    return rigid, rigid.translation


@pytest.fixture
def motion():
    q = torch.tensor([0.5, -0.5, 0.5, 0.5]).double()
    return Rigid(quaternion_to_rotation(q), torch.tensor([30.0, -4.0, 1.0]).double())


def test_fape_of_a_rigid_motion_is_zero_and_of_a_mirror_image_is_not(motion):
    frames = chain()
    target, ones = (Rigid.from_tensor7(frames), frames[:, 4:]), torch.ones(9).double()
    error = frame_aligned_point_error(moved(frames, motion), target, ones, ones, unit=10, clamp=10)
    assert float(error) < 1.1e-3  # the root of the epsilon, over the unit
    # reflected in the yz plane; frames of a mirror image are built from reflected atoms
    mirror = torch.tensor([-1.0, 1.0, 1.0]).double()
    rotation = target[0].rotation * mirror[:, None]
    rotation = rotation * torch.tensor([1.0, 1.0, -1.0]).double()  # z from a cross product
    reflected = Rigid(rotation, frames[:, 4:] * mirror)
    error = frame_aligned_point_error(
        (reflected, reflected.translation), target, ones, ones, unit=10, clamp=10
    )
    assert float(error) > 0.3


def test_fape_is_blind_to_the_frame_of_the_prediction(motion):
    a, b, ones = chain(seed=1), chain(seed=2), torch.ones(9).double()
    target = (Rigid.from_tensor7(b), b[:, 4:])
    still = (Rigid.from_tensor7(a), a[:, 4:])
    here, there = (
        frame_aligned_point_error(prediction, target, ones, ones, unit=10, clamp=10)
        for prediction in (still, moved(a, motion))
    )
    torch.testing.assert_close(here, there)


@pytest.mark.parametrize(("clamped", "wanted"), [(1.0, 1.0), (0.0, 2.5), (0.9, 1.15)])
def test_fape_by_hand(clamped, wanted):
    """One frame, one point 25 Angstrom off."""
    frame = Rigid(torch.eye(3)[None], torch.zeros(1, 3))
    points, truth = torch.tensor([[25.0, 0, 0]]), torch.zeros(1, 3)
    error = frame_aligned_point_error(
        (frame, points), (frame, truth), torch.ones(1), torch.ones(1),
        unit=10, clamp=10, clamped=clamped,
    )  # fmt: skip
    torch.testing.assert_close(error, torch.tensor(wanted), rtol=2e-4, atol=0)


def test_masked_frames_and_points_do_not_count():
    a, b = chain(seed=1), chain(seed=2)
    mask = torch.tensor([1.0] * 6 + [0.0] * 3).double()
    config = LossConfig()
    whole = backbone_fape(config, a[None], b, mask)
    cut = backbone_fape(config, a[None, :6], b[:6], mask[:6])
    torch.testing.assert_close(whole, cut)


def test_errors_between_chains_have_their_own_clamp_and_unit():
    """Two rigid chains 100 Angstrom too far apart: right within, 30 / 20 between."""
    truth = chain(10)
    asym_id = torch.tensor([1] * 5 + [2] * 5)
    apart = truth.clone()
    apart[5:, 4] += 100
    config, ones = LossConfig(interface_clamp=30.0), torch.ones(10).double()
    error = backbone_fape(config, apart[None], truth, ones, asym_id=asym_id)
    within = 1e-3  # the root of the epsilon
    assert abs(float(error) - within - 1.5) < 1e-4
    assert float(backbone_fape(config, truth[None], truth, ones, asym_id=asym_id)) < 1.6e-3


# -------------------------------------------------------------------------------- names and angles


def test_symmetric_atoms_are_named_as_the_prediction_has_them():
    batch = labelled({key: oracle.features(FULL)[key] for key in GIVEN})
    same = renamed_labels(batch, batch["atom14_gt_positions"])
    assert not same["alt_naming_is_better"].any()
    other = renamed_labels(batch, batch["atom14_alt_gt_positions"])
    symmetric = batch["rigidgroups_group_is_ambiguous"].amax(-1)
    assert symmetric.sum() >= 4
    assert torch.equal(other["alt_naming_is_better"], symmetric)
    renamed = other["renamed_atom14_gt_positions"]
    assert torch.equal(renamed, batch["atom14_alt_gt_positions"])


def test_chi_loss_by_hand():
    """A symmetric angle may be off by half a turn for nothing; another costs the chord, squared."""
    aatype = torch.tensor([residues.RESTYPES.index(letter) for letter in "FL"])
    chi = torch.tensor([[0.3, 0.7, 0, 0], [0.3, 0.7, 0, 0]])
    mask = torch.tensor([[1.0, 1, 0, 0], [1.0, 1, 0, 0]])
    predicted = chi.clone()
    predicted[:, 1] += torch.pi
    sin_cos = torch.zeros(1, 2, 7, 2)
    sin_cos[0, :, 3:] = torch.stack([predicted.sin(), predicted.cos()], dim=-1)
    loss = chi_loss(sin_cos, chi, mask, aatype)
    torch.testing.assert_close(loss, torch.tensor(4.0 / 4))


def test_angle_norm_loss_by_hand():
    vectors = torch.zeros(1, 3, 7, 2)
    vectors[0, 0, :, 0], vectors[0, 1, :, 1], vectors[0, 2] = 3.0, 1.0, 99.0
    loss = angle_norm_loss(vectors, torch.tensor([1.0, 1.0, 0.0]))
    torch.testing.assert_close(loss, torch.tensor(1.0), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------ heads


def test_lddt_of_a_structure_with_itself_is_one_and_by_hand():
    x = 5 * torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(lddt_ca(x, x, torch.ones(12)), torch.ones(12))
    torch.testing.assert_close(lddt_ca(x + 9, x, torch.ones(12)), torch.ones(12))
    # on a line: 0, 4, 8, 40; the third moves by 1.5, so two of four thresholds hold
    line = torch.tensor([0.0, 4, 8, 40])[:, None] * torch.tensor([1.0, 0, 0])
    bent = line.clone()
    bent[2, 0] += 1.5
    score = lddt_ca(bent, line, torch.ones(4))
    torch.testing.assert_close(score, torch.tensor([0.75, 0.75, 0.5, 1.0]))
    score = lddt_ca(bent, line, torch.tensor([1.0, 1, 0, 1]))
    torch.testing.assert_close(score[:2], torch.ones(2))


def test_even_logits_cost_the_log_of_their_number():
    beta, mask = torch.randn(5, 3), torch.tensor([1.0, 1, 1, 0, 1])
    edges = torch.linspace(2.3125, 21.6875, 63)
    loss, true = distogram_loss(torch.zeros(5, 5, 64), edges, beta, mask)
    torch.testing.assert_close(loss, torch.tensor(64.0).log())
    torch.testing.assert_close(true[0, 1], (beta[0] - beta[1]).norm(), rtol=1e-3, atol=1e-3)
    msa = torch.randint(0, 23, (4, 5))
    loss = masked_msa_loss(torch.zeros(4, 5, 23), msa, torch.ones(4, 5))
    torch.testing.assert_close(loss, torch.tensor(23.0).log())
    loss = resolved_loss(torch.zeros(5, 37), torch.ones(5, 37), torch.ones(5, 37))
    torch.testing.assert_close(loss, torch.tensor(2.0).log())


def test_distances_fall_in_the_right_bins():
    """A logit of 50 in the right bin costs nothing: 2 A is bin 0, 10 A bin 25, 40 A the last."""
    beta = torch.tensor([[0.0, 0, 0], [2, 0, 0], [10, 0, 0], [40, 0, 0]])
    edges = torch.linspace(2.3125, 21.6875, 63)
    right = {(0, 0): 0, (0, 1): 0, (0, 2): 25, (0, 3): 63, (1, 2): 19, (1, 3): 63, (2, 3): 63}
    logits = torch.zeros(4, 4, 64)
    for i, j in itertools.product(range(4), repeat=2):
        logits[i, j, right.get((min(i, j), max(i, j)), 0)] = 50
    loss, _ = distogram_loss(logits, edges, beta, torch.ones(4))
    assert float(loss) < 1e-6


# ------------------------------------------------------------------------------------- violations


def dipeptide(letters="AA"):
    """Residues with ideal geometry, joined by an ideal trans peptide bond."""
    aatype = torch.tensor([residues.RESTYPES.index(letter) for letter in letters])
    angles = torch.full((len(letters), 7), torch.pi).double()
    angles[aatype == residues.RESTYPES.index("P"), 3:5] = torch.tensor([-0.44, 0.61]).double()
    own = oracle.built(angles, aatype)
    rows = [own[0]]
    for x in own[1:]:
        rows.append(joined(rows[-1], x))
    positions = torch.stack(rows)
    exists = by_type(residues.atom14_exists(), aatype, positions)
    return Atoms(positions, exists, aatype, torch.arange(len(letters)))


def joined(before, x):
    """``x`` moved so that its N follows C of ``before``: 1.329 A, 116.57 and 121.35 degrees."""
    ca, c, o = before[1], before[2], before[3]
    along = (c - ca) / (c - ca).norm()
    up = o - c - (o - c) @ along * along
    up = up / up.norm()
    cos, sin = 0.4473, (1 - 0.4473**2) ** 0.5
    n = c + 1.329 * (cos * along - sin * up)
    to_c = (c - n) / (c - n).norm()
    flat = along - (along @ to_c) * to_c
    flat = flat / flat.norm()
    next_ca = n + (-0.5203 * to_c + (1 - 0.5203**2) ** 0.5 * flat) * 1.46
    source = frame_of(x[0], x[1], x[2])
    third = next_ca + (next_ca - n) / 1.46 * 0.5 - flat
    target = frame_of(n, next_ca, third)
    return target.apply(source.apply_inverse(x))


def frame_of(n, ca, c):
    return rigid_from_three_points(ca, n, c)


def test_ideal_residues_have_no_violations():
    atoms = dipeptide("ARNDCQEGHILKMFPSTWYV")
    within = find_violations(LossConfig(), atoms)["within_residues"]
    assert not within["per_atom_violations"].any()
    assert float(within["per_atom_loss_sum"].max()) == 0


def test_an_ideal_peptide_bond_has_no_violation_and_a_broken_one_has():
    atoms, config = dipeptide("AGA"), LossConfig()
    found = find_violations(config, atoms)
    assert float(violation_loss(found, atoms.exists)) < 1e-6
    assert not found["total_per_residue_violations_mask"].any()
    metrics = violation_metrics(found, atoms, torch.ones(3).double())
    assert not any(metrics.values())

    broken = atoms.positions.clone()
    broken[2] += 10
    worse = Atoms(broken, atoms.exists, atoms.aatype, atoms.residue_index)
    found = find_violations(config, worse)
    between = found["between_residues"]
    assert between["connections_per_residue_violation_mask"].tolist() == [0, 1, 1]
    length = (broken[2, 0] - broken[1, 2]).norm()
    per_bond = length - 1.329 - 12 * 0.014
    assert abs(float(between["bonds_c_n_loss_mean"] - per_bond / 2)) < 1e-4
    metrics = violation_metrics(found, worse, torch.ones(3).double())
    assert abs(float(metrics["violations_extreme_ca_ca_distance"]) - 0.5) < 1e-6
    assert abs(float(metrics["violations_per_residue"]) - 2 / 3) < 1e-6

    for gap in (
        Atoms(broken, atoms.exists, atoms.aatype, torch.tensor([0, 1, 7])),
        Atoms(broken, atoms.exists, atoms.aatype, atoms.residue_index, torch.tensor([1, 1, 2])),
    ):
        assert not find_violations(config, gap)["total_per_residue_violations_mask"].any()


def test_overlapping_atoms_clash_by_what_their_radii_say():
    """Two CA atoms 1 Angstrom apart: 1.7 + 1.7 - 1.5 - 1 = 0.9 too near."""
    positions = torch.zeros(2, 14, 3)
    positions[1, 1, 0] = 1.0
    exists = torch.zeros(2, 14)
    exists[:, 1] = 1
    found = find_violations(
        LossConfig(), Atoms(positions, exists, torch.tensor([7, 7]), torch.tensor([0, 5]))
    )["between_residues"]
    torch.testing.assert_close(found["clashes_mean_loss"], torch.tensor(0.9), rtol=1e-4, atol=1e-4)
    assert found["clashes_per_atom_clash_mask"].sum() == 2
    torch.testing.assert_close(found["clashes_per_atom_loss_sum"][:, 1], torch.full((2,), 0.9))


def test_disulphide_bridges_do_not_clash():
    positions = torch.zeros(2, 14, 3)
    positions[1, 5, 0] = 2.0
    exists = torch.zeros(2, 14)
    exists[:, 5] = 1
    atoms = Atoms(positions, exists, torch.tensor([4, 4]), torch.tensor([0, 5]))
    assert not find_violations(LossConfig(), atoms)["between_residues"][
        "clashes_per_atom_clash_mask"
    ].any()


# ------------------------------------------------------------------------------------ everything


def tiny_batch(dtype, *, multimer=False, known=True):
    """Five residues, one unknown and one padding; every predicted atom at one place at first."""
    torch.manual_seed(0)
    aatype = torch.tensor([3, 7, 17, 14, 20, 0])
    exists = by_type(residues.atom37_exists(), aatype, torch.empty(0, dtype=dtype))
    mask = torch.tensor([1.0, 1, 1, 1, 1, 0], dtype=dtype)
    batch = {
        "aatype": aatype,
        "residue_index": torch.arange(6),
        "seq_mask": mask,
        "all_atom_positions": 5 * torch.randn(6, 37, 3, dtype=dtype) * exists[..., None],
        "all_atom_mask": exists * mask[:, None] * (1.0 if known else 0.0),
        "true_msa": torch.randint(0, 20, (2, 6)),
        "bert_mask": torch.ones(2, 6, dtype=dtype),
    }
    return batch | ({"asym_id": torch.tensor([1, 1, 1, 2, 2, 2])} if multimer else {})


def tiny_outputs(batch, dtype, *, multimer):
    config = StructureModuleConfig(
        c_s=8, c_z=4, layers=2, heads=2, sidechain_channels=8, multimer=multimer
    )
    module = StructureModule(config).to(dtype)
    zeros = [torch.zeros(shape, dtype=dtype, requires_grad=True) for shape in ((6, 8), (6, 6, 4))]
    logits = {
        name: torch.zeros(shape, dtype=dtype, requires_grad=True)
        for name, shape in {
            "distogram": (6, 6, 64), "masked_msa": (2, 6, 23), "predicted_lddt": (6, 50),
            "experimentally_resolved": (6, 37), "predicted_aligned_error": (6, 6, 64),
        }.items()
    }  # fmt: skip
    out = {name: {"logits": value} for name, value in logits.items()}
    out["distogram"]["bin_edges"] = torch.linspace(2.3125, 21.6875, 63, dtype=dtype)
    out["predicted_aligned_error"]["breaks"] = torch.linspace(0, 31, 63, dtype=dtype)
    out["structure_module"] = module(*zeros, batch["aatype"], batch["seq_mask"])
    return out, [*zeros, *logits.values(), *module.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("multimer", [False, True])
@pytest.mark.parametrize("known", [True, False])
def test_loss_and_gradients_are_finite_where_all_atoms_coincide(dtype, multimer, known):
    batch = tiny_batch(dtype, multimer=multimer, known=known)
    out, leaves_ = tiny_outputs(batch, dtype, multimer=multimer)
    config = AlphaFoldConfig(multimer=multimer, loss=LossConfig(aligned_error=0.1))
    loss, parts = total_loss(config, batch, out)
    loss.backward()
    assert loss.dtype == dtype
    assert loss.isfinite()
    assert all(value.isfinite().all() for _, value in leaves(parts))
    for leaf in leaves_[2:]:
        assert leaf.grad is None or leaf.grad.isfinite().all()
    assert leaves_[0].grad.isfinite().all()
    assert ("chain_centre_loss" in parts["structure_module"]) == multimer


def test_autocast_does_not_coarsen_the_losses():
    batch, out = oracle.features(FULL), oracle.outputs(FULL)
    config = oracle.config(aligned_error=True)
    plain, _ = total_loss(config, batch, out)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, _ = total_loss(config, batch, out)
    assert torch.equal(cast, plain)


def test_confidence_is_learnt_from_good_structures_only():
    batch = tiny_batch(torch.float32)
    out, _ = tiny_outputs(batch, torch.float32, multimer=False)
    config = AlphaFoldConfig(loss=LossConfig(aligned_error=0.1))
    heads = "predicted_lddt", "experimentally_resolved", "predicted_aligned_error"
    for resolution, counts in ((2.0, True), (3.5, False), (0.0, False)):
        _, parts = total_loss(config, batch | {"resolution": torch.tensor(resolution)}, out)
        assert all((parts[head]["loss"] > 0) == counts for head in heads)
        assert parts["distogram"]["loss"] > 0


def test_terms_without_weight_are_left_out():
    batch = tiny_batch(torch.float32)
    out, _ = tiny_outputs(batch, torch.float32, multimer=False)
    only = LossConfig(
        distogram=0, masked_msa=0, plddt=0, experimentally_resolved=0, aligned_error=0, violation=0
    )
    loss, parts = total_loss(AlphaFoldConfig(loss=only), batch, {**out, "distogram": None})
    assert {*parts} == {"structure_module"}
    assert "violations" not in parts["structure_module"]
    assert loss == parts["structure_module"]["loss"]


def test_a_batch_without_labels_says_so():
    batch = tiny_batch(torch.float32)
    del batch["all_atom_positions"]
    with pytest.raises(DataError, match="lacks all_atom_positions, so there is nothing"):
        total_loss(AlphaFoldConfig(), batch, {})


def test_a_perfect_prediction_costs_next_to_nothing():
    """The oracle's known structure given as the prediction: FAPE near 0."""
    batch = labelled({key: oracle.features(FULL)[key] for key in GIVEN})
    traj = batch["backbone_affine_tensor"][None]
    error = backbone_fape(LossConfig(), traj, traj[0], batch["backbone_affine_mask"])
    assert float(error) < 1.1e-3
    wide = atom14_to_atom37(batch["atom14_gt_positions"], batch["aatype"])
    exists = batch["all_atom_mask"][..., None] * batch["atom37_atom_exists"][..., None]
    torch.testing.assert_close(wide, batch["all_atom_positions"] * exists)
