"""``scripts/bench gpu``: what this machine's card does with it, beside plain diffusers in the same run.

A section for each question, the most important first; each stops when the time is up, and what did not fit is said.
"""
