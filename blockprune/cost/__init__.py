"""What a model costs: parameters and MACs by arithmetic, latency and memory by measurement."""
