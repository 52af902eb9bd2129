"""The leading eigenvalues of one recurrence, token by token."""
