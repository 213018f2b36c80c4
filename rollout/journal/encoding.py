"""Chunks, prompts and requests as bytes and text, exactly and without pickle.

A chunk's payload is a header, its tokens as little-endian int32, then its log-probabilities: as float32 if every one of
them is a float32 (engines give those), else as float64. Every row that is read back carries a digest, because a
database's own check does not see a flipped bit inside a value.

Owns the formats. Knows nothing of databases or of what the records are for.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import xxhash

from rollout.errors import InvalidRequest
from rollout.journal.errors import JournalBroken
from rollout.routing import RoutingRef
from rollout.types import ChunkResult, FinishReason, Prompt, SamplingParams, VersionSpan

_HEADER = struct.Struct("<BBxxIQ")  # format, bytes of a log-probability, tokens, XXH3-64 of the row
_FORMAT = 1
_TOKEN: np.dtype = np.dtype("<i4")
_LOGPROBS: dict[int, np.dtype] = {4: np.dtype("<f4"), 8: np.dtype("<f8")}


def plain_text(what: str, value: str) -> str:
    """`value` itself, if every database can keep it.

    Raises:
        InvalidRequest: It holds a NUL, or half of a surrogate pair.
    """
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        raise InvalidRequest(what, ascii(value), "text without NUL and lone surrogates")
    return value


def to_json(what: str, value: Any) -> str:
    """Compact JSON with sorted keys; dataclasses become mappings of their fields, NumPy scalars plain numbers.

    Raises:
        InvalidRequest: The value is not plain data, or has keys that are not strings.
    """
    _check_keys(what, value)
    try:
        return json.dumps(value, separators=(",", ":"), sort_keys=True, default=_plain)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(
            what, str(error), "plain data: mappings, sequences, text, numbers, booleans, None"
        ) from None


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {one.name: getattr(value, one.name) for one in fields(value)}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a {type(value).__name__}")


def _check_keys(what: str, value: Any) -> None:
    """JSON would turn the key 1 into "1", and the record that is read back would not be the one written."""
    if isinstance(value, Mapping):
        bad = next((key for key in value if not isinstance(key, str)), None)
        if bad is not None:
            raise InvalidRequest(f"{what} key", bad, "text")
        for key, inner in value.items():
            _check_keys(f"{what}.{key}", inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            _check_keys(what, inner)


def digest_of(*parts: object) -> str:
    """XXH3-128 over the parts, told apart."""
    hasher = xxhash.xxh3_128()
    for part in parts:
        piece = part if isinstance(part, bytes) else repr(part).encode("utf-8", "surrogatepass")
        hasher.update(struct.pack("<Q", len(piece)))
        hasher.update(piece)
    return hasher.hexdigest()


def tokens_to_bytes(what: str, token_ids: Sequence[int]) -> bytes:
    """Little-endian int32. Raises InvalidRequest for what does not fit."""
    try:
        return np.asarray(token_ids, dtype=_TOKEN).tobytes()
    except (OverflowError, TypeError, ValueError) as error:
        raise InvalidRequest(what, str(error), "integers of 32 bits") from None


def tokens_from_bytes(blob: bytes) -> list[int]:
    return np.frombuffer(blob, dtype=_TOKEN).tolist()


def encode_details(result: ChunkResult) -> str:
    """Everything of a chunk but tokens, log-probabilities and finish reason, as JSON.

    A routing reference is durable if its `ref` is text, a name that outlives the process; any other (a handle of an
    object store) is left out, and reads back as routing that was not captured.
    """
    routing = result.routing
    is_durable = routing is not None and isinstance(routing.ref, str)
    record = {
        "spans": [(span.version, span.stop) for span in result.spans],
        "shard": result.shard,
        "cached": result.num_cached_tokens,
        "ttft_s": result.ttft_s,
        "duration_s": result.duration_s,
        "routing": encode_routing(routing) if routing is not None and is_durable else None,
    }
    return to_json("chunk", record)


def encode_routing(routing: RoutingRef) -> list[Any]:
    return [routing.ref, routing.num_bytes, routing.first_token, routing.num_tokens]


def decode_routing(fields_: Sequence[Any]) -> RoutingRef:
    ref, num_bytes, first_token, num_tokens = fields_
    return RoutingRef(ref=ref, num_bytes=num_bytes, first_token=first_token, num_tokens=num_tokens)


def spans_of(stops: Iterable[Sequence[int]]) -> list[VersionSpan]:
    """[(version, stop), …] → spans from 0."""
    spans, start = [], 0
    for version, stop in stops:
        spans.append(VersionSpan(version=version, start=start, stop=stop))
        start = stop
    return spans


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedChunk:
    """A chunk as it is stored.

    Attributes:
        num_tokens: Its tokens.
        finish_reason, details: As text.
        payload: Tokens and log-probabilities under a digest of the whole row.
    """

    num_tokens: int
    finish_reason: str
    details: str
    payload: bytes

    def says_the_same_as(self, other: EncodedChunk) -> bool:
        """Same tokens, log-probabilities, versions and end; where and how fast it ran may differ."""
        mine, theirs = json.loads(self.details), json.loads(other.details)
        return (self.payload[_HEADER.size :], self.finish_reason, mine["spans"]) == (
            other.payload[_HEADER.size :],
            other.finish_reason,
            theirs["spans"],
        )


def encode_chunk(place: tuple[object, ...], result: ChunkResult) -> EncodedChunk:
    """A chunk with at least one token, ready to be stored.

    Args:
        place: The other columns that must be read back with it: the trajectory's key, epoch and start.
        result: With a log-probability and a version for each token.

    Raises:
        InvalidRequest: Tokens do not fit 32 bits, or log-probabilities or versions are not of all tokens.
    """
    num_tokens = len(result.token_ids)
    tokens = tokens_to_bytes("chunk token_ids", result.token_ids)
    wide = np.asarray(result.logprobs, dtype=_LOGPROBS[8])
    if len(wide) != num_tokens:
        raise InvalidRequest("chunk logprobs", len(wide), f"{num_tokens}, one a token")
    stops = [0, *(span.stop for span in result.spans)]
    starts = [*(span.start for span in result.spans), num_tokens]
    if starts != stops or any(a >= b for a, b in pairwise(stops)):
        raise InvalidRequest("chunk spans", result.spans, f"spans that cover {num_tokens} tokens in order")
    with np.errstate(over="ignore"):
        narrow = wide.astype(_LOGPROBS[4])
    kept = narrow if np.array_equal(narrow.astype(_LOGPROBS[8]), wide) else wide
    details, finish_reason = encode_details(result), result.finish_reason.value
    body = tokens + kept.tobytes()
    header = _HEADER.pack(_FORMAT, kept.dtype.itemsize, num_tokens, _row_digest(place, finish_reason, details, body))
    return EncodedChunk(num_tokens=num_tokens, finish_reason=finish_reason, details=details, payload=header + body)


def decode_payload(what: str, place: tuple[object, ...], chunk: EncodedChunk) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int32 [n] and log-probabilities float32 or float64 [n] of a chunk.

    Raises:
        JournalBroken: The row is not the one that was written. `what` says which one it is.
    """
    payload = chunk.payload
    body = memoryview(payload)[_HEADER.size :]
    if len(payload) >= _HEADER.size:
        version, width, num_tokens, digest = _HEADER.unpack_from(payload)
        is_whole = version == _FORMAT and width in _LOGPROBS and len(body) == num_tokens * (_TOKEN.itemsize + width)
        is_same = is_whole and digest == _row_digest(place, chunk.finish_reason, chunk.details, body)
        if is_same and num_tokens == chunk.num_tokens:
            stop = num_tokens * _TOKEN.itemsize
            return np.frombuffer(body[:stop], dtype=_TOKEN), np.frombuffer(body[stop:], dtype=_LOGPROBS[width])
    raise damaged(what)


def damaged(what: str) -> JournalBroken:
    """The error for a row whose digest differs."""
    return JournalBroken(
        f"{what}: its digest differs, the stored bytes are damaged; stop the service, keep a copy of the journal, and "
        "restore it from a backup, or delete this group's rows to have it generated anew"
    )


def _row_digest(place: tuple[object, ...], finish_reason: str, details: str, body: bytes | memoryview) -> int:
    hasher = xxhash.xxh3_64(repr((*place, finish_reason, details)).encode("utf-8", "surrogatepass"))
    hasher.update(body)
    return hasher.intdigest()


def encode_prompt(prompt: Prompt) -> str:
    """Id and metadata of a prompt; its tokens are kept apart."""
    return to_json(f"prompt {prompt.prompt_id}", {"prompt_id": prompt.prompt_id, "metadata": prompt.metadata})


def decode_prompt(text: str, tokens: bytes) -> Prompt:
    record = json.loads(text)
    return Prompt(
        token_ids=tuple(tokens_from_bytes(tokens)), prompt_id=record["prompt_id"], metadata=record["metadata"]
    )


def encode_request(sampling: SamplingParams, n_samples: int, reward: str, run_seed: int) -> str:
    """What all groups of a submission share and a later submission must repeat."""
    record = {"sampling": asdict(sampling), "n_samples_per_prompt": n_samples, "reward": reward, "run_seed": run_seed}
    return to_json("request", record)


def decode_sampling(record: dict[str, Any]) -> SamplingParams:
    return SamplingParams(**(record | {"stop_token_ids": tuple(record["stop_token_ids"])}))


def decode_finish_reason(text: str | None) -> FinishReason | None:
    return None if text is None else FinishReason(text)
