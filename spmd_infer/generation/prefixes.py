"""Names for what a page holds: salted digests, each over the page's tokens and the digest of the page before it.

Equal digests mean equal tokens from the first position on, in the same namespace. They are made here only, from a
salt that no client knows, so that a request can neither guess nor probe what another one sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

DIGEST_BYTES = 16
MOST_SALT_BYTES = blake2b.MAX_KEY_SIZE


def extend_digests(
    digests: list[bytes], tokens: Sequence[int], count: int, *, page_size: int, salt: bytes, namespace: str
) -> None:
    """Append the digests of the pages that ``digests`` lacks, up to ``count`` pages.

    Args:
        digests: of the first pages of ``tokens``; grows in place.
        tokens: at least ``count * page_size`` ids, each of 32 bits.
        count: pages to have digests of.
        page_size: positions of a page.
        salt: the server's secret, at most 64 bytes.
        namespace: only sequences of one namespace share pages: an adapter's name, an API key's salt.
    """
    if len(digests) >= count:
        return
    first = len(digests) * page_size
    ids = np.asarray(tokens[first : count * page_size], np.int32).tobytes()
    last = digests[-1] if digests else _digest(salt, namespace.encode())
    for start in range(0, len(ids), 4 * page_size):
        last = _digest(salt, last + ids[start : start + 4 * page_size])
        digests.append(last)


def _digest(salt: bytes, content: bytes) -> bytes:
    return blake2b(content, digest_size=DIGEST_BYTES, key=salt).digest()
