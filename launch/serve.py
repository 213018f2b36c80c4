"""The service behind its HTTP gateway, until it is told to stop.

    python -m launch.serve                                     # the embedded model on http://127.0.0.1:8000
    python -m launch.serve experiment=qwen3_235b_serving gateway.host=0.0.0.0 gateway.port=8080

Without a file of keys an operator's key is made and printed, once: only its hash is kept. `launch.keys` makes others.
On SIGTERM new completions are refused with 503, those under way end (gateway.drain_timeout_s), then everything stops.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ray

from actors.gateway import start_gateway
from actors.gateway_app import GatewayOptions
from actors.service import start_service
from actors.supervisor import Supervisor
from launch.cluster import absolute_dsn, model_path, run_directory, start_ray
from launch.compose import compose, model_directory, to_yaml
from rollout.config import RunConfig
from rollout.errors import LongrollError
from rollout.gateway.keys import KeyFile, Role

KEYS_FILE = "keys.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """What of a configuration is told to clients, or found by operators.

    Attributes:
        model: Name of the model.
        keys_file: Where the hashes of keys are.
    """

    model: str
    keys_file: Path


def names_of(config: RunConfig) -> Names:
    """Before paths are made absolute: clients know the model by the name that was configured."""
    folder = run_directory(config.run_dir)
    given = config.gateway.keys_file
    return Names(
        model=config.gateway.model_name or config.model.path,
        keys_file=folder / KEYS_FILE if given is None else Path(given).expanduser().resolve(),
    )


def first_key(path: Path) -> str | None:
    """An operator's key if there are no keys yet, else None."""
    file = KeyFile(path)
    return None if file.load() else file.add("operator", Role.OPERATOR)


def run(config: RunConfig, stop: threading.Event) -> None:
    """Serve until `stop` is set."""
    names = names_of(config)
    model_directory(config.model.path)
    config.model.path = model_path(config.model.path)
    config.journal.dsn = absolute_dsn(config.journal.dsn)
    (run_directory(config.run_dir) / "config.yaml").write_text(to_yaml(config))
    key = first_key(names.keys_file)
    if key is not None:
        _say(f"API key of the operator, shown this once: {key}")
    start_ray(config)
    _stop_on_signals(stop)  # Ray's own handler would abort this process three seconds after a SIGTERM
    try:
        parts = config.model, config.engine, config.scheduler, config.sync, config.cluster
        _say(f"starting {config.engine.num_all_shards} shards of {names.model}")
        with (
            start_service(*parts, journal=config.journal, supervisor=config.supervisor) as service,
            Supervisor(service, config.supervisor, _say),
        ):
            options = GatewayOptions(
                gateway=config.gateway,
                model=config.model,
                sync=config.sync,
                model_name=names.model,
                keys_file=str(names.keys_file),
                namespace=service.namespace,
            )
            gateway = start_gateway(options)
            try:
                _say(f"serving {names.model} on {gateway.url}")
                stop.wait()
                _say("stopping: completions under way may end")
            finally:
                gateway.stop()
    finally:
        ray.shutdown()
    _say("stopped")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--help" in arguments or "-h" in arguments:
        print(__doc__)
        return 0
    stop = threading.Event()
    try:
        config = compose(arguments)
        _stop_on_signals(stop)
        run(config, stop)
    except LongrollError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return 0


def _stop_on_signals(stop: threading.Event) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())


def _say(message: str) -> None:
    print(message, flush=True)


if __name__ == "__main__":
    sys.exit(main())
