"Every notebook runs, in a fresh process and as `nbdev_test` runs it, with all shapes checked, and within its time."
import os, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
import pytest
from conftest import ROOT

NBS = sorted((ROOT/'nbs').glob('[!.]*.ipynb'))
SECONDS = 30*(1 if os.environ.get('DIFFNB_TYPECHECK')=='0' else 1.5) # of one core, which a busy machine hardly changes; checking costs half more
RUN = '''import sys
from pathlib import Path
sys.path.append('tests')
import typecheck
typecheck.install()
from nbdev.config import get_config
from nbdev.test import test_nb
ok, _ = test_nb(Path(sys.argv[1]), skip_flags=get_config().tst_flags.split(), basepath=get_config().config_path)
sys.exit(not ok)'''

def run(nb):
    "Exit code, output and seconds of processor time of one notebook."
    with subprocess.Popen([sys.executable, '-c', RUN, nb], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as p:
        out = p.stdout.read()
        _, status, used = os.wait4(p.pid, 0)
        p.returncode = os.waitstatus_to_exitcode(status)
    return p.returncode, out, used.ru_utime+used.ru_stime

@pytest.fixture(scope='module')
def results(request):
    "The notebooks asked for, run two at a time."
    nbs = [o.callspec.params['nb'] for o in request.session.items if o.path==request.path]
    with ThreadPoolExecutor(2) as ex: yield {o: ex.submit(run, o) for o in nbs}

@pytest.mark.parametrize('nb', NBS, ids=lambda o: o.stem)
def test_notebook(results, nb):
    rc, out, seconds = results[nb].result()
    assert rc==0, out
    assert seconds <= SECONDS, f'{seconds:.0f} s; mark what is slow with `#| slow` and give it a small twin'
