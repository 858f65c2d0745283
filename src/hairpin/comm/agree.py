"""Making sure that all ranks of an axis are about to do the same thing."""

import hashlib

import torch

from hairpin.comm.mesh import Mesh
from hairpin.comm.transport import Link
from hairpin.errors import DisagreementError

_DIGEST_WORDS = 2
_TEXT_BYTES = 512


def require_agreement(statement: str, mesh: Mesh, axis: str) -> None:
    """Raise on every rank of ``axis`` unless all of them make the same ``statement``.

    Exchanges 16 bytes with each peer, and only on disagreement the statements themselves.

    Raises:
        DisagreementError: naming every rank's statement.
        CommError: a rank is gone or did not answer.
    """
    if mesh.size(axis) == 1:
        return
    digest = hashlib.blake2b(statement.encode(), digest_size=8 * _DIGEST_WORDS).digest()
    digests = _all_gather_bytes(digest, mesh, axis)
    if all(other == digest for other in digests):
        return
    text = statement.encode()[:_TEXT_BYTES].ljust(_TEXT_BYTES)
    statements = [t.decode(errors="replace").strip() for t in _all_gather_bytes(text, mesh, axis)]
    lines = "\n".join(f"  rank {rank}: {line}" for rank, line in enumerate(statements))
    raise DisagreementError(
        f"the ranks of mesh axis {axis!r} were given different work:\n{lines}\n"
        "Give every rank of this axis the same inputs, plan and mode"
    )


def _all_gather_bytes(data: bytes, mesh: Mesh, axis: str) -> list[bytes]:
    link = Link(mesh, axis)
    mine = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    all_ = [torch.empty_like(mine) for _ in range(link.size)]
    all_[link.rank].copy_(mine)
    link.exchange([mine] * link.size, all_, what="checking that all ranks agree", control=True)()
    return [bytes(part.tolist()) for part in all_]
