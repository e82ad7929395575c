"The notebooks are the source: modules follow from them, they are clean, and their outputs are stored."
import configparser, os, shutil, subprocess, sys
from pathlib import Path
import pytest
from conftest import ROOT

ENV = {k:v for k,v in os.environ.items() if k!='IN_TEST'}
NBS = sorted((ROOT/'nbs').glob('[!.]*.ipynb'))

@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "settings.ini and nbs/ alone, exported and cleaned afresh: a module whose notebook is gone does not come back."
    d = tmp_path_factory.mktemp('sync')
    shutil.copy(ROOT/'settings.ini', d)
    shutil.copytree(ROOT/'nbs', d/'nbs', ignore=shutil.ignore_patterns('.*'))
    for c in ('nbdev_export', 'nbdev_clean'): subprocess.run([Path(sys.executable).with_name(c)], cwd=d, env=ENV, check=True)
    return d

def modules(d): # the package's own __init__ is the one module written by hand
    return {f.relative_to(d).as_posix(): f.read_text() for f in d.rglob('*.py') if f!=d/'__init__.py'}

def test_exported(copy):
    want, got = modules(copy/'diffnb'), modules(ROOT/'diffnb')
    assert sorted(got)==sorted(want), 'a module without a notebook, or a notebook without its module: run nbdev_export'
    assert [k for k in want if want[k]!=got[k]]==[], 'run nbdev_export'

@pytest.mark.parametrize('nb', NBS, ids=lambda o: o.stem)
def test_clean(copy, nb):
    assert nb.read_bytes()==(copy/nb.relative_to(ROOT)).read_bytes(), 'run nbdev_clean'

def test_version():
    cfg = configparser.ConfigParser(delimiters=['='])
    cfg.read(ROOT/'settings.ini')
    assert f'__version__ = "{cfg["DEFAULT"]["version"]}"' in (ROOT/'diffnb'/'__init__.py').read_text()

def test_quarto_link():
    assert (ROOT/'nbs'/'_quarto.yml').read_text()==(ROOT/'_quarto.yml').read_text()
