"""Captured boots of real machines: reading them, replaying them in our kernel stages, and comparing."""
