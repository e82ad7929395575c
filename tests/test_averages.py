"Averages with power profiles: any width after the run, from the snapshots of two."
import errno, math, shutil
from functools import partial
import numpy as np, pytest, torch
from scipy.integrate import quad
from torch import nn
import diffnb.train.ema as ema
from diffnb.core import Denoiser, Feats
from diffnb.data.images import Images, batches, floats
from diffnb.process.gaussian import Gaussian
from diffnb.rng import Rng
from diffnb.train.checkpoint import load_weights
from diffnb.train.ema import Power, exponent, halflife, mixture, overlap, power, reconstruct, shares, snapshots
from diffnb.train.loop import fit
from diffnb.train.task import DiffusionTask, adamw, constant

class Net(Denoiser):
    "With a frozen weight and two buffers, one that training moves and one of whole numbers."
    def __init__(self):
        super().__init__()
        self.inp, self.norm, self.out = nn.Linear(17, 8), nn.BatchNorm1d(8), nn.Linear(8, 16)
        self.frozen = nn.Parameter(torch.ones(8), requires_grad=False)
    def features(self, x, net_t, **cond):
        h = self.inp(torch.cat([x.flatten(1), net_t.to(x.dtype).expand(len(x))[:,None]], 1))
        return Feats(torch.relu(self.norm(h))*self.frozen, size=x.shape)
    def head(self, feats): return self.out(feats.h).view(feats.size)

def go(steps, folder, every=4, widths=dict(narrow=.05, wide=.1), seed=0, **kw):
    torch.manual_seed(0)
    x = torch.randint(0, 256, (64, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    task = DiffusionTask(Net(), Gaussian('straight', 'flow'), optimiser=adamw(), lr=constant(1e-2))
    data = partial(batches, Images(x, torch.zeros(64).long(), ('a',)), 8, Rng(seed), transforms=(floats,))
    averages = {k: power(s) for k,s in widths.items()}
    return fit(task, data, steps, folder, Rng(seed), averages, snapshots(every)() if every else None, bar=False, save_every=10, **kw)

@pytest.mark.parametrize('width', [.01, .05, .1, .2, .28])
def test_the_width_is_the_standard_deviation(width):
    g = exponent(width)
    moment = lambda k: quad(lambda u: (g+1)*u**g*u**k, 0, 1, epsabs=1e-13)[0]
    assert math.sqrt(moment(2)-moment(1)**2)==pytest.approx(width, rel=1e-6)

def test_a_width_that_cannot_be():
    for s in (0, -.1, .2887, 1):
        with pytest.raises(ValueError, match=f'below 0.288, not {s}'): exponent(s)

def test_overlaps_are_integrals():
    for ta,ga,tb,gb in [(3., 2.5, 7., 1.), (7., 2.5, 3., 1.), (5., 16.97, 5., 6.94), (5., 2., 5., 2.)]:
        p = lambda u, t, g: (g+1)*u**g/t**(g+1)
        want = quad(lambda u: p(u, ta, ga)*p(u, tb, gb), 0, min(ta, tb), epsabs=1e-13)[0]
        got = overlap(*(torch.tensor(o, dtype=torch.float64) for o in (ta, ga, tb, gb)))
        assert got.item()==pytest.approx(want, rel=1e-9)

def test_it_is_the_least_squares_of_dense_profiles():
    "The oracle: shares of every step as rows, and the best mixture with sum one by numpy's null space and lstsq."
    K, g = 4000, [exponent(.05), exponent(.1)]
    t = np.repeat([1000, 2000, 3000, 4000], 2)
    P = np.stack([np.pad(shares(Power(a), n, 1).numpy(), (0, K-n)) for n,a in zip(t.tolist(), g*4)])
    for width in (.07, .15):
        b = shares(power(width), K, 1).numpy()
        first, step = np.full(8, 1/8), np.linalg.svd(np.ones((1, 8)))[2][1:] # any mixture, and all ways to change it
        want = first+step.T@np.linalg.lstsq((step@P).T, b-first@P, rcond=None)[0]
        got = mixture(torch.tensor(t).double(), torch.tensor(g*4).double(), K, width).numpy()
        assert abs(got-want).max()<1e-5 # 4000 steps, and functions of time: off by 5e-7
        assert np.linalg.norm(got@P-b)<=(1+1e-5)*np.linalg.norm(want@P-b)

def test_a_constant_comes_back_and_the_paper_without_the_constraint_loses_some():
    t, g = torch.arange(1, 5).double().repeat_interleave(2), torch.tensor([16.97, 6.94]*4).double()
    x = mixture(t, g, 4, .2)
    A, b = overlap(t[:,None], g[:,None], t, g), overlap(t, g, t.new_tensor(4.), t.new_tensor(exponent(.2)))
    assert x.sum().item()==pytest.approx(1, abs=1e-12) and (torch.linalg.solve(A, b).sum()-1).abs()>.05
    with pytest.raises(ValueError, match='after 4 images says nothing of the first 3'): mixture(t, g, 3, .2)

def test_a_run_against_averages_that_were_tracked(tmp_path):
    run = go(60, tmp_path, widths=dict(narrow=.05, wide=.1, middle=.07))
    kept = sorted((tmp_path/'ema').glob('step-*'))
    assert [p.name for p in kept]==[f'step-{4*k:08d}' for k in range(1, 16)]
    for p in [*kept, tmp_path/'step-00000060']: # forget the third average: it is the truth
        f = p/'state.json'
        if 'gammas' in f.read_text(): rewrite(p, lambda s: s['gammas'].pop('middle'))
    truth, made = run.emas['middle'].avg, reconstruct(tmp_path, .07)
    far = lambda a: max((a[k]-truth[k]).norm()/(run.emas['narrow'].avg[k]-run.emas['wide'].avg[k]).norm() for k in truth)
    assert far(made)<.02<.2<min(far(run.emas[k].avg) for k in ('narrow', 'wide'))
    for k,s in dict(narrow=.05, wide=.1).items(): # what is stored is found again, to float32
        found = reconstruct(tmp_path, s)
        for n,v in run.emas[k].avg.items(): assert torch.allclose(found[n], v, rtol=1e-6, atol=1e-7)
    assert torch.equal(made['norm.running_mean'], run.emas['wide'].buffers['norm.running_mean'])
    assert made['norm.num_batches_tracked']==60 and 'frozen' not in made
    early = reconstruct(tmp_path/'step-00000050', .05) # at an older checkpoint, from what there was then
    net = Net()
    load_weights(tmp_path/'step-00000050', net, 'narrow')
    assert torch.allclose(early['inp.weight'], net.inp.weight, rtol=1e-6, atol=1e-7)

def rewrite(folder, change):
    state = ema.load_json(folder/'state.json')
    change(state)
    files = {p.name: p.read_bytes() for p in folder.glob('*.safetensors')}
    with ema.write_folder(folder) as tmp:
        for n,b in files.items(): (tmp/n).write_bytes(b)
        ema.save_json(tmp/'state.json', state)

def tree(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}

def test_a_resumed_run_keeps_the_same_snapshots(tmp_path):
    go(32, tmp_path/'whole')
    go(14, tmp_path/'run') # the last checkpoint: 14, so that 12 stays
    shutil.rmtree(tmp_path/'run/step-00000014') # killed after step 12: back to 10
    (tmp_path/'run/ema/step-00000012/ema-wide.safetensors').write_bytes(b'of another life')
    go(32, tmp_path/'run')
    assert tree(tmp_path/'run/ema')==tree(tmp_path/'whole/ema') and len(tree(tmp_path/'run/ema'))==4*8

def test_snapshots_later_than_the_run_are_taken_back(tmp_path):
    go(12, tmp_path)
    for n in ('step-00000010', 'step-00000012'): shutil.rmtree(tmp_path/n)
    run = go(4, tmp_path, every=3)
    assert sorted(p.name for p in (tmp_path/'ema').iterdir())==['step-00000003'] and run.progress.step==4

def test_a_full_disk_is_said(tmp_path, monkeypatch):
    real = ema.save_tensors
    def full(path, *a):
        if '/ema/' in str(path) and '00000008' in str(path.parent): raise OSError(errno.ENOSPC, 'No space left on device')
        return real(path, *a)
    monkeypatch.setattr(ema, 'save_tensors', full)
    with pytest.warns(UserWarning, match='step 8 could not be kept'): go(12, tmp_path)
    assert sorted(p.name for p in (tmp_path/'ema').iterdir())==['step-00000004', 'step-00000012']

def test_mistakes(tmp_path):
    with pytest.raises(ValueError, match='at least 1, not 0'): snapshots(0)
    bad = dict(averages=dict(ema=halflife()), hooks=snapshots(2)(), bar=False)
    task = DiffusionTask(Net(), Gaussian('straight', 'flow'))
    def nothing(start): return iter([])
    with pytest.raises(ValueError, match=r"decay `power`, and there are \['ema'\]"): fit(task, nothing, 1, tmp_path/'a', **bad)
    with pytest.raises(ValueError, match='this run has none'): fit(task, nothing, 1, None, **bad)
    go(4, tmp_path/'b', every=0)
    with pytest.raises(FileNotFoundError, match='the hook `snapshots`'): reconstruct(tmp_path/'b', .1)
    with pytest.raises(FileNotFoundError, match='no complete checkpoint'): reconstruct(tmp_path/'c', .1)
    go(8, tmp_path/'d')
    f = tmp_path/'d/ema/step-00000004/ema-wide.safetensors'
    f.write_bytes(f.read_bytes()[:-1]+b'x')
    with pytest.raises(ValueError, match='ema-wide'): reconstruct(tmp_path/'d', .1)
