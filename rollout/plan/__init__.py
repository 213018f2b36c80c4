"""The planner: what a model will do on hardware that is not there yet, by its roofline and its memory.

`workload` says what is asked for, `candidate` what could be configured, `memory` what it holds, `steady` what it
then takes; `search` finds the best, `requirements` judges it, `training` adds the rest of an RL step. Steps are priced
by `rollout.simulate.costs`, with efficiencies that `calibration` fits to the figures in `published`. Everything here
is computed; nothing is measured.
"""
