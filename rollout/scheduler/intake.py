"""What enters the scheduler: groups made from a request, and chunk results that are checked first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rollout.errors import InvalidRequest
from rollout.seeds import trajectory_seed
from rollout.types import ChunkResult, FinishReason, Group, RolloutRequest, Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """What was durable of a trajectory when its group was asked for again.

    Attributes:
        trajectory: With its tokens; pending, or as it ended.
        epoch: Times it was restarted from scratch.
        ended: Why its generation is over, for a pending one that only has to be scored; None to go on.
    """

    trajectory: Trajectory
    epoch: int
    ended: FinishReason | None


def make_group(request: RolloutRequest, place: int, restored: Sequence[Restored] | None = None) -> Group:
    """The group of the prompt at `place`: all of its trajectories pending, or as they were restored.

    Raises:
        InvalidRequest: If no seed can be derived from the run seed.
    """
    prompt, group_id = request.prompts[place], request.group_ids[place]
    if restored is not None:
        for one in restored:  # the client's own prompt metadata, which it gets back as it gave it
            one.trajectory.metadata["prompt"] = prompt.metadata
        return Group(group_id=group_id, prompt=prompt, trajectories=[one.trajectory for one in restored])
    try:
        seeds = [trajectory_seed(request.run_seed, group_id, i) for i in range(request.n_samples_per_prompt)]
    except ValueError as error:
        raise InvalidRequest("run_seed / group_ids", (request.run_seed, group_id), str(error)) from None
    trajectories = [
        Trajectory(
            group_id=group_id,
            sample_index=i,
            seed=seed,
            prompt_token_ids=tuple(prompt.token_ids),
            metadata={"prompt": prompt.metadata},
        )
        for i, seed in enumerate(seeds)
    ]
    return Group(group_id=group_id, prompt=prompt, trajectories=trajectories)


def fault_of(budget_tokens: int, result: ChunkResult) -> str | None:
    """Say what is wrong with a result, or None. A wrong one must not reach the record.

    Every token needs a log-probability and a version, and a chunk that ended by its budget must
    have used some of it, or the trajectory would be continued for ever.
    """
    num_tokens = len(result.token_ids)
    if len(result.logprobs) != num_tokens:
        return f"engine result: got {len(result.logprobs)} log-probabilities, expected {num_tokens}, one a token"
    if num_tokens > budget_tokens:
        return f"engine result: got {num_tokens} tokens, expected at most {budget_tokens}"
    stop = 0
    for span in result.spans:
        if span.start != stop or span.stop <= span.start:
            return f"engine result: got version spans {result.spans}, expected {num_tokens} tokens covered in order"
        stop = span.stop
    if stop != num_tokens:
        return f"engine result: got weight versions of {stop} tokens, expected {num_tokens}"
    if result.finish_reason is FinishReason.LENGTH and num_tokens == 0:
        return "engine result: got no tokens with finish reason length, expected at least one"
    return None
