"""What W&B is told of speculation, over an interval of steps."""

from __future__ import annotations

from dataclasses import dataclass, field

from rollout.governor.records import StepOutcome
from rollout.governor.tally import Tally


@dataclass(slots=True, kw_only=True)
class SpeculationRecord:
    """Sums over an interval. Owned by the governor until `take_record` hands it out; records of ranks add.

    Attributes:
        num_steps, num_off_steps, num_trial_steps, num_guarded_steps: Steps; without drafts, of trials, kept off by
            the account of losses.
        sequences: Sequences of all steps, which is the tokens that steps without drafts would have given.
        tokens: Generated.
        expected_tokens: Tokens that the choices promised.
        drafting_sequences, drafting_tokens: The same two, of requests in steps with drafts.
        budget_nodes: Budgets, summed over steps with drafts.
        choices: How often each set of sources was chosen, by its name.
        by_source: Trials and hits.
        num_alarms: By source.
        expected_gain: Expected tokens per second of those without drafts, summed over steps.
        loss_s: Seconds that speculation lost against none, as measured; below 0, gained.
    """

    max_depth: int
    num_steps: int = 0
    num_off_steps: int = 0
    num_trial_steps: int = 0
    num_guarded_steps: int = 0
    sequences: int = 0
    tokens: int = 0
    expected_tokens: float = 0.0
    drafting_sequences: int = 0
    drafting_tokens: int = 0
    budget_nodes: int = 0
    choices: dict[str, int] = field(default_factory=dict)
    by_source: dict[str, Tally] = field(default_factory=dict)
    num_alarms: dict[str, int] = field(default_factory=dict)
    expected_gain: float = 0.0
    loss_s: float = 0.0

    def add_outcome(self, outcome: StepOutcome, loss_s: float) -> None:
        choice = outcome.choice
        self.num_steps += 1
        self.num_trial_steps += choice.is_trial
        self.sequences += outcome.num_sequences
        self.tokens += outcome.num_tokens
        drafted = 0
        if choice.is_off:
            self.num_off_steps += 1
        else:
            name = "+".join(choice.sources)
            self.choices[name] = self.choices.get(name, 0) + 1
            self.budget_nodes += choice.budget_nodes
            self.loss_s += loss_s
            self.expected_gain += choice.expected_gain
            if outcome.tally is not None:
                drafted = outcome.tally.together.asked
                self.drafting_sequences += drafted
                self.drafting_tokens += drafted + outcome.tally.together.accepted
                for source, tally in outcome.tally.by_source.items():
                    self.by_source.setdefault(source, Tally.empty(self.max_depth)).add(tally)
        self.expected_tokens += outcome.num_sequences + drafted * (choice.expected_tokens - 1)

    def merge(self, other: SpeculationRecord) -> None:
        """Another rank's, or a later interval's."""
        for name in (
            "num_steps",
            "num_off_steps",
            "num_trial_steps",
            "num_guarded_steps",
            "sequences",
            "tokens",
            "expected_tokens",
            "drafting_sequences",
            "drafting_tokens",
            "budget_nodes",
            "expected_gain",
            "loss_s",
        ):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name, count in other.choices.items():
            self.choices[name] = self.choices.get(name, 0) + count
        for name, count in other.num_alarms.items():
            self.num_alarms[name] = self.num_alarms.get(name, 0) + count
        for name, tally in other.by_source.items():
            self.by_source.setdefault(name, Tally.empty(self.max_depth)).add(tally)

    def metrics(self) -> dict[str, float]:
        """By W&B key; a key whose denominator is 0 is left out."""
        drafting_steps = self.num_steps - self.num_off_steps
        result = {
            "spec/steps": float(self.num_steps),
            "spec/alarms": float(sum(self.num_alarms.values())),
            "spec/guarded_steps": float(self.num_guarded_steps),
            "spec/loss_s": self.loss_s,
        }
        if self.num_steps:
            result["spec/off_share"] = self.num_off_steps / self.num_steps
            result["spec/trial_share"] = self.num_trial_steps / self.num_steps
        if self.sequences:
            result["spec/tokens_per_step"] = self.tokens / self.sequences
            result["spec/expected_tokens_per_step"] = self.expected_tokens / self.sequences
        if self.drafting_sequences:
            result["rollout/spec_accept_length"] = self.drafting_tokens / self.drafting_sequences
        if drafting_steps:
            result["spec/budget_nodes"] = self.budget_nodes / drafting_steps
            result["spec/expected_gain"] = self.expected_gain / drafting_steps
        for name, count in self.choices.items():
            result[f"spec/chosen_share/{name}"] = count / self.num_steps
        for name, count in self.num_alarms.items():
            result[f"spec/alarms/{name}"] = float(count)
        for name, tally in self.by_source.items():
            result |= _source_metrics(name, tally)
        return result


def _source_metrics(source: str, tally: Tally) -> dict[str, float]:
    result = {}
    if tally.asked:
        result[f"spec/offered/{source}"] = tally.offered / tally.asked
    if tally.nodes:
        result[f"spec/accepted_of_drafted/{source}"] = tally.accepted / tally.nodes
    for layer, (trials, hits) in enumerate(zip(tally.trials, tally.hits, strict=True), start=1):
        if trials[0]:
            result[f"spec/acceptance/{source}/depth_{layer}"] = float(hits.sum() / trials[0])
    return result
