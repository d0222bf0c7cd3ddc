"""`python -m launch` names the commands."""

print("python -m launch.generate --help   answer a question about a long document")
print("python -m launch.ask --help        many questions about one document")
print("python -m launch.compare --help    star against exact on your own document")
print("python -m launch.demo              a real model, 6,000 tokens, four ranks")
