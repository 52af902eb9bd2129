"""The one native implementation of a looped transformer."""
