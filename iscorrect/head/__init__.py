"""The LM-head path: from hidden states to log-probs and to the loss."""
