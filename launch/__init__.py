"""The command line: parses config, starts ranks, runs, prints."""
