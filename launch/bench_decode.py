"""Decode speed of INT4 weights against bfloat16 on one CPU engine.

    python -m launch.bench_decode [batch=1,4,8] [repeats=11] [tokens=32] [out=PATH]

A random mixture-of-experts model of a few hundred million parameters, large enough that a decode step
reads weights rather than runs Python, is served three ways on the same core: by vLLM's own bfloat16
layers, by ours in bfloat16 (`longroll_plain`) and in INT4 (`longroll_int4`). Each engine is a process;
they take turns within a repeat, one at a time, so that what else the machine does falls on all alike.
All three run vLLM's own worker, so nothing but the weights differs.

`decode_speedup` is the median over repeats of the faster bfloat16 engine's time over INT4's time.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any

from actors.vllm_plugin import QUANTIZATIONS
from actors.vllm_plugin.options import PluginOptions
from launch.arguments import split_arguments
from rollout.config import Int4Config
from rollout.errors import EngineDead, InvalidRequest

STOCK, PLAIN, INT4 = "bf16 (vLLM)", "bf16 (longroll)", "int4"
BASELINES = (STOCK, PLAIN)
START_TIMEOUT_S = 300.0
MODEL_SEED = 0
KV_BYTES = 256 * 2**20
NUM_PROMPT_TOKENS = 8  # short, so that nearly all of a request is decoding


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The model and the load.

    Attributes:
        batch: Sequences decoded together; one line each.
        tokens: Tokens of each sequence.
        repeats: Rounds in which every engine runs every batch once.
        hidden, layers, experts, top_k, width, vocabulary: Of the model; `width` is that of one expert.
        group_size: Of the INT4 weights.
        core: CPU that all engines are bound to.
        out: JSON file to write.
    """

    batch: tuple[int, ...] = (1, 4, 8)
    tokens: int = 32
    repeats: int = 11
    hidden: int = 1024
    layers: int = 6
    experts: int = 16
    top_k: int = 4
    width: int = 768
    vocabulary: int = 8192
    group_size: int = 64
    core: int = 0
    out: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """Decode times at one batch size; seconds of a step, by engine, in the order of repeats."""

    batch: int
    step_s: dict[str, list[float]]

    @property
    def medians(self) -> dict[str, float]:
        return {name: statistics.median(times) for name, times in self.step_s.items()}

    @property
    def baseline(self) -> str:
        """The faster of the bfloat16 engines."""
        medians = self.medians
        return min(BASELINES, key=medians.__getitem__)

    @property
    def speedups(self) -> list[float]:
        pairs = zip(self.step_s[self.baseline], self.step_s[INT4], strict=True)
        return [plain / int4 for plain, int4 in pairs]

    @property
    def speedup(self) -> float:
        return statistics.median(self.speedups)


def make_model(directory: str, options: Options) -> int:
    """Write a random model; returns its number of parameters."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(MODEL_SEED)
    config = Qwen3MoeConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=4 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=max(1, options.hidden // 256),
        head_dim=64,
        max_position_embeddings=4096,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        moe_intermediate_size=options.width,
        num_experts=options.experts,
        num_experts_per_tok=options.top_k,
        norm_topk_prob=True,
        tie_word_embeddings=False,
    )
    model = Qwen3MoeForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(directory)
    return model.num_parameters()


def _serve(name: str, directory: str, options: Options, pipe: Connection) -> None:
    """An engine's process: answers batch sizes with the seconds a batch took."""
    os.environ.update(
        VLLM_CPU_OMP_THREADS_BIND=str(options.core),
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_USE_V2_MODEL_RUNNER="0",
        VLLM_NO_USAGE_STATS="1",
        VLLM_LOGGING_LEVEL="WARNING",
        OMP_NUM_THREADS="1",
    )
    from vllm import LLM, SamplingParams

    chosen: dict[str, Any] = {}
    if name != STOCK:
        int4 = Int4Config(group_size=options.group_size) if name == INT4 else None
        chosen["quantization"] = QUANTIZATIONS["int4" if int4 else None]
        chosen["additional_config"] = PluginOptions(int4=int4).to_additional_config()
    engine = LLM(
        directory,
        dtype="bfloat16",
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=2048,
        max_num_seqs=max(options.batch),
        kv_cache_memory_bytes=KV_BYTES,
        enable_prefix_caching=False,
        **chosen,
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=options.tokens, ignore_eos=True, detokenize=False)
    pipe.send(None)
    while (batch := pipe.recv()) is not None:
        prompts = [{"prompt_token_ids": [3 + (7 * i + j) % 97 for j in range(NUM_PROMPT_TOKENS)]} for i in range(batch)]
        start = time.perf_counter()
        engine.generate(prompts, sampling, use_tqdm=False)
        pipe.send(time.perf_counter() - start)


class _Engine:
    """The parent's end of an engine process."""

    def __init__(self, name: str, directory: str, options: Options) -> None:
        self._name = name
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(name, directory, options, other), daemon=True)
        self._process.start()
        other.close()
        self._receive(START_TIMEOUT_S)

    def run(self, batch: int) -> float:
        """Seconds that a batch takes from its submission to its last token."""
        self._pipe.send(batch)
        seconds: float = self._receive(START_TIMEOUT_S)
        return seconds

    def close(self) -> None:
        if self._process.is_alive():
            self._pipe.send(None)
        self._process.join()

    def _receive(self, timeout_s: float) -> Any:
        try:
            if self._pipe.poll(timeout_s):
                return self._pipe.recv()
        except (EOFError, OSError) as error:
            raise EngineDead(f"{self._name}: its process ended with {self._process.exitcode}") from error
        raise EngineDead(f"{self._name}: no answer within {timeout_s:g} s")


def measure(options: Options, directory: str) -> list[Line]:
    """Start the engines one after another, warm them up and let them take turns."""
    engines: dict[str, _Engine] = {}
    lines = [Line(batch=batch, step_s={name: [] for name in (STOCK, PLAIN, INT4)}) for batch in options.batch]
    try:
        for name in (STOCK, PLAIN, INT4):
            engines[name] = _Engine(name, directory, options)
            for batch in options.batch:
                engines[name].run(batch)
        for _ in range(options.repeats):
            for line in lines:
                for name, engine in engines.items():
                    line.step_s[name].append(engine.run(line.batch) / options.tokens)
    finally:
        for engine in engines.values():
            engine.close()
    return lines


def table(lines: Sequence[Line]) -> str:
    """One line for each batch size, times in milliseconds."""
    rows = [
        f"{'batch':>5} " + " ".join(f"{name:>16}" for name in (STOCK, PLAIN, INT4)) + "   speedup (lowest … highest)"
    ]
    for line in lines:
        medians = line.medians
        times = " ".join(f"{medians[name] * 1e3:>13.2f} ms" for name in (STOCK, PLAIN, INT4))
        speedups = line.speedups
        rows.append(f"{line.batch:>5} {times}   {line.speedup:.2f} × ({min(speedups):.2f} … {max(speedups):.2f})")
    return "\n".join(rows)


def record(options: Options, num_parameters: int, lines: Sequence[Line]) -> dict[str, Any]:
    """What is written as JSON; `decode_speedup` is the lowest of all batch sizes."""
    return {
        "decode_speedup": min(line.speedup for line in lines),
        "num_parameters": num_parameters,
        "options": asdict(options),
        "batches": [
            {
                "batch": line.batch,
                "decode_speedup": line.speedup,
                "baseline": line.baseline,
                "median_step_s": line.medians,
                "step_s": line.step_s,
            }
            for line in lines
        ],
    }


def main(arguments: Sequence[str]) -> int:
    logging.basicConfig(level=logging.WARNING)
    options, rest = split_arguments(Options, arguments)
    if rest:
        raise InvalidRequest("argument", rest[0], "one of this command's own")
    with tempfile.TemporaryDirectory() as directory:
        num_parameters = make_model(directory, options)
        print(f"{num_parameters / 1e6:.0f} M parameters, top {options.top_k} of {options.experts} experts, one core")
        lines = measure(options, directory)
    print(table(lines))
    result = record(options, num_parameters, lines)
    if options.out is not None:
        with open(options.out, "w") as file:
            json.dump(result, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
