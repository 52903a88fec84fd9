"""Students as files that other tools load: pipelines, stock configurations, model cards, adapters."""
