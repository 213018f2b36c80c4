"""What enters the scheduler: groups made from a request, and chunk results that are checked first."""

from __future__ import annotations

from rollout.errors import InvalidRequest
from rollout.scheduler.records import Flight
from rollout.seeds import trajectory_seed
from rollout.types import ChunkResult, FinishReason, Group, RolloutRequest, Trajectory


def make_group(request: RolloutRequest, place: int) -> Group:
    """The group of the prompt at `place`, all of its trajectories pending.

    Raises:
        InvalidRequest: If no seed can be derived from the run seed.
    """
    prompt, group_id = request.prompts[place], request.group_ids[place]
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


def fault_of(flight: Flight, result: ChunkResult) -> str | None:
    """Say what is wrong with a result, or None. A wrong one must not reach the record.

    Every token needs a log-probability and a version, and a chunk that ended by its budget must
    have used some of it, or the trajectory would be continued for ever.
    """
    num_tokens = len(result.token_ids)
    if len(result.logprobs) != num_tokens:
        return f"engine result: got {len(result.logprobs)} log-probabilities, expected {num_tokens}, one a token"
    if num_tokens > flight.budget_tokens:
        return f"engine result: got {num_tokens} tokens, expected at most {flight.budget_tokens}"
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
