"""The names of the files in a run's folder."""

BEGUN, CHECKPOINTS, FAILED, RESULT = "recipe.yaml", "checkpoints", "FAILED.txt", "result.json"
METRICS_FILE, RANKS_FILE = "metrics.jsonl", "ranks.jsonl"
