"""Losses, contrasts, bootstrap, multiplicity and equivalence."""
