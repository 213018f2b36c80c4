"""The governor of speculation: learns what steps cost and what drafts bring, and chooses what pays.

`governor` is the door: choose before a step, observe after it. It puts together `time_model` (seconds of a step),
`acceptance` with `expected_tree` (tokens that a budget of nodes brings), `plans` (everything that could be chosen,
priced), `exploration` with `accounts` (what may be spent on finding out), `collapse` (the alarm after a weight
sync), `request_budgets` (who gets how much) and `statistics` (what W&B is told). `tally` is filled by whoever
verifies drafts; `records` are the messages. Nothing here reads a clock, draws at random or knows an engine.
"""
