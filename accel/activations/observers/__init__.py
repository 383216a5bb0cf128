"""Choices of a static scale from the magnitudes of the calibration inputs. One file a method."""
