"""Rollouts without a trainer: prompts in, a journal of trajectories out.

    python -m launch.generate run_dir=runs/long prompts=my.jsonl n=8 sampling.max_tokens=32768
    python -m launch.generate run_dir=runs/long num_prompts=4 prompt_tokens=2048 n=4 sampling.max_tokens=32768 \\
        ignore_eos=true scheduler.chunk_tokens=2048

Without a file the prompts are the experiment's own training problems; `prompt_tokens` puts as many tokens of other
problems before each. Every chunk is durable in run_dir/journal.sqlite (or journal.dsn) before the next one starts, and
the same command given again goes on from there. With several engine.num_groups, `drain_every_s` takes one after another
out of service for a while, as an operator would before maintenance: what runs there is cut, and goes on elsewhere.
`launch.replay` shows that the result did not depend on any of it.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import ray

from actors.service import start_service
from actors.supervisor import Supervisor
from launch.arguments import split_arguments
from launch.cluster import absolute_dsn, model_path, run_directory, start_ray
from launch.compose import compose, model_directory, to_yaml
from launch.generate_watch import Watch, WatchReport
from launch.train import run_id_of
from launch.workload import Workload
from rollout.client import RolloutClient
from rollout.config import RunConfig
from rollout.errors import InvalidRequest, LongrollError
from rollout.prompts import read_prompts
from rollout.types import Group, Prompt, SamplingParams, Status


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is generated.

    Attributes:
        prompts: JSONL file; None = the workload's training problems.
        num_prompts: Of the workload, or at most so many of the file; None = all of a file, 16 of the workload.
        prompt_tokens: Length of every prompt of the workload; None = as it is.
        n: Samples of each prompt; None = sampling.n_samples_per_prompt.
        ignore_eos: Go on past the model's own end token, to sampling.max_tokens.
        reward: Name of a reward function; "none" leaves trajectories unscored.
        drain_every_s: Between two drains, each of the next expert-parallel group; 0 = none.
        drain_s: How long a drained group stays out of service.
        out: JSON file for the summary.
    """

    prompts: str | None = None
    num_prompts: int | None = None
    prompt_tokens: int | None = None
    n: int | None = None
    ignore_eos: bool = False
    reward: str = "none"
    drain_every_s: float = 0.0
    drain_s: float = 5.0
    out: str | None = None

    def __post_init__(self) -> None:
        for name in ("num_prompts", "prompt_tokens", "n"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidRequest(name, value, "an integer ≥ 1")
        if self.prompts is not None and self.prompt_tokens is not None:
            raise InvalidRequest("prompt_tokens", self.prompt_tokens, "none with a file of prompts")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateSummary:
    """What came back. `num_moved` counts trajectories whose chunks ran on more than one shard."""

    num_groups: int
    num_trajectories: int
    num_failed: int
    num_tokens: int
    num_chunks: int
    num_moved: int
    longest_tokens: int
    seconds: float
    watch: WatchReport


def prompts_of(config: RunConfig, options: Options) -> list[Prompt]:
    """The prompts, in order. Raises InvalidRequest for a file that is wrong."""
    if options.prompts is not None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(config.model.path, trust_remote_code=config.model.trust_remote_code)
        return read_prompts(options.prompts, tokenizer)[: options.num_prompts]
    workload = Workload(config.workload, config.model, config.trainer.seed)
    num_prompts = options.num_prompts or 16
    if options.prompt_tokens is None:
        return workload.batch(0, num_prompts)
    return [_long_prompt(workload, i, options.prompt_tokens, num_prompts) for i in range(num_prompts)]


def _long_prompt(workload: Workload, number: int, num_tokens: int, num_prompts: int) -> Prompt:
    """A problem behind the last tokens of others, none of which stands before another prompt's."""
    problem = workload.problem(number)
    tokens, other = problem.token_ids, num_prompts + number
    while len(tokens) < num_tokens:
        tokens = workload.problem(other).token_ids + tokens
        other += num_prompts
    return Prompt(
        token_ids=tokens[-num_tokens:], prompt_id=f"{problem.prompt_id}+{num_tokens}", metadata=problem.metadata
    )


def sampling_of(config: RunConfig, options: Options) -> SamplingParams:
    sampling = config.sampling
    return SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        ignore_eos=options.ignore_eos,
    )


def generate(config: RunConfig, options: Options, run_dir: Path) -> GenerateSummary:
    """Start the engines, ask for everything at once, and watch until it is there."""
    if options.drain_every_s and config.engine.num_groups < 2:
        raise InvalidRequest("engine.num_groups", config.engine.num_groups, "2 or more with drain_every_s")
    prompts, sampling = prompts_of(config, options), sampling_of(config, options)
    n = options.n or config.sampling.n_samples_per_prompt
    num_shards = config.engine.num_all_shards
    _say(f"starting {num_shards} shards for {len(prompts)} prompts × {n} samples of up to {sampling.max_tokens} tokens")
    parts = config.model, config.engine, config.scheduler, config.sync, config.cluster
    with (
        start_service(*parts, journal=config.journal, supervisor=config.supervisor) as service,
        Supervisor(service, config.supervisor, _say),
    ):
        client: RolloutClient = service.client
        began = time.monotonic()
        handle = client.submit(
            prompts,
            n,
            sampling,
            run_seed=config.trainer.seed,
            group_ids=[f"{i:06d}" for i in range(len(prompts))],
            reward=options.reward,
            run_id=run_id_of(config, run_dir),
        )
        with Watch(service, handle, options.drain_every_s, options.drain_s, _say) as watch:
            groups = handle.in_order(client.groups(handle))
        return _summary(groups, time.monotonic() - began, watch.report())


def _summary(groups: Sequence[Group], seconds: float, watch: WatchReport) -> GenerateSummary:
    everyone = [t for group in groups for t in group.trajectories]
    ran = [t.metadata.get("shards", []) for t in everyone]
    return GenerateSummary(
        num_groups=len(groups),
        num_trajectories=len(everyone),
        num_failed=sum(t.status is Status.FAILED for t in everyone),
        num_tokens=sum(len(t.token_ids) for t in everyone),
        num_chunks=sum(len(shards) for shards in ran),
        num_moved=sum(len(set(shards)) > 1 for shards in ran),
        longest_tokens=max(len(t.token_ids) for t in everyone),
        seconds=seconds,
        watch=watch,
    )


def run(config: RunConfig, options: Options) -> int:
    """Set up and generate. Returns the exit code: 1 if a trajectory failed."""
    model_directory(config.model.path)
    config.model.path = model_path(config.model.path)
    run_dir = run_directory(config.run_dir)
    config.journal.dsn = absolute_dsn(config.journal.dsn)
    (run_dir / "config.yaml").write_text(to_yaml(config))
    start_ray(config)
    try:
        summary = generate(config, options, run_dir)
    finally:
        ray.shutdown()
    _say(
        f"{summary.num_trajectories} trajectories, {summary.num_tokens} tokens in {summary.seconds:.0f} s "
        f"({summary.num_tokens / summary.seconds:.0f} tokens/s), {summary.num_chunks} chunks, "
        f"{summary.num_moved} trajectories moved, {summary.num_failed} failed; journal {config.journal.dsn}"
    )
    if options.out is not None:
        Path(options.out).write_text(json.dumps(asdict(summary), indent=2) + "\n")
    return 1 if summary.num_failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--help" in arguments or "-h" in arguments:
        print(__doc__)
        return 0
    try:
        options, overrides = split_arguments(Options, arguments)
        if not any(override.startswith("experiment=") for override in overrides):
            overrides = ["experiment=tiny_grpo", *overrides]
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _stop)
        return run(compose(overrides), options)
    except LongrollError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1


def _say(message: str) -> None:
    print(message, flush=True)


def _stop(number: int, frame: object) -> None:
    """End from wherever it is; what is durable stays."""
    signal.signal(number, signal.SIG_DFL)
    print(f"stopping on {signal.Signals(number).name}; run again to go on", file=sys.stderr, flush=True)
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
