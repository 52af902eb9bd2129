"""The contract of a subject, as a check that anyone can run."""
