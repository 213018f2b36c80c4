"""The shard's decode step against its float32 definition, and the bench's bytes."""

import dataclasses
import subprocess
import sys

import pytest
import torch

from kernels.bench_shard import (
    CHECK_CONFIG,
    UNIT,
    StepTime,
    check_step,
    exchange_bytes,
    format_line,
    memory_by_part,
    read_bytes,
    time_step,
)
from kernels.shard_model import QWEN3_235B_A22B, DecodeStep, Part, random_batch, random_shard
from kernels.shard_reference import step_errors

TINY = dataclasses.replace(
    CHECK_CONFIG,
    hidden=64,
    num_query_heads=4,
    num_kv_heads=2,
    num_experts=8,
    experts_per_token=2,
    expert_width=32,
    vocab_size=96,
    ep=2,
    group_size=32,
)
FLOAT32_UNIT = 128 * 2.0**-24
"""A sum of n products is off by up to n half units; 128, twice the longest, because both sides have an error."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_step_is_the_definition() -> None:
    check_step(TINY, "cpu", torch.float32, FLOAT32_UNIT)


def test_step_in_bfloat16_is_the_definition() -> None:
    check_step(TINY, "cpu", torch.bfloat16, UNIT)


@pytest.mark.parametrize("part", list(Part))
def test_a_step_without_a_part_is_not_the_definition(part: Part) -> None:
    generator = torch.Generator().manual_seed(0)
    shard = random_shard(TINY, device="cpu", dtype=torch.float32, generator=generator)
    batch = random_batch(shard, 3, 37, generator)
    step = DecodeStep(shard)
    step(batch)
    assert step_errors(shard, batch, step(batch, skip=part)).logits > 2.0**-4


def test_read_bytes_count_experts_that_were_chosen() -> None:
    generator = torch.Generator().manual_seed(0)
    shard = random_shard(TINY, device="cpu", generator=generator)
    batch = random_batch(shard, 3, 37, generator)
    batch.ids.fill_(7)
    fewer, none = read_bytes(shard, batch)
    batch.ids[0].fill_(1)
    more, pairs = read_bytes(shard, batch)
    one_expert = 3 * TINY.hidden * TINY.expert_width * (0.5 + 2 / TINY.group_size)
    assert (more - fewer, none, pairs) == (one_expert, 0, 3 * TINY.ep * TINY.experts_per_token / TINY.num_layers)


def test_a_line_is_measured_and_printed() -> None:
    shard = random_shard(TINY, device="cpu", dtype=torch.float32, generator=torch.Generator().manual_seed(0))
    line = StepTime(batch=3, context=37, kv_bytes=TINY.kv_bytes(3, 37), exchange=exchange_bytes(TINY, 3))
    assert "does not fit" in format_line(line)
    measured = time_step(shard, DecodeStep(shard), line, 1e9)
    assert measured.step_ms and measured.tokens_per_s and measured.read_bytes
    assert measured.tokens_per_s == pytest.approx(3e3 / measured.step_ms)
    assert measured.memcpy_share == pytest.approx(measured.read_bytes / (measured.step_ms * 1e-3) / 1e9)
    assert "does not fit" not in format_line(measured)


def test_memory_of_the_whole_shard() -> None:
    parts = {memory.part: memory.num_bytes for memory in memory_by_part(random_shard(QWEN3_235B_A22B, device="meta"))}
    int4 = 0.5 + 2 / 128
    assert parts["attention, INT4"] == 94 * 4096 * (9216 + 8192) * int4
    assert parts["local experts, INT4"] == 94 * 4 * 3 * 4096 * 1536 * int4
    assert parts["head"] == parts["embedding"] == 151_936 * 4096 * 2
    assert 9e9 < sum(parts.values()) < 10e9


def test_exchange_of_one_rank_is_nothing() -> None:
    alone = exchange_bytes(dataclasses.replace(TINY, ep=1), 4)
    assert (alone.gathered_bytes, alone.chosen_bytes) == (0, 0)
    # Two rows, there and back, from one other rank; two choices of eight miss half of the experts at 6 in 28.
    shared = exchange_bytes(TINY, 2)
    assert shared.gathered_bytes == 2 * 2 * (2 * 2 * 64 + 2 * 8)
    assert shared.chosen_bytes == round(shared.gathered_bytes * 22 / 28)


def test_ranks_must_divide_the_experts() -> None:
    with pytest.raises(ValueError, match="ep: got 3"):
        dataclasses.replace(TINY, ep=3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure")
def test_without_cuda_it_says_so_and_prints_the_memory() -> None:
    command = [sys.executable, "-m", "kernels.bench_shard", "--dry-run", "--contexts", "4096", "--batches", "64"]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    assert "not measured: no CUDA device" in output
    cache = 94 * 64 * 4096 * 2 * 4 * (128 + 4)
    assert f"cache 64 x 4096 {cache * 1e-9:>17.3f} GB" in output
