"""Wan 2.1 and 2.2, with their causal and few-step offspring."""
