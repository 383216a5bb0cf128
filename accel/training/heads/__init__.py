"""Small networks that are trained on the hidden states of a model and help a drafter; beside each, its training."""
