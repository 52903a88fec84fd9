"""What a user asks for: scan, search, train, evaluate."""
