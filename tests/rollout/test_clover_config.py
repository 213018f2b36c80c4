"""Files of a draft model, and the targets it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rollout.errors import InvalidRequest
from rollout.speculation.clover import CloverDraft
from rollout.speculation.clover_config import DraftConfig, load_draft, save_draft, vocabulary_digest
from tests.rollout.clover_cases import HIDDEN, VOCAB, scrambled_draft, toy_config

TINY = Path(__file__).resolve().parents[2] / "models" / "tiny"


def test_a_saved_draft_is_read_back(tmp_path: Path) -> None:
    draft = scrambled_draft(vocabulary="abc", target_version=3)
    save_draft(tmp_path / "draft", draft.config, draft.state_dict())
    config, tensors = load_draft(tmp_path / "draft")
    assert config == draft.config
    other = CloverDraft(config)
    other.load(tensors)
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), draft.state_dict().values(), strict=True))
    assert sorted(p.name for p in (tmp_path / "draft").iterdir()) == ["config.json", "model.safetensors"]


def test_the_config_follows_the_target() -> None:
    target = json.loads((TINY / "config.json").read_text())
    config = DraftConfig.for_target(target, "digest", num_layers=1)
    assert (config.vocab_size, config.hidden_size) == (target["vocab_size"], target["hidden_size"])
    assert (config.head_dim, config.rope_theta, config.num_layers) == (32, 10_000.0, 1)


def test_another_target_is_refused() -> None:
    config = toy_config(vocabulary="abc", target_version=3)
    same = {"vocab_size": VOCAB, "hidden_size": HIDDEN}
    config.check_target(**same)
    config.check_target(**same, vocabulary="abc", version=3)
    for changed, message in (
        ({"vocab_size": VOCAB + 1}, f"{VOCAB} tokens"),
        ({"hidden_size": 2 * HIDDEN}, "hidden size"),
        ({"vocabulary": "xyz"}, "vocabulary: got abc, expected the target's, xyz"),
        ({"version": 4}, "target version: got 3"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            config.check_target(**(same | changed))  # type: ignore[arg-type]
    assert config.at_version(4).target_version == 4


def test_vocabularies_differ_by_their_tokens_only(tmp_path: Path) -> None:
    tokenizer = json.loads((TINY / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer, indent=3))
    assert vocabulary_digest(tmp_path) == vocabulary_digest(TINY), "formatting does not count"
    vocab = tokenizer["model"]["vocab"]
    first, second = list(vocab)[-2:]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert vocabulary_digest(tmp_path) != vocabulary_digest(TINY), "two tokens have changed places"
    assert vocabulary_digest(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "a directory with"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 100), "a safetensors file"),
        (lambda folder: (folder / "config.json").write_text("{"), "a JSON object"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "qwen3_moe"}'), "model type"),
        (lambda folder: _edit(folder, num_leaves=3), "num_leaves"),
        (lambda folder: _edit(folder, hidden_size=None), "hidden_size"),
        (lambda folder: _edit(folder, num_heads=5), "heads"),
        (lambda folder: _edit(folder, num_layers=0), "num_layers"),
    ],
)
def test_damaged_drafts_are_refused(damage, message: str, tmp_path: Path) -> None:
    draft = scrambled_draft()
    save_draft(tmp_path, draft.config, draft.state_dict())
    damage(tmp_path)
    with pytest.raises(InvalidRequest, match=message):
        load_draft(tmp_path)


def _edit(folder: Path, **changes: object) -> None:
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
