"""Independent random streams from one seed."""

import hashlib


def derive_seed(*parts: int | str) -> int:
    """Mix a run's seed with what it is used for (a purpose, a step, an epoch) into a seed of its own, in [0, 2⁶³).

    Equal parts give equal seeds on every machine; streams of different parts are unrelated.
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
