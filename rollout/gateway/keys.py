"""API keys: who may call what. Only hashes are kept.

A key is "lr_<id>_<secret>"; its secret is 256 random bits. Guessing one takes 2**255 tries on average however fast a
try is, so one SHA-256 is enough: slow hashes such as scrypt protect secrets that people think up. What the file tells
a thief is which keys there are, not the keys.

Owns the file of hashes and the comparison, which takes the same time for every wrong key. Knows nothing of HTTP.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path

from rollout.errors import InvalidRequest

SECRET_BYTES = 32
_KEY = re.compile(r"lr_([0-9a-f]{12})_[A-Za-z0-9_-]{43}")
_NOBODY = "0" * 64  # no SHA-256 that anybody could present


class Role(str, Enum):
    """Each may do what the ones before it may."""

    CLIENT = "client"  # completions
    TRAINER = "trainer"  # rollouts and the state of the weights
    OPERATOR = "operator"  # everything: other users' rollouts, other weights, metrics

    def includes(self, other: Role) -> bool:
        """Whether whoever has this role may do what `other` may."""
        order = list(Role)
        return order.index(self) >= order.index(other)


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """A key as it is kept.

    Attributes:
        key_id: The public part, also in log lines.
        name: Whose it is, for people.
        role: What it is good for.
        sha256: Of the whole key, in hexadecimal digits.
    """

    key_id: str
    name: str
    role: Role
    sha256: str


def make_key(name: str, role: Role) -> tuple[str, ApiKey]:
    """A new key, and what to keep of it. The key itself cannot be had again."""
    key_id = secrets.token_hex(6)
    key = f"lr_{key_id}_{secrets.token_urlsafe(SECRET_BYTES)}"
    return key, ApiKey(key_id=key_id, name=name, role=role, sha256=_digest(key))


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


class KeyRing:
    """Keys that are valid now."""

    def __init__(self, keys: Iterable[ApiKey]) -> None:
        self._keys = {key.key_id: key for key in keys}

    def find(self, presented: str) -> ApiKey | None:
        """The key that was presented, if it is one."""
        match = _KEY.fullmatch(presented)
        known = self._keys.get(match.group(1)) if match is not None else None
        is_right = hmac.compare_digest(_digest(presented), known.sha256 if known is not None else _NOBODY)
        return known if is_right else None


class KeyFile:
    """The keys of a service in a JSON file that only its owner can read; processes that use it see changes.

    Args:
        path: The file; made when the first key is added.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: tuple[int, int] | None = None
        self._ring = KeyRing(())

    def ring(self) -> KeyRing:
        """The keys as they are now; reads the file only when it has changed. No file: no keys.

        Raises:
            InvalidRequest: The file is damaged.
        """
        try:
            status = self._path.stat()
        except FileNotFoundError:
            return KeyRing(())
        stamp = (status.st_mtime_ns, status.st_ino)
        if stamp != self._stamp:
            self._ring, self._stamp = KeyRing(self.load()), stamp
        return self._ring

    def load(self) -> list[ApiKey]:
        """All keys, in the order in which they were added. Raises InvalidRequest if the file is damaged."""
        if not self._path.exists():
            return []
        try:
            records = json.loads(self._path.read_text())["keys"]
            return [
                ApiKey(key_id=r["key_id"], name=r["name"], role=Role(r["role"]), sha256=r["sha256"]) for r in records
            ]
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidRequest(f"key file {self._path}", str(error), "a file that Longroll has written") from None

    def add(self, name: str, role: Role) -> str:
        """Make a key and keep its hash. Returns the key, which is nowhere else."""
        key, kept = make_key(name, role)
        self._save([*self.load(), kept])
        return key

    def revoke(self, key_id: str) -> None:
        """From now on a key is refused. Raises InvalidRequest if there is none of that id."""
        keys = self.load()
        rest = [key for key in keys if key.key_id != key_id]
        if len(rest) == len(keys):
            raise InvalidRequest("key id", key_id, f"one of {', '.join(k.key_id for k in keys) or 'none'}")
        self._save(rest)

    def _save(self, keys: list[ApiKey]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        draft = self._path.with_name(f"{self._path.name}.{secrets.token_hex(4)}")
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump({"keys": [asdict(key) for key in keys]}, file, indent=2)
        draft.replace(self._path)
