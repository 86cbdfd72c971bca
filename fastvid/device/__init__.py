"""What a device has, and how weights and calls sit on it."""
