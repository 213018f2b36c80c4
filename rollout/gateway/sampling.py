"""Seeds and choices of completions: which trajectories a request with n choices stands for.

Every choice is a group of one, named by its place, so that a request with a seed gives the same choices whatever else
is asked for, and each choice ends on its own.
"""

from __future__ import annotations

import hashlib
import secrets

from rollout.seeds import NUM_SEEDS

REWARD = "none"


def run_seed_of(seed: int | None, caller: str, idempotency_key: str | None) -> int:
    """The run seed of a completion, in [0, 2**63).

    Args:
        seed: That the request gives, any integer.
        caller: Whose request it is.
        idempotency_key: Makes requests that are made again come out the same, wherever they are answered.
    """
    if seed is not None:
        return seed % NUM_SEEDS
    if idempotency_key is None:
        return secrets.randbelow(NUM_SEEDS)
    digest = hashlib.blake2b(f"{caller}:{idempotency_key}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") % NUM_SEEDS


def group_id_of(prompt: int, sample: int) -> str:
    """Group of one choice; it enters the seed."""
    return f"completion/{prompt}/{sample}"
