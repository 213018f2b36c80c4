"""What can go wrong with a journal. Nothing that was durable is lost by any of these."""

from __future__ import annotations

from rollout.errors import LongrollError


class JournalError(LongrollError):
    """Root of the journal's errors."""


class JournalConflict(JournalError):
    """What was to be written contradicts what is durable under the same key; nothing was changed."""


class JournalFull(JournalError):
    """The journal cannot grow (disk, quota or size limit); what was to be written was not, and may be sent again."""


class JournalBroken(JournalError):
    """Stored bytes are damaged; the message says where and what to do."""


class JournalBusy(JournalError):
    """Another process owns the journal; it is named."""


class JournalTooNew(JournalError):
    """The journal was written by a later version of Longroll; it was left as it is."""


class JournalLost(JournalError):
    """The database does not answer any more, or the journal is closed; what was not answered may not be durable."""
