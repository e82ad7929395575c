"""Samplers against closed forms: Gaussian data and a 2-D mixture, whose posterior means are known exactly.

Tolerances: deterministic samplers run in float64, so ratios of errors are exact but for higher orders (15 % for order 1, 25 % for 2);
where noise is drawn, the bound is at least four standard deviations of the Monte Carlo estimate.
"""
import math
import pytest, torch
import diffnb
from diffnb.core import Est, create, presets
from diffnb.data.toy import GaussianData, Mixture
from diffnb.grids import edm_grid, karras, uniform
from diffnb.process.gaussian import Gaussian, predictions
from diffnb.rng import Rng
from diffnb.schedules import cosine
from diffnb.samplers import ancestral, ddim, dpmpp_2m, euler, flow_clock, heun, hold_noised, sample, sigma_clock

F64 = torch.float64
DATA = GaussianData(torch.tensor([1.5]), .6)
MIX = Mixture(torch.tensor([[-1.5, 0.], [1.5, .8], [.6, -1.4]], dtype=F64), .3, torch.tensor([.5, .3, .2], dtype=F64))
PROCESSES = {'flow': Gaussian('straight', 'flow'), 'cosine-v': Gaussian(cosine(s=0.), 'v'), 'cosine-x0': Gaussian(cosine(s=0.), 'x0'),
             'linear-eps': Gaussian('linear_beta', 'eps'), 'sd-v': Gaussian('scaled_linear', 'v'), 'zsnr-v': Gaussian('zero_snr', 'v'),
             'edm': Gaussian('edm', 'edm')}
SAMPLERS = presets('sampler')

def grid_of(p): return edm_grid() if p.pred.name=='edm' else uniform()
def last(*a, **k):
    *_, x = sample(*a, **k)
    return x

SMOOTH = karras(smin=.002, smax=80.)
def gauss_error(p, step, n, grid):
    "Error of the sampled end point, whose exact value is m + z sd for a start z standard deviations from the mean."
    z, (alpha, sigma) = torch.tensor([[-1.], [2.]], dtype=F64), p.schedule(grid(p, n).t[0])
    x = alpha*1.5+z*(alpha**2*.36+sigma**2).sqrt()
    return (last(p.oracle(DATA.posterior_mean), p, (2, 1), steps=n, step=step, grid=grid, x=x)-(1.5+.6*z)).abs().max().item()

@pytest.mark.parametrize('p', ['flow', 'cosine-v', 'cosine-x0', 'edm'])
@pytest.mark.parametrize('name', [n for n,f in SAMPLERS.items() if not f.facts['stochastic']])
def test_order_gaussian(p, name):
    f = SAMPLERS[name]
    r = gauss_error(PROCESSES[p], f(), 80, SMOOTH)/gauss_error(PROCESSES[p], f(), 160, SMOOTH)
    want = 2**f.facts['order']
    assert abs(r/want-1)<.15, f'error falls {r:.2f}-fold per doubling, and {want} is claimed'

@pytest.mark.parametrize('p', ['linear-eps', 'sd-v'])
@pytest.mark.parametrize('name', [n for n,f in SAMPLERS.items() if not f.facts['stochastic']])
def test_order_table(p, name):
    "A table ends above zero noise, where the last step leaves an error that no number of steps removes: so few steps, where theirs is greater."
    f = SAMPLERS[name]
    r = gauss_error(PROCESSES[p], f(), 20, g:=karras(smax=14.))/gauss_error(PROCESSES[p], f(), 40, g)
    assert r>(1.7 if f.facts['order']==1 else 3), f'error falls {r:.2f}-fold per doubling'

@pytest.mark.parametrize('name', [n for n,f in SAMPLERS.items() if not f.facts['stochastic']])
def test_order_mixture(name):
    "No closed form for the end point, but a reference solution of 480 Heun steps is as good."
    p, f = PROCESSES['flow'], SAMPLERS[name]
    net, x = p.oracle(MIX.posterior_mean), p.prior((64, 2), Rng(1), dtype=F64)
    def run(n, step): return last(net, p, (64, 2), steps=n, step=step, grid=SMOOTH, x=x)
    ref = run(480, heun())
    e = [(run(n, f())-ref).norm(dim=-1).median().item() for n in (40, 80, 160)]
    want = 2**f.facts['order']
    assert e[0]/e[2]>(.8*want)**2, e

@pytest.mark.parametrize('name', SAMPLERS)
@pytest.mark.parametrize('p', ['flow', 'cosine-v', 'linear-eps', 'sd-v', 'edm'])
def test_mean_and_spread(p, name):
    "100 steps from the true marginal at t = 1 reach the mixture's mean, covariance and weights."
    p, n = PROCESSES[p], 1500
    x = p.corrupt(MIX.sample(n, seed=2), torch.ones(1), rng=Rng(3))[0]
    x = last(p.oracle(MIX.posterior_mean), p, (n, 2), steps=100, step=SAMPLERS[name](), grid=grid_of(p), rng=Rng(2), x=x)
    d = MIX.sample(200_000, seed=1)
    assert torch.allclose(x.mean(0), d.mean(0), atol=4*1.4/n**.5)         # sd of the data is below 1.4
    assert torch.allclose(x.T.cov(), d.T.cov(), atol=.2)
    near = torch.cdist(x, MIX.means).argmin(-1).bincount(minlength=3)/n
    assert torch.allclose(near.double(), torch.tensor([.5, .3, .2], dtype=F64), atol=4*.5/n**.5)

def test_ancestral_order():
    "The spread of ancestral samples errs in proportion to the step."
    p, n, e = PROCESSES['cosine-v'], 200_000, []
    for steps in (10, 20): e.append(abs(last(p.oracle(DATA.posterior_mean), p, (n, 1), steps=steps, step=ancestral(), dtype=F64).std().item()-.6))
    assert 1.6<e[0]/e[1]<2.5, e   # errors .04 and .02; Monte Carlo sd .001

@pytest.mark.parametrize('name,want', [('euler', .423031436408), ('heun', .527624637001)])
def test_edm_golden(name, want):
    "N(0, 0.5^2), start 80 at sigma 80, EDM's grid of 18: published end points."
    p, d = PROCESSES['edm'], GaussianData(torch.tensor([0.]), .5)
    x = last(p.oracle(d.posterior_mean), p, (1, 1), steps=18, step=SAMPLERS[name](), grid=edm_grid(), x=torch.full((1, 1), 80., dtype=F64))
    assert abs(x.item()-want)<1e-9

def test_ddim_golden():
    p = PROCESSES['cosine-v']
    for n,sd in {10: .52128, 20: .55943, 40: .57938, 80: .58960, 160: .59478}.items():
        a, b = (last(p.oracle(DATA.posterior_mean), p, (1, 1), steps=n, step=ddim(), x=torch.full((1, 1), z, dtype=F64)).item() for z in (0., 1.))
        assert abs(a-1.5)<1e-12 and abs(b-a-sd)<1e-5

@pytest.mark.parametrize('name', SAMPLERS)
@pytest.mark.parametrize('p', PROCESSES)
@pytest.mark.parametrize('n', [1, 2, 3])
def test_few_steps(p, name, n):
    p = PROCESSES[p]
    xs = list(sample(p.oracle(DATA.posterior_mean), p, (3, 1), steps=n, step=SAMPLERS[name](), grid=grid_of(p), dtype=F64))
    assert len(xs)==n and all(x.isfinite().all() for x in xs)
    if n==1 and p.pred.name!='edm': assert torch.allclose(xs[-1], p.estimate(p.oracle(DATA.posterior_mean), p.prior((3, 1), dtype=F64), torch.ones(1)).x0)

@pytest.mark.parametrize('name', SAMPLERS)
def test_own_noise(name):
    "A sample does not change with the batch it is in, nor with how the batch is split."
    p = PROCESSES['flow']
    def run(idx): return last(p.oracle(MIX.posterior_mean), p, (len(idx), 2), steps=7, step=SAMPLERS[name](), rng=Rng(5).of(idx), dtype=F64)
    whole = run(range(8))
    assert torch.allclose(torch.cat([run(range(3)), run(range(3, 8))]), whole, atol=1e-12)

@pytest.mark.parametrize('clock', [sigma_clock, flow_clock])
def test_heun_clocks(clock):
    "Both clocks of Heun's rule converge to the same end."
    p = PROCESSES['edm']
    x = torch.full((1, 1), 80., dtype=F64)
    got = last(p.oracle(GaussianData(torch.tensor([0.]), .5).posterior_mean), p, (1, 1), steps=100, step=heun(clock), grid=edm_grid(), x=x)
    assert abs(got.item()-.499990234661)<1e-2

def test_ddim_one_is_ancestral():
    "One step of ddim(1) and ancestral with the same draw are the same point."
    for p in PROCESSES.values():
        g, x, net = grid_of(p)(p, 6), p.prior((50, 1), Rng(1), dtype=F64), p.oracle(DATA.posterior_mean)
        class Fixed(Rng):
            def at(self, *a, **k): return self
        a, b = (f(p, net, x, g, 2, {}, Fixed(7)) for f in (ddim(1.), ancestral()))
        assert torch.allclose(a, b, atol=1e-9)

def test_hold():
    p, known = PROCESSES['flow'], torch.tensor([1.5, 0.]).expand(500, 2)
    keep = torch.tensor([True, False]).expand(500, 2)
    x = last(p.oracle(MIX.posterior_mean), p, (500, 2), steps=100, step=ancestral(), known=known, keep=keep, hold=hold_noised)
    assert (x[:,0]==1.5).all() and abs(x[:,1].median()-.8)<.3
    for x in sample(p.oracle(MIX.posterior_mean), p, (500, 2), steps=5, known=known, keep=keep): assert (x[:,0]==1.5).all()

class Net(diffnb.core.Denoiser):
    def __init__(self):
        super().__init__()
        self.drop, self.w = torch.nn.Dropout(.5), torch.nn.Parameter(torch.ones(()))
    def features(self, x, net_t, **cond): return diffnb.core.Feats(self.drop(x*self.w))
    def head(self, feats): return feats.h

def test_mode_and_grad():
    "Sampling runs in eval mode without gradients, leaves both as they were, and does not leak no_grad between steps."
    net, p = Net().train(), PROCESSES['flow']
    it = sample(net, p, (2, 1), steps=3)
    x = next(it)
    assert not x.requires_grad and torch.is_grad_enabled() and not net.training
    it.close()
    assert net.training
    a, b = last(net, p, (2, 1), steps=3), last(net, p, (2, 1), steps=3)
    assert torch.equal(a, b)

def test_errors():
    p = PROCESSES['flow']
    net = p.oracle(DATA.posterior_mean)
    for kw, msg in [(dict(known=torch.zeros(2, 1)), 'go together'), (dict(x=torch.zeros(3, 1)), 'shape'), (dict(w=2., guide=diffnb.guidance.plain()), 'default guide'),
                    (dict(steps=0), 'step')]:
        with pytest.raises(ValueError, match=msg): sample(net, p, (2, 1), **kw)

@pytest.fixture(scope='module')
def ds(): return pytest.importorskip('diffusers')

class TestDiffusers:
    "Per step, the same x and the same output of the network: equal to diffusers' schedulers in float32."

    @staticmethod
    def net(x, i): return torch.sin(3*x)+.3*x+i/1000

    @pytest.mark.parametrize('pred,name', [('eps', 'epsilon'), ('x0', 'sample'), ('v', 'v_prediction')])
    @pytest.mark.parametrize('n', [4, 10, 25, 50])
    def test_ddim(self, ds, pred, name, n):
        s = ds.DDIMScheduler(beta_schedule='scaled_linear', beta_start=.00085, beta_end=.012, clip_sample=False, set_alpha_to_one=True,
                             timestep_spacing='trailing', prediction_type=name)
        s.set_timesteps(n)
        p = Gaussian('scaled_linear', pred)
        g = create('trailing', kind='grid')(p, n)
        x = Rng(0).normal(2, 3, 4, 4)
        assert torch.allclose(g.net_t[:-1], s.timesteps.double())
        for i,tt in enumerate(s.timesteps):
            y = self.net(x, tt)
            want = s.step(y, tt, x).prev_sample
            got = ddim()(p, lambda x, t: y, x, g, i, {}, Rng(0))
            assert torch.allclose(got, want, atol=1e-5*max(1, want.abs().max().item()))
            x = want

    @pytest.mark.parametrize('n', [4, 10, 25, 50])
    def test_dpmpp_2m(self, ds, n):
        s = ds.DPMSolverMultistepScheduler(beta_schedule='scaled_linear', beta_start=.00085, beta_end=.012, timestep_spacing='trailing', lower_order_final=True)
        s.set_timesteps(n)
        p = Gaussian('scaled_linear', 'eps')
        g = create('trailing', kind='grid')(p, n)
        x, state = Rng(0).normal(2, 3, 4, 4), {}
        for i,tt in enumerate(s.timesteps):
            y = self.net(x, tt)
            want = s.step(y, tt, x).prev_sample
            got = dpmpp_2m()(p, lambda x, t: y, x, g, i, state, Rng(0))
            assert torch.allclose(got, want, atol=1e-5*max(1, want.abs().max().item())), i
            x = want
