"""`python -m launch` names the commands."""

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
    for name, what in COMMANDS.items():
        command = f"python -m launch.{name} --help"
        print(f"{command:36}{what}")
