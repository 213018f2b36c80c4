"""Replays: pieces against scripted engines, what the journal lists, and every wrong way to ask.

The engine here draws tokens from a table of logits with the sampler's own noise, so that "the same weights" and
"other weights" mean what they say.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.gumbel_sample import gumbel_sample
from launch.compose import compose, to_yaml
from launch.near_ties import near_tie
from launch.replay import main
from launch.replay_pieces import MAX_DIFFERENCES, Recorded, pieces, replay_piece, verdict_of
from launch.replay_run import read_config, stored_run
from rollout.checkpoints import CURSOR_FILE
from rollout.config import JournalConfig
from rollout.errors import InvalidRequest
from rollout.journal.opening import open_journal
from rollout.journal.records import TrajectoryKey
from rollout.types import (
    Chunk,
    ChunkResult,
    FinishReason,
    Prompt,
    RolloutRequest,
    SamplingParams,
    Trajectory,
    VersionSpan,
)

VOCAB = 32
PROMPT = (3, 1, 4)
SAMPLING = SamplingParams(max_tokens=40)
SEED = 77


class TableEngine:
    """Logits are a row of a table, chosen by the last token; one position may be nudged."""

    def __init__(self, weights_seed: int = 0, nudge: dict[int, tuple[int, float]] | None = None) -> None:
        generator = torch.Generator().manual_seed(weights_seed)
        self._table = torch.randn(VOCAB, VOCAB, generator=generator)
        self._nudge = nudge or {}
        self.num_calls = 0

    def __call__(self, chunk: Chunk) -> ChunkResult:
        self.num_calls += 1
        ids, logprobs = list(chunk.token_ids), []
        for _ in range(chunk.max_tokens):
            logits = self._table[ids[-1]].clone()
            token, by = self._nudge.get(len(ids), (0, 0.0))
            logits[token] += by
            tokens, found = gumbel_sample(
                logits[None],
                seeds=torch.tensor([chunk.seed]),
                positions=torch.tensor([len(ids)]),
                temperature=torch.tensor([1.0]),
            )
            ids.append(int(tokens))
            logprobs.append(float(found))
        new = tuple(ids[len(chunk.token_ids) :])
        return ChunkResult(
            trajectory_id=chunk.trajectory_id,
            token_ids=new,
            logprobs=tuple(logprobs),
            spans=(VersionSpan(version=0, start=0, stop=len(new)),),
            finish_reason=FinishReason.LENGTH,
            shard=0,
        )


def whole(engine: TableEngine) -> ChunkResult:
    return engine(
        Chunk(
            trajectory_id="t",
            token_ids=PROMPT,
            num_prompt_tokens=len(PROMPT),
            max_tokens=SAMPLING.max_tokens,
            seed=SEED,
            sampling=SAMPLING,
        )
    )


def recorded_by(engine: TableEngine) -> Recorded:
    trajectory = Trajectory(group_id="g", sample_index=0, seed=SEED, prompt_token_ids=PROMPT)
    trajectory.append(whole(engine))
    return Recorded(trajectory=trajectory, sampling=SAMPLING, vocab_size=VOCAB, within=near_tie("float32", 1.0))


@settings(max_examples=25, deadline=None)
@given(piece_tokens=st.integers(1, 50))
def test_any_pieces_of_the_same_weights_agree(piece_tokens: int) -> None:
    recorded = recorded_by(TableEngine())
    parts = pieces(0, SAMPLING.max_tokens, piece_tokens)
    assert [i for first, last in parts for i in range(first, last)] == list(range(SAMPLING.max_tokens))
    results = [replay_piece(TableEngine(), recorded, *part) for part in parts]
    verdict = verdict_of(SAMPLING.max_tokens, results, [])
    assert verdict.is_same and verdict.num_same == SAMPLING.max_tokens and verdict.max_logprob_gap == 0.0
    assert verdict.text == "verdict: the same"


def test_one_other_token_is_told_and_what_follows_is_compared_with_the_record() -> None:
    recorded = recorded_by(TableEngine())
    place = 11
    other = (recorded.trajectory.token_ids[place] + 1) % VOCAB
    nudged = TableEngine(nudge={len(PROMPT) + place: (other, 50.0)})
    result = replay_piece(nudged, recorded, 0, SAMPLING.max_tokens)
    [difference] = result.differences
    assert (difference.index, difference.tokens) == (place, (recorded.trajectory.token_ids[place], other))
    assert result.num_compared == SAMPLING.max_tokens and nudged.num_calls == 2
    verdict = verdict_of(SAMPLING.max_tokens, [result], [])
    assert not verdict.is_same and verdict.text == f"verdict: differs, first at token {place}"


def test_other_weights_are_given_up_early() -> None:
    engine = TableEngine(weights_seed=1)
    result = replay_piece(engine, recorded_by(TableEngine()), 0, SAMPLING.max_tokens)
    assert len(result.differences) == MAX_DIFFERENCES == engine.num_calls
    assert result.num_compared < SAMPLING.max_tokens


def test_what_cannot_be_had_is_not_called_the_same() -> None:
    assert not verdict_of(5, [], [3]).is_same
    recorded = recorded_by(TableEngine())
    half = verdict_of(SAMPLING.max_tokens, [replay_piece(TableEngine(), recorded, 0, 20)], [3])
    assert half.is_same and half.text == "verdict: the same, in the 20 tokens that can be had"


def write_journal(folder: Path, *run_ids: str) -> str:
    """A journal with one group of two members in each run, the first of them with one chunk."""
    dsn = f"sqlite:///{folder / 'journal.sqlite'}"

    async def write() -> None:
        async with open_journal(JournalConfig(dsn=dsn)) as journal:
            for run_id in run_ids:
                request = RolloutRequest(
                    prompts=(Prompt(token_ids=PROMPT, prompt_id="p"),),
                    n_samples_per_prompt=2,
                    sampling=SAMPLING,
                    run_seed=0,
                    group_ids=("step1/g",),
                )
                await journal.submit(run_id, request, "handle")
                key = TrajectoryKey(run_id=run_id, group_id="step1/g", sample_index=0)
                await journal.append_chunk(key, 0, 0, whole(TableEngine()))

    asyncio.run(write())
    return dsn


def test_a_run_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"journal={write_journal(tmp_path, 'only')}", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split() for line in lines] == [
        ["step1/g/0", "pending", "40", "1", "0"],
        ["step1/g/1", "pending", "0", "0", "-"],
    ]


@pytest.mark.parametrize(
    "runs, arguments, message",
    [
        (["a"], ["trajectory=step1/g/0"], "journal: got none"),
        (["a"], ["journal=DSN"], "trajectory: got none"),
        (["a", "b"], ["journal=DSN", "trajectory=step1/g/0"], "run_id: got none, expected one of a, b"),
        (["a"], ["journal=DSN", "trajectory=step1/g/0", "run_id=c"], "run_id: got c, expected one of a"),
        (["a"], ["journal=DSN", "trajectory=step1"], "<group_id>/<sample_index>"),
        (["a"], ["journal=DSN", "trajectory=step1/g/7"], "one that was submitted"),
        (["a"], ["journal=DSN", "trajectory=step1/g/1"], "one with tokens"),
        (["a"], ["journal=DSN", "trajectory=step1/g/0"], "the run's configuration"),
        (["a"], ["journal=DSN", "trajectory=step1/g/0", "model.path=/nowhere/at/all"], "model.path"),
        (["a"], ["journal=sqlite:////nowhere/j.sqlite", "trajectory=step1/g/0"], "/nowhere/j.sqlite"),
        (["a"], ["journal=DSN", "piece_tokens=0"], "piece_tokens"),
    ],
)
def test_wrong_requests_say_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], runs: list[str], arguments: list[str], message: str
) -> None:
    dsn = write_journal(tmp_path, *runs)
    assert main([a.replace("DSN", dsn) for a in arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_runs_own_configuration_is_beside_its_journal(tmp_path: Path) -> None:
    config = compose(["experiment=tiny_grpo_int4", f"run_dir={tmp_path}"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert read_config(tmp_path / "config.yaml") == config
    stored = stored_run(f"sqlite:///{tmp_path / 'journal.sqlite'}", [])
    assert (stored.run_dir, stored.config.engine.quantization) == (tmp_path, "int4")
    saved = tmp_path / "checkpoints" / "step-000002"
    saved.mkdir(parents=True)
    (saved / CURSOR_FILE).write_text("{}")
    assert [stored.has(version) for version in (0, 1, 2)] == [True, False, True]


def test_a_configuration_of_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("engine: {num_wheels: 4}\n")
    with pytest.raises(InvalidRequest, match="num_wheels"):
        read_config(tmp_path / "config.yaml")
