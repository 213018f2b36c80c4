from __future__ import annotations

import os
import subprocess
import sys

# In a process of its own: importing vLLM changes the one it is imported into.
TEMPERATURES = """
from vllm import SamplingParams
from rollout.types import MAX_TEMPERATURE, MIN_TEMPERATURE

for kept in (0.0, MIN_TEMPERATURE, MAX_TEMPERATURE):
    assert SamplingParams(temperature=kept).temperature == kept, kept
assert SamplingParams(temperature=MIN_TEMPERATURE / 2).temperature == MIN_TEMPERATURE
try:
    SamplingParams(temperature=MAX_TEMPERATURE * 1.01)
except Exception as error:
    print(error)
"""


def test_vllm_takes_the_temperatures_that_are_let_in_as_they_are():
    command, environment = [sys.executable, "-c", TEMPERATURES], os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "temperature" in done.stdout, done.stderr
