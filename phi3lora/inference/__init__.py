"""Evaluation and chat generation."""
