"""Throughput of the gateway under Locust.

    python -m launch.bench_locust [users=32] [duration_s=60] [prompt_tokens=64] [output_tokens=64]
        [url=http://127.0.0.1:8000] [out=PATH] [overrides …]

Runs launch/locustfile.py without its page, against the gateway at `url` (API key in LONGROLL_API_KEY) or against the
service of the overrides, which is started for it. `tokens_per_s` are generated tokens of whole answers in a second.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launch.arguments import split_arguments
from launch.hardware import hardware_line
from launch.http_load import Target
from launch.serving_target import KEY_VARIABLE, serving
from rollout.errors import LongrollError

LOCUSTFILE = Path(__file__).resolve().parent / "locustfile.py"
PATIENCE_S = 120.0  # beyond the duration, for starting and for the last answers


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The load: users that send one completion after another, for so long, of such lengths."""

    url: str | None = None
    users: int = 32
    duration_s: int = 60
    prompt_tokens: int = 64
    output_tokens: int = 64
    out: str | None = None


def run_locust(target: Target, options: Options) -> list[dict[str, Any]]:
    """Locust's figures, one entry a name. Raises LongrollError if it wrote none."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stats.json"
        command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "--only-summary"]
        command += ["--host", target.url, "--users", str(options.users), "--spawn-rate", str(options.users)]
        command += ["--run-time", f"{options.duration_s}s", "--stop-timeout", "30"]
        command += ["--json-file", str(path.with_suffix(""))]
        command += ["--prompt-tokens", str(options.prompt_tokens), "--output-tokens", str(options.output_tokens)]
        done = subprocess.run(
            command,
            env=os.environ | {KEY_VARIABLE: target.key},
            cwd=LOCUSTFILE.parent.parent,
            capture_output=True,
            text=True,
            timeout=options.duration_s + PATIENCE_S,
        )
        if not path.is_file():
            said = done.stderr[-2000:]
            raise LongrollError(f"locust: got exit code {done.returncode}, expected figures; it said:\n{said}")
        entries: list[dict[str, Any]] = json.loads(path.read_text())
        return entries


def figures(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What Locust says of a run.

    Raises:
        LongrollError: No request was made, or no answer came.
    """
    by_name = {entry["name"]: entry for entry in entries}
    if "/v1/completions" not in by_name or "tokens" not in by_name:
        raise LongrollError(f"locust: got figures of {', '.join(by_name) or 'nothing'}, expected completed answers")
    requests, tokens = by_name["/v1/completions"], by_name["tokens"]
    duration_s = requests["last_request_timestamp"] - requests["start_time"]
    return {
        "tokens_per_s": tokens["total_content_length"] / duration_s,
        "requests_per_s": requests["num_requests"] / duration_s,
        "num_requests": requests["num_requests"],
        "num_failures": requests["num_failures"],
        "duration_s": duration_s,
        **{f"{name.lower()}_ms": _quantiles(by_name[name]) for name in ("TTFT", "TPOT") if name in by_name},
    }


def _quantiles(entry: Mapping[str, Any]) -> dict[str, float]:
    """Of Locust's histogram of rounded milliseconds."""
    times = sorted((float(time), count) for time, count in entry["response_times"].items())
    total, seen, found = entry["num_requests"], 0, {}
    wanted = [("p50", 0.5), ("p95", 0.95), ("p99", 0.99)]
    for time, count in times:
        seen += count
        while wanted and seen >= wanted[0][1] * total:
            found[wanted.pop(0)[0]] = time
    return found


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--help" in arguments or "-h" in arguments:
        print(__doc__)
        return 0
    try:
        options, overrides = split_arguments(Options, arguments)
        with serving(options.url, overrides, has_targets=False) as served:
            record = figures(run_locust(served.target, options))
    except LongrollError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    record |= {"hardware": hardware_line(), "options": asdict(options)}
    print(json.dumps(record, indent=1))
    if options.out is not None:
        Path(options.out).write_text(json.dumps(record, indent=1) + "\n")
    return 0 if record["num_failures"] == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
