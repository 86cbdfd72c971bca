"""Ranks: how they exchange messages, how they share the work, and what that costs."""
