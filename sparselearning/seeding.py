"""Independent random streams from one seed."""

import hashlib


def derive_seed(*parts: int | str) -> int:
    """Mix a run's seed with what it is used for (a purpose, a step, an epoch) into a seed of its own, in [0, 2⁶³).

    Equal parts give equal seeds on every machine; streams of different parts are unrelated.
    """
    plain = tuple(part if isinstance(part, str) else int(part) for part in parts)  # of NumPy's integers, too
    digest = hashlib.blake2b(repr(plain).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
