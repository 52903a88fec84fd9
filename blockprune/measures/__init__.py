"""Every measure of quality: who looks, what is computed, with which interval."""
