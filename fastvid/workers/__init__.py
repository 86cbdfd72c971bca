"""The same pipeline in other processes, one for each rank."""
