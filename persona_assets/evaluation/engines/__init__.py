"""Engines that run the rationale-then-letter protocol; each imports its own heavy libraries."""
