"""Seeds and the counter layout of keyed sampling.

Owns the map from (run, group, sample) to the 64-bit seed of a trajectory and the names of the lanes.
Knows nothing of models or tensors: the bits themselves are drawn in ``kernels.gumbel_sample``.

The random number that token ``v`` meets at position ``p`` of a trajectory is a pure function of
(seed, p, lane, v), so a trajectory that is cut, moved or batched differently continues unchanged::

    Philox4x32-10 key      word 0   seed, low 32 bits
                           word 1   seed, high 31 bits (seeds lie in [0, 2**63) to fit an int64 tensor)
    Philox4x32-10 counter  word 0   v // 4              token v takes output word v % 4
                           word 1   p, low 32 bits      p is the index of the sampled token in prompt + output
                           word 2   p, high 31 bits
                           word 3   lane
"""

import hashlib
from enum import IntEnum

NUM_SEEDS = 2**63

_HASH_DOMAIN = b"longroll-seed-v1"


class Lane(IntEnum):
    """Independent streams at one position. The values are part of the counter: append, never renumber."""

    SAMPLE = 0
    """The token of the trajectory itself; also the draft of a model that should agree with it."""
    DRAFT = 1
    """Draft proposals that must be independent of the sampled token."""
    VERIFY = 2
    """Accept-or-reject decisions of speculative verification."""


def trajectory_seed(run_seed: int, group_id: str | int, sample_index: int) -> int:
    """Return the seed of one trajectory of a group.

    The group's base is a BLAKE2b hash of run and group; members count up from it modulo 2**63, so
    two members of a group differ by construction, not by luck. Groups are as far apart as a hash
    makes them: with G groups of n samples, any overlap at all has probability below G**2 * n / 2**63.

    Args:
        run_seed: Seed of the run, in [0, 2**63).
        group_id: Name or number of the prompt group; ``7`` and ``"7"`` are different groups.
        sample_index: Index of the trajectory in its group, in [0, 2**63).

    Returns:
        An integer in [0, 2**63), the key of the counter layout above.

    Raises:
        ValueError: An argument has the wrong type or lies outside its range.
    """
    _check_counter("run_seed", run_seed)
    _check_counter("sample_index", sample_index)
    return (_group_base(run_seed, group_id) + sample_index) % NUM_SEEDS


def _group_base(run_seed: int, group_id: str | int) -> int:
    if isinstance(group_id, bool) or not isinstance(group_id, (str, int)):
        raise ValueError(f"group_id: got {group_id!r}, expected a string or an integer")
    kind = "s" if isinstance(group_id, str) else "i"
    message = f"{run_seed}:{kind}:{group_id}".encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(message, digest_size=8, person=_HASH_DOMAIN).digest()
    return int.from_bytes(digest, "little") % NUM_SEEDS


def _check_counter(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < NUM_SEEDS:
        raise ValueError(f"{name}: got {value!r}, expected an integer in [0, 2**63)")
