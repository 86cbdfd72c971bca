"""Many requests over a pool of pipelines."""
