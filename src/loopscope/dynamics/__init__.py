"""What a state tends to: verdicts on trajectories, eigenvalues of a recurrence, and what they predict."""
