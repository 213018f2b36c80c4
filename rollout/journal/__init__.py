"""The durable store of rollouts: every finished chunk, how trajectories ended, and who has learned from them.

`journal` is what the controller holds; `store` does its calls in transactions, with `reading` (rows back into records),
`submission` (groups into rows), `outcome` (how trajectories end),
`heads` (what the next write must fit), `delivery` (leases, acknowledgements, compaction), `encoding`, `schema` and two
databases, `sqlite` and `postgres`, opened by `opening`. `export` writes runs to JSONL and Parquet.
"""
