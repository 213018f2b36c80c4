"""Published speeds of Qwen3-235B-A22B on GPUs, as their sources state them.

Owns the figures and where they are from. Two kinds: mean time of an output token at a concurrency, and output tokens
per second of a GPU when a number of requests is thrown at an engine at once. What a source leaves open is said
beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

from rollout.plan.candidate import BF16, Precision

# NVFP4: 4 bits and an FP8 scale for every 16 weights. ModelOpt's checkpoints, which NVIDIA measured, quantise KV too;
# the tables do not say so, but the batches behind their figures would not fit otherwise.
NVFP4 = Precision(name="fp4", weight_bits=4.5, kv_dtype="float8_e4m3fn", arithmetic="fp4")
FP8 = Precision(name="fp8", weight_bits=8, kv_dtype="float8_e4m3fn", arithmetic="fp8")

TRTLLM = "TensorRT-LLM performance overview, https://nvidia.github.io/TensorRT-LLM/developer-guide/perf-overview.html"
SGLANG = "SGLang cookbook, https://github.com/sgl-project/sgl-cookbook/blob/main/docs/Qwen/Qwen3.md"
ATOM = "AMD ATOM recipe, https://github.com/ROCm/ATOM/blob/main/recipes/Qwen3-235b.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """One figure.

    Attributes:
        source: Title and address.
        engine: Software, for what a step costs it at least.
        accelerator: A key of ACCELERATORS.
        precision: Of weights and KV.
        ranks, tensor_ranks: GPUs of the group; of them, those that share an attention.
        prompt_tokens, output_tokens: Mean of a request.
        concurrency: Requests running together, in the mean; None = as many as fit.
        num_requests: Thrown at it at once, where concurrency is None.
        tpot_s: Mean time of an output token, where that is the figure.
        tokens_per_s_per_gpu: Output tokens, where that is.
    """

    source: str
    engine: str
    accelerator: str
    precision: Precision
    ranks: int
    tensor_ranks: int
    prompt_tokens: int
    output_tokens: int
    concurrency: float | None = None
    num_requests: int | None = None
    tpot_s: float | None = None
    tokens_per_s_per_gpu: float | None = None

    @property
    def figure(self) -> float:
        """Seconds, or tokens per second."""
        figure = self.tpot_s if self.tpot_s is not None else self.tokens_per_s_per_gpu
        assert figure is not None, "a published row is one or the other"
        return figure


def _offline(accelerator: str, ranks: int, precision: Precision, *rows: tuple[int, int, int, float]) -> list[Published]:
    """TensorRT-LLM with data-parallel attention ("DEP"): (input, output, requests, tokens per second and GPU)."""
    return [
        Published(
            source=TRTLLM,
            engine="tensorrt-llm",
            accelerator=accelerator,
            precision=precision,
            ranks=ranks,
            tensor_ranks=1,
            prompt_tokens=prompt,
            output_tokens=output,
            num_requests=requests,
            tokens_per_s_per_gpu=speed,
        )
        for prompt, output, requests, speed in rows
    ]


def _serving(
    source: str, engine: str, accelerator: str, tensor_ranks: int, *rows: tuple[int, int, float, float]
) -> list[Published]:
    """Tensor-parallel serving: (input, output, requests in flight, milliseconds an output token)."""
    return [
        Published(
            source=source,
            engine=engine,
            accelerator=accelerator,
            precision=BF16 if engine == "sglang" else FP8,
            ranks=tensor_ranks,
            tensor_ranks=tensor_ranks,
            prompt_tokens=prompt,
            output_tokens=output,
            concurrency=concurrency,
            tpot_s=milliseconds / 1000,
        )
        for prompt, output, concurrency, milliseconds in rows
    ]


PUBLISHED: tuple[Published, ...] = (
    *_offline(
        "h200",
        4,
        FP8,
        (1024, 1024, 3000, 3268),
        (1024, 8192, 1500, 1417),
        (8192, 1024, 1500, 627),
        (32_768, 1024, 1000, 134),
    ),
    *_offline("h100", 8, FP8, (1024, 1024, 3000, 1935), (1024, 8192, 1500, 873)),
    *_offline(
        "b200",
        4,
        NVFP4,
        (1024, 1024, 3000, 5756),
        (1024, 8192, 1500, 3389),
        (1024, 32_768, 1000, 1255),
        (8192, 1024, 1500, 1410),
        (32_768, 1024, 1000, 319),
    ),
    *_offline(
        "gb200",
        4,
        NVFP4,
        (1024, 1024, 3000, 5862),
        (1024, 8192, 1500, 3423),
        (8192, 1024, 1500, 1464),
        (32_768, 1024, 1000, 333),
    ),
    # Lengths and concurrency as its logs state them: totals by requests, mean in flight. Its last table is cut short.
    *_serving(
        SGLANG,
        "sglang",
        "b200",
        8,
        (610, 421, 1.0, 10.27),
        (496, 509, 13.58, 15.88),
        (500, 504, 89.76, 30.52),
        (610, 4445, 1.0, 10.33),
        (496, 3978, 13.84, 14.83),
        (497, 4065, 56.33, 23.22),
        (4194, 421, 1.0, 10.38),
        (3750, 520, 13.93, 17.46),
    ),
    *_serving(
        ATOM,
        "atom",
        "mi355x",
        8,
        (1000, 1000, 256, 20.55),
        (1000, 1000, 128, 16.47),
        (4000, 1000, 128, 21.32),
        (4000, 1000, 64, 17.52),
        (10_000, 1000, 64, 22.80),
        (10_000, 1000, 32, 19.08),
    ),
    *_serving(
        ATOM,
        "atom",
        "mi355x",
        4,
        (1000, 1000, 256, 27.79),
        (1000, 1000, 128, 21.15),
        (4000, 1000, 128, 26.79),
        (4000, 1000, 64, 19.88),
        (10_000, 1000, 64, 26.84),
        (10_000, 1000, 32, 21.44),
    ),
)
