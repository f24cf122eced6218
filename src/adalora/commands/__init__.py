"""The commands, a file for each one or two; `cli` declares them. Heavy imports stay inside the functions."""
