"""Submit a training run to a Ray cluster, follow it, stop it.

    python -m launch.submit experiment=tiny_grpo                 submit and follow
    python -m launch.submit --detach experiment=tiny_grpo        submit and leave
    python -m launch.submit status | logs | stop JOB_ID

Wraps Ray's job client; the same as `ray job submit --working-dir . -- python -m launch.train …`.
Ctrl-C while following detaches (the job goes on) unless --stop-on-interrupt.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from ray.job_submission import JobStatus, JobSubmissionClient

from launch.compose import compose
from rollout.errors import InvalidRequest

ROOT = Path(__file__).resolve().parent.parent
ADDRESS = "http://127.0.0.1:8265"
# Ray reads .gitignore and .rayignore as well; these would be refused for their size where neither is read.
EXCLUDES = [".git", ".venv", "runs", "wandb", "tests", "docs"]
COMMANDS = ("status", "logs", "stop")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    _send_token_if_there_is_one()
    try:
        if any(a in COMMANDS for a in arguments):
            return _manage(arguments)
        return _submit(arguments)
    except InvalidRequest as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ConnectionError as error:
        print(f"error: no Ray dashboard answers ({error}); start one with `ray start --head`", file=sys.stderr)
        return 3
    except RuntimeError as error:  # how Ray's client reports a refusal, such as an unknown job
        print(f"error: {error}", file=sys.stderr)
        return 3


def _send_token_if_there_is_one() -> None:
    """A cluster demands the token that Ray keeps; its job client sends it only when told (Ray 2.60)."""
    if "RAY_AUTH_TOKEN" in os.environ or (Path.home() / ".ray" / "auth_token").is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _submit(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m launch.submit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--address", default=os.environ.get("RAY_API_SERVER_ADDRESS", ADDRESS))
    parser.add_argument("--python", default="python", help="interpreter on the cluster")
    parser.add_argument("--job-id", default=None, help="a name of your own for the job")
    parser.add_argument("--detach", action="store_true", help="do not follow the logs")
    parser.add_argument("--stop-on-interrupt", action="store_true", help="Ctrl-C stops the job")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for launch.train")
    options = parser.parse_args(argv)
    compose(options.overrides)  # a mistake is said here, not in a log on the cluster
    client = JobSubmissionClient(options.address)
    job_id = client.submit_job(
        entrypoint=shlex.join([options.python, "-m", "launch.train", *options.overrides]),
        submission_id=options.job_id,
        runtime_env={"working_dir": str(ROOT), "excludes": EXCLUDES},
    )
    print(f"submitted {job_id}", flush=True)
    if options.detach:
        return 0
    return follow(client, job_id, options.stop_on_interrupt)


def follow(client: JobSubmissionClient, job_id: str, stop_on_interrupt: bool) -> int:
    """Print a job's log until it ends.

    Returns:
        The exit code of the job's command; 130 after Ctrl-C.
    """

    async def tail() -> None:
        async for text in client.tail_job_logs(job_id):
            print(text, end="", flush=True)

    try:
        asyncio.run(tail())
    except KeyboardInterrupt:
        if stop_on_interrupt:
            client.stop_job(job_id)
            print(f"\nstopped {job_id}")
        else:
            print(f"\ndetached; python -m launch.submit logs {job_id} follows again, stop {job_id} ends it")
        return 130
    return _exit_code(client, job_id)


def _exit_code(client: JobSubmissionClient, job_id: str) -> int:
    info = client.get_job_info(job_id)
    print(f"{job_id}: {info.status}")
    if info.status == JobStatus.SUCCEEDED:
        return 0
    if info.message:
        print(info.message.splitlines()[0], file=sys.stderr)
    return info.driver_exit_code or 1


def _manage(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m launch.submit")
    parser.add_argument("--address", default=os.environ.get("RAY_API_SERVER_ADDRESS", ADDRESS))
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("job_id")
    options = parser.parse_args(argv)
    client = JobSubmissionClient(options.address)
    if options.command == "status":
        info = client.get_job_info(options.job_id)
        print(f"{options.job_id}: {info.status} {info.message or ''}")
        return 0
    if options.command == "stop":
        print("stopping" if client.stop_job(options.job_id) else "it had ended already")
        return 0
    return follow(client, options.job_id, stop_on_interrupt=False)


if __name__ == "__main__":
    sys.exit(main())
