"""Record and show a run: its directory, metrics, the W&B run, the report, the console, profiles."""
