"""Token streams for calibration and evaluation."""
