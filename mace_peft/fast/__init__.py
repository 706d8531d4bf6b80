"""Cheaper steps with the same numbers: where the backward pass goes, and how two of MACE's operations are computed."""
