"""Scaffolds, the rationale-then-letter protocol and the engines that run it."""
