"""Studies compared: their stages of inference on relative depth, looped or feed-forward."""
