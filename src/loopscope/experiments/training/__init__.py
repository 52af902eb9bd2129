"""Training of small looped models."""
