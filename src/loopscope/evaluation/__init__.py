"""Models on tasks: how accuracy depends on the number of recurrences."""
