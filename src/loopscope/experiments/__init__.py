"""Many models: random ones, trained ones, damped ones, and what their results say."""
