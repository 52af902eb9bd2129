"""What a model is and what running it takes, from configuration and headers alone."""
