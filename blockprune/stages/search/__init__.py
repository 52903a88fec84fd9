"""The best removal set under a budget."""
