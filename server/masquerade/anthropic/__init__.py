"""Anthropic's routes: messages, and the count of their tokens."""
