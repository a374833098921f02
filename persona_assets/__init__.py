"""persona_assets: a Dagster asset graph for persona fine-tuning experiments."""
