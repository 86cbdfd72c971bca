"""What each operation means, and what runs it."""
