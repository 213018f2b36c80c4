"""Hidden states that are kept for a draft model that is off."""

import numpy as np
import torch

from actors.vllm_plugin.hidden_log import HELD_BYTES, HELD_STEPS, HiddenLog


def test_hidden_states_by_position() -> None:
    log = HiddenLog(max_bytes=6 * 4 * 2, max_steps=3)
    rows = torch.arange(20.0).view(10, 2)
    log.add(["a", "b"], np.array([3, 1]), np.array([0, 5]), rows[:4])
    log.add(["a"], np.array([2]), np.array([3]), rows[4:6])
    begin, found = log.since("a", 1, 5)
    assert begin == 1 and torch.equal(found, rows[[1, 2, 4, 5]])
    assert log.since("b", 0, 7) == (7, None), "the states end before the root"
    assert log.since("c", 0, 3) == (3, None)
    log.add(["a"], np.array([1]), np.array([5]), rows[6:7])  # drops the first step
    begin, found = log.since("a", 0, 6)
    assert begin == 3 and torch.equal(found, rows[4:7])
    log.add(["a"], np.array([2]), np.array([4]), rows[7:9])  # computed anew
    begin, found = log.since("a", 3, 6)
    assert begin == 3 and torch.equal(found, rows[[4, 7, 8]])
    assert log.num_bytes <= 6 * 4 * 2
    for position in range(6, 9):
        log.add(["b"], np.array([1]), np.array([position]), rows[9:])
    assert log.since("b", 6, 9)[0] == 6 and log.since("a", 0, 6) == (6, None), "three steps are kept"


def test_decoding_steps_are_found_at_any_time() -> None:
    """Whether they were copied already or not, and whoever joined or left in between."""
    width = 4
    log = HiddenLog(max_bytes=2**20, max_steps=10_000)
    expected: dict[str, dict[int, torch.Tensor]] = {}
    draw = np.random.default_rng(0)
    position = dict.fromkeys("abcde", 0)
    ids: list[str] = []
    for _ in range(400):
        if ids and draw.random() < 0.9:
            ids = ids if draw.random() < 0.8 else [name for name in ids if draw.random() < 0.7] or ["a"]
            first = np.array([position[name] for name in ids], dtype=np.int32)
            counts, num_rows = None, len(ids)
        else:
            ids = sorted(draw.choice(list(position), size=int(draw.integers(1, 6)), replace=False).tolist())
            if draw.random() < 0.3:
                position[ids[0]] = max(0, position[ids[0]] - 5)  # preempted, and computed anew
            counts = draw.integers(1, 6, len(ids))
            first, num_rows = np.array([position[name] for name in ids], dtype=np.int32), int(counts.sum())
        rows = torch.from_numpy(draw.standard_normal((num_rows, width)).astype(np.float32))
        log.add(ids, counts, first, rows)
        row = 0
        for name, count in zip(ids, [1] * len(ids) if counts is None else counts.tolist(), strict=True):
            for place in range(count):
                expected.setdefault(name, {})[position[name] + place] = rows[row + place]
            row += count
            position[name] += count
        first[:] = -1  # as an engine that goes on would
        if draw.random() < 0.2:
            name = ids[int(draw.integers(len(ids)))]
            begin = int(draw.integers(0, position[name]))
            found_at, found = log.since(name, begin, position[name])
            assert found_at == begin, "nothing is missing from the first token on"
            wanted = [expected[name][place] for place in range(begin, position[name])]
            assert found is not None and torch.equal(found, torch.stack(wanted))


def test_few_bytes_wait_to_be_copied() -> None:
    log = HiddenLog(max_bytes=2**24, max_steps=10_000)
    waiting = []
    for position in range(4 * HELD_STEPS):
        rows = torch.zeros(8, 512)
        log.add(list("abcdefgh"), None, np.full(8, position), rows)
        waiting.append(sum(held.nbytes for held in log._held))
    assert max(waiting) < HELD_BYTES and max(waiting) >= HELD_BYTES // 2
    assert log.num_bytes == 4 * HELD_STEPS * 8 * 512 * 4


def test_decoding_steps_are_bounded_too() -> None:
    log = HiddenLog(max_bytes=2**20, max_steps=3 * HELD_STEPS)
    for position in range(10 * HELD_STEPS):
        log.add(["a", "b"], None, np.array([position, position + 7]), torch.full((2, 4), float(position)))
    begin, found = log.since("b", 0, 10 * HELD_STEPS + 7)
    assert begin == 7 * HELD_STEPS + 7 and found is not None
    assert found[:, 0].tolist() == [float(position) for position in range(7 * HELD_STEPS, 10 * HELD_STEPS)]
