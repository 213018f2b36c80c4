"""Options of speculative decoding, with their defaults; off unless asked for.

Owns what may be asked for. Knows nothing of drafters, trees or engines: with position-keyed sampling none
of these options can change a token, only the time it takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from rollout.errors import InvalidRequest, check_positive
from rollout.speculation.tree import MAX_WIDTH

SOURCES = ("clover2", "sibling", "random", "adversarial")
"""Who can draft: a trained draft model, the other members of a group, and two that are wrong on purpose."""


class DraftPolicy(StrEnum):
    """Who decides whether an engine drafts in a step; may be changed while it runs."""

    GOVERNED = "governed"  # the governor; without one, as ALWAYS
    ALWAYS = "always"  # nobody: with all that the configuration allows; the governor learns nothing meanwhile
    NEVER = "never"  # nobody drafts, but drafters are told all that they need to go on at any moment
    COMPARED = "compared"  # GOVERNED and NEVER, by turns of a few steps (rollout.governor.comparison)


@dataclass(kw_only=True)
class SpeculationConfig:
    """Token trees that are drafted and verified inside the engines."""

    enabled: bool = False  # draft; off costs nothing, as vLLM then runs without any of it
    # Drafters, all within one budget: clover2 (a draft model), sibling (what other members of the group, and earlier
    # visits of the prompt, went on with); random and adversarial are wrong on purpose, for measurements; or the class
    # of one's own, "package.module:Class".
    sources: tuple[str, ...] = ("sibling",)
    draft_model: str | None = None  # directory of the draft model of source clover2
    # The draft model's tensors come with every publication of weights, so that a trainer can keep it fitted; whoever
    # publishes must then send them.
    draft_travels: bool = False
    max_width: int = 4  # nodes in one layer of a tree, 1 to 4; 1 = chains
    max_depth: int = 8  # layers of a tree: tokens that one step can gain beyond its own
    budget_nodes: int = 16  # nodes of one request's tree in a step; more = more tokens a step, and longer steps
    # Let measurements of step times and acceptance choose sources, depth, width and budget below these limits, step
    # by step; off = always the limits themselves.
    governor: bool = True
    sibling_tokens: int = 2_000_000  # tokens that the index of sibling drafts may hold on one shard

    def __post_init__(self) -> None:
        check_positive(
            "engine.speculation",
            max_depth=self.max_depth,
            budget_nodes=self.budget_nodes,
            sibling_tokens=self.sibling_tokens,
        )
        if not 1 <= self.max_width <= MAX_WIDTH:
            raise InvalidRequest("engine.speculation.max_width", self.max_width, f"1 to {MAX_WIDTH}")
        unknown = [source for source in self.sources if source not in SOURCES and ":" not in source]
        if unknown or not self.sources:
            expected = f"some of {', '.join(SOURCES)}, or package.module:Class"
            raise InvalidRequest("engine.speculation.sources", list(self.sources), expected)
        if self.enabled and "clover2" in self.sources and self.draft_model is None:
            raise InvalidRequest("engine.speculation.draft_model", None, "a directory, for source clover2")
        if self.draft_travels and "clover2" not in self.sources:
            raise InvalidRequest("engine.speculation.draft_travels", True, "source clover2 among the sources")
