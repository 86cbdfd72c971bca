"""Predicts the memory, layout and time of a request before it runs."""
