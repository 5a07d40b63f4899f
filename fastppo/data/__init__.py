"""Prompts, and sequences packed without padding."""
