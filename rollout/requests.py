"""From a caller's arguments to a `RolloutRequest`, with the errors the controller would give."""

from __future__ import annotations

import operator
from collections.abc import Sequence

from rollout.errors import InvalidRequest
from rollout.types import ModelLimits, Prompt, RolloutRequest, SamplingParams

PromptLike = Prompt | Sequence[int]


def build_request(
    prompts: Sequence[PromptLike],
    n_samples_per_prompt: int,
    sampling: SamplingParams,
    run_seed: int,
    group_ids: Sequence[str] | None,
    reward: str,
    priority: int,
    run_id: str | None = None,
    *,
    limits: ModelLimits,
    submission: int,
) -> RolloutRequest:
    """Check and convert the arguments of `RolloutClient.submit`.

    Args:
        limits: What the model accepts.
        submission: Number of the submission, for the group ids when none are given.

    Raises:
        InvalidRequest: For the first fault.
    """
    request = RolloutRequest(
        prompts=tuple(_as_prompt(prompt, place) for place, prompt in enumerate(prompts)),
        n_samples_per_prompt=n_samples_per_prompt,
        sampling=sampling,
        run_seed=run_seed,
        group_ids=_group_ids(group_ids, submission, len(prompts)),
        reward=reward,
        priority=priority,
        run_id=run_id,
    )
    for prompt in request.prompts:
        limits.check(prompt, sampling)
    return request


def _group_ids(group_ids: Sequence[str] | None, submission: int, num_prompts: int) -> tuple[str, ...]:
    if group_ids is None:
        return tuple(f"submission{submission}/{place}" for place in range(num_prompts))
    if isinstance(group_ids, str):
        raise InvalidRequest("group_ids", group_ids, "a sequence of strings, one a prompt")
    return tuple(group_ids)


def _as_prompt(prompt: PromptLike, place: int) -> Prompt:
    if isinstance(prompt, Prompt):
        return prompt
    expected = "a Prompt or a sequence of token ids (tokenize text first)"
    if isinstance(prompt, (str, bytes)):
        raise InvalidRequest(f"prompt {place}", type(prompt).__name__, expected)
    try:
        return Prompt(token_ids=tuple(operator.index(token) for token in prompt), prompt_id=f"prompt{place}")
    except TypeError as error:
        raise InvalidRequest(f"prompt {place}", str(error), expected) from None
