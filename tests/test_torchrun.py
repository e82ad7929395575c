"`diffnb train` by several processes: as torchrun starts them, stopped, killed, and refused; with less memory, and compiled."
import os, re, subprocess, sys, time
from functools import partial
from pathlib import Path
import pytest, torch
import diffnb.cli as cli
import diffnb.train.loop as loop
from conftest import ROOT
from diffnb.cli import main
from diffnb.recipes import build, check, read
from diffnb.store import load_tensors
from diffnb.train.loop import rows
from diffnb.train.parallel import forked
from shell import among
from test_recipes_codec import TINY as CODEC
from test_recipes_text import DIMBA, PAGES

TINY = '''
model: {name: dit_tiny, size: 28, ch: 1, patch: 7, classes: 10}
train: {steps: 6, batch: 6, drop: 0.1, save_every: 2, log_every: 1, sample_every: 4,
        optimiser: {name: adamw, eps: 1.0e-2}, lr: {name: constant, lr: 1.0e-2}}
sample: {n: 4, steps: 2, sampler: euler}
eval: {n: 70}
''' # a small eps would enlarge rounding
WAYS = 'ddp', 'fsdp2', 'tensor', 'tokens' # named, since others join when all notebooks are imported; experts need a network that has them
CLOSE = 1e-6 # float32, sums in another order

@pytest.fixture(scope='module')
def files(tmp_path_factory):
    "Recipes, and a data set."
    root = tmp_path_factory.mktemp('alone')
    (root/'pages').mkdir()
    for split,n in (('train', 30), ('test', 10)):
        (root/'pages'/f'{split}.txt').write_text('\n\n'.join(f'page {i} says that {i} and {i+1} make {2*i+1}' for i in range(n)))
    for k,v in dict(tiny=TINY, vae=CODEC, pages=PAGES, dimba=DIMBA).items(): (root/f'{k}.yaml').write_text(v)
    return root

@pytest.fixture
def here(files, tmp_path, monkeypatch):
    return among(files, tmp_path, monkeypatch)

def train(words): return main(f'train {words}'.split())
def two(words): return forked(2, partial(train, words))

@pytest.fixture(scope='module')
def one(files, tmp_path_factory):
    "The run of a single process, undisturbed."
    root = tmp_path_factory.mktemp('one')/'run'
    assert train(f'{files}/tiny.yaml --out {root}')==0
    return root

def far(a, b):
    "The greatest distance of weights, averages and moments at the end of two runs."
    out = []
    for k in ('model', 'ema-ema', 'optim'):
        x, y = (load_tensors(Path(o)/(Path(o)/'latest').read_text().strip()/f'{k}.safetensors')[0] for o in (a, b))
        assert x.keys()==y.keys()
        out += [float((x[n].double()-y[n].double()).abs().max()) for n in x if x[n].numel()]
    return max(out)

def names(run): return sorted(str(p.relative_to(run)) for p in Path(run).rglob('*') if p.name!='log.txt')

def torchrun(*words, what=('-m', 'diffnb.cli')):
    "As a shell does it, on this machine alone."
    env = {k: v for k,v in os.environ.items() if k not in ('RANK', 'WORLD_SIZE')}
    env |= dict(OMP_NUM_THREADS='1', GLOO_SOCKET_IFNAME='lo', PYTHONPATH=str(ROOT), TORCH_CPP_LOG_LEVEL='ERROR')
    flags = [o for o in words if o.startswith('--max')]
    cmd = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2', *flags, *what]
    return subprocess.run([*cmd, *(o for o in words if o not in flags)], env=env, capture_output=True, text=True, timeout=300)

# --- torchrun ---
@pytest.mark.parametrize('kind', WAYS)
def test_two_are_one(here, one, kind):
    "Two processes are one: its weights, its files, its log, its line."
    r = torchrun('train', 'tiny.yaml', '--out', 'two', f'--train.parallel={kind}')
    assert (r.returncode, r.stdout)==(0, 'two has 6 steps, 36 samples seen\n'), r.stderr
    assert far('two', one)<CLOSE and names('two')==names(one) and 'samples/step-00000004.png' in names('two')
    assert [o['step'] for o in rows(Path('two'))]==[*range(1, 7)]

KILLED = '''
import os, signal, sys
import diffnb.train.loop as loop
from diffnb.cli import main
step = loop.train_step
def dies(run, batch, scaler):
    if run.progress.step==3 and os.environ['RANK']=='1' and os.environ['TORCHELASTIC_RESTART_COUNT']=='0': os.kill(os.getpid(), signal.SIGKILL)
    return step(run, batch, scaler)
loop.train_step = dies
sys.exit(main())
'''

def test_a_killed_process_is_started_again(here):
    "SIGKILL to one of two after three steps; both go on from the checkpoint after two, and end where nobody was killed, bit for bit."
    Path('killed.py').write_text(KILLED)
    r = torchrun('--max-restarts=1', 'train', 'tiny.yaml', '--out', 'two', '--train.parallel=ddp', what=['killed.py'])
    assert (r.returncode, r.stdout)==(0, 'going on from step-00000002\ntwo has 6 steps, 36 samples seen\n'), r.stderr
    assert two('tiny.yaml --out calm --train.parallel=ddp')==[0, 0]
    assert far('two', 'calm')==0 and names('two')==names('calm')
    assert [o['step'] for o in rows(Path('two'))]==[*range(1, 7)]

# --- the command in forks, which find what torchrun sets ---
@pytest.mark.parametrize('kind', WAYS)
def test_goes_on_with_another_number(here, one, kind):
    "2, 1 and 2 processes, with and without what saves memory, are one run."
    assert two(f'tiny.yaml --out run --train.steps=2 --train.parallel={kind}')==[0, 0]
    assert train('tiny.yaml --out run --train.steps=4 --train.remat=true')==0
    assert two(f'tiny.yaml --out run --train.parallel={kind} --train.remat=true')==[0, 0]
    assert far('run', one)<CLOSE and names('run')==names(one)

@pytest.mark.parametrize('name,kind', [('pages', 'ddp'), ('pages', 'fsdp2'), ('dimba', 'ddp'), ('vae', 'ddp')])
def test_other_systems(here, name, kind):
    "Texts, and where more than a denoiser is trained. (A critic is weighed anew for each part of a batch: as many parts.)"
    words = ['train', f'{name}.yaml', '--train.optimiser={name: adamw, eps: 1.0e-2}', '--out']
    assert main([*words, 'one', f'--train.accumulate={1+(name=="vae")}'])==0
    assert forked(2, lambda: main([*words, 'two', '--train.accumulate=1', f'--train.parallel={kind}']))==[0, 0]
    assert far('two', 'one')<1e-5 and names('two')==names('one')

def slow_first(*args):
    rank = os.environ['RANK']
    if rank=='0': time.sleep(.5)
    with open('said', 'a') as f: f.write(f'{rank} begins\n')
    if rank=='0': time.sleep(.5)
    out = build(*args)
    with open('said', 'a') as f: f.write(f'{rank} ends\n')
    return out

def test_rank_0_prepares(here, monkeypatch):
    "The others wait, and find what it has made."
    monkeypatch.setattr(cli, 'build', slow_first)
    assert two('tiny.yaml --out run --train.steps=1 --train.parallel=ddp')==[0, 0]
    assert Path('said').read_text().split('\n')[:4]==['0 begins', '0 ends', '1 begins', '1 ends']

def refused(*args):
    if os.environ['RANK']=='1': raise FileNotFoundError('there is no disk on this machine')
    return build(*args)

@pytest.mark.parametrize('kind', WAYS)
def test_errors_end_all(here, monkeypatch, capfd, kind):
    "Said once: of all, of one before the first step, and of one in the middle."
    def said(words):
        capfd.readouterr()
        assert two(words)==[2, 2]
        return re.findall('diffnb: (?:(?!diffnb: ).)*', capfd.readouterr().err) # perhaps behind a bar, or two in one line
    assert said(f'tiny.yaml --out run --train.batch=0 --train.parallel={kind}')==['diffnb: train.batch must be at least 1, not 0']
    assert said('tiny.yaml --out run')==['diffnb: 2 processes would each train alone: give --train.parallel=ddp or fsdp2']
    with monkeypatch.context() as m:
        m.setattr(cli, 'build', refused)
        assert said(f'tiny.yaml --out run --train.parallel={kind}')==['diffnb: there is no disk on this machine']
    assert not Path('run').exists()
    step = loop.train_step
    def breaks(run, batch, scaler):
        if run.progress.step==3 and os.environ['RANK']=='1': raise OSError(5, 'Input/output error')
        return step(run, batch, scaler)
    monkeypatch.setattr(loop, 'train_step', breaks)
    lines = said(f'tiny.yaml --out run --train.parallel={kind}')
    assert sorted(lines)==['diffnb: [Errno 5] Input/output error', 'diffnb: another process has ended: what it said, or the signal that ended it, is the reason']
    assert (Path('run')/'latest').read_text().strip()=='step-00000002'

def test_only_training(here, capfd):
    for words in ('list recipe', 'quickstart', 'finetune tiny.yaml --base one'):
        assert forked(2, partial(main, words.split()))==[2, 2]
        assert 'torchrun is for diffnb train' in capfd.readouterr().err

WRONG = {
    'tiny.yaml --train.parallel=dpp': "train.parallel cannot be 'dpp' (did you mean 'ddp'?)",
    'tiny.yaml --train.compile=inducter': "train.compile cannot be 'inducter' (did you mean 'inductor'?)",
    'tiny.yaml --train.remat=3': 'train.remat: expected bool, not 3',
    'vae.yaml --train.parallel=fsdp2': 'a denoiser is shared, and here more is trained, or something else: use ddp',
    'dimba.yaml --train.parallel=fsdp2': 'a denoiser is shared, and here more is trained, or something else: use ddp',
}
@pytest.mark.parametrize('words', WRONG)
def test_refused(here, capsys, words):
    "One line before anything is computed or written, whatever the number of processes."
    assert train(f'{words} --out run')==2
    assert capsys.readouterr().err==f'diffnb: {WRONG[words]}\n' and not Path('run').exists()

# --- memory and programs ---
def kept_bytes(task, batch, rng):
    "The loss's gradient, and the bytes kept for the way back, weights aside."
    own, seen = {p.untyped_storage().data_ptr() for p in task.net.parameters()}, {}
    def pack(t):
        if t.untyped_storage().data_ptr() not in own: seen[t.untyped_storage().data_ptr()] = (t, t.untyped_storage().nbytes())
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): total = task.loss(task.draw(batch, rng), rng).value.mean()
    total.backward()
    return {k: p.grad for k,p in task.net.named_parameters()}, sum(n for _,n in seen.values())

@pytest.mark.parametrize('name,saves', [('tiny', .25), ('pages', .6), ('dimba', .8)])
def test_remat(here, name, saves):
    "The same gradient, bit for bit, from fewer bytes."
    got = []
    for remat in ('false', 'true'):
        b = build(check(read(f'{name}.yaml'), [f'--train.remat={remat}', *(['--model.depth=4'] if name!='tiny' else [])]))
        b.task.net.train()
        got.append(kept_bytes(b.task, next(b.batches(start=0)), b.rng.at('train', step=0)))
    (g,n), (h,m) = got
    assert g.keys()==h.keys() and all((g[k] is h[k] is None) or torch.equal(g[k], h[k]) for k in g)
    assert m<saves*n

@pytest.mark.parametrize('backend', ['aot_eager', pytest.param('inductor', marks=pytest.mark.slow)])
def test_compiled(here, one, backend):
    "Blocks as programs, from the command line; they may add in another order. The checks of types are off, which they would not survive."
    code = ('import sys; from diffnb.cli import main; code = main(); from torch._dynamo.utils import counters; '
            'print("graphs", counters["stats"]["unique_graphs"]); sys.exit(code)')
    words = ['train', 'tiny.yaml', '--out', 'run', f'--train.compile={backend}']
    env = dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=str(ROOT))
    res = subprocess.run([sys.executable, '-c', code, *words], env=env, capture_output=True, text=True, timeout=300)
    assert res.returncode==0, res.stderr
    assert int(re.search(r'graphs (\d+)', res.stdout)[1])>0 and far('run', one)<CLOSE

def test_muon_needs_whole_matrices(here, one, capfd):
    "Parts of rows are gathered and turned as a whole; parts of layers are refused before the first step."
    Path('muon.yaml').write_text(TINY.replace('{name: adamw, eps: 1.0e-2}', 'muon').replace('save_every: 2', 'save_every: 6'))
    assert train('muon.yaml --out whole')==0 and two('muon.yaml --out rows --train.parallel=fsdp2')==[0, 0]
    assert far('whole', 'rows')<1e-5 # the polynomial enlarges rounding, at most by its slope at 0 in each of five rounds
    assert two('muon.yaml --out parts --train.parallel=tensor')==[2, 2]
    assert 'muon turns whole matrices' in capfd.readouterr().err and not list(Path('parts').glob('step-*'))
