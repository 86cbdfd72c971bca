"""What makes the embedded checkpoint: drawn clips, training, measuring. Not part of the installed package."""
