"""Training small looped models: plain PyTorch, every random choice a function of (seed, step), exact resumption."""
