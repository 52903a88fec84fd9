"""Teach a model one subject from a few images (DreamBooth)."""
