"""Beside the loss in a training loop: is the mismatch growing, and is it shared?"""
