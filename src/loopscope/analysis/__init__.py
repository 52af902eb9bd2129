"""One model and its prompts in, one study out."""
