"""What a run leaves or shows: its directory, metrics, the W&B run, the report, the console, profiles."""
