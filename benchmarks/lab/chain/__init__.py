"""Learning on a chain of thousands of tokens, whose expectations are finite sums."""
