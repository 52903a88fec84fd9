"""Images and captions as they come: folders, shards, digits, and what is encoded beforehand."""
