"""The paper figures that are not yet a `Plot`."""
