"Training: a resumed run is the same run, averages are what they say, bad steps are skipped, signals save."
import math, signal, subprocess, sys
from functools import partial
import pytest, torch
from torch import nn
from diffnb.core import Denoiser, Feats
from diffnb.data.images import Images, batches, floats, hflip
from diffnb.process.gaussian import Gaussian
from diffnb.rng import Rng
from diffnb.train.checkpoint import load_weights
from diffnb.train.ema import EMA, averaged, halflife, warmed
from diffnb.train.loop import Options, Run, fit, gradient, rows
from diffnb.train.task import DiffusionTask, adamw, cosine

class Tiny(Denoiser):
    "A network for 4x4 images with three labels, with dropout."
    def __init__(self, d=16, p=.1):
        super().__init__()
        self.table, self.inp, self.out, self.drop = nn.Embedding(4, d), nn.Linear(17, d), nn.Linear(d, 16), nn.Dropout(p)
    def features(self, x, net_t, y=None, **cond):
        t = net_t.to(x.dtype).expand(len(x))[:,None]
        h = self.inp(torch.cat([x.flatten(1), t], 1))+self.table(torch.full((len(x),), 3) if y is None else y)
        return Feats(self.drop(torch.relu(h)), size=x.shape)
    def head(self, feats): return self.out(feats.h).view(feats.size)
    def null(self, x, keep=None, y=None, **cond): return x, {**cond, 'y': torch.full_like(y, 3)}

@pytest.fixture(scope='module')
def images():
    g = torch.Generator().manual_seed(0)
    return Images(torch.randint(0, 256, (40, 1, 4, 4), generator=g, dtype=torch.uint8), torch.arange(40)%3, ('a', 'b', 'c'))

def task(optimiser=adamw(), **kw):
    torch.manual_seed(0)
    return DiffusionTask(Tiny(), Gaussian('straight', 'flow'), drop=.2, optimiser=optimiser, lr=cosine(1e-2, 24, 400), **kw)

AVG = dict(short=halflife(30), long=warmed(.99))
def go(images, steps, folder=None, workers=0, **kw):
    data = partial(batches, images, 12, Rng(0), workers=workers, transforms=(floats, hflip)) # 40 images: epochs end inside batches
    return fit(task(), data, steps, folder, averages=AVG, bar=False, **kw)

def bits(run):
    out = {f'net/{k}': v for k,v in run.task.net.state_dict().items()}
    out |= {f'{n}/{k}': v for n,e in run.emas.items() for k,v in e.avg.items()}
    return out | {f'opt/{i}/{k}': v for i,s in enumerate(run.opt.state.values()) for k,v in s.items()}

def same(a, b):
    a, b = bits(a), bits(b)
    return a.keys()==b.keys() and all(torch.equal(v, b[k]) for k,v in a.items())

@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('accumulate', [1, 3])
@pytest.mark.parametrize('stops', [(5, 10), (3, 6, 10), (3, 4, 10)])
def test_resume_bit_for_bit(images, tmp_path, workers, accumulate, stops):
    whole = go(images, 10, accumulate=accumulate)
    for n in stops: run = go(images, n, tmp_path/'run', workers=workers, accumulate=accumulate)
    assert same(run, whole)
    assert run.progress.images==120 and math.isfinite(run.last.loss)

def test_resume_is_not_trivial(images, tmp_path):
    "What the equality above would see: another seed, a missing moment, an average not restored."
    whole = go(images, 10)
    assert not same(whole, go(images, 9))
    assert not same(whole, go(images, 10, rng=Rng(1)))
    go(images, 5, tmp_path/'run')
    run = go(images, 10, tmp_path/'run')
    raw, avg = load_weights(tmp_path/'run', a := Tiny(), None), load_weights(tmp_path/'run', b := Tiny(), 'long')
    assert raw==avg and torch.equal(a.inp.weight, run.task.denoiser.inp.weight)
    assert not torch.equal(a.inp.weight, b.inp.weight) and torch.equal(b.inp.weight, run.emas['long'].avg['inp.weight'])

def test_save_does_not_disturb(images, tmp_path):
    assert same(go(images, 10, tmp_path/'a', save_every=1, log_every=1), go(images, 10))
    assert [r['step'] for r in rows(tmp_path/'a')]==list(range(1, 11))

def test_log_after_a_crash(images, tmp_path):
    "Rows beyond the checkpoint, and a line cut off, are taken back."
    go(images, 6, tmp_path, save_every=2, log_every=1)
    with open(tmp_path/'log.jsonl', 'a') as f: f.write('{"step": 7}\n{"step": 8, "lo')
    go(images, 8, tmp_path, save_every=2, log_every=1)
    assert [r['step'] for r in rows(tmp_path)]==list(range(1, 9)) and all('loss' in r for r in rows(tmp_path))

def test_other_run_is_refused(images, tmp_path):
    go(images, 2, tmp_path, recipe={'train': {'batch': 12}})
    with pytest.raises(ValueError, match='train.batch = 12, and now it is 6'): go(images, 4, tmp_path, recipe={'train': {'batch': 6}})
    with pytest.raises(ValueError, match='seed = 0, and now it is 1'): go(images, 4, tmp_path, rng=Rng(1), recipe={'train': {'batch': 12}})

def test_damaged_newest_is_passed_over(images, tmp_path):
    whole = go(images, 8)
    go(images, 6, tmp_path, save_every=3)
    f = tmp_path/'step-00000006'/'optim.safetensors'
    f.write_bytes(f.read_bytes()[:-1]+b'x')
    run = go(images, 8, tmp_path, save_every=3)
    assert same(run, whole) and 'passed over step-00000006' in (tmp_path/'log.txt').read_text()

def test_full_disk(images, tmp_path, monkeypatch):
    "A save that fails is said, and training goes on; the third in a row is raised."
    import diffnb.train.loop as loop
    fails, real = [4, 6], loop.save_checkpoint
    def flaky(folder, net, opt, emas, progress, *a):
        if progress.step in fails: raise OSError(28, 'No space left on device')
        return real(folder, net, opt, emas, progress, *a)
    monkeypatch.setattr(loop, 'save_checkpoint', flaky)
    assert go(images, 8, tmp_path/'a', save_every=2).saved.name=='step-00000008'
    assert 'step 4 could not be saved' in (tmp_path/'a'/'log.txt').read_text()
    fails += [2]
    with pytest.raises(OSError): go(images, 8, tmp_path/'b', save_every=2)

def broken(images, at):
    data = partial(batches, images, 12, Rng(0))
    return lambda start: ({**b, 'x': b['x']*math.nan} if k in at else b for k,b in enumerate(data(start=start), start//12))

def test_not_finite(images, tmp_path):
    run = fit(task(), broken(images, {2, 5}), 8, averages=AVG, bar=False)
    assert (run.progress.skipped, run.progress.in_a_row, run.progress.step) == (2, 0, 8)
    assert all(v.isfinite().all() for v in bits(run).values())
    with pytest.raises(FloatingPointError, match='4 steps in a row.*samples 84.*step-00000004'):
        fit(task(), broken(images, range(4, 99)), 20, tmp_path, averages=AVG, bar=False, save_every=4, patience=4)

@pytest.mark.parametrize('name', ['SIGTERM', 'SIGUSR1'])
def test_signal_saves_at_the_step(images, tmp_path, name):
    before = signal.getsignal(getattr(signal, name))
    def hook(run):
        if run.progress.step==4: signal.raise_signal(getattr(signal, name))
    run = go(images, 10, tmp_path, hooks=dict(step=hook))
    assert run.stopped==name and run.saved.name=='step-00000004' and signal.getsignal(getattr(signal, name)) is before
    assert same(go(images, 10, tmp_path), go(images, 10))

def test_parts_add_up(images):
    def grads(k):
        t = task()
        t.denoiser.drop.p = 0.
        run = Run(t, t.optimiser(t.net), {}, Rng(0), Options(accumulate=k))
        gradient(run, next(batches(images, 12, Rng(0))), torch.amp.GradScaler('cpu', enabled=False))
        return torch.cat([p.grad.flatten() for p in t.net.parameters()])
    for k in (2, 5, 12): torch.testing.assert_close(grads(k), grads(1), atol=1e-6, rtol=1e-5)

def test_mixed_precision(images, tmp_path):
    run = go(images, 6, amp=torch.bfloat16)
    assert all(p.dtype==torch.float32 for p in run.task.net.parameters()) and math.isfinite(run.last.loss)

def test_ema_closed_form():
    net, w = nn.Linear(1, 1, bias=False).double(), torch.linspace(-1, 1, 30, dtype=torch.float64)
    for decay in (halflife(40, .3), warmed(.8)):
        e, beta = EMA(net, decay), []
        for k,v in enumerate(w):
            net.weight.data.fill_(v)
            e.update(net, 8*(k+1), 8)
            beta.append(decay(8*(k+1), 8))
        want = sum((1-b)*math.prod(beta[k+1:])*v.item() for k,(b,v) in enumerate(zip(beta, w)))
        assert e.avg['weight'].item()==pytest.approx(want, abs=1e-12) and beta[0]==0

def test_ema_is_diffusers():
    EMAModel = pytest.importorskip('diffusers.training_utils').EMAModel
    net = nn.Linear(4, 4)
    ours, theirs = EMA(net, warmed(.7)), EMAModel(net.parameters(), decay=.7)
    for k in range(20):
        for p in net.parameters(): p.data += .1*Rng(3).at('walk', step=k).normal(*p.shape)
        ours.update(net, 8*(k+1), 8)
        theirs.step(net.parameters())
    for x,y in zip(ours.avg.values(), theirs.shadow_params): torch.testing.assert_close(x, y)

def test_ema_of_a_constant_and_edm():
    net = nn.Linear(3, 3)
    e = EMA(net, halflife(10))
    for k in range(9): e.update(net, k+1, 1)
    assert torch.equal(e.avg['weight'], net.weight) and torch.equal(averaged(net, e).weight, net.weight)
    assert halflife(500_000, .05)(1_000_000+512, 512)==pytest.approx(.5**(512/50_000)) # EDM: min(500k, 0.05 n)

def test_times_and_drops_do_not_depend_on_the_cut(images):
    t, b = task(), next(batches(images, 12, Rng(0)))
    whole = t.draw(b, Rng(0))
    half = t.draw({**b, 'idx': b['idx'][6:]}, Rng(0))
    assert torch.equal(whole['t'][6:], half['t']) and torch.equal(whole['drop'][6:], half['drop'])

def test_second_process_is_refused(images, tmp_path):
    go(images, 1, tmp_path)
    code = f'from diffnb.train.checkpoint import alone\nwith alone({str(tmp_path)!r}): pass'
    def hook(run):
        res = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
        assert res.returncode and 'another process' in res.stderr
    go(images, 2, tmp_path, hooks=dict(step=hook))
    assert subprocess.run([sys.executable, '-c', code]).returncode==0
