"""Figures of a study, a comparison, verdicts and experiments."""
