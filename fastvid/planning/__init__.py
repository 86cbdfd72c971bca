"""Memory, layout and time of a request, before anything runs."""
