"""Losses, estimands, estimates, bootstrap, multiplicity and equivalence."""
