"""The calibration pass of one shard: statistics of layer inputs, layer groups, and the solve of each layer."""
