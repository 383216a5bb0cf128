"""One linear layer at a time: weights in, codes and scales out. One file a method."""
