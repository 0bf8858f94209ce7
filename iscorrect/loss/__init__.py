"""The loss path: from log-probs to a scalar."""
