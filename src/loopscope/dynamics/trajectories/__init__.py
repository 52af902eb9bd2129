"""Verdicts on trajectories, which need no model."""
