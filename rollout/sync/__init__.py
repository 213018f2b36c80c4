"""Weight publication: how a version is encoded, sent as what changed, and served by all shards at once.

Encoding and transfer: `encoding` (tensors as rows of bytes), `manifest` (pieces, buckets, digests), `delta`
(what changed between two versions), `segments` (payloads in shared memory), `outgoing` (a client's buckets).
A worker: `shadow` (its copy of the bytes), `participant` (what it promised, and when it may flip).
The controller: `publication` (the state machine), with `attempt`, `receivers`, `members`, `switch` (after
the decision) and `catch_up` (shards that were restarted).
"""
