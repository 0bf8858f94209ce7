"""A pretrained language model of 135 M parameters under reinforcement, with a real engine.

What it asks and how is written in PLAN.md.
"""
