"""Whether a run directory may be continued with a configuration. Reads config.yaml; changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from rollout.config import RunConfig
from rollout.errors import InvalidRequest

SECTIONS = ("model", "sampling", "trainer", "workload")
"""What decides the trajectories; engines, cluster, sync and monitor may change between restarts."""
FREE = {
    "trainer.num_steps",
    "trainer.checkpoint_every",
    "trainer.keep_checkpoints",
    "trainer.start_timeout_s",
    "trainer.distributed_timeout_s",
}


def check_same_run(config: RunConfig, run_dir: Path) -> None:
    """Refuse to continue a checkpoint under options that would make it another run.

    An option that did not exist when the run began had its default.

    Raises:
        InvalidRequest: With the first option that differs from run_dir/config.yaml.
    """
    stored = run_dir / "config.yaml"
    if not (config.resume and (run_dir / "checkpoints" / "latest").exists() and stored.is_file()):
        return
    before: Any = OmegaConf.to_container(OmegaConf.load(stored))
    now, defaults = _as_stored(config), _as_stored(RunConfig())
    for section in SECTIONS:
        for key, value in now[section].items():
            name, was = f"{section}.{key}", before.get(section, {}).get(key, defaults[section][key])
            if name not in FREE and was != value:
                raise InvalidRequest(
                    name,
                    value,
                    f"{was} as in {stored}, which has a checkpoint (resume=false or another run_dir starts anew)",
                )


def _as_stored(config: RunConfig) -> Any:
    """What config.yaml of such a run holds."""
    return OmegaConf.to_container(OmegaConf.create(OmegaConf.to_yaml(OmegaConf.structured(config))))
