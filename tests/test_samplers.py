"""Samplers against closed forms: Gaussian data and a 2-D mixture, whose posterior means are known exactly.

Tolerances: deterministic samplers run in float64, so ratios of errors are exact but for higher orders (15 % for order 1, 25 % for 2);
where noise is drawn, the bound is at least four standard deviations of the Monte Carlo estimate.
"""
import functools, math
import pytest, torch
import diffnb
from diffnb.core import presets
from diffnb.data.toy import GaussianData, Mixture
from diffnb.grids import edm_grid, karras, lcm_grid, shifted_by_tokens, uniform
from diffnb.process.gaussian import Gaussian, LearnedRange
from diffnb.process.masked import Masked
from diffnb.rng import Rng
from diffnb.schedules import cosine
from diffnb.samplers import ancestral, ddim, dpmpp_2m, flow_clock, heun, hold_noised, sample, sigma_clock, tail, tokens_of
from diffnb.samplers.solvers import churned, clipped, ddpm, euler_ancestral, heun_churn, lcm, plms, runge_kutta, sde_dpmpp_2m, unipc

F64 = torch.float64
DATA = GaussianData(torch.tensor([1.5]), .6)
MIX = Mixture(torch.tensor([[-1.5, 0.], [1.5, .8], [.6, -1.4]], dtype=F64), .3, torch.tensor([.5, .3, .2], dtype=F64))
PROCESSES = {'flow': Gaussian('straight', 'flow'), 'cosine-v': Gaussian(cosine(s=0.), 'v'), 'cosine-x0': Gaussian(cosine(s=0.), 'x0'),
             'linear-eps': Gaussian('linear_beta', 'eps'), 'sd-v': Gaussian('scaled_linear', 'v'), 'zsnr-v': Gaussian('zero_snr', 'v'),
             'edm': Gaussian('edm', 'edm')}
SAMPLERS = presets('sampler')
SOLVERS = {n: f for n,f in SAMPLERS.items() if not f.facts['stochastic'] and f.facts['order']} # deterministic, of a fixed order
HONEST = {n: f for n,f in SAMPLERS.items() if not f.facts.get('consistency')} # for a network that gives the posterior mean

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
@pytest.mark.parametrize('name', SOLVERS)
def test_order_gaussian(p, name):
    f = SAMPLERS[name]
    r = gauss_error(PROCESSES[p], f(), 80, SMOOTH)/gauss_error(PROCESSES[p], f(), 160, SMOOTH)
    want = 2**f.facts['order']
    assert .85<r/want<1.3, f'error falls {r:.2f}-fold per doubling, and {want} is claimed' # multistep rules come down to their order from above

@pytest.mark.parametrize('p', ['linear-eps', 'sd-v'])
@pytest.mark.parametrize('name', SOLVERS)
def test_order_table(p, name):
    "A table ends above zero noise, where the last step leaves an error that no number of steps removes: so few steps, where theirs is greater."
    f = SAMPLERS[name]
    r = gauss_error(PROCESSES[p], f(), 20, g:=karras(smax=14.))/gauss_error(PROCESSES[p], f(), 40, g)
    assert r>(1.7 if f.facts['order']==1 else 3), f'error falls {r:.2f}-fold per doubling'

@functools.cache
def reference(): return list(sample(PROCESSES['flow'].oracle(MIX.posterior_mean), PROCESSES['flow'], (32, 2), 480, heun(), SMOOTH, x=Rng(1).normal(32, 2, dtype=F64)))[-1]

@pytest.mark.parametrize('name', SOLVERS)
def test_order_mixture(name):
    "No closed form for the end point, but a reference solution of 480 Heun steps is as good."
    p, f = PROCESSES['flow'], SAMPLERS[name]
    def run(n): return last(p.oracle(MIX.posterior_mean), p, (32, 2), steps=n, step=f(), grid=SMOOTH, x=Rng(1).normal(32, 2, dtype=F64))
    e = [(run(n)-reference()).norm(dim=-1).median().item() for n in (30, 90)]
    assert e[0]/e[1]>(.8*2**f.facts['order'])**math.log2(3), e

@pytest.mark.parametrize('name', HONEST)
@pytest.mark.parametrize('p', ['flow', 'sd-v', 'edm'])
def test_mean_and_spread(p, name):
    "100 steps (one, to a tolerance) from the true marginal at t = 1 reach the mixture's mean, covariance and weights."
    p, n, f = PROCESSES[p], 1500, SAMPLERS[name]
    x = p.corrupt(MIX.sample(n, seed=2), torch.ones(1), rng=Rng(3))[0]
    x = last(p.oracle(MIX.posterior_mean), p, (n, 2), steps=100 if f.facts['order'] else 1, step=f(), grid=grid_of(p), rng=Rng(2), x=x)
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
    if n==1 and p.pred.name!='edm' and SAMPLERS[name].facts['order']: assert torch.allclose(xs[-1], p.estimate(p.oracle(DATA.posterior_mean), p.prior((3, 1), dtype=F64), torch.ones(1)).x0)

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

# --- where a trajectory starts, and how large a picture is ---
def test_start():
    "The later part of the grid, from what is known, corrupted to its first time; nearer to it the later it starts."
    p, known, net = PROCESSES['flow'], MIX.sample(400, seed=5), PROCESSES['flow'].oracle(MIX.posterior_mean)
    seen, far = [], []
    def counted(x, t, **c): seen.append(t.item()); return net(x, t)
    for start in (.3, .6, .9):
        seen.clear()
        xs = list(sample(counted, p, (400, 2), 10, ddim(), known=known, start=start, rng=Rng(3)))
        assert seen==[t.item() for t in uniform()(p, 10).t[:-1] if t<=start+1e-9] and len(xs)==len(seen)
        far.append((xs[-1]-known).norm(dim=1).mean().item())
    assert far[0]<far[1]<far[2] and far[0]<.5
    first = p.corrupt(known, torch.tensor([.6], dtype=F64), rng=Rng(3).at('start'))[0]
    a, b = (last(net, p, (400, 2), steps=10, step=ddim(), start=.6, rng=Rng(3), **kw) for kw in (dict(known=known), dict(x=first)))
    assert torch.equal(a, b)

def test_start_on_a_table():
    "diffusers' strength 0.6 of 10 trailing steps: six, from entry 599."
    p, seen = PROCESSES['sd-v'], []
    list(sample(lambda x, t, **c: seen.append(t.item()) or x, p, (1, 2), 10, ddim(), known=torch.zeros(1, 2), start=.6))
    assert [round(o) for o in seen]==[599, 499, 399, 299, 199, 99]

def test_start_and_hold():
    "Held positions stay, the others set out from what is known."
    p, known = PROCESSES['flow'], torch.tensor([1.5, .8]).expand(300, 2)
    keep = torch.tensor([True, False]).expand(300, 2)
    x = last(p.oracle(MIX.posterior_mean), p, (300, 2), steps=20, known=known, keep=keep, hold=hold_noised, start=.5)
    assert (x[:,0]==1.5).all() and (x[:,1]-.8).abs().mean()<.5

def test_start_of_text():
    "Masked text starts half hidden; what is visible stays."
    p, known = Masked('straight', mask_id=5, vocab=6), torch.arange(64).view(2, 32)%5
    xs = list(sample(lambda x, t, **c: torch.zeros(*x.shape, 6), p, (2, 32), 8, diffnb.samplers.ancestral(), known=known, start=.5))
    x0 = p.corrupt(known, torch.tensor([.5], dtype=F64), rng=Rng(0).at('start'))[0]
    assert 0<(x0==5).sum()<64 and torch.equal(xs[-1][x0!=5], known[x0!=5]) and (xs[-1]<5).all()

@pytest.mark.parametrize('start', (0., -1., 1.5))
def test_start_errors(start):
    p = PROCESSES['flow']
    with pytest.raises(ValueError, match='start'): sample(Net(), p, (2, 1), known=torch.zeros(2, 1), start=start)
    with pytest.raises(ValueError, match='more steps'): sample(Net(), p, (2, 1), 4, known=torch.zeros(2, 1), start=.1)
    with pytest.raises(ValueError, match='known'): sample(Net(), p, (2, 1), start=.5)

def test_tail():
    p, g = PROCESSES['sd-v'], uniform()(PROCESSES['sd-v'], 10)
    cut = tail(uniform(), .35)(p, 10)
    assert torch.equal(cut.t, g.t[-4:]) and torch.equal(cut.net_t[:-1], g.net_t[-4:-1]) and cut.net_t[-1].isnan()

def test_tokens():
    "Grids are told the size: pixels, tokens, or what the network says that it makes of them."
    class Patches(Net):
        def tokens(self, shape): return shape[2]*shape[3]//4
    for net,shape,n in ((Net(), (2, 4, 16, 8), 128), (Net(), (2, 7, 5), 7), (Net(), (2, 9), 9), (Patches(), (2, 4, 16, 8), 32)):
        assert tokens_of(net, shape)==n
    p, told = PROCESSES['flow'], []
    list(sample(Patches(), p, (1, 4, 64, 64), 3, grid=lambda process, n, tokens: told.append(tokens) or uniform()(process, n)))
    assert told==[1024]
    list(sample(Patches(), p, (1, 4, 64, 64), 3, grid=shifted_by_tokens()))

# --- variances ---
def test_shares_of_the_variance():
    "share 0 is ancestral, 1 has the variance sigma_{t|s}^2, and a learned range is what the network says, up to float32."
    p = PROCESSES['linear-eps']
    q = Gaussian('linear_beta', 'eps', learned=LearnedRange())
    x, g = torch.full((200_000, 1), .3, dtype=F64), uniform()(p, 8)
    (at,st), (as_,ss) = (p.schedule.wide(g.t[i:i+1], x) for i in (3, 4))
    var = st**2-(at/as_*ss)**2
    net = p.oracle(DATA.posterior_mean)
    for v in (0., .4, 1.):
        want = math.exp(v*math.log(var)+(1-v)*math.log(var*ss**2/st**2))
        y = ddpm(v)(p, net, x, g, 3, {}, Rng(1))
        assert abs(y.var().item()/want-1)<.02   # 200,000 draws: relative sd .003
        z = ancestral()(q, lambda x, t: torch.cat([net(x, t), torch.full_like(x, 2*v-1)], 1), x, g, 3, {}, Rng(1))
        assert torch.allclose(y, z, atol=1e-6)
    assert torch.equal(ddpm(0.)(p, net, x, g, 3, {}, Rng(1)), ancestral()(p, net, x, g, 3, {}, Rng(1)))

def test_names_of_one_thing():
    "Euler ancestral by k-diffusion's formula is DDIM with eta = 1."
    p = PROCESSES['linear-eps']
    g, x, net = uniform()(p, 8), Rng(0).normal(5, 1, dtype=F64), p.oracle(DATA.posterior_mean)
    for eta in (.5, 1.):
        k, alpha, est = p.schedule.ksigma(g.t), p.schedule(g.t)[0], p.estimate(net, x, g.t[3:4])
        up = eta*k[4]*((k[3]**2-k[4]**2)/k[3]**2).sqrt()
        want = alpha[4]*(est.x0+(k[4]**2-up**2).sqrt()*est.eps+up*Rng(1).normal(like=x))
        assert torch.allclose(euler_ancestral(eta)(p, net, x, g, 3, {}, Rng(1)), want, atol=1e-12)

@pytest.mark.parametrize('f', (dpmpp_2m, sde_dpmpp_2m, ddim, euler_ancestral))
def test_noiseless_limit(f):
    "eta = 0 is the deterministic solver."
    p = PROCESSES['cosine-v']
    a, b = (last(p.oracle(DATA.posterior_mean), p, (4, 1), steps=9, step=o, dtype=F64, rng=Rng(2)) for o in (f(eta=0.), ddim() if 'ddim' in f.__name__ or 'euler' in f.__name__ else dpmpp_2m()))
    assert torch.equal(a, b)

def test_sde_is_better_than_ancestral():
    "Of second order in what is not noise: at 10 steps the spread is nearer to the data's."
    p, n = PROCESSES['cosine-v'], 100_000
    a, b = (abs(last(p.oracle(DATA.posterior_mean), p, (n, 1), steps=10, step=f, grid=SMOOTH, dtype=F64).std().item()-.6) for f in (ancestral(), sde_dpmpp_2m()))
    assert b<a/2, (a, b)

# --- churn ---
def test_churn_formula():
    "EDM, Alg. 2, lines 5 to 8, by hand: the noise level rises by gamma, at most sqrt(2)-1, inside the range only; from there a plain Heun step."
    p = PROCESSES['edm']
    g, net = edm_grid()(p, 18), p.oracle(GaussianData(torch.tensor([0.]), .5).posterior_mean)
    k = p.schedule.ksigma(g.t)
    for amount,gamma in ((4., 4/18), (40., 2**.5-1)):
        for i in (0, 5, 12, 17):
            x = k[i]*Rng(7).normal(6, 1, dtype=F64)
            got = churned(heun(), amount, .05, 50., 1.003)(p, net, x, g, i, {}, Rng(1))
            h = (1+gamma)*k[i] if .05<=k[i]<=50 else k[i]
            xh = x+1.003*(h**2-k[i]**2).sqrt()*Rng(1).at('churn').normal(like=x)
            def D(x, s): return .25*x/(.25+s**2)
            d = (xh-D(xh, h))/h
            y = xh+(k[i+1]-h)*d
            if k[i+1]>0: y = xh+(k[i+1]-h)*(d+(y-D(y, k[i+1]))/k[i+1])/2
            assert torch.allclose(got, y, atol=1e-9)

def test_churn_stays_on_the_schedule():
    "Nothing is raised beyond the noisiest time, nor where there is no signal to compare with."
    for name in ('flow', 'zsnr-v', 'sd-v'):
        p = PROCESSES[name]
        x = last(p.oracle(MIX.posterior_mean), p, (50, 2), steps=9, step=heun_churn(100., 0., math.inf), dtype=F64)
        assert x.isfinite().all()

# --- memory ---
def test_unipc_is_exact_for_quadratics():
    "With the corrector, estimates that are quadratic in lambda are integrated exactly over a step, from the integral x_s/sigma_s = x_t/sigma_t + int e^lambda x0(lambda) dlambda."
    p = PROCESSES['linear-eps']
    g = karras(smax=20.)(p, 12)
    lam = -p.schedule.ksigma(g.t[:-1]).log()
    q = lambda l: .3+.2*l-.05*l**2                        # x0 as a function of lambda alone
    call = lambda x, t: x
    class Known:                                          # a process whose estimates are known
        schedule = p.schedule
        def estimate(self, call, x, t, prev=None, net_t=None):
            return diffnb.core.Est(torch.full_like(x, q(-p.schedule.ksigma(t).log().item())))
    def exact(i, j):                                      # of e^lambda q, by its antiderivative
        F = lambda l: math.exp(l)*(q(l)-(.2-.1*l)-.1)
        return F(lam[j].item())-F(lam[i].item())
    x, state, kept = torch.ones(1, 1, dtype=F64), {}, []
    for i in range(6):
        x = unipc()(Known(), call, x, g, i, state, Rng(0))
        kept.append(state['from'].item()/p.schedule(g.t[i])[1].item())
    for i in (2, 3, 4): assert abs(kept[i+1]-kept[i]-exact(i, i+1))<1e-9, i # corrected points; the first two steps have less of a past

def test_adams_is_exact_for_cubics():
    "On even steps, slopes that are cubic in the clock are integrated exactly once four are known; Runge and Kutta at once."
    flow = PROCESSES['flow']
    f = lambda t: 1-2*t+3*t**2-t**3                       # the slope eps-x0, of t alone
    F = lambda t: t-t**2+t**3-t**4/4
    class Known:
        schedule = flow.schedule
        def estimate(self, call, x, t, prev=None, net_t=None): return diffnb.core.Est(torch.zeros_like(x), torch.full_like(x, f(t.item())))
    g = uniform()(flow, 10)
    for step,start in ((plms(), 4), (runge_kutta(), 0)):
        x, state, xs = torch.ones(1, 1, dtype=F64), {}, []
        for i in range(9):
            xs.append(x.item())
            x = step(Known(), lambda x, t: x, x, g, i, state, Rng(0))
        for i in range(start, 8): assert abs(xs[i+1]-xs[i]-(F(1-(i+1)/10)-F(1-i/10)))<1e-12, i

def test_calls():
    "N, 2N-1, N+1 and N+9 calls of the network."
    p, n = PROCESSES['flow'], []
    for name,want in dict(ancestral=10, ddim=10, heun=19, dpmpp_2m=10, unipc=10, plms=11, pndm=19, lcm=10, heun_churn=19).items():
        n.clear()
        list(sample(lambda x, t, **c: n.append(0) or x/2, p, (1, 2), 10, SAMPLERS[name]()))
        assert len(n)==want, name

# --- consistency, clipping ---
def test_lcm_follows_a_consistent_network():
    "A perfect consistency function keeps the distribution in any number of steps; lcm's blend is the identity at the first entry."
    p = PROCESSES['sd-v']
    def jump(x, alpha, sigma): return 1.5+.6*(x-alpha*1.5)/(alpha**2*.36+sigma**2)**.5
    for n in (1, 2, 4):
        x = last(p.oracle(jump), p, (20_000, 1), steps=n, step=lcm(), grid=lcm_grid())
        assert abs(x.mean()-1.5)<.06 and abs(x.std()-.6)<.02
    g, x = uniform()(p, 1000), torch.randn(3, 1, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(lcm()(p, p.oracle(jump), x, g, 999, {}, Rng(0)), x, atol=1e-6)

def test_clipped():
    "Estimates stay in range whatever the network says; inside it nothing changes."
    p, wild = PROCESSES['linear-eps'], lambda x, t, **c: 5*x
    assert last(wild, p, (50, 2), steps=10, step=clipped(ancestral(), .5)).abs().max()<=.5
    net = p.oracle(MIX.posterior_mean)
    a, b = (last(net, p, (50, 2), steps=10, step=s) for s in (unipc(), clipped(unipc(), 100.)))
    assert torch.equal(a, b)
