"""How ranks communicate, how they share the work, and a model of what that costs."""
