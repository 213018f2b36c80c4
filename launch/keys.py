"""The API keys of a service: make, list, revoke.

    python -m launch.keys add client alice file=runs/run/keys.json      # roles: client, trainer, operator
    python -m launch.keys list file=runs/run/keys.json
    python -m launch.keys revoke ID file=runs/run/keys.json

A key is printed when it is made and cannot be had again. Gateways that use the file see changes with the next request.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rollout.errors import InvalidRequest, LongrollError
from rollout.gateway.keys import KeyFile, Role

FILE = "file="
EXPECTED = "add ROLE NAME, list, or revoke ID, and file=PATH"


def run(words: Sequence[str], file: KeyFile) -> list[str]:
    """Do what the words say. Returns the lines to print. Raises InvalidRequest."""
    match list(words):
        case ["add", role, name]:
            if role not in list(Role):
                raise InvalidRequest("role", role, f"one of {', '.join(one.value for one in Role)}")
            return [f"API key of {name}, shown this once: {file.add(name, Role(role))}"]
        case ["list"]:
            return [f"{key.key_id}  {key.role.value:8}  {key.name}" for key in file.load()]
        case ["revoke", key_id]:
            file.revoke(key_id)
            return [f"revoked {key_id}"]
    raise InvalidRequest("command", " ".join(words) or "nothing", EXPECTED)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--help" in arguments or "-h" in arguments:
        print(__doc__)
        return 0
    files = [argument.removeprefix(FILE) for argument in arguments if argument.startswith(FILE)]
    try:
        if len(files) != 1:
            raise InvalidRequest("file", files, EXPECTED)
        words = [argument for argument in arguments if not argument.startswith(FILE)]
        print("\n".join(run(words, KeyFile(Path(files[0])))))
    except LongrollError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
