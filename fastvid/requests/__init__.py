"""What is asked for: checked, read, and laid out in frames."""
