"""Measurements, each against a peer or a physical limit, in one run."""
