"""Memory maps that users bring along: one file for each form they come in, and what can be seen in them."""
