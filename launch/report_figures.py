"""Which figure of which record answers which requirement, and what counts as holding.

Owns the list of requirements that are measured, and the reading of each benchmark's JSON.
"""

from __future__ import annotations

from collections.abc import Callable

from launch.report_rows import Figure, Record, Requirement

TINY = "embedded model"


def _within(record: Record) -> Figure:
    options, share = record["options"], record["share_within"]
    cells = record["cells"]
    text = (
        f"{share:.1%} of {record['num_requests']:,} requests (1 to {max(c['concurrency'] for c in cells)} streams, "
        f"{', '.join(options['lengths'])} tokens)"
    )
    return Figure(text=text, holds=share >= 0.95, hardware=f"{TINY}, {record['hardware']}")


def _latency(what: str) -> Callable[[Record], Figure]:
    def read(record: Record) -> Figure:
        target, cells = record["options"][f"{what}_ms"], record["cells"]
        at = max(cells, key=lambda cell: (cell["summary"][f"{what}_ms"]["p95"], cell["concurrency"]))
        worst = at["summary"][f"{what}_ms"]["p95"]
        median = sorted(cell["summary"][f"{what}_ms"]["p50"] for cell in cells)[len(cells) // 2]
        text = f"p95 {worst:.1f} ms at {at['concurrency']} streams, the worst of {len(cells)}; median {median:.1f} ms"
        return Figure(text=text, holds=worst <= target, hardware=f"{TINY}, {record['hardware']}")

    return read


def _steady(record: Record) -> Figure | None:
    phase = record["phases"].get("steady")
    if phase is None:
        return None
    s, options = phase["summary"], record["options"]
    text = (
        f"{s['requests_per_s']:.1f} requests/s, {s['tokens_per_s']:,.0f} tokens/s, {s['num_errors']} errors of "
        f"{s['num_requests']:,} in {options['duration_s']:g} s at {options['share']:.0%} of capacity"
    )
    holds = s["num_errors"] == 0 and s["num_refused"] == 0
    return Figure(text=text, holds=holds, hardware=f"{TINY}, {record['hardware']}")


def _variation(record: Record) -> Figure | None:
    phase = record["phases"].get("steady")
    if phase is None or phase["summary"]["qps_variation"] is None:
        return None
    s = phase["summary"]
    text = (
        f"± {s['qps_variation']:.1%} over windows of {record['options']['window_s']:g} s "
        f"(the arrivals themselves ± {s['offered_variation']:.1%})"
    )
    return Figure(text=text, holds=s["qps_variation"] < 0.10, hardware=f"{TINY}, {record['hardware']}")


def _overload(record: Record) -> Figure | None:
    phase = record["phases"].get("overload")
    if phase is None:
        return None
    s = phase["summary"]
    told = s["share_with_retry_after"]
    text = (
        f"{s['num_refused']:,} of {s['num_requests']:,} refused with 429"
        + (f" ({told:.0%} of them with Retry-After)" if told is not None else "")
        + f", {s['share_within']:.1%} of the admitted within targets, {s['num_errors']} errors, "
        + ("alive afterwards" if record["is_alive"] else "dead afterwards")
    )
    holds = record["is_alive"] and s["num_errors"] == 0 and told == 1.0 and s["share_within"] >= 0.95
    return Figure(text=text, holds=holds, hardware=f"{TINY}, {record['hardware']}")


def _overload_memory(record: Record) -> Figure | None:
    phases = record["phases"]
    if any(phases.get(name) is None or phases[name]["memory"] is None for name in ("steady", "overload")):
        return None
    steady, overload = phases["steady"]["memory"], phases["overload"]["memory"]
    more = overload["peak_pss_bytes"] / steady["peak_pss_bytes"] - 1
    text = (
        f"PSS {overload['peak_pss_bytes'] / 2**20:,.0f} MiB at most, {more:+.1%} of the steady phase's; "
        f"{overload['growth_bytes'] / 2**20:+,.0f} MiB while it lasted"
    )
    return Figure(text=text, holds=more < 0.10, hardware=f"{TINY}, {record['hardware']}")


def _memory_shapes(record: Record) -> Figure:
    o = record["options"]
    text = (
        f"weights {record['weights_ratio']:.1%}, weights + KV at the load that bf16 just holds "
        f"{record['peak_ratio']:.1%} of bf16's"
    )
    hardware = f"Qwen3-235B, {o['headline']} devices of {o['device_gb']:g} GB, laid out without them"
    return Figure(text=text, holds=record["peak_ratio"] <= 0.60, hardware=hardware, kind="planned")


def _memory_engines(record: Record) -> Figure | None:
    held = record.get("engines")
    if held is None:
        return None
    text = f"{held['peak_ratio']:.1%} of bf16's, weights alone {held['weights_ratio']:.1%}"
    return Figure(text=text, holds=held["peak_ratio"] <= 0.60, hardware=f"{TINY}, running CPU engines")


def _kv_bytes(record: Record) -> Figure:
    shape = record["shapes"][0]
    ratio = shape["kv_token_int8"] / shape["kv_token_bf16"]
    text = f"{shape['kv_token_int8']:,.0f} bytes a token, {ratio:.1%} of bf16's"
    return Figure(text=text, holds=ratio <= 0.60, hardware="Qwen3-235B's shape", kind="planned")


def _ratio(key: str, text: str, target: float, hardware: str = TINY) -> Callable[[Record], Figure | None]:
    def read(record: Record) -> Figure | None:
        if key not in record:
            return None
        value = record[key]
        return Figure(text=text.format(value), holds=value >= target, hardware=record.get("hardware", hardware))

    return read


def _kernel(op: str) -> Callable[[Record], Figure | None]:
    def read(record: Record) -> Figure | None:
        results = [result for result in record["results"] if result["op"].startswith(op)]
        ratios = [result["ratio_to_bf16"] for result in results if result["ratio_to_bf16"]]
        if results and not ratios:
            rates = [result["gb_per_s"] for result in results]
            text = f"{min(rates):.1f} to {max(rates):.1f} GB/s over {len(rates)} shapes; not timed beside bf16 here"
            return Figure(text=text, holds=None, hardware=record["device"])
        if not ratios:
            return None
        text = f"{min(ratios):.2f} to {max(ratios):.2f} × bf16's speed over {len(ratios)} shapes"
        return Figure(text=text, holds=max(ratios) > 1, hardware=record["device"])

    return read


def _batching(record: Record) -> Figure | None:
    by_streams = {cell["concurrency"]: cell["summary"]["tokens_per_s"] for cell in record["cells"]}
    if 1 not in by_streams or len(by_streams) < 2:
        return None
    most = max(by_streams)
    gain = by_streams[most] / by_streams[1]
    text = f"{by_streams[most]:,.0f} tokens/s with {most} streams, {gain:.1f} × one stream's"
    return Figure(text=text, holds=gain > 1, hardware=f"{TINY}, {record['hardware']}")


def _locust(record: Record) -> Figure:
    text = (
        f"{record['tokens_per_s']:,.0f} tokens/s, {record['requests_per_s']:.1f} requests/s with "
        f"{record['options']['users']} users, {record['num_failures']} failures of {record['num_requests']:,}"
    )
    return Figure(text=text, holds=record["num_failures"] == 0, hardware=f"{TINY}, {record['hardware']}")


def _accuracy(record: Record) -> Figure:
    limit = record["options"]["max_loss"]
    worst = min(record["comparisons"], key=lambda one: one["low"])
    text = (
        f"{worst['setting']}: {worst['difference']:+.2f} points ({worst['low']:+.2f} … {worst['high']:+.2f}) on "
        f"{worst['num_problems']:,} problems"
    )
    return Figure(text=text, holds=worst["low"] >= -limit, hardware=f"{TINY}, CPU engines")


def _first_token(record: Record) -> Figure:
    parts = sorted(record["parts_ms"].items(), key=lambda item: -item[1])
    shown = ", ".join(f"{name} {value:.1f} ms" for name, value in parts[:4])
    text = f"{record['ttft_ms']:.1f} ms: {shown}"
    return Figure(text=text, holds=record["ttft_ms"] <= 200, hardware=f"{TINY}, {record['hardware']}")


def _speculation(record: Record) -> Figure | None:
    if "tail_speedup" not in record:
        return None
    text = f"{record['tail_speedup']:.2f} × the throughput of 1, 2 and 4 long sequences, the least of the three"
    return Figure(text=text, holds=record["tail_speedup"] > 1, hardware=f"{TINY}, CPU engines")


INDICATORS, OPTIMISATIONS, TESTS = "Indicators, measured", "Optimisations", "Tests"

REQUIREMENTS = (
    Requirement(
        section=INDICATORS,
        name="time to first token",
        target="≤ 200 ms",
        source="parallel",
        read=_latency("ttft"),
    ),
    Requirement(
        section=INDICATORS,
        name="where the time to first token goes (PyTorch Profiler)",
        target="≤ 200 ms",
        source="first_token",
        read=_first_token,
    ),
    Requirement(
        section=INDICATORS,
        name="time per output token",
        target="≤ 50 ms",
        source="parallel",
        read=_latency("tpot"),
    ),
    Requirement(
        section=INDICATORS,
        name="memory of KV cache + weights",
        target="≤ 60 % of bf16's",
        source="memory",
        read=_memory_engines,
    ),
    Requirement(
        section=INDICATORS,
        name="memory of KV cache + weights, Qwen3-235B's shapes",
        target="≤ 60 % of bf16's",
        source="memory",
        read=_memory_shapes,
    ),
    Requirement(
        section=INDICATORS,
        name="throughput of long rollouts over plain vLLM",
        target="≥ 2 ×",
        source="rollout",
        read=_ratio("makespan_speedup", "{:.2f} × (makespan, heavy-tailed lengths)", 2.0),
    ),
    Requirement(
        section=INDICATORS, name="throughput under Locust", target="no failures", source="locust", read=_locust
    ),
    Requirement(
        section=OPTIMISATIONS,
        name="INT4 weights",
        target="≥ 1 × bf16's decode step",
        source="decode",
        read=_ratio("decode_speedup", "{:.2f} × bf16's decode step", 1.0, "a random MoE model on this CPU"),
    ),
    Requirement(
        section=OPTIMISATIONS, name="INT8 KV cache", target="≤ 60 % of bf16's", source="memory", read=_kv_bytes
    ),
    Requirement(
        section=OPTIMISATIONS,
        name="FlashAttention: blockwise attention over INT8 KV",
        target="> 1 × bf16",
        source="kernels",
        read=_kernel("kv_attention"),
    ),
    Requirement(
        section=OPTIMISATIONS,
        name="GEMM operator fusion: dequantisation inside the INT4 matmul",
        target="> 1 × bf16",
        source="kernels",
        read=_kernel("int4"),
    ),
    Requirement(
        section=OPTIMISATIONS,
        name="speculative sampling: token trees of at most 4 a layer",
        target="> 1 ×",
        source="speculation",
        read=_speculation,
    ),
    Requirement(
        section=OPTIMISATIONS,
        name="speculation where it does not pay",
        target="≥ 0.97 × without it",
        source="speculation",
        read=_ratio("worst_case_ratio", "{:.3f} × without drafts, at worst", 0.97),
    ),
    Requirement(
        section=OPTIMISATIONS, name="continuous batching", target="> 1 × one stream", source="parallel", read=_batching
    ),
    Requirement(
        section=TESTS,
        name="benchmark_parallel: TTFT and TPOT targets",
        target="met in ≥ 95 % of requests",
        source="parallel",
        read=_within,
    ),
    Requirement(
        section=TESTS,
        name="benchmark_serving: throughput and error rate",
        target="no errors",
        source="serving",
        read=_steady,
    ),
    Requirement(
        section=TESTS, name="benchmark_serving: variation of QPS", target="< 10 %", source="serving", read=_variation
    ),
    Requirement(
        section=TESTS,
        name="three times the capacity",
        source="serving",
        read=_overload,
        target="429 with Retry-After, no errors, admitted ≥ 95 % within targets",
    ),
    Requirement(
        section=TESTS,
        name="memory at three times the capacity",
        target="< 10 % above the steady phase",
        source="serving",
        read=_overload_memory,
    ),
    Requirement(
        section=TESTS,
        name="accuracy regression, INT4 weights and INT8 KV",
        source="evaluate",
        read=_accuracy,
        target="loss within the stated limit (1 point)",
    ),
)
