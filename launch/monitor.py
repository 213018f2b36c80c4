"""The one sink of a run's figures: W&B, progress bars or plain lines.

Owns the W&B run and the terminal. Knows key names and how to show them; computes nothing. A W&B that
fails never stops a run: the failure is counted, and said once.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from launch.evaluation import Evaluation
from launch.history import StepRecord
from rollout.config import MonitorConfig

logger = logging.getLogger(__name__)
T = TypeVar("T")
PLAIN_INTERVAL_S = 10.0  # between two lines about the same count, where there are no bars


class Monitor:
    """Shows and records a run.

    Args:
        config: What is shown and kept.
        run_dir: Where W&B writes; its path also gives the W&B run id, so that a resumed run continues it.
        settings: The whole configuration, shown beside the W&B run.
        num_steps: Steps of the run, for the progress bar.
    """

    def __init__(self, config: MonitorConfig, run_dir: Path, settings: dict[str, Any], num_steps: int) -> None:
        self.num_wandb_failures = 0
        self.run_id = config.wandb_run_id or _run_id(run_dir)
        self._console = Console(stderr=False)
        self._style = _style(config.progress, self._console)
        self._num_steps = num_steps
        self._progress: Progress | None = None
        self._steps_bar: Any = None
        self._wandb: Any = None
        if config.wandb_mode != "disabled":
            self._guard(lambda: self._start_wandb(config, run_dir, settings))
        if self._style == "rich":
            self._start_progress()

    def say(self, message: str) -> None:
        """One line for a person."""
        if self._style == "off":
            return
        if self._progress is not None:
            self._progress.console.print(message, highlight=False, markup=False)
        else:
            print(message, flush=True)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Show that something without a count is going on (training, sync)."""
        if self._progress is None:
            yield
            return
        bar = self._progress.add_task(name, total=None)
        try:
            yield
        finally:
            self._progress.remove_task(bar)

    def track(self, items: Iterable[T], name: str, total: int) -> Iterator[T]:
        """Pass items through, counting them on a bar, or now and then in a line."""
        if self._progress is None:
            said_at = time.monotonic()
            for done, item in enumerate(items, start=1):
                if time.monotonic() - said_at >= PLAIN_INTERVAL_S and done < total:
                    said_at = time.monotonic()
                    self.say(f"{name} {done}/{total}")
                yield item
            return
        bar = self._progress.add_task(name, total=total)
        try:
            for item in items:
                self._progress.advance(bar)
                yield item
        finally:
            self._progress.remove_task(bar)

    def evaluation(self, evaluation: Evaluation, when: str, step: int) -> None:
        self.say(
            f"eval {when}: reward {evaluation.reward:.3f}  exact {evaluation.exact_rate:.3f}  "
            f"length {evaluation.length_mean:.0f}  problems {len(evaluation.rewards)}  {evaluation.duration_s:.1f} s"
        )
        self._log(
            {
                "train/step": step,
                "eval/reward_mean": evaluation.reward,
                "eval/exact_rate": evaluation.exact_rate,
                "eval/response_length_mean": evaluation.length_mean,
            }
        )

    def step(self, record: StepRecord) -> None:
        """Record a finished step and say it in one line."""
        if self._progress is not None:
            self._progress.update(self._steps_bar, completed=record.step)
        self.say(
            f"step {record.step:3d}/{self._num_steps}  reward {record.reward_mean:.3f}  exact {record.exact_rate:.3f}  "
            f"length {record.length_mean:4.0f} (max {record.length_max})  {record.tokens_per_s:5.0f} tokens/s  "
            f"rollout {record.rollout_s:.1f} s  train {record.train_s:.1f} s  sync {record.sync_s:.2f} s"
        )
        self._log(wandb_row(record))

    def finish(self, *, exit_code: int = 0, picture: Path | None = None) -> None:
        """End the W&B run and the bars. Safe to call twice."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        if self._wandb is not None:
            run, self._wandb = self._wandb, None
            if picture is not None:
                import wandb

                self._guard(lambda: run.log({"progress": wandb.Image(str(picture))}))
            self._guard(lambda: run.finish(exit_code=exit_code))

    def _log(self, row: dict[str, float]) -> None:
        if self._wandb is not None:
            self._guard(lambda: self._wandb.log(row))

    def _start_wandb(self, config: MonitorConfig, run_dir: Path, settings: dict[str, Any]) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        mode: Any = config.wandb_mode
        self._wandb = wandb.init(
            project=config.wandb_project,
            dir=str(run_dir),
            id=self.run_id,
            resume="allow",
            mode=mode,
            config=settings,
            settings=wandb.Settings(console="off", x_disable_stats=True),
        )
        for axis, areas in AREAS.items():
            self._wandb.define_metric(axis)
            for area in areas:
                self._wandb.define_metric(f"{area}/*", step_metric=axis)

    def _start_progress(self) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description:<10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
        )
        self._steps_bar = self._progress.add_task("steps", total=self._num_steps)
        self._progress.start()

    def _guard(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:  # W&B is an outside service: its trouble is counted, never passed on
            self.num_wandb_failures += 1
            if self.num_wandb_failures == 1:
                logger.warning("W&B failed and will not be complete for this run: %r", error)


AREAS = {
    "rollout/step": ("rollout", "scheduler", "failures", "perf", "async", "engine"),
    "train/step": ("train", "draft", "mismatch_kl", "routing", "sync", "timing_s", "eval"),
}
"""Step axis of each area of keys."""


def wandb_row(record: StepRecord) -> dict[str, float]:
    """W&B keys of a step, `area/name`; what the step did not measure has none."""
    row = {
        "rollout/step": record.step,
        "rollout/reward_mean": record.reward_mean,
        "rollout/reward_std": record.reward_std,
        "rollout/exact_rate": record.exact_rate,
        "rollout/response_length_mean": record.length_mean,
        "rollout/response_length_p95": record.length_p95,
        "rollout/response_length_max": record.length_max,
        "rollout/truncated_rate": record.truncated_rate,
        "rollout/num_trajectories": record.num_trajectories,
        "rollout/num_failed": record.num_failed,
        "rollout/num_groups_filtered": record.num_groups_filtered,
        "perf/tokens_per_s": record.tokens_per_s,
        "perf/longest_sample_tokens_per_s": record.longest_sample_tokens_per_s,
        "async/staleness_max": record.staleness_max,
        "train/step": record.step,
        "train/loss": record.loss,
        "train/grad_norm": record.grad_norm,
        "train/clip_fraction": record.clip_fraction,
        "train/entropy": record.entropy,
        "train/lr": record.lr,
        "train/reference_kl": record.reference_kl,
        "train/tis_weight_mean": record.tis_weight_mean,
        "train/tis_capped_fraction": record.tis_capped_fraction,
        "engine/kv_cache_usage": record.kv_usage_max,
        "train/is_skipped": float(record.is_skipped),
        "train/tis_cap": record.tis_cap,
        "draft/loss": record.draft_loss,
        "draft/agreement": record.draft_agreement,
        "mismatch_kl/all": record.mismatch_kl,
        "mismatch_kl/slice": record.mismatch_kl_slice,
        "mismatch_kl/weights": record.mismatch_kl_weights,
        "mismatch_kl/kv": record.mismatch_kl_kv,
        "mismatch_kl/routing": record.mismatch_kl_routing,
        "mismatch_kl/staleness": record.mismatch_kl_staleness,
        "routing/kl_without_replay": record.routing_kl_without_replay,
        "routing/flip_rate": record.routing_flip_rate,
        "routing/num_replayed": record.num_routing_replayed,
        "routing/num_missing": record.num_routing_missing,
        "sync/stall_ms": record.stall_s * 1e3,
        "scheduler/num_chunks": record.num_chunks,
        "scheduler/num_migrations": record.num_migrations,
        "scheduler/num_cuts": record.num_cuts,
        "scheduler/num_retries": record.num_retries,
        "scheduler/num_tokens_restored": record.num_tokens_restored,
        "scheduler/num_regenerated": record.num_regenerated,
        "scheduler/num_group_restarts": record.num_group_restarts,
        **{f"failures/{reason}": count for reason, count in record.failures.items()},
        "timing_s/rollout": record.rollout_s,
        "timing_s/train": record.train_s,
        "timing_s/sync": record.sync_s,
        "timing_s/save": record.save_s,
    }
    return {key: value for key, value in row.items() if value is not None}


def _run_id(run_dir: Path) -> str:
    return "longroll-" + hashlib.blake2b(str(run_dir.resolve()).encode(), digest_size=6).hexdigest()


def _style(wanted: str, console: Console) -> str:
    if wanted != "auto":
        return wanted
    return "rich" if console.is_terminal and sys.stdout.isatty() else "plain"
