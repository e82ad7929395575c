"The command line as a function"
from diffnb.cli import main

def ask(words, capsys):
    "Exit code, what was written to stdout, and to stderr."
    capsys.readouterr()
    code = main(words if isinstance(words, list) else words.split())
    return code, *capsys.readouterr()
