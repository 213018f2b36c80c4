"""How far the trainer's log-probabilities are from those the engine sampled with, and by which cause.

Every figure is a k3 estimate, in nats a token, of KL(p ‖ q) from d = log q − log p of tokens that the engine
sampled. Sums add over micro-batches and ranks. On a slice of a step's trajectories, before its update, with
q always the forward as it trains (routing replayed if replay is on):

- all: p is what the engine reported;
- weights: p is the same forward with the weights rounded as the engine rounds them (INT4 groups, or another
  element type), so also with the routing that follows from them unless routing is replayed;
- kv: p is the same forward with keys and values rounded as in the engine's KV cache;
- routing: p is the same forward with the experts of sampling. Where routing is replayed both are one
  forward, so the figure is 0: what is left of routing is 0 wherever it was captured. Over captured
  trajectories only, because the others have nothing to be compared with;
- staleness: the part of `all` that tokens of older weight versions contribute: the sum over those versions of
  (share of tokens) × (mean over them); 0 without such tokens.

Causes act together, and other differences (kernels, activation types) have no toggle, so the figures do not
sum to `all`. The samples are the engine's, not p's; with p near the engine the estimate is good.

Owns the estimates, the sums, and what a budget asks for. Knows nothing of models, ranks or how a forward is
changed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum

import torch

from rollout.errors import MismatchOverBudget
from rollout.loss import k3
from rollout.trainer_config import MismatchConfig, OverBudget

MEASURABLE_KV = ("auto", "int8_per_token_head", "fp8", "fp8_e4m3")  # engine.kv_cache_dtype whose rounding is known
TIGHT_CAP = 1.001  # a tis_cap below it is taken for tight; halving would never reach 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Mismatch:
    """Sums over trained tokens of d = train log-probability − sampling log-probability.

    Attributes:
        num_tokens: Tokens summed over.
        k3_sum: Sum of exp(d) − 1 − d.
        abs_sum: Sum of |d|.
        abs_max: Largest |d|, 0 without tokens.
    """

    num_tokens: int
    k3_sum: float
    abs_sum: float
    abs_max: float

    @property
    def kl(self) -> float:
        """KL(sampling ‖ training) in nats a token, by the k3 estimate; 0 without tokens."""
        return self.k3_sum / max(self.num_tokens, 1)

    @property
    def abs_mean(self) -> float:
        return self.abs_sum / max(self.num_tokens, 1)

    def __add__(self, other: Mismatch) -> Mismatch:
        return Mismatch(
            num_tokens=self.num_tokens + other.num_tokens,
            k3_sum=self.k3_sum + other.k3_sum,
            abs_sum=self.abs_sum + other.abs_sum,
            abs_max=max(self.abs_max, other.abs_max),
        )


NO_MISMATCH = Mismatch(num_tokens=0, k3_sum=0.0, abs_sum=0.0, abs_max=0.0)


def measure(train_logprobs: torch.Tensor, sampling_logprobs: torch.Tensor, is_trained: torch.Tensor) -> Mismatch:
    """Compare log-probabilities of the same tokens.

    Args:
        train_logprobs: float32, any shape.
        sampling_logprobs: float32, same shape: log-probabilities the tokens were drawn with.
        is_trained: bool, same shape: which positions count.
    """
    gap = (train_logprobs.detach() - sampling_logprobs)[is_trained].double()
    if gap.numel() == 0:
        return NO_MISMATCH
    return Mismatch(
        num_tokens=gap.numel(),
        k3_sum=float(k3(gap).sum()),
        abs_sum=float(gap.abs().sum()),
        abs_max=float(gap.abs().max()),
    )


def measure_by_version(
    train_logprobs: torch.Tensor, sampling_logprobs: torch.Tensor, is_trained: torch.Tensor, versions: torch.Tensor
) -> tuple[tuple[int, Mismatch], ...]:
    """`measure` for the tokens of each weight version; `versions` int64 of the same shape."""
    return tuple(
        (version, measure(train_logprobs, sampling_logprobs, is_trained & (versions == version)))
        for version in versions[is_trained].unique().tolist()
    )


class Cause(str, Enum):
    """What a figure is about; also the end of its metric's name, mismatch_kl/<cause>."""

    ALL = "all"
    WEIGHTS = "weights"
    KV = "kv"
    ROUTING = "routing"
    STALENESS = "staleness"


@dataclass(frozen=True, slots=True, kw_only=True)
class CauseSums:
    """What scoring a slice again gave; of one rank or of all.

    Attributes:
        all, weights, kv: See the module.
        routing: Over captured trajectories.
        unreplayed: As `routing`, but with q the forward with its own experts; the same unless routing is replayed.
        by_version: `all` for each weight version of the tokens.
        num_choices: Choices of experts compared: captured tokens × layers.
        num_flips: How many of them the forward alone, after the same experts before, would have made otherwise.
        is_captured: Whether any trajectory's routing was found.
    """

    all: Mismatch = NO_MISMATCH
    weights: Mismatch = NO_MISMATCH
    kv: Mismatch = NO_MISMATCH
    routing: Mismatch = NO_MISMATCH
    unreplayed: Mismatch = NO_MISMATCH
    by_version: tuple[tuple[int, Mismatch], ...] = ()
    num_choices: int = 0
    num_flips: int = 0
    is_captured: bool = False

    def __add__(self, other: CauseSums) -> CauseSums:
        versions: dict[int, Mismatch] = dict(self.by_version)
        for version, sums in other.by_version:
            versions[version] = versions.get(version, NO_MISMATCH) + sums
        return CauseSums(
            all=self.all + other.all,
            weights=self.weights + other.weights,
            kv=self.kv + other.kv,
            routing=self.routing + other.routing,
            unreplayed=self.unreplayed + other.unreplayed,
            by_version=tuple(sorted(versions.items())),
            num_choices=self.num_choices + other.num_choices,
            num_flips=self.num_flips + other.num_flips,
            is_captured=self.is_captured or other.is_captured,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MismatchReport:
    """KL by cause of a slice, in nats a token; None where it could not be measured.

    Attributes:
        all, weights, kv, routing, staleness: See the module. `routing` is None without captured routing.
        routing_without_replay: What `routing` would be without replay.
        routing_flip_rate: Share of the choices of experts that the training forward would have made otherwise.
        num_tokens: Trained tokens of the slice.
    """

    all: float
    weights: float
    kv: float
    routing: float | None
    staleness: float
    routing_without_replay: float | None
    routing_flip_rate: float | None
    num_tokens: int

    def figure(self, cause: Cause) -> float | None:
        figure: float | None = getattr(self, cause.value)
        return figure


def report_of(parts: Iterable[CauseSums], version: int) -> MismatchReport:
    """Figures of a slice.

    Args:
        parts: Of every rank.
        version: Of the weights being trained; tokens of lower ones are stale.
    """
    total = CauseSums()
    for part in parts:
        total += part
    stale = sum((sums for v, sums in total.by_version if v < version), NO_MISMATCH)
    return MismatchReport(
        all=total.all.kl,
        weights=total.weights.kl,
        kv=total.kv.kl,
        routing=total.routing.kl if total.is_captured else None,
        staleness=stale.k3_sum / max(total.all.num_tokens, 1),
        routing_without_replay=total.unreplayed.kl if total.is_captured else None,
        routing_flip_rate=total.num_flips / total.num_choices if total.num_choices else None,
        num_tokens=total.all.num_tokens,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Knobs:
    """What a budget may tighten; everything else of the update stays as configured.

    Attributes:
        tis_cap: Cap of the importance weights; None when they are not used.
        replay_routing: Whether the update's forwards use the experts of sampling.
    """

    tis_cap: float | None
    replay_routing: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """What a report leads to: the knobs from now on, and what to tell people, if anything."""

    knobs: Knobs
    messages: tuple[str, ...] = ()


def respond(report: MismatchReport, config: MismatchConfig, knobs: Knobs) -> Response:
    """Hold a report against the budget and take the configured action.

    Tightening replays the routing if that is not done yet, was captured, and routing or everything is over
    its budget; otherwise it halves the distance of tis_cap to 1. Once for each report, however many causes
    are over. Importance weights go on correcting from the sampling log-probabilities whatever is tightened.

    Raises:
        MismatchOverBudget: With action "stop"; names every cause over its budget, with figure and limit.
    """
    over = []
    for cause in Cause:
        figure, limit = report.figure(cause), getattr(config.budget_kl, cause.value)
        if figure is not None and limit is not None and not figure <= limit:  # a figure that is no number is over too
            over.append((cause, figure, limit))
    if not over:
        return Response(knobs=knobs)
    found = "; ".join(
        f"mismatch_kl/{cause.value}: got {figure:.3g} nats a token, expected at most {limit:g} "
        f"(mismatch.budget_kl.{cause.value})"
        for cause, figure, limit in over
    )
    if config.action is OverBudget.STOP:
        raise MismatchOverBudget(found)
    if config.action is OverBudget.WARN:
        return Response(knobs=knobs, messages=(found,))
    is_routing = any(cause in (Cause.ROUTING, Cause.ALL) for cause, _, _ in over)
    tighter, what = _tighten(knobs, can_replay=is_routing and report.routing is not None)
    return Response(knobs=tighter, messages=(f"{found}; {what}",))


def _tighten(knobs: Knobs, *, can_replay: bool) -> tuple[Knobs, str]:
    if can_replay and not knobs.replay_routing:
        return replace(knobs, replay_routing=True), "routing is replayed from now on"
    if knobs.tis_cap is not None and knobs.tis_cap > TIGHT_CAP:
        cap = 1 + (knobs.tis_cap - 1) / 2
        return replace(knobs, tis_cap=cap), f"tis_cap is {cap:g} from now on"
    return knobs, "nothing is left to tighten"
