"""Which experts every token went to at sampling: packed bytes, and references to them.

Routing replay (R3, arXiv 2510.11370) lets the trainer's forward use the experts that the engine used.
A trajectory of N tokens has N − 1 rows of expert ids: row p says where the token at position p went when
the token after it was sampled; the last token was never an input. Each chunk of a trajectory brings the
rows its engine saw first, so that the chunks of a trajectory tile [0, N − 1).

Packed: a header, then ceil(log2(num_experts)) bits for each id in the order [token, layer, place], eight
ids at a time: byte i of the first eight bytes (of all of them, up to 8 bits) holds the low bits of id i,
squeezed together; ids of more than 8 bits are followed by a second plane with their high bits. At 128
experts, 94 layers and 8 experts a token that is 658 bytes a token.

Owns the format and the records. Knows nothing of where bytes are kept, of engines or of models.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from rollout.errors import InvalidRequest, RoutingBroken

MAGIC = b"LRRX"
FORMAT_VERSION = 1
_FIELDS = struct.Struct("<4sHHIIHH")  # magic, version, experts − 1, first token, tokens, layers, places
_DIGEST = struct.Struct("<Q")  # XXH3-64 of the fields and the ids
_HEADER_BYTES = _FIELDS.size + _DIGEST.size
_GROUP = 8  # ids squeezed together, so that every width gives whole bytes
_MAX_EXPERTS = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """Experts of consecutive tokens.

    Attributes:
        first_token: Position of the first row's token in prompt + output.
        num_experts: Ids are smaller than this.
        ids: uint8 (up to 256 experts) or uint16 [tokens, layers, places]; layers are those with experts, in
            order, and places the experts of one token, in the router's order.
    """

    first_token: int
    num_experts: int
    ids: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingRef:
    """Where packed routing lies. What the blob holds beyond `num_tokens` rows is to be ignored.

    Attributes:
        ref: Resolved by whoever stored it (actors.routing_store); plain to everybody else.
        num_bytes: Of the blob.
        first_token: Position of the first row's token in the trajectory.
        num_tokens: Rows.
    """

    ref: Any
    num_bytes: int
    first_token: int
    num_tokens: int

    @property
    def stop(self) -> int:
        return self.first_token + self.num_tokens


def id_dtype(num_experts: int) -> type[np.uint8] | type[np.uint16]:
    """The smallest type that holds every id."""
    return np.uint8 if num_experts <= 256 else np.uint16


def num_id_bits(num_experts: int) -> int:
    """ceil(log2(num_experts)), at least 1.

    Raises:
        InvalidRequest: More experts than the format has room for, or none.
    """
    if not 1 <= num_experts <= _MAX_EXPERTS:
        raise InvalidRequest("number of experts", num_experts, f"a number in [1, {_MAX_EXPERTS}]")
    return max(1, (num_experts - 1).bit_length())


def pack(routing: Routing) -> bytes:
    """Bytes that `unpack` turns into the same record.

    Raises:
        InvalidRequest: The ids have another number of dimensions or type, or are not all below num_experts.
    """
    ids, bits = routing.ids, num_id_bits(routing.num_experts)
    if ids.ndim != 3 or ids.dtype != id_dtype(routing.num_experts):
        expected = f"{id_dtype(routing.num_experts).__name__} [tokens, layers, places]"
        raise InvalidRequest("expert ids", f"{ids.dtype} of shape {ids.shape}", expected)
    if ids.size and int(ids.max()) >= routing.num_experts:
        raise InvalidRequest("expert id", int(ids.max()), f"a number below num_experts = {routing.num_experts}")
    groups = np.zeros((-(-ids.size // _GROUP), _GROUP), dtype=ids.dtype)
    groups.reshape(-1)[: ids.size] = ids.reshape(-1)
    planes = [_squeeze(groups & 0xFF, min(bits, 8))]
    if bits > 8:
        planes.append(_squeeze(groups >> 8, bits - 8))
    payload = b"".join(plane.tobytes() for plane in planes)
    experts = routing.num_experts - 1  # so that 65,536 fits as well
    fields = _FIELDS.pack(MAGIC, FORMAT_VERSION, experts, routing.first_token, *ids.shape)
    return fields + _DIGEST.pack(_digest(fields, payload)) + payload


def _digest(fields: bytes | memoryview, payload: bytes | memoryview) -> int:
    hasher = xxhash.xxh3_64(fields)
    hasher.update(payload)
    return hasher.intdigest()


def unpack(blob: bytes) -> Routing:
    """The record that was packed.

    Raises:
        RoutingBroken: The bytes are of something else, cut short, or damaged.
    """
    if len(blob) < _HEADER_BYTES:
        raise RoutingBroken(f"packed routing: got {len(blob)} bytes, expected a header of {_HEADER_BYTES}")
    magic, version, experts, first, num_tokens, num_layers, num_places = _FIELDS.unpack_from(blob)
    if (magic, version) != (MAGIC, FORMAT_VERSION):
        raise RoutingBroken(
            f"packed routing: got {magic!r} version {version}, expected {MAGIC!r} version {FORMAT_VERSION}"
        )
    num_experts = experts + 1
    bits, count = num_id_bits(num_experts), num_tokens * num_layers * num_places
    num_groups = -(-count // _GROUP)
    view = memoryview(blob)
    payload = view[_HEADER_BYTES:]
    if len(payload) != num_groups * bits:
        raise RoutingBroken(
            f"packed routing of {num_tokens} tokens: got {len(payload)} bytes after the header, expected "
            f"{num_groups * bits}"
        )
    if _DIGEST.unpack_from(blob, _FIELDS.size)[0] != _digest(view[: _FIELDS.size], payload):
        raise RoutingBroken(f"packed routing of {num_tokens} tokens: its digest differs, the bytes are damaged")
    low = min(bits, 8)
    raw = np.frombuffer(payload, dtype=np.uint8)
    ids: np.ndarray = _spread(raw[: num_groups * low], low).astype(id_dtype(num_experts), copy=False)
    if bits > 8:
        ids |= _spread(raw[num_groups * low :], bits - 8).astype(np.uint16) << 8
    shaped = ids.reshape(-1)[:count].reshape(num_tokens, num_layers, num_places)
    return Routing(first_token=first, num_experts=num_experts, ids=shaped)


def _squeeze(groups: np.ndarray, bits: int) -> np.ndarray:
    """[G, 8] ids of at most `bits` ≤ 8 bits → [G, bits] bytes, id i at bit i · bits of the little-endian word."""
    words: np.ndarray = np.zeros(len(groups), dtype="<u8")
    for place in range(_GROUP):
        words |= groups[:, place].astype(np.uint64) << np.uint64(place * bits)
    return words.view(np.uint8).reshape(-1, 8)[:, :bits]


def _spread(squeezed: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of `_squeeze`: flat bytes → uint8 [G, 8]."""
    rows = squeezed.reshape(-1, bits)
    whole: np.ndarray = np.zeros((len(rows), 8), dtype=np.uint8)
    whole[:, :bits] = rows
    words, mask = whole.view("<u8").reshape(-1), np.uint64((1 << bits) - 1)
    ids: np.ndarray = np.empty((len(rows), _GROUP), dtype=np.uint8)
    for place in range(_GROUP):
        ids[:, place] = (words >> np.uint64(place * bits)) & mask
    return ids


def covers(refs: Sequence[RoutingRef], num_rows: int) -> bool:
    """Whether references tile the rows [0, num_rows) in order, without gap or overlap."""
    stop = 0
    for ref in refs:
        if ref.first_token != stop:
            return False
        stop = ref.stop
    return stop == num_rows


def rows_of(blob: bytes, ref: RoutingRef) -> np.ndarray:
    """[ref.num_tokens, layers, places] of a blob that a reference led to.

    Raises:
        RoutingBroken: The blob is damaged, or holds other tokens than the reference says.
    """
    routing = unpack(blob)
    if routing.first_token != ref.first_token or len(routing.ids) < ref.num_tokens:
        raise RoutingBroken(
            f"packed routing: got tokens {routing.first_token}…{routing.first_token + len(routing.ids) - 1}, "
            f"expected {ref.first_token}…{ref.stop - 1}"
        )
    return routing.ids[: ref.num_tokens]
