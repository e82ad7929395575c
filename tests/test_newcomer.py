"""A newcomer's first three additions, in a scratch copy: a schedule and a sampler of one cell each, a network of one notebook.

Nothing else is touched, and the conformance tests find and pass each of them.
"""
import json, os, shutil, subprocess, sys
from pathlib import Path
import pytest
from conftest import ROOT

SCHEDULE = '''#| exports
@preset('schedule')
def parabola():
    "alpha = 1-t^2, variance preserving."
    return Schedule('parabola', lambda t: (1-t*t, t*(2-t*t).sqrt()))'''

SAMPLER = '''#| exports
@preset('sampler', order=1, stochastic=False)
def straight_on():
    "Keep the estimate and its noise, and move to the next time."
    def step(process, call, x, grid, i, state, rng):
        est = process.estimate(call, x, grid.t[i:i+1], net_t=grid.net_t[i:i+1])
        return process.move(est.x0, est.eps, grid.t[i+1:i+2])
    return step'''

IMPORTS = '''#| export
import torch
from torch import nn
from diffnb.core import Denoiser, Feats, preset'''

DENOISER = '''#| exports
class Plain(Denoiser):
    "Two linear layers over points and time."
    def __init__(self,
        dim:int=2,    # coordinates of a point
        width:int=64, # hidden units
    ):
        super().__init__()
        self.dim = dim
        self.body, self.last = nn.Linear(dim+1, width), nn.Linear(width, dim)
    def features(self, x, net_t, **cond):
        t = net_t.to(x).reshape(-1, 1).expand(len(x), 1)
        return Feats(self.body(torch.cat([x, t], 1)).relu())
    def head(self, feats): return self.last(feats.h)
    def demo(self, b=2, seed=0):
        g = torch.Generator().manual_seed(seed)
        return torch.randn(b, self.dim, generator=g), torch.rand(b, generator=g, dtype=torch.float64), {}

@preset('denoiser')
def plain_tiny(
    dim:int=2, # coordinates of a point
):
    "A network for points in the plane."
    return Plain(dim)'''

def code(src, i): return dict(cell_type='code', source=src, metadata={}, id=f'newcomer{i}', execution_count=None, outputs=[])
def text(src, i): return dict(cell_type='markdown', source=src, metadata={}, id=f'newcomer{i}')

def insert(nb, src):
    "One cell in front of the notebook's last."
    d = json.loads(nb.read_text())
    d['cells'].insert(-1, code(src, 0))
    nb.write_text(json.dumps(d))

@pytest.fixture(scope='module')
def scratch(tmp_path_factory):
    d = tmp_path_factory.mktemp('newcomer')/'repo'
    d.mkdir()
    for o in ('nbs', 'diffnb', 'tests'): shutil.copytree(ROOT/o, d/o, ignore=shutil.ignore_patterns('.*', '__pycache__'))
    for o in ('settings.ini', 'pytest.ini'): shutil.copy(ROOT/o, d)
    return d

def test_newcomer(scratch):
    before = {f: f.read_bytes() for f in (scratch/'nbs').iterdir() if f.is_file()}
    insert(scratch/'nbs'/'10_schedules.ipynb', SCHEDULE)
    insert(scratch/'nbs'/'16_samplers.ipynb', SAMPLER)
    cells = [text('# Plain\n\n> A first network', 0), code('#| default_exp models.plain', 1), code(IMPORTS, 2), code(DENOISER, 3)]
    (scratch/'nbs'/'27_models.plain.ipynb').write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)))
    touched = sorted(f.name for f in (scratch/'nbs').iterdir() if f.is_file() and f.read_bytes()!=before.get(f))
    assert touched==['10_schedules.ipynb', '16_samplers.ipynb', '27_models.plain.ipynb'] # one place each

    env = {k:v for k,v in os.environ.items() if k!='IN_TEST'} | {'PYTHONPATH': str(scratch)}
    subprocess.run([Path(sys.executable).with_name('nbdev_export')], cwd=scratch, env=env, check=True)
    res = subprocess.run([sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-rA', 'tests/test_presets.py',
                          'tests/test_samplers.py', '-k', 'parabola or straight_on or plain_tiny'], cwd=scratch, env=env, capture_output=True, text=True)
    assert res.returncode==0, res.stdout[-5000:]
    for o in ('test_schedule[parabola]', 'test_sampler[1-straight_on]', 'test_order_gaussian[straight_on', 'test_forward[plain_tiny]', 'test_gradient[plain_tiny]'):
        assert f'{o}' in res.stdout, f'{o} did not run'
