"""The network as an object of study: its blocks, what can go, what stands in, and how it is loaded and run."""
