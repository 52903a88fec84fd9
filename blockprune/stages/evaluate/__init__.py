"""Score the images of a model under a protocol."""
