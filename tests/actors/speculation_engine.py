"""Runs engines that speculate in a process of their own and writes what they sampled; see test_speculation.py.

    python tests/actors/speculation_engine.py <output.json>

Drafters are exchanged in a running engine, and taken away to see what it samples without. An engine changes its
process for good (threads, accelerator calls), so tests do not run one in theirs.
"""

import json
import os
import random
import sys
from pathlib import Path

import numpy as np

os.environ.update(
    VLLM_USE_V2_MODEL_RUNNER="0", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_OMP_THREADS_BIND="0", RANK="0"
)

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = REPOSITORY / "models" / "tiny"
BLOCK_SIZE = 32
NUM_GROUPS, NUM_MEMBERS = 5, 4
NUM_TOKENS = 64
PIECE = 32
KV_BYTES = {"auto": 7 * 2**19, "int8_per_token_head": 2**20}  # about half of what 20 sequences come to need
SAMPLINGS = ({"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.9, "top_k": 50}, {"temperature": 0.0})


def prompts() -> list[list[int]]:
    draw = random.Random(11)
    groups = [[draw.randrange(3, 500) for _ in range(draw.randrange(3, 90))] for _ in range(NUM_GROUPS)]
    return [prompt for prompt in groups for _ in range(NUM_MEMBERS)]


class Engine:
    """The tiny model with few KV blocks and short steps: prefills are cut and mixed with trees, some are preempted."""

    def __init__(self, kv_cache_dtype: str) -> None:
        from vllm import LLM

        from actors.vllm_plugin.options import PluginOptions
        from rollout.speculation_config import SpeculationConfig

        self.config = SpeculationConfig(
            enabled=True, sources=("random",), budget_nodes=10, governor=False, draft_model=str(TINY / "draft")
        )
        self.llm = LLM(
            model=str(TINY),
            dtype="float32",
            kv_cache_dtype=kv_cache_dtype,
            max_model_len=512,
            skip_tokenizer_init=True,
            enforce_eager=True,
            worker_cls="actors.vllm_plugin.worker.KeyedCpuWorker",
            scheduler_cls="actors.vllm_plugin.scheduler.VersionedScheduler",
            quantization="longroll_plain",
            kv_cache_memory_bytes=KV_BYTES[kv_cache_dtype],
            block_size=BLOCK_SIZE,
            max_num_seqs=20,
            max_num_batched_tokens=128,
            logprobs_mode="processed_logprobs",
            additional_config=PluginOptions(speculation=self.config).to_additional_config(),
        )
        core = self.llm.llm_engine.engine_core.engine_core
        self.runner = core.model_executor.driver_worker.worker.model_runner
        self.vocab_size = self.runner.model_config.get_vocab_size()
        self.num_preempted = 0
        self.tally = {"steps": 0, "trees": 0, "accepted": 0, "moved": 0}
        self._count(core.scheduler)

    def _count(self, scheduler) -> None:
        preempt, moved, draft = scheduler._preempt_request, self.runner.kv_moved, self.runner._draft

        def counted_preempt(*args, **kwargs):
            self.num_preempted += 1
            return preempt(*args, **kwargs)

        def counted_moved(rows, slots):
            self.tally["moved"] += len(rows)
            return moved(rows, slots)

        def counted_draft(desk, state):
            self.tally["steps"] += 1
            self.tally["trees"] += len(self.runner._verified_trees)
            self.tally["accepted"] += sum(walked.num_drafted for *_, walked in self.runner._verified_trees)
            return draft(desk, state)

        scheduler._preempt_request = counted_preempt
        self.runner.kv_moved, self.runner._draft = counted_moved, counted_draft

    def draft_with(self, drafter) -> None:
        from actors.vllm_plugin.drafting import DraftDesk

        self.runner.draft_desk = drafter and DraftDesk(
            self.config, {"tests": drafter}, vocab_size=self.vocab_size, max_nodes=100
        )
        self.tally = dict.fromkeys(self.tally, 0)

    def sample(self, contexts: list[list[int]], num_tokens: int, places=None, extra=None, **sampling) -> list[dict]:
        """Tokens and log-probabilities; `places` choose seeds and groups, `extra` some requests' own options."""
        from vllm import SamplingParams

        places = range(len(contexts)) if places is None else places
        params = [
            SamplingParams(
                max_tokens=num_tokens,
                ignore_eos=True,
                detokenize=False,
                logprobs=0,
                extra_args={
                    "longroll_seed": 1000 + place,
                    "longroll_group": str(place // NUM_MEMBERS),
                    "longroll_member": str(place),
                },
                **sampling | (extra or {}).get(place, {}),
            )
            for place in places
        ]
        outputs = self.llm.generate([{"prompt_token_ids": c} for c in contexts], params, use_tqdm=False)
        samples = []
        for output in outputs:
            tokens = list(output.outputs[0].token_ids)
            logprobs = [step[t].logprob for step, t in zip(output.outputs[0].logprobs, tokens, strict=True)]
            samples.append({"tokens": tokens, "logprobs": logprobs, "num_cached": output.num_cached_tokens})
        return samples

    def sample_cut(self, batch: list[list[int]], **sampling) -> list[dict]:
        """As `sample`, but every request ends after a piece and is submitted again with what it has."""
        cut = [{"tokens": [], "logprobs": [], "num_cached": 0} for _ in batch]
        for _ in range(NUM_TOKENS // PIECE):
            pieces = self.sample([p + c["tokens"] for p, c in zip(batch, cut, strict=True)], PIECE, **sampling)
            cut = [{key: so_far[key] + new[key] for key in so_far} for so_far, new in zip(cut, pieces, strict=True)]
        return cut


def drafters(engine: Engine, batch: list[list[int]], plain: list[dict]) -> dict:
    from actors.vllm_plugin.clover_drafter import CloverDrafter
    from actors.vllm_plugin.drafters import AdversarialDrafter, RandomDrafter
    from actors.vllm_plugin.sibling_drafter import SiblingDrafter
    from tests.actors.speculation_drafters import TruthDrafter

    config, model = engine.runner.vllm_config, engine.runner.get_model()
    truth = {1000 + place: p + s["tokens"] for place, (p, s) in enumerate(zip(batch, plain, strict=True))}
    return {
        "random": RandomDrafter(engine.config, config, None),
        "adversarial": AdversarialDrafter(engine.config, config, None),
        "sibling": SiblingDrafter(engine.config, config, None),
        "clover2": CloverDrafter(engine.config, config, model),
        "truth": TruthDrafter(truth, engine.vocab_size),
    }


def record(kv_cache_dtype: str, samplings) -> dict:
    engine, batch = Engine(kv_cache_dtype), prompts()
    runs = []
    for sampling in samplings:
        engine.draft_with(None)
        plain = engine.sample(batch, NUM_TOKENS, **sampling)
        for name, drafter in drafters(engine, batch, plain).items():
            if name == "random" and sampling["temperature"] < 1:
                continue  # seldom right at any temperature
            engine.draft_with(drafter)
            before = engine.num_preempted
            drafted = engine.sample(batch, NUM_TOKENS, **sampling)
            run = {"drafter": name, "sampling": sampling, "plain": plain, "drafted": drafted}
            runs.append(run | {"tally": engine.tally, "num_preempted": engine.num_preempted - before})
        engine.draft_with(drafter)
        cut = engine.sample_cut(batch, **sampling)
        runs.append(
            {"drafter": "truth, cut", "sampling": sampling, "plain": plain, "drafted": cut} | {"tally": engine.tally}
        )
    result = {"runs": runs, "processors": processors(engine, batch), "hidden": hidden(engine, batch)}
    return result | ({"without": without(engine, batch)} if kv_cache_dtype == "auto" else {})


def without(engine: Engine, batch: list[list[int]]) -> dict:
    """What is sampled when a part of the machinery is left out."""
    from unittest import mock

    from actors.vllm_plugin.trees import TreeBatch

    def not_moved(trees, accepted, slots):
        return slots[:0], slots[:0]

    def by_index(trees):
        rows, owners, _ = whole.func(trees)
        depth = [np.arange(tree.num_rows) for tree in trees.trees]
        return rows, owners, trees.bases[owners] + np.concatenate(depth)

    whole = TreeBatch.__dict__["sampled_rows"]
    parts = {
        "mask": mock.patch.object(TreeBatch, "branching", lambda trees: []),
        "move": mock.patch.object(TreeBatch, "move", not_moved),
        "positions": mock.patch.object(TreeBatch, "sampled_rows", property(by_index)),
    }
    engine.draft_with(None)
    plain = engine.sample(batch, 48, temperature=1.0)
    record = {}
    for name, patch in parts.items():
        engine.llm.reset_prefix_cache()  # of wrong KV
        engine.draft_with(drafters(engine, batch, plain)["truth"])
        with patch:
            record[name] = {"plain": plain, "drafted": engine.sample(batch, 48, temperature=1.0)}
    engine.llm.reset_prefix_cache()
    return record


def processors(engine: Engine, batch: list[list[int]]) -> dict:
    """Requests with options that trees cannot have, among others."""
    extra = {
        1: {"repetition_penalty": 1.3},
        2: {"min_p": 0.1},
        3: {"logit_bias": {5: 4.0}},
        5: {"presence_penalty": 0.8},
        6: {"min_tokens": 20, "stop_token_ids": [7]},
        7: {"allowed_token_ids": list(range(10, 90))},
    }
    engine.draft_with(None)
    plain = engine.sample(batch, 32, extra=extra, temperature=1.0)
    engine.draft_with(drafters(engine, batch, plain)["truth"])
    drafted = engine.sample(batch, 32, extra=extra, temperature=1.0)
    return {"plain": plain, "drafted": drafted, "tally": engine.tally, "places": sorted(extra)}


def hidden(engine: Engine, batch: list[list[int]]) -> dict:
    """Largest difference between hidden states handed over with trees and without, by position; how many of the tensors
    that were handed over are still what they were, and of how many."""
    import torch

    from actors.vllm_plugin.drafting import DraftDesk
    from tests.actors.speculation_drafters import HiddenSpy, TruthDrafter

    plain_spy, spy = HiddenSpy(), HiddenSpy()
    engine.llm.reset_prefix_cache()
    engine.draft_with(plain_spy)
    plain = engine.sample(batch[:4], 32, temperature=1.0)
    truth = {1000 + place: batch[place] + plain[place]["tokens"] for place in range(4)}
    engine.llm.reset_prefix_cache()
    engine.runner.draft_desk = DraftDesk(
        engine.config,
        {"spy": spy, "truth": TruthDrafter(truth, engine.vocab_size)},
        vocab_size=engine.vocab_size,
        max_nodes=100,
    )
    drafted = engine.sample(batch[:4], 32, temperature=1.0)
    compared, largest = 0, 0.0
    for (_, expected), (_, got) in zip(sorted(plain_spy.rows.items()), sorted(spy.rows.items()), strict=True):
        common = expected.keys() & got.keys()
        compared += len(common)
        largest = max([largest] + [float((expected[p] - got[p]).abs().max()) for p in common])
    handed = plain_spy.handed + spy.handed
    kept = sum(torch.equal(rows, copy) for rows, copy in handed), len(handed)
    return {"plain": plain, "drafted": drafted, "compared": compared, "largest": largest, "kept": kept}


def main(output: Path) -> None:
    records = {"auto": record("auto", SAMPLINGS), "int8_per_token_head": record("int8_per_token_head", SAMPLINGS[:1])}
    output.write_text(json.dumps(records | {"prompts": prompts()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
