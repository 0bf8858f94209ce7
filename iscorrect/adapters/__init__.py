"""Corrections inside the trainers that people run; each module needs its own framework only."""
