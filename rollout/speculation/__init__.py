"""Speculative decoding without engines: token trees, the keyed walk that verifies them, and what drafts them."""
