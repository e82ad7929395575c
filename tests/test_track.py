"Hooks that watch a run: held-out loss, distances, TensorBoard and Weights & Biases."
import json, shutil, time
from dataclasses import replace
from functools import partial
import numpy as np, pytest, torch
import diffnb.train.track as track
from diffnb.core import Denoiser, Feats, create, presets
from diffnb.data.images import batches, fashion_mnist, floats
from diffnb.process.gaussian import Gaussian
from diffnb.recipes import check, system
from diffnb.rng import Rng
from diffnb.train.checkpoint import load_weights
from diffnb.train.ema import halflife
from diffnb.train.loop import fit, rows
from diffnb.train.task import DiffusionTask, constant
from diffnb.viz import save_png
from torch import nn

RECIPE = dict(model='diffit_fashion', sample=dict(steps=1, batch=70, n=4), eval=dict(n=70, metrics=['fid', 'kid']), train=dict(batch=8))

class Net(Denoiser):
    "For garments: one layer, with classes."
    def __init__(self):
        super().__init__()
        self.table, self.inp, self.out = nn.Embedding(11, 8), nn.Linear(785, 8), nn.Linear(8, 784)
    def features(self, x, net_t, y=None, **cond):
        t = net_t.to(x.dtype).expand(len(x))[:,None]
        return Feats(torch.relu(self.inp(torch.cat([x.flatten(1), t], 1))+self.table(torch.full((len(x),), 10) if y is None else y)), size=x.shape)
    def head(self, feats): return self.out(feats.h).view(feats.size)
    def null(self, x, keep=None, y=None, **cond): return x, {**cond, 'y': torch.full_like(y, 10)}
    def demo(self, n=2): return torch.zeros(n, 1, 28, 28), torch.zeros(n), {'y': torch.zeros(n).long()}

@pytest.fixture(scope='module')
def recipe(): return check(RECIPE)

def task():
    torch.manual_seed(0)
    return DiffusionTask(Net(), Gaussian('straight', 'flow'), lr=constant(1e-2))

GARMENTS = fashion_mnist()
def go(steps, folder, *hooks, t=None, log_every=2, **kw):
    data = partial(batches, GARMENTS, 8, Rng(0), transforms=(floats,))
    todo = {}
    for h in hooks:
        for k,f in h.items(): todo.setdefault(k, []).append(f)
    return fit(t or task(), data, steps, folder, averages=dict(ema=halflife(30)), hooks=todo, bar=False, log_every=log_every, save_every=4, **kw)

def test_the_loss_is_that_of_a_direct_computation(recipe):
    t = task()
    ds, data = track.held_out_data(recipe, t, 'test', None, 16)
    got = track.loss_by_time(t, data(start=0), 40, 4, Rng(7))
    assert ds.source=='fashion_mnist test'
    each, k = {i: [] for i in range(4)}, 0
    for batch in data(start=0): # one by one, in double precision where it is summed
        for j in range(16):
            if k==40: break
            idx, x, y = batch['idx'][j:j+1], batch['x'][j:j+1], batch['cond']['y'][j:j+1]
            rng = Rng(7).at('held out').of(idx)
            s = (k%4+rng.at('times').uniform(1))/4
            eps = rng.at('noise')
            x_t, noise = t.process.corrupt(x, s, rng=eps)
            raw = t.denoiser(x_t, s.float(), y=y)
            each[k%4].append((raw-(noise-x)).square().mean().item())
            k += 1
        if k==40: break
    want = [np.mean(o) for o in each.values()]
    assert got['loss_by_t']==pytest.approx(want, rel=1e-5) and got['loss']==pytest.approx(np.mean(want), rel=1e-5) and got['n']==40

@pytest.mark.parametrize('batch', [1, 7, 40])
def test_the_batch_size_does_not_matter(recipe, batch):
    "Up to the order of float32 sums in the network."
    t = task()
    of = lambda b: track.loss_by_time(t, track.held_out_data(recipe, t, 'test', None, b)[1](start=0), 40, 4)
    assert of(batch)['loss_by_t']==pytest.approx(of(16)['loss_by_t'], rel=1e-5)
    assert of(batch)==of(batch) and t.net.training

def test_held_out_rows(recipe, tmp_path):
    "The same rows whether the run was stopped or not; they are the loss of the average, and change nothing."
    hook = lambda t: track.held_out_loss(every=2, n=24, bins=3)(recipe, t, GARMENTS)
    t = task()
    whole = go(9, tmp_path/'whole', hook(t), t=t)
    for n in (3, 7, 9):
        t = task()
        run = go(n, tmp_path/'run', hook(t), t=t)
        if n==7: # killed later: rows after the checkpoint come again
            shutil.rmtree(tmp_path/'run/step-00000007')
    plain = go(9, None)
    a, b = (rows(tmp_path/o/'held_out.jsonl') for o in ('whole', 'run'))
    assert a==b and [o['step'] for o in a]==[2, 4, 6, 8] and [o['images'] for o in a]==[16, 32, 48, 64]
    for x in (whole, run): assert all(torch.equal(v, plain.task.net.state_dict()[k]) for k,v in x.task.net.state_dict().items())
    t = task()
    load_weights(tmp_path/'whole/step-00000008', t.net, 'ema')
    direct = track.loss_by_time(t, track.held_out_data(recipe, t, 'test', None, 64)[1](start=0), 24, 3)
    assert direct['loss_by_t']==a[-1]['loss_by_t'] and direct['loss']==a[-1]['loss']
    load_weights(tmp_path/'whole/step-00000008', t.net, None)
    assert track.loss_by_time(t, track.held_out_data(recipe, t, 'test', None, 64)[1](start=0), 24, 3)['loss']!=a[-1]['loss']

def test_held_out_mistakes(recipe, tmp_path):
    t = task()
    with pytest.raises(ValueError, match='data that is trained on'): track.held_out_loss(split='train')(recipe, t, None)
    with pytest.raises(ValueError, match='fashion_mnist has no path'): track.held_out_loss(path='x')(recipe, t, None)
    with pytest.raises(ValueError, match="split"): track.held_out_loss(split='tset')(recipe, t, None)
    with pytest.raises(ValueError, match='at least 1, not 0'): track.held_out_loss(n=0)
    with pytest.raises(ValueError, match='every must be at least 1'): track.held_out_loss(every=0)(recipe, t, None)
    with pytest.raises(ValueError, match="no average 'emma' .did you mean 'ema'"): go(2, tmp_path, track.held_out_loss(2, average='emma')(recipe, t, None))
    with pytest.raises(ValueError, match='this run has none'): go(2, None, track.held_out_loss(2)(recipe, t, None))
    with pytest.raises(ValueError, match="no metric is called 'fidd'"): track.measured(metrics=['fidd'])(recipe, t, None)

def test_the_distance_is_that_of_eval(recipe, tmp_path):
    t = task()
    hook = track.frechet(every=4)(recipe, t, None)
    go(4, tmp_path, hook, t=t)
    got, = rows(tmp_path/'measured.jsonl')
    fresh = task()
    load_weights(tmp_path/'step-00000004', fresh.net, 'ema')
    fresh.net.eval()
    want, _ = system('images').measure(replace(recipe, eval=replace(recipe.eval, metrics=['fid'])), fresh) # what `diffnb eval` does
    assert got['fid']==want[0].value and got['records'][0]['samples']==want[0].samples and got['step']==4

def curves(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    acc = EventAccumulator(str(folder), size_guidance=dict(scalars=0, images=0))
    acc.Reload()
    return {k: [(o.step, o.value) for o in acc.Scalars(k)] for k in acc.Tags()['scalars']}, {k: acc.Images(k) for k in acc.Tags()['images']}

def drawn(run):
    if run.progress.step%4==0:
        (run.folder/'samples').mkdir(exist_ok=True)
        save_png(run.folder/'samples'/f'step-{run.progress.step:08d}.png', torch.zeros(4, 1, 28, 28))

def test_tensorboard(recipe, tmp_path):
    def hooks(t): return [track.held_out_loss(2, n=8, bins=2)(recipe, t, None), dict(step=drawn), track.tensorboard()(recipe, t, None)]
    t = task()
    go(7, tmp_path, *hooks(t), t=t)
    shutil.rmtree(tmp_path/'step-00000007') # killed: goes on from step 4, and steps 5 to 7 are done again
    t = task()
    go(10, tmp_path, *hooks(t), t=t)
    scalars, images = curves(tmp_path/'tensorboard')
    for tag,name,key in [('train/loss', 'log.jsonl', 'loss'), ('train/norm', 'log.jsonl', 'norm'), ('held_out/loss', 'held_out.jsonl', 'loss')]:
        assert scalars[tag]==[(o['step'], np.float32(o[key])) for o in rows(tmp_path/name)] and len(scalars[tag])==5
    assert [v for _,v in scalars['held_out/loss_by_t/01']]==[np.float32(o['loss_by_t'][1]) for o in rows(tmp_path/'held_out.jsonl')]
    assert [o.step for o in images['samples']]==[4, 8] and images['samples'][0].width>28

def test_a_tracker_that_comes_late_gets_the_history(tmp_path):
    go(4, tmp_path)
    go(8, tmp_path, track.tensorboard()())
    assert [s for s,_ in curves(tmp_path/'tensorboard')[0]['train/loss']]==[2, 4, 6, 8]

def test_no_line_is_read_twice(tmp_path):
    "New lines alone are read; one that is not yet complete waits for its end."
    path, sent, done = tmp_path/'log.jsonl', {}, {}
    def told(): return [(s, tag, v) for s,tag,v in track.news(tmp_path, sent, done) if tag=='train/loss']
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "lo')
    assert told()==[(1, 'train/loss', 3.)] and done=={'log.jsonl': 25}
    assert told()==[] and done=={'log.jsonl': 25}
    path.write_text('-'*25+'{"step": 2, "loss": 2.0}\n') # what has been read could be anything now
    assert told()==[(2, 'train/loss', 2.)] and sent=={'log.jsonl': 2}
    path.write_text('{"step": 2, "loss": 9.0}\n{"step": 3, "loss": 1.0}\n')
    assert [v for _,_,v in [o for o in track.news(tmp_path, sent, {}) if o[1]=='train/loss']]==[1.] # sent before

def wandb_records(data):
    "Records of a .wandb file: after 7 bytes, blocks of 32 KB with pieces of `crc32, length, type` (1 whole, 2 first, 3 middle, 4 last)."
    at, part = 7, b''
    assert data[:4]==b':W&B'
    while at+7<=len(data):
        if 32768-at%32768<7: at += 32768-at%32768; continue
        n, kind = int.from_bytes(data[at+4:at+6], 'little'), data[at+6]
        part += data[at+7:at+7+n]
        at += 7+n
        if kind in (1, 4): yield part; part = b''

def wandb_rows(folder):
    "History rows of all offline runs in a folder, and the ids of the runs."
    from wandb.proto import wandb_internal_pb2
    out, ids = [], []
    for f in sorted(folder.glob('wandb/offline-run-*/*.wandb')):
        for data in wandb_records(f.read_bytes()):
            rec = wandb_internal_pb2.Record()
            rec.ParseFromString(data)
            if rec.WhichOneof('record_type')=='run': ids.append(rec.run.run_id)
            if rec.WhichOneof('record_type')=='history':
                out.append({o.key or '/'.join(o.nested_key): json.loads(o.value_json) for o in rec.history.item})
    return out, set(ids)

def test_wandb_offline(tmp_path, monkeypatch):
    import socket
    real = socket.socket.connect
    def connect(self, where): # the library's own process is reached over a socket of this machine
        if isinstance(where, tuple) and where[0] not in ('127.0.0.1', 'localhost', '::1'): raise AssertionError(f'connects to {where}')
        return real(self, where)
    monkeypatch.setattr(socket.socket, 'connect', connect)
    monkeypatch.setenv('WANDB_SILENT', 'true')
    go(6, tmp_path, dict(step=drawn), track.wandb()(None, None, None))
    shutil.rmtree(tmp_path/'step-00000006') # killed: goes on from 4; 6 was sent already
    go(8, tmp_path, dict(step=drawn), track.wandb()(None, None, None))
    for _ in range(100): # its own process may write a moment longer
        got, ids = wandb_rows(tmp_path)
        if got[-1]['_step']==8: break
        time.sleep(.2)
    losses = [(o['_step'], o['train/loss']) for o in got if 'train/loss' in o]
    assert losses==[(o['step'], o['loss']) for o in rows(tmp_path)] and [s for s,_ in losses]==[2, 4, 6, 8]
    assert [o['_step'] for o in got if 'samples' in o or any(k.startswith('samples') for k in o)]==[4, 8]
    assert ids=={json.loads((tmp_path/'wandb.json').read_text())['id']}

@pytest.mark.parametrize('name', ['tensorboard', 'wandb'])
def test_without_the_extra(monkeypatch, name):
    import importlib
    real = importlib.import_module
    def gone(module, *a):
        if module==name: raise ModuleNotFoundError(f"No module named '{module}'", name=module)
        return real(module, *a)
    monkeypatch.setattr(importlib, 'import_module', gone)
    with pytest.raises(ModuleNotFoundError, match=rf"{name} is not installed: pip install 'diffnb\[track\]'"): create(name, kind='hook')

def test_they_are_presets():
    assert {'tensorboard', 'wandb', 'held_out_loss', 'measured', 'frechet', 'snapshots'}<=presets('hook').keys()

def test_a_recipe_says_it(tmp_path, capsys):
    "All hooks by name, from the command line; a width that was chosen afterwards is exported and drawn from."
    from diffnb.cli import main
    from diffnb.saving import load
    from diffnb.train.ema import reconstruct
    powers = dict(narrow=dict(name='power', width=.05), wide=dict(name='power', width=.1))
    hooks = [dict(name='snapshots', every=1), dict(name='held_out_loss', every=2, n=8, bins=2, average='wide'), 'tensorboard']
    r = dict(RECIPE, sample=dict(steps=1, n=2, average='wide'), train=dict(batch=2, steps=4, save_every=2, log_every=2, averages=powers, hooks=hooks))
    (tmp_path/'r.yaml').write_text(json.dumps(r))
    run, out = str(tmp_path/'run'), str(tmp_path/'out')
    assert main(['train', str(tmp_path/'r.yaml'), '--out', run, '--train.steps=2'])==0
    assert main(['train', str(tmp_path/'r.yaml'), '--out', run])==0
    assert [o['step'] for o in rows(tmp_path/'run/held_out.jsonl')]==[2, 4]
    assert [s for s,_ in curves(tmp_path/'run/tensorboard')[0]['held_out/loss']]==[2, 4]
    assert main(['export', run, '--out', out, '--width', '.07'])==0
    assert 'width 0.07 of step-00000004' in capsys.readouterr().out
    net, want = load(out), reconstruct(run, .07)
    assert all(torch.equal(v, want[k]) for k,v in net.state_dict().items())
    assert main(['sample', out, '--out', str(tmp_path/'s.png')])==0
    assert main(['export', run, '--out', out+'2', '--width', '.4'])==2 and 'below 0.288, not 0.4' in capsys.readouterr().err
