"""Replies from a model: batched generation from the chat encoder's own prompts, and their score."""
