"""What a run costs, beside what else could be used: `python -m launch.bench`."""
