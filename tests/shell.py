"The command line as a function, and a folder to work in"
from pathlib import Path
from diffnb.cli import main

def ask(words, capsys):
    "Exit code, what was written to stdout, and to stderr."
    capsys.readouterr()
    code = main(words if isinstance(words, list) else words.split())
    return code, *capsys.readouterr()

def among(files, folder, monkeypatch):
    "Work in an empty folder, beside what is in another one."
    monkeypatch.chdir(folder)
    for p in files.iterdir(): Path(p.name).symlink_to(p)
    return folder
