"""Between chunks and vLLM's requests: sampling parameters one way, outputs the other.

Owns what has come back of a chunk that runs, and hands its tokens to the outbox of whoever follows it. Knows nothing of
the engine's life, of actors or of calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rollout.gateway.outbox import Outbox
from rollout.streaming import ChunkEnd, TopLogprobs
from rollout.types import Chunk, ChunkResult, DraftCounts, FinishReason, VersionSpan, append_span


def sampling_params(chunk: Chunk, model_stop_token_ids: Sequence[int], extra_args: dict[str, Any]) -> Any:
    """vLLM's parameters of a chunk.

    Args:
        chunk: The chunk.
        model_stop_token_ids: End tokens of the model.
        extra_args: For the plug-in's sampler, drafters and routing capture.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    wanted, stream = chunk.sampling, chunk.stream
    stops = set(wanted.stop_token_ids)
    if not wanted.ignore_eos:
        stops |= set(model_stop_token_ids)
    is_first = len(chunk.token_ids) == chunk.num_prompt_tokens
    return SamplingParams(
        max_tokens=chunk.max_tokens,
        temperature=wanted.temperature,
        top_k=wanted.top_k or 0,
        top_p=wanted.top_p,
        stop_token_ids=sorted(stops),
        ignore_eos=True,  # ends come from stop_token_ids alone
        logprobs=stream.num_top_logprobs if stream is not None else 0,
        prompt_logprobs=stream.num_prompt_logprobs if stream is not None and is_first else None,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY if stream is None else RequestOutputKind.DELTA,
        extra_args=extra_args,
    )


class ChunkRun:
    """The outputs of one chunk: the final one alone, or for a stream one a step.

    Args:
        chunk: The chunk.
        outbox: Of whoever follows it; None if nobody does any more.
    """

    def __init__(self, chunk: Chunk, outbox: Outbox | None) -> None:
        self._chunk, self._outbox = chunk, outbox
        self._token_ids: list[int] = []
        self._logprobs: list[float] = []
        self._last: Any = None

    def add(self, output: Any) -> None:
        """The engine's next output."""
        self._last = output
        if not output.outputs or not output.outputs[0].token_ids:
            return
        completion = output.outputs[0]
        token_ids, flat = completion.token_ids, completion.logprobs
        logprobs = [flat.logprobs[first] for first in flat.start_indices]
        stream = self._chunk.stream
        if stream is not None and self._outbox is not None:
            self._outbox.put(
                stream.stream_id,
                len(self._chunk.token_ids) - self._chunk.num_prompt_tokens + len(self._token_ids),
                token_ids,
                logprobs,
                _positions(flat) if stream.num_top_logprobs else (),
                tuple(entry or None for entry in _positions(output.prompt_logprobs)) if output.prompt_logprobs else (),
                _end(output),
            )
        self._token_ids.extend(token_ids)
        self._logprobs.extend(logprobs)

    def result(self, shard: int, duration_s: float) -> ChunkResult:
        """The chunk as it ended."""
        output = self._last
        if output is None or not output.outputs:  # aborted before it was scheduled
            return ChunkResult(
                trajectory_id=self._chunk.trajectory_id,
                token_ids=(),
                logprobs=(),
                spans=(),
                finish_reason=FinishReason.ABORT,
                shard=shard,
                duration_s=duration_s,
            )
        completion = output.outputs[0]
        spans: list[VersionSpan] = []
        for span in completion.weight_versions or ():
            if span.end > span.start:
                append_span(spans, VersionSpan(version=int(span.version), start=span.start, stop=span.end))
        return ChunkResult(
            trajectory_id=self._chunk.trajectory_id,
            token_ids=tuple(self._token_ids),
            logprobs=tuple(self._logprobs),
            spans=tuple(spans),
            finish_reason=FinishReason(completion.finish_reason),
            shard=shard,
            num_cached_tokens=output.num_cached_tokens or 0,
            ttft_s=output.metrics.first_token_latency if output.metrics else 0.0,
            duration_s=duration_s,
            drafts=_draft_counts(completion.spec_decode_metrics),
        )


def _end(output: Any) -> ChunkEnd | None:
    """How a chunk ended with this output; None if it goes on, or was aborted."""
    reason = output.outputs[0].finish_reason
    if reason is None or reason == FinishReason.ABORT.value:
        return None
    return ChunkEnd(is_stopped=reason == FinishReason.STOP.value, num_cached_tokens=output.num_cached_tokens or 0)


def _positions(flat: Any) -> list[TopLogprobs]:
    """vLLM's flat log-probabilities by position; nothing at one that was not scored."""
    pairs = list(zip(flat.token_ids, flat.logprobs, strict=True))
    return [tuple(pairs[first:stop]) for first, stop in zip(flat.start_indices, flat.end_indices, strict=True)]


def _draft_counts(counted: Any) -> DraftCounts | None:
    """vLLM's counts of a request that might have had drafts; None for any other."""
    if counted is None:
        return None
    accepted = sum(number * steps for number, steps in enumerate(counted.histogram))
    return DraftCounts(trees=sum(counted.histogram), nodes=counted.num_draft_tokens, accepted=accepted)


def stop_token_ids(model_config: Any) -> tuple[int, ...]:
    """End tokens that the model directory names (generation config first, then the model config)."""
    ids: set[int] = set()
    for source in (model_config.try_get_generation_config(), model_config.hf_config.to_dict()):
        value = source.get("eos_token_id")
        ids |= set(value) if isinstance(value, (list, tuple)) else ({value} if value is not None else set())
    return tuple(sorted(ids))
