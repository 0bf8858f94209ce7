"""Mismatch between a real engine and a trainer, and what it does to reinforcement learning."""
