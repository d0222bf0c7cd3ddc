"""`python -m launch` names the commands."""

from __future__ import annotations

import sys

COMMANDS = {
    "generate": "answer a question about a long document",
    "ask": "many questions about one document, or about several",
    "score": "how likely texts are: continuations, or the document itself",
    "compare": "star against exact on your own document",
    "evaluate": "exact and star on long-context tasks",
    "harness": "tasks of lm-eval",
    "bench": "what answers cost, with peers beside",
    "models": "which models run, and how",
    "demo": "a real model, 6,000 tokens, four ranks",
}

if __name__ == "__main__":
    given = sys.argv[1:]
    misled = bool(given) and not {"-h", "--help"} & set(given)
    if misled:
        print(f"ringstar: {given[0]}: give a command as python -m launch.NAME:", file=sys.stderr)
    for name, what in COMMANDS.items():
        command = f"python -m launch.{name} --help"
        print(f"{command:36}{what}")
    sys.exit(2 if misled else 0)
