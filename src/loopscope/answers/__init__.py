"""Quick answers: plain sentences with their evidence, drawn from a study and nothing else."""
