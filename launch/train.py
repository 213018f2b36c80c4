"""The training run: rollout → train → publish → log → checkpoint.

    python -m launch.train experiment=tiny_grpo trainer.lr=1e-4
    python -m launch.train experiment=tiny_grpo --cfg          print the configuration and stop

The loop is `train_steps`; everything it calls is somebody else's work. Every rollout of step k is sampled
under version k - 1, so a run that was killed and resumed repeats the same trajectories. Trainer ranks that die are
started anew beside the engines, which go on: the steps since the checkpoint are trained again from the journal.
"""

from __future__ import annotations

import signal
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import ray
from omegaconf import OmegaConf

from actors.service import Service, start_service
from actors.supervisor import Supervisor
from actors.trainer_group import TrainerGroup
from launch.cluster import absolute_dsn, model_path, run_directory, start_ray
from launch.compose import compose, model_directory, to_yaml
from launch.evaluation import Evaluation, evaluation_of
from launch.history import History
from launch.monitor import Monitor
from launch.picture import draw
from launch.restarts import Once, TrainerDeaths
from launch.resume import check_same_run
from launch.step_statistics import StepTimes, step_record
from launch.summary import Summary, summarise
from launch.workload import Workload
from rollout.client import RolloutClient
from rollout.config import RunConfig, SupervisorConfig
from rollout.cursor import Cursor
from rollout.errors import CheckpointBroken, EngineDead, InvalidRequest, LongrollError, SyncRefused, TrainerDead
from rollout.fleet import SyncReport
from rollout.types import Group, SamplingParams

MAX_REFUSALS = 3  # of a publication, in a row


def train(config: RunConfig, run_dir: Path, monitor: Monitor) -> Summary:
    """One run from its newest checkpoint, or from the start, to its last step."""
    began = time.monotonic()
    workload, history = Workload(config.workload, config.model, config.trainer.seed), History(run_dir / "steps.jsonl")
    with service_of(config, monitor) as service, supervised(service, config.supervisor, monitor):
        start_s = time.monotonic() - began
        monitor.say(f"{len(service.infos)} shards ready in {start_s:.0f} s")
        before: Once[Cursor, Evaluation] = Once(
            lambda cursor: evaluation_before(config, run_dir, service.client, workload, cursor, monitor)
        )
        deaths = TrainerDeaths(config.supervisor, history, monitor)
        while True:
            try:
                with trainers_of(config, run_dir, service.controller) as trainers:
                    after = train_steps(config, run_dir, service.client, trainers, workload, history, before, monitor)
            except TrainerDead as error:
                deaths.note(error)
                continue
            return summarise(
                before=before.value,
                after=after,
                steps=history.steps,
                shards=tuple(service.infos),
                num_trainer_ranks=config.trainer.num_ranks,
                num_trainer_restarts=deaths.num_restarts,
                start_s=start_s,
                total_s=time.monotonic() - began,
            )


def train_steps(
    config: RunConfig,
    run_dir: Path,
    client: RolloutClient,
    trainers: TrainerGroup,
    workload: Workload,
    history: History,
    before: Once[Cursor, Evaluation],
    monitor: Monitor,
) -> Evaluation:
    """From the newest checkpoint to the last step. Returns the evaluation at the end.

    Raises:
        TrainerDead: The ranks are gone; others may go on from the newest checkpoint.
    """
    run_id = run_id_of(config, run_dir)
    cursor = resume(config, client, trainers, history, monitor)
    client.acknowledge_groups(run_id, cursor.learned, f"step {cursor.step}")  # in case it died before it could
    learned: list[str] = []
    before.ask(cursor)

    for step in range(cursor.step + 1, config.trainer.num_steps + 1):
        times = StepTimes()
        with timed(times, "rollout_s"):
            asked = ask_for(config, step, cursor)
            groups = rollout(config, client, workload, asked, run_id, monitor)
        stats = client.stats()
        with timed(times, "train_s"), monitor.phase("train"):
            metrics = trainers.train_step(groups)
        client.note_mismatch(trainers.version, metrics.mismatch_kl, metrics.mismatch)
        with timed(times, "sync_s"), monitor.phase("sync"):
            report = publish(config, client, trainers, monitor)
        learned += [group.group_id for group in groups]
        cursor = after_step(cursor, asked, groups, trainers.version, learned)
        is_last = step == config.trainer.num_steps
        history.add(step_record(step, groups, metrics, report, times, stats))
        if is_last or step % config.trainer.checkpoint_every == 0:
            with timed(times, "save_s"), monitor.phase("save"):
                trainers.save(cursor)
                client.acknowledge_groups(run_id, learned, f"step {step}")
            learned = []
            history.amend_save_s(times.save_s)
        monitor.step(history.steps[-1])

    after = evaluate(config, client, workload, cursor.version, monitor)
    monitor.evaluation(after, "after", cursor.step)
    return after


def ask_for(config: RunConfig, step: int, cursor: Cursor) -> tuple[tuple[str, int], ...]:
    """Groups of a step, as (group id, problem): first what an earlier step left over, then new problems."""
    num_new = num_requested(config) - len(cursor.leftover)
    return cursor.leftover + tuple((f"step{step:06d}/{i:04d}", cursor.data_cursor + i) for i in range(num_new))


def after_step(
    cursor: Cursor, asked: Sequence[tuple[str, int]], groups: Sequence[Group], version: int, learned: Sequence[str]
) -> Cursor:
    """Where the run stands once a step has used these of the groups that it asked for."""
    used = {group.group_id for group in groups}
    return Cursor(
        step=cursor.step + 1,
        version=version,
        data_cursor=cursor.data_cursor + len(asked) - len(cursor.leftover),
        leftover=tuple(one for one in asked if one[0] not in used),
        learned=tuple(learned),
    )


def rollout(
    config: RunConfig,
    client: RolloutClient,
    workload: Workload,
    asked: Sequence[tuple[str, int]],
    run_id: str | None,
    monitor: Monitor,
) -> list[Group]:
    """The first prompts_per_step to finish of the groups that are asked for, in order of their ids."""
    sampling = config.sampling
    handle = client.submit(
        [workload.problem(problem) for _, problem in asked],
        sampling.n_samples_per_prompt,
        sampling_params(config, sampling.max_tokens),
        run_seed=config.trainer.seed,
        group_ids=[group_id for group_id, _ in asked],
        reward=config.workload.reward,
        run_id=run_id,
    )
    wanted = config.trainer.prompts_per_step
    groups = list(islice(monitor.track(client.groups(handle), "rollout", wanted), wanted))
    if wanted < len(asked):  # over-sampling: the slowest are given up for now; their tokens are durable
        client.abort(handle)
        for _ in client.groups(handle):  # reading what was given up closes the handle
            continue
    return sorted(groups, key=lambda group: group.group_id)


def evaluate(
    config: RunConfig, client: RolloutClient, workload: Workload, version: int, monitor: Monitor
) -> Evaluation:
    """One sample of each held-out problem, with the same seeds every time."""
    began = time.monotonic()
    prompts = workload.held_out()
    max_tokens = config.workload.eval_max_tokens or config.sampling.max_tokens
    handle = client.submit(
        prompts,
        1,
        sampling_params(config, max_tokens),
        run_seed=0,
        group_ids=[f"eval/{i:06d}" for i in range(len(prompts))],
        reward=config.workload.reward,
    )
    groups = list(monitor.track(client.groups(handle), "evaluate", len(prompts)))
    return evaluation_of(groups, version, time.monotonic() - began)


def evaluation_before(
    config: RunConfig, run_dir: Path, client: RolloutClient, workload: Workload, cursor: Cursor, monitor: Monitor
) -> Evaluation:
    """The held-out score of the first weights; a resumed run reads what it measured then.

    Raises:
        CheckpointBroken: A resumed run no longer has it, and its weights can no longer give it.
        InvalidRequest: It is of another number of problems, which could not be compared at the end.
    """
    path, wanted = run_dir / "eval_before.json", config.workload.eval_problems
    if cursor.step > 0:
        if not path.is_file():
            raise CheckpointBroken(f"{path}: got no file, expected the held-out score from before step 1")
        before = Evaluation.load(path)
        if len(before.rewards) != wanted:
            raise InvalidRequest("workload.eval_problems", wanted, f"{len(before.rewards)}, as when this run began")
        return before
    before = evaluate(config, client, workload, cursor.version, monitor)
    before.save(path)
    monitor.evaluation(before, "before", cursor.step)
    return before


def publish(config: RunConfig, client: RolloutClient, trainers: TrainerGroup, monitor: Monitor) -> SyncReport:
    """Publish, again if something died meanwhile that a supervisor brings back.

    A version that is live already was published by ranks that died since; it is not gone back to.

    Raises:
        SyncRefused: More than MAX_REFUSALS times: it is not a death that is in the way.
        EngineDead: No engine came back within supervisor.engine_wait_s.
    """
    deadline, num_refused = time.monotonic() + config.supervisor.engine_wait_s, 0
    if client.stats().live_version >= trainers.version:
        return SyncReport.unknown(trainers.version)
    while True:
        try:
            return trainers.publish()
        except (SyncRefused, EngineDead) as error:
            num_refused += isinstance(error, SyncRefused)
            if not config.supervisor.enabled or num_refused > MAX_REFUSALS or time.monotonic() > deadline:
                raise
            monitor.say(f"version {trainers.version} was not published, trying again: {error}")
        time.sleep(config.supervisor.check_every_s)
        if client.stats().live_version == trainers.version:  # only the answer was lost
            return SyncReport.unknown(trainers.version)


def resume(
    config: RunConfig, client: RolloutClient, trainers: TrainerGroup, history: History, monitor: Monitor
) -> Cursor:
    """Load the newest checkpoint and bring fresh shards to its version."""
    cursor = trainers.load_latest() if config.resume else None
    history.restore(cursor.step if cursor is not None else 0)
    if cursor is None:
        return Cursor(step=0, version=0, data_cursor=0)
    publish(config, client, trainers, monitor)
    monitor.say(f"resumed after step {cursor.step}")
    return cursor


def run_id_of(config: RunConfig, run_dir: Path) -> str:
    """The name under which the run's rollouts are durable: kept beside its checkpoints, new without resume."""
    path = run_dir / "run_id"
    if config.resume and path.is_file():
        return path.read_text().strip()
    run_id = f"{run_dir.name}-{uuid.uuid4().hex[:12]}"
    path.write_text(run_id + "\n")
    return run_id


def num_requested(config: RunConfig) -> int:
    """Prompts that a step asks for."""
    return config.trainer.over_sampling_batch_size or config.trainer.prompts_per_step


def sampling_params(config: RunConfig, max_tokens: int) -> SamplingParams:
    sampling = config.sampling
    return SamplingParams(
        max_tokens=max_tokens, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p
    )


def service_of(config: RunConfig, monitor: Monitor) -> Service:
    monitor.say(f"starting {config.engine.num_all_shards} shards; importing vLLM takes each of them a minute or so")
    return start_service(
        config.model,
        config.engine,
        config.scheduler,
        config.sync,
        config.cluster,
        journal=config.journal,
        supervisor=config.supervisor if config.supervisor.enabled else None,
        on_progress=lambda ready, total: monitor.say(f"shards ready {ready}/{total}"),
    )


def supervised(service: Service, config: SupervisorConfig, monitor: Monitor) -> AbstractContextManager[object]:
    return Supervisor(service, config, monitor.say) if config.enabled else nullcontext()


@contextmanager
def trainers_of(config: RunConfig, run_dir: Path, controller: Any) -> Iterator[TrainerGroup]:
    trainers = TrainerGroup.start(
        config.model,
        config.trainer,
        config.sampling,
        config.sync,
        config.cluster,
        run_dir,
        controller,
        config.engine,
        config.mismatch,
    )
    try:
        yield trainers
    finally:
        trainers.stop()


@contextmanager
def timed(times: StepTimes, part: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    setattr(times, part, time.monotonic() - began)


def run(config: RunConfig) -> int:
    """Set up, train, and write run_dir/summary.json and progress.png. Returns the exit code."""
    model_directory(config.model.path)
    config.model.path = model_path(config.model.path)
    speculation = config.engine.speculation
    if speculation.draft_model is not None:
        speculation.draft_model = model_path(speculation.draft_model)
    run_dir = run_directory(config.run_dir)
    config.journal.dsn = absolute_dsn(config.journal.dsn)
    check_same_run(config, run_dir)
    (run_dir / "config.yaml").write_text(to_yaml(config))
    settings: Any = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    monitor = Monitor(config.monitor, run_dir, settings, config.trainer.num_steps)
    monitor.say(f"run directory {run_dir}")
    picture = run_dir / "progress.png"
    code = 1
    try:
        start_ray(config)
        summary = train(config, run_dir, monitor)
        summary.save(run_dir / "summary.json")
        if config.monitor.picture:
            history = History(run_dir / "steps.jsonl")
            history.restore(config.trainer.num_steps)
            draw(history.steps, picture, run_dir.name, (summary.eval_reward_before, summary.eval_reward_after))
        monitor.say(
            f"reward {summary.eval_reward_before:.3f} → {summary.eval_reward_after:.3f} "
            f"(p = {summary.p_value:.2g}) in {summary.timing_s['total']:.0f} s; see {run_dir / 'summary.json'}"
        )
        code = 0
    finally:
        monitor.finish(exit_code=code, picture=picture if code == 0 and config.monitor.picture else None)
        ray.shutdown()
    return code


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--help" in arguments or "-h" in arguments:
        print(__doc__)
        return 0
    try:
        config = compose([a for a in arguments if a != "--cfg"])
        if "--cfg" in arguments:
            print(to_yaml(config))
            return 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _stop)
        return run(config)
    except LongrollError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1


def _stop(number: int, frame: object) -> None:
    """End the run from wherever it is: context managers stop everything; the newest checkpoint stays."""
    signal.signal(number, signal.SIG_DFL)  # a second signal does not wait
    print(f"stopping on {signal.Signals(number).name}; run again to resume", file=sys.stderr, flush=True)
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
