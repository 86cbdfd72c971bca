"""Finds the fastest right back end of every operation on this machine: `fastvid tune` and `fastvid.tune`."""
