"""Making sure that all ranks of an axis are about to do the same thing."""

import hashlib
from collections.abc import Sequence

import torch

from hairpin.comm.mesh import Mesh
from hairpin.comm.transport import Link
from hairpin.errors import DisagreementError

_DIGEST_WORDS = 2


def require_agreement(statement: str, mesh: Mesh, axis: str) -> None:
    """Raise on every rank of ``axis`` unless all of them make the same ``statement``.

    Raises:
        DisagreementError: naming every rank's statement.
        CommError: a rank is gone or did not answer.
    """
    statements = all_statements(statement, mesh, axis)
    if len(set(statements)) == 1:
        return
    lines = "\n".join(f"  rank {rank}: {line}" for rank, line in enumerate(statements))
    raise DisagreementError(
        f"the ranks of mesh axis {axis!r} were given different work:\n{lines}\n"
        "Give every rank of this axis the same inputs, plan and mode"
    )


def all_statements(statement: str, mesh: Mesh, axis: str) -> list[str]:
    """What every rank of ``axis`` says, by rank.

    Exchanges 16 bytes with each peer, and only where statements differ the statements themselves.

    Raises:
        CommError: a rank is gone or did not answer.
    """
    size = mesh.size(axis)
    if size == 1:
        return [statement]
    digest = hashlib.blake2b(statement.encode(), digest_size=8 * _DIGEST_WORDS).digest()
    digests = _all_gather_bytes(digest, mesh, axis)
    if all(other == digest for other in digests):
        return [statement] * size
    text = statement.encode()
    lengths = [int.from_bytes(n) for n in _all_gather_bytes(len(text).to_bytes(8), mesh, axis)]
    texts = _all_gather_bytes(text, mesh, axis, lengths)
    return [text.decode(errors="replace") for text in texts]


def _all_gather_bytes(
    data: bytes, mesh: Mesh, axis: str, lengths: Sequence[int] | None = None
) -> list[bytes]:
    """What every rank gives, by rank; all of one length unless ``lengths`` says otherwise."""
    link = Link(mesh, axis)
    mine = torch.tensor(list(data), dtype=torch.uint8)
    lengths = [len(data)] * link.size if lengths is None else lengths
    all_ = [torch.empty(length, dtype=torch.uint8) for length in lengths]
    all_[link.rank].copy_(mine)
    what = "checking that all ranks agree"
    link.exchange([mine] * link.size, all_, what=what, control=True)()
    return [bytes(part.tolist()) for part in all_]
