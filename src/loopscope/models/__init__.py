"""What is studied: architectures, checkpoints, hooked modules, and what runs them."""
