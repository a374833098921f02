"""Warehouse, figures and the report."""
