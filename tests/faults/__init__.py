"""Faults: for each, how to provoke it and what must come out."""
