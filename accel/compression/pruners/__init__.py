"""One linear layer at a time: weights in, fewer weights and a mask out. One file a method."""
