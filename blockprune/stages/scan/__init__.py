"""Score every removal without retraining."""
