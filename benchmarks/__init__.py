"""Timings, and in `study` the research on the embedded base. Run from a checkout; nothing of it is installed."""
