"""What stands in for a person in a request: the key that was presented, and the request's own name.

Knows nothing of HTTP.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass

from rollout.gateway.keys import ApiKey, Role

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who makes a request.

    Attributes:
        key: That was presented.
        request_id: Names the request in log lines and in the answer.
    """

    key: ApiKey
    request_id: str

    def owns(self, owner: str) -> bool:
        """Whether what belongs to the key `owner` may be seen."""
        return owner == self.key.key_id or self.key.role is Role.OPERATOR


def request_id_of(presented: str | None) -> str:
    """The client's own name for its request, if it is fit for a log line, else a new one."""
    if presented is not None and _REQUEST_ID.fullmatch(presented):
        return presented
    return secrets.token_hex(16)
