"""Features and parameters by chance, for tests of AlphaFold's trunk."""

import torch

ATOMS = 37


def randomize(model, seed=1):
    """Every parameter random, so that what starts at zero matters too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.3 if parameter.ndim > 1 else 0.5
            parameter.add_(spread * torch.randn(parameter.shape, generator=generator))
    return model


def random_features(config, *, residues=9, rows=6, extra=5, templates=2, seed=0):
    """Processed features of a protein that never was, by DeepMind's names."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=g)

    def letters(high, *shape):
        return torch.randint(high, shape, generator=g)

    aatype = letters(20, residues)
    common = {
        "aatype": aatype,
        "residue_index": torch.arange(residues),
        "seq_mask": torch.ones(residues),
        "template_aatype": letters(20, templates, residues),
        "template_all_atom_positions": 5 * normal(templates, residues, ATOMS, 3),
    }
    masks = torch.ones(templates, residues, ATOMS)
    if config.multimer:
        chain = (torch.arange(residues) >= residues // 2).long()
        return common | {
            "asym_id": chain + 1,
            "entity_id": torch.ones(residues).long(),
            "sym_id": chain + 1,
            "msa": letters(22, rows + extra, residues),
            "deletion_matrix": letters(3, rows + extra, residues).float(),
            "msa_mask": torch.ones(rows + extra, residues),
            "template_all_atom_mask": masks,
        }
    return common | {
        "target_feat": torch.nn.functional.one_hot(aatype + 1, 22).float(),
        "msa_feat": normal(rows, residues, 49),
        "msa_mask": torch.ones(rows, residues),
        "extra_msa": letters(23, extra, residues),
        "extra_has_deletion": torch.zeros(extra, residues),
        "extra_deletion_value": torch.zeros(extra, residues),
        "extra_msa_mask": torch.ones(extra, residues),
        "template_all_atom_masks": masks,
        "template_mask": torch.ones(templates),
        "template_pseudo_beta": 5 * normal(templates, residues, 3),
        "template_pseudo_beta_mask": torch.ones(templates, residues),
    }
