"""A step's learned variance: diffusers' DDPM step by step, the bound against its definition, and data whose entropy is known.

Tolerances: parity is 1e-5 of the values' size, as float32 sums differ; expectations over draws are held to four standard errors or more.
"""
import math, warnings
import numpy as np, pytest, torch
from scipy import stats
from torch import nn
from diffnb.core import Denoiser, Est, Feats, mean_loss
from diffnb.data.toy import GaussianData
from diffnb.grids import linspace, trailing
from diffnb.process.gaussian import Gaussian, LearnedRange, nll_of
from diffnb.rng import Rng
from diffnb.samplers import ancestral, ddim, sample
from diffnb.schedules import linear_beta
from diffnb.train.task import DiffusionTask

F64 = torch.float64
DATA = GaussianData(torch.tensor([.2]), .6)

# --- diffusers ---
@pytest.fixture(scope='module')
def diffusers():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return pytest.importorskip('diffusers')

class Same(Rng):
    "An rng that gives the noise which theirs draws from a generator of the same seed."
    def at(self, *a, **k): return self
    def normal(self, like): return torch.randn(like.shape, generator=torch.Generator().manual_seed(self.seed), dtype=like.dtype)

def net(x, i):
    "Smooth in x, different in each half."
    return torch.cat([torch.sin(3*x)+.3*x+i/1000, torch.cos(2*x)], 1)

@pytest.mark.parametrize('kind', ['learned_range', 'fixed_small', 'fixed_large'])
@pytest.mark.parametrize('pred,name', [('eps', 'epsilon'), ('x0', 'sample'), ('v', 'v_prediction')])
@pytest.mark.parametrize('n', [4, 10, 25, 50, pytest.param(250, marks=pytest.mark.slow)])
def test_steps_of_diffusers(diffusers, kind, pred, name, n):
    if n==250 and (pred!='eps' or kind!='learned_range'): pytest.skip('the long one once')
    s = diffusers.DDPMScheduler(beta_schedule='linear', timestep_spacing='linspace', variance_type=kind, clip_sample=False, prediction_type=name)
    s.set_timesteps(n)
    learns = kind=='learned_range'
    p = Gaussian('linear_beta', pred, learned=LearnedRange() if learns else None)
    g, x = linspace()(p, n), torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(9))
    if n==10: assert s.timesteps.tolist()==[999, 888, 777, 666, 555, 444, 333, 222, 111, 0]
    differs = 0
    for i,tt in enumerate(s.timesteps):
        y = net(x, tt) if learns else net(x, tt)[:,:3]
        want = s.step(y, tt, x, generator=torch.Generator().manual_seed(i)).prev_sample
        t, to = g.t[i:i+1], g.t[i+1:i+2]
        est = p.estimate(lambda x, t: y, x, t)
        if kind=='fixed_large': est = est._replace(logvar=1.)
        got = p.step(x, est, t, to, Same(i))
        assert torch.allclose(got, want, atol=1e-5*max(1, want.abs().max().item()), rtol=0), i
        differs += not torch.allclose(p.step(x, est._replace(logvar=.5), t, to, Same(i)), want, atol=1e-5*max(1, want.abs().max().item()))
        x = want
    assert differs>=n/3 # the variance makes a difference

# --- the share ---
def test_share_is_read_from_the_second_half():
    p, x = Gaussian('linear_beta', 'eps', learned=LearnedRange()), torch.randn(2, 3, 4, 4)
    raw = torch.cat([x, torch.linspace(-1, 1, x.numel()).view(x.shape)], 1)
    est = p.estimate(lambda x, t: raw, x, torch.tensor([.5]))
    assert torch.allclose(est.logvar.flatten(), torch.linspace(0, 1, x.numel())) and torch.equal(est.eps, x)

def test_share_moves_the_log_variance_in_equal_steps():
    p, x = Gaussian('cosine', 'v'), torch.zeros(100_000, 1)
    t, s = torch.tensor([.6]), torch.tensor([.3])
    lv = torch.stack([p.step(x, Est(x, logvar=f), t, s, Rng(0)).var().log() for f in (0., .25, .5, 1.)])
    _, _, var, ratio = p.posterior(t, s, x)
    want = torch.tensor([math.log(var)+2*(1-f)*math.log(ratio) for f in (0., .25, .5, 1.)])
    assert torch.allclose(lv, want, atol=.02) # 100,000 draws: sd .0045

def test_each_sample_its_own_time_and_share():
    p, x = Gaussian('linear_beta', 'v', learned=LearnedRange()), torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    t, s, share = torch.tensor([.9, .5, .1]), torch.tensor([.6, .4, 0.]), torch.tensor([[.1, .9], [.5, .2], [1., 0.]])
    whole = p.step(x, Est(x/2, logvar=share), t, s, Rng(0))
    for i in range(3): assert torch.allclose(p.step(x[i:i+1], Est(x[i:i+1]/2, logvar=share[i:i+1]), t[i:i+1], s[i:i+1], Rng(0).of([i])), whole[i:i+1], atol=1e-6)
    assert torch.allclose(whole[2], x[2]/2, atol=1e-6) # the last step draws nothing, whatever the share

def test_smallest_range_is_the_plain_sampler():
    mean, q = DATA.posterior_mean, Gaussian('linear_beta', 'eps')
    p = Gaussian('linear_beta', 'eps', learned=LearnedRange())
    for step in (ancestral(), ddim()):
        a, b = (list(sample(o.oracle(mean), o, (5, 1), steps=6, step=step, grid=trailing(), dtype=F64))[-1] for o in (p, q))
        assert torch.allclose(a, b, atol=1e-12)

@pytest.mark.parametrize('learned,channels', [(None, 6), (LearnedRange(), 3), (LearnedRange(), 4)])
def test_wrong_channels(learned, channels):
    p, x = Gaussian('linear_beta', 'eps', learned=learned), torch.zeros(2, 3, 4, 4)
    def call(x, t): return torch.zeros(2, channels, 4, 4)
    with pytest.raises(ValueError, match='gave'): p.estimate(call, x, torch.tensor([.5]))
    with pytest.raises(ValueError, match='gave'): p.loss(call, x, torch.tensor([.5, .2]))

# --- the bound ---
def by_definition(p, x_t, x0, x0_hat, share, i, levels):
    "In bits, entry by entry, from betas and cumulative products as in the papers; scipy for the normal law."
    abar = p.schedule.abar.numpy()
    before = np.append(1., abar[:-1])
    beta = 1-abar/before
    post = beta*(1-before)/(1-abar)
    low = np.log(np.append(post[1], post[1:]))[i]
    logvar = share*np.log(beta[i])+(1-share)*low
    if i==0:
        d, sd, half = x0-x0_hat, np.exp(logvar/2), 1/(levels-1)
        upper = np.where(x0>1-half, 1., stats.norm.cdf((d+half)/sd))
        lower = np.where(x0<-1+half, 0., stats.norm.cdf((d-half)/sd))
        return -np.log2(upper-lower)
    c0, cx = np.sqrt(before[i])*beta[i]/(1-abar[i]), np.sqrt(abar[i]/before[i])*(1-before[i])/(1-abar[i])
    gap = (cx*x_t+c0*x0)-(cx*x_t+c0*x0_hat)
    return .5*(-1+logvar-low+np.exp(low-logvar)+gap**2*np.exp(-logvar))/np.log(2)

@pytest.mark.parametrize('T', [20, 1000])
@pytest.mark.parametrize('pred', ['eps', 'v', 'x0'])
def test_bound_by_definition(T, pred):
    p = Gaussian(linear_beta(T, 1e-4*1000/T, .02*1000/T if T>20 else .5), pred, learned=LearnedRange())
    g = torch.Generator().manual_seed(0)
    x0 = ((torch.randint(256, (4, 6), generator=g)/127.5)-1).double()
    x0[0,:2] = torch.tensor([-1., 1.])
    for i in (0, 1, 2, T//2, T-1):
        t = torch.full((4,), (i+1)/T, dtype=F64)
        x_t, share = p.corrupt(x0, t, rng=Rng(i))[0], torch.rand(4, 6, generator=g)
        raw = torch.randn(4, 6, generator=g, dtype=F64)*(.01 if i==0 else 1)+(p.coef(p.pred.target, t, x0)[0]*x0 if i==0 else 0)
        cx,cy = p.coef(p.pred.x0, t, x0)
        want = by_definition(p, x_t.numpy(), x0.numpy(), (cx*x_t+cy*raw).numpy(), share.double().numpy(), i, 256)
        np.testing.assert_allclose(p.bound(x_t, x0, raw, share, t), want, rtol=2e-3, atol=2e-4) # float32 logarithms
        one = p.bound(x_t, x0, raw, share, t[:1]) # a single time: numbers instead of tensors
        assert torch.allclose(one, p.bound(x_t, x0, raw, share, t), rtol=1e-5, atol=1e-6)

@pytest.mark.parametrize('mean', [-1., -.37, .999, 3.])
@pytest.mark.parametrize('sd', [.001, .05, 2.])
def test_grey_levels_have_probabilities_that_add_to_one(mean, sd):
    x = torch.arange(256, dtype=F64)/127.5-1
    nll = nll_of(mean-x, torch.full((256,), 2*math.log(sd), dtype=F64), x, 256)
    assert abs((-nll).exp().sum()-1)<1e-9 and nll.isfinite().all()

def test_no_gradient_is_lost_far_out():
    "Ten thousand standard deviations off, the likelihood still says where to go."
    x0, logvar = torch.tensor([0., .5, -1., 1.]), torch.full((4,), -9., requires_grad=True)
    err = torch.tensor([.9, -50., 3., -3.], requires_grad=True)
    nll_of(err, logvar, x0, 256).sum().backward()
    assert err.grad.isfinite().all() and (err.grad*err.detach()>0).all() and (logvar.grad<0).all() and logvar.grad.isfinite().all()

def test_hybrid_loss_is_squared_error_plus_bound():
    p, q = (Gaussian('linear_beta', 'eps', learned=o) for o in (LearnedRange(weight=.3), None))
    x0 = torch.rand(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))*2-1
    t = torch.tensor([.001, .002, .3, 1.], dtype=F64)
    raw = torch.randn(4, 6, 2, 2, generator=torch.Generator().manual_seed(1)).requires_grad_()
    both = p.loss(lambda x, n: raw, x0, t, rng=Rng(2))
    plain = q.loss(lambda x, n: raw[:,:3], x0, t, rng=Rng(2))
    x_t = p.corrupt(x0, t, rng=Rng(2))[0]
    bound = p.bound(x_t, x0, raw[:,:3], (raw[:,3:]+1)/2, t)
    assert torch.allclose(both.value, plain.value+.3*bound, rtol=1e-6)
    got, = torch.autograd.grad(both.value.sum(), raw, retain_graph=True)
    mse, = torch.autograd.grad(plain.value.sum(), raw)
    assert torch.equal(got[:,:3], mse[:,:3]) and (got[:,3:].abs().amax((1, 2, 3))>0).all() # the bound moves the variance alone

@pytest.mark.parametrize('share', ['best', 'smallest', 'largest'])
def test_bound_of_data_with_known_entropy(share):
    "All steps together bound -log p: closely with the best variance, further off with either end of the range."
    T, n = 20, 10_000
    p = Gaussian(linear_beta(T, .001, .5), 'x0', learned=LearnedRange(levels=None))
    x0, total, call = DATA.sample(n, seed=1), torch.zeros(n, 1, dtype=F64), p.oracle(DATA.posterior_mean)
    for i in range(T):
        t = torch.tensor([(i+1)/T], dtype=F64)
        x_t = p.corrupt(x0, t, rng=Rng(3, step=i))[0]
        alpha,sigma = p.schedule.wide(t, x0)
        _, c0, var, ratio = p.posterior(t, t-1/T if i else 0*t, x0)
        v = .36*sigma**2/(alpha**2*.36+sigma**2)
        low = p.posterior(torch.tensor([2/T]), torch.tensor([1/T]), x0)
        top, bottom = (math.log(var), math.log(var*ratio**2)) if i else (math.log(var), math.log(low[2]*low[3]**2))
        target = math.log(c0**2*v+(var*ratio**2 if i else 0))
        f = dict(best=(target-bottom)/(top-bottom), smallest=0., largest=1.)[share]
        raw = p.halves(call(x_t, p.net_t(t)), x_t)[0]
        total += p.bound(x_t, x0, raw, torch.full_like(x0, f), t)
    alpha,sigma = p.schedule.wide(torch.ones(1), x0)
    total += .5*((alpha*x0)**2+sigma**2-1-2*math.log(sigma))/math.log(2) # the prior is a standard normal
    exact = (((x0-.2)/.6)**2/2+math.log(.6*math.sqrt(2*math.pi)))/math.log(2) # the same draws: what is left is the noise of x_t
    extra = (total-exact).mean().item()
    assert (-.01<extra<.01) if share=='best' else extra>.025, extra

class Halves(Denoiser):
    "Three numbers in, six out."
    def __init__(self):
        super().__init__()
        self.w = nn.Linear(3, 6)
    def features(self, x, net_t, **cond): return Feats(x)
    def head(self, feats): return self.w(feats.h)

def test_a_task_trains_it():
    net = Halves()
    task = DiffusionTask(net, Gaussian('linear_beta', 'eps', learned=LearnedRange()))
    batch = dict(x=torch.rand(64, 3, generator=torch.Generator().manual_seed(0))*2-1, idx=torch.arange(64))
    opt, losses = torch.optim.Adam(net.parameters(), lr=.05), []
    for i in range(30):
        loss = mean_loss(task.loss(batch, Rng(0, step=i)))
        opt.zero_grad(); loss.backward(); opt.step()
        losses.append(loss.item())
    assert all(map(math.isfinite, losses)) and sum(losses[-6:])<.8*sum(losses[:6])
    assert (net.w.weight.grad[3:].abs().sum()>0).all()
