"Weightings: the rule at every time, ends included, and published numbers. Times: their laws, and whose they are."
import itertools, math, warnings
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from scipy import stats
import diffnb.weights
from diffnb.core import create, mean_loss
from diffnb.process.gaussian import Gaussian, predictions
from diffnb.rng import Rng
from diffnb.schedules import cosine, edm, linear_beta, scaled_linear, straight, zero_snr
from diffnb.weights import (biased, cosmap, earlier, edm_weight, later, learned, log_normal, logit_normal, min_snr, mode, p2, shift_time,
                            shifted_times, sigma_sqrt, snr, soft_min_snr, stratified, uniform, uniform_times, weigh)

schedules = dict(straight=straight(), cosine=cosine(), scaled_linear=scaled_linear(), zero_snr=zero_snr(), edm=edm(),
                 table=linear_beta(7, .01, .6))
def pairs():
    "Every schedule with every prediction that it can have."
    for s,k in itertools.product(schedules, predictions):
        try: yield pytest.param(Gaussian(schedules[s], k), id=f'{s}-{k}')
        except ValueError: pass

x0_weights = dict(snr=lambda r: r, capped=lambda r: r.clamp(max=5.), p2=lambda r: r/(1+r), soft=lambda r: r*4/(r+4),
                  one=lambda r: 0*r+1, edm=lambda r: r+4)
def made(kind): return {k: f for k,f in vars(diffnb.weights).items() if getattr(f, 'kind', None)==kind}
def f64(*o): return torch.tensor(o, dtype=torch.float64)
SD = {k: Gaussian(schedules['scaled_linear'], k) for k in ('eps', 'v', 'x0')}
FLOW, ED, ED_X0 = Gaussian(schedules['straight'], 'flow'), Gaussian(schedules['edm'], 'edm'), Gaussian(schedules['edm'], 'x0')

# --- the rule ---
@pytest.mark.parametrize('process', list(pairs()))
@settings(max_examples=40, deadline=None)
@given(t=st.one_of(st.sampled_from([0., 1., 1e-12, 1-1e-12]), st.floats(0, 1)), which=st.sampled_from(sorted(x0_weights)))
def test_finite_and_not_negative_everywhere(process, t, which):
    w = weigh(process, t, x0_weights[which])
    assert w.dtype==torch.float64 and w.shape==() and w.isfinite() and w>=0
    for name,f in made('weight').items():
        w = f()(process, t)
        assert w.isfinite() and w.float().isfinite() and 0<=w, name # a loss is float32

@pytest.mark.parametrize('process', list(pairs()))
@settings(max_examples=15, deadline=None)
@given(t=st.floats(1e-3, .999), seed=st.integers(0, 99), which=st.sampled_from(sorted(x0_weights)))
def test_weighted_loss_is_the_error_of_x0(process, t, seed, which):
    t, rng = f64(t), Rng(seed)
    x0, raw = rng.at('x0').normal(2, 3, dtype=torch.float64), rng.at('raw').normal(2, 3, dtype=torch.float64)
    est = process.estimate(lambda x, net_t: raw, process.corrupt(x0, t, rng=rng)[0], t)
    want = x0_weights[which](process.schedule.snr(t))*(est.x0-x0)**2
    a,b = process.coef(process.pred.target, t, x0)
    eps = process.corrupt(x0, t, rng=rng)[1]
    got = weigh(process, t, x0_weights[which])*(raw-a*x0-b*eps)**2
    assert torch.allclose(got, want, rtol=1e-6, atol=1e-9*float(want.max()))

@pytest.mark.parametrize('shape', [(), (1,), (4,), (4, 3)])
def test_shapes(shape):
    t = torch.full(shape, .3, dtype=torch.float64)
    for w in made('weight').values():
        got = w()(Gaussian('cosine', 'v'), t)
        assert got.shape==shape and got.dtype==torch.float64

def test_a_process_uses_its_weight():
    x0, t = Rng(1).normal(6, 4), Rng(2).uniform(6)
    plain, weighted = (Gaussian('cosine', 'v', weight=w) for w in (None, min_snr()))
    call = lambda x, net_t: 0*x
    a,b = (p.loss(call, x0, t, rng=Rng(3)) for p in (plain, weighted))
    assert torch.allclose(b.value, a.value*min_snr()(plain, t)[:,None].float())
    assert torch.equal(a.value, Gaussian('cosine', 'v', weight=uniform()).loss(call, x0, t, rng=Rng(3)).value)
    assert abs(mean_loss(b)-mean_loss(a))>.01

# --- published numbers (scaled_linear, gamma = 5) ---
golden = {100: (8.4538937, dict(eps=.59144344, v=.52888261, x0=5.), .10577652),
          500: (.38185044, dict(eps=1., v=.27633268, x0=.38185044), .72366732),
          900: (.014354271, dict(eps=1., v=.014151142, x0=.014354271), .98584886)}

@pytest.mark.parametrize('i', golden)
def test_min_snr_and_p2_by_the_papers(i):
    snr, rows, p2 = golden[i]
    t = f64((i+1)/1000)
    assert abs(scaled_linear().snr(t).item()/snr-1)<1e-7
    for k,want in rows.items(): assert abs(min_snr()(Gaussian('scaled_linear', k), t).item()/want-1)<2e-7, k
    assert abs(diffnb.weights.p2()(Gaussian('scaled_linear', 'eps'), t).item()/p2-1)<1e-7

@settings(max_examples=100, deadline=None)
@given(t=st.floats(1e-6, 1-1e-6), g=st.floats(.1, 100), k=st.floats(.1, 10))
def test_the_papers_table(t, g, k):
    "Each weighting in each row, as published: the table of weights for eps, v and x0."
    u = f64(t)
    R = SD['v'].schedule.snr(u)
    table = {snr(): (1, R/(R+1), R), soft_min_snr(g): (g/(R+g), R*g/((R+g)*(R+1)), R*g/(R+g)),
             p2(k, g/50): (1/(k+R)**(g/50), R/((R+1)*(k+R)**(g/50)), R/(k+R)**(g/50)),
             edm_weight(k): (1+1/(R*k**2), (R+1/k**2)/(R+1), R+1/k**2)}
    for w,row in table.items():
        for pred,want in zip(('eps', 'v', 'x0'), row):
            assert torch.allclose(w(SD[pred], u), torch.as_tensor(want, dtype=torch.float64), rtol=1e-9, atol=0), pred
    sigma = 80*u
    assert torch.allclose(soft_min_snr(1/k**2)(ED_X0, u), 1/(sigma**2+k**2), rtol=1e-9, atol=0) # k-diffusion's form
    assert torch.allclose(edm_weight(k)(ED_X0, u), (sigma**2+k**2)/(sigma*k)**2, rtol=1e-9, atol=0)
    assert torch.allclose(edm_weight()(ED, u), f64(1.), rtol=1e-9, atol=0)
    assert torch.allclose(snr()(FLOW, u), (1-u)**2, rtol=1e-9, atol=0) # MSE_v = MSE_eps/(1-t)^2, so MSE_eps is (1-t)^2 MSE_v

def test_weights_of_sd3(training):
    u, flow = torch.linspace(.01, .99, 99, dtype=torch.float64), Gaussian(straight(), 'flow')
    for f in (sigma_sqrt, cosmap):
        want = training.compute_loss_weighting_for_sd3(f.__name__, u)
        assert torch.allclose(f()(flow, u), want.double(), rtol=1e-6, atol=0) # theirs is float32 in part

def test_flow_min_snr_reads_time_the_right_way():
    "t = 1 is noise: SNR 9 at 0.25 and 1 at 0.5. (One library has it the other way round, with t = 1 as data.)"
    assert torch.allclose(straight().snr(f64(.25, .5)), f64(9., 1.))
    assert torch.allclose(min_snr(100.)(Gaussian(straight(), 'x0'), f64(.25, .5)), f64(9., 1.))

def test_bad_parameters_of_weights():
    for bad in (0., -1., math.inf, math.nan):
        for f,k in ((min_snr, 'gamma'), (soft_min_snr, 'gamma'), (p2, 'gamma'), (p2, 'k'), (edm_weight, 'sd')):
            with pytest.raises(ValueError, match=k): f(**{k: bad})
    with pytest.raises(ValueError, match='did you mean'): learned('unifrom')

# --- a learned weight ---
def fitted(pred, data, base='uniform', steps=150):
    "A learned weight for a network that always gives 0, and its process."
    w = learned(base)
    p = Gaussian('cosine', pred, weight=w)
    opt = torch.optim.Adam(w.parameters())
    for i in range(steps):
        for g in opt.param_groups: g['lr'] = .006*(1-i/steps)
        rng = Rng(6, step=i)
        loss = p.loss(lambda x, net_t: 0*x, data, rng.at('times').uniform(len(data)), rng=rng)
        opt.zero_grad(); mean_loss(loss).backward(); opt.step()
    return w, p

def test_a_learned_weight_starts_as_its_base():
    x0, t = Rng(1).normal(6, 4), Rng(2).uniform(6)
    for base in ('uniform', 'min_snr', 'edm_weight'):
        plain, ours = (Gaussian('cosine', 'v', weight=create(k, kind='weight', **kw)) for k,kw in ((base, {}), ('learned', dict(base=base))))
        a,b = (p.loss(lambda x, net_t: x, x0, t, rng=Rng(3)).value for p in (plain, ours))
        assert torch.equal(a, b)

@pytest.mark.parametrize('base', ['uniform', 'min_snr'])
def test_a_learned_weight_learns_the_expected_error(base):
    "exp(u) becomes E[w err^2 | t], so that each time costs the same; for v and a network that gives 0 that is w (sigma^2 var + alpha^2)."
    data = .3*Rng(5).normal(1024, 1)
    w, p = fitted('v', data, base)
    t = torch.linspace(.1, .9, 17, dtype=torch.float64)
    alpha,sigma = p.schedule(t)
    want = (create(base, kind='weight')(p, t)*(.09*sigma**2+alpha**2)).log()
    got = w.added(p, t)
    assert got.dtype==torch.float64 and (got-want).abs().max()<.25
    cost = torch.exp(want-got)
    assert (cost-1).abs().max()<.3 and want.max()-want.min()>1.5 # even now, and not before

def test_a_learned_weight_is_trained_saved_and_averaged_like_any_module():
    w, p = fitted('v', .3*Rng(5).normal(64, 1), steps=20)
    other = learned()
    other.load_state_dict(w.state_dict())
    t = torch.linspace(0, 1, 5, dtype=torch.float64)
    assert torch.equal(other(p, t), w(p, t)) and not torch.equal(learned()(p, t), w(p, t))
    assert [k for k,_ in w.named_parameters()]==['out.weight']
    assert torch.equal(learned().freq, w.freq) # the features are drawn from a key, not from global state

def test_the_network_is_weighted_by_what_was_learned():
    "Its gradient is that of the plain error times exp(-u)."
    w, p = fitted('v', .3*Rng(5).normal(64, 1), steps=20)
    x0, t = Rng(1).normal(6, 4), Rng(2).uniform(6)
    raw = torch.zeros(6, 4, requires_grad=True)
    grads = []
    for q in (p, Gaussian('cosine', 'v')):
        q.loss(lambda x, net_t: raw, x0, t, rng=Rng(3)).value.sum().backward()
        grads.append(raw.grad); raw.grad = None
    assert torch.allclose(grads[0], grads[1]*(-w.added(p, t))[:,None].exp().float(), rtol=1e-5)

@settings(max_examples=100, deadline=None)
@given(t=st.floats(1e-6, 1-1e-6), gamma=st.floats(.1, 100))
def test_closed_forms(t, gamma):
    u, w = f64(t), min_snr(gamma)
    snr = SD['v'].schedule.snr(u)
    m = snr.clamp(max=gamma)
    for k,want in dict(eps=m/snr, v=m/(snr+1), x0=m).items():
        assert torch.allclose(w(SD[k], u), want, rtol=1e-9, atol=0)
    flow_snr = ((1-u)/u)**2
    assert torch.allclose(w(FLOW, u), u**2*flow_snr.clamp(max=gamma), rtol=1e-9, atol=0)
    assert torch.allclose(weigh(FLOW, u, lambda r: (1+r.sqrt())**2), f64(1.), rtol=1e-9)  # plain flow loss
    s, sd = 80*u, .5
    lam = lambda r: (1/r+sd**2)/(sd**2/r)
    assert torch.allclose(weigh(ED, u, lam), f64(1.), rtol=1e-9)
    assert torch.allclose(lam(s**-2), (s**2+sd**2)/(s*sd)**2, rtol=1e-9)

def test_limits():
    ends = f64(0., 1.)
    for k,want in dict(v=(0., 0.), x0=(5., 0.), flow=(0., 0.)).items():
        assert torch.allclose(min_snr()(Gaussian(zero_snr(), k), ends), f64(*want), rtol=0, atol=1e-15), k
    assert torch.allclose(min_snr()(Gaussian(straight(), 'flow'), ends), f64(0., 0.), rtol=0, atol=1e-15)
    eps = Gaussian('scaled_linear', 'eps')
    assert torch.allclose(min_snr()(eps, ends), f64(0., 1.), rtol=0, atol=1e-15)
    near_zero = Gaussian(linear_beta(20, .3, 1-1e-12), 'eps') # almost no signal: the weight of eps tends to 1
    assert abs(min_snr()(near_zero, 1.).item()-1)<1e-9
    for bad in (0., -1., math.nan):
        with pytest.raises(ValueError, match='gamma'): min_snr(bad)

@pytest.fixture(scope='module')
def training():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return pytest.importorskip('diffusers.training_utils')

def test_snr_of_diffusers(training):
    from diffusers import DDPMScheduler
    ref = DDPMScheduler(beta_schedule='scaled_linear', beta_start=.00085, beta_end=.012)
    i = torch.tensor([0, 100, 500, 900, 999])
    want = training.compute_snr(ref, i).double()
    got = snr()(Gaussian('scaled_linear', 'x0'), (i+1).double()/1000)
    assert torch.allclose(got, want, rtol=2e-4) # theirs is float32

# --- times ---
def unmode(t):
    "The u of `mode`'s t, by looking it up."
    u = np.linspace(0, 1, 20001)
    return torch.from_numpy(np.interp(t, (1-u-1.29*(np.cos(np.pi*u/2)**2-1+u))[::-1], u[::-1]))

class steps:
    "A density of steps: each from the one before to its end, with a height."
    def __init__(self, *parts):
        self.x = np.array([0., *(x for x,_ in parts)])
        mass = np.diff(self.x)*[h for _,h in parts]
        self.F = np.array([0., *mass.cumsum()/mass.sum()])
    def cdf(self, t): return np.interp(t, self.x, self.F)

laws = dict(uniform_times=(uniform_times(), lambda t: t, stats.uniform()),
            stratified=(stratified(), lambda t: t, stats.uniform()),
            logit_normal=(logit_normal(.5, .8), torch.logit, stats.norm(.5, .8)),
            log_normal=(log_normal(), lambda t: (80*t).log(), stats.norm(-1.2, 1.2)),
            mode=(mode(), lambda t: 1-unmode(t), stats.uniform()), shifted_times=(shifted_times(), lambda t: shift_time(t, 1/3), stats.uniform()),
            biased=(biased(.2, .5, 4.), lambda t: t, steps((.2, 1.), (.5, 4.), (1., 1.))),
            rare=(biased(.4, 1., .1), lambda t: t, steps((.4, 1.), (1., .1))),
            earlier=(earlier(), lambda t: t, steps((.25, 2.), (1., 1.))), later=(later(.5, 3.), lambda t: t, steps((.5, 1.), (1., 3.))))

@pytest.mark.parametrize('name', laws)
def test_laws(name):
    f, to, law = laws[name]
    # 40 batches, so that a stratified one does not pass for being even
    x = torch.cat([to(f(Rng(3, step=i), 500)) for i in range(40)])
    p = stats.kstest(x, law.cdf).pvalue
    assert p>.01
    assert stats.kstest(x*1.05, law.cdf).pvalue<1e-3 # the test can fail
    one = torch.stack([to(f(Rng(3, step=i), 8))[5] for i in range(600)]) # a single sample over the steps
    assert stats.kstest(one, law.cdf).pvalue>.01

@pytest.mark.parametrize('name', sorted(made('times')))
@pytest.mark.parametrize('n', [1, 2, 65])
def test_every_times(name, n):
    f, rng = create(name, kind='times'), Rng(5, 'times', 2).of(range(100, 100+n))
    t = f(rng, n)
    assert t.dtype==torch.float64 and t.shape==(n,) and (t>0).all() and (t<1).all()
    assert torch.equal(t, f(rng, n))
    assert not torch.equal(t, f(rng.at(step=3), n))
    assert torch.equal(f(rng.of(range(99+n, 99, -1)), n), t.flip(0)) # a time belongs to its sample
    snapped = scaled_linear().snap(t)
    assert ((snapped*1000).round()>=1).all() and (snapped<=1).all()
    with pytest.raises(ValueError, match='bound'): f(rng, n+1)

@pytest.mark.parametrize('name', sorted(set(made('times'))-{'stratified', 'jittered'})) # theirs are strata of the whole batch
def test_a_time_does_not_depend_on_the_batch(name):
    f, rng = create(name, kind='times'), Rng(5)
    assert torch.equal(f(rng.of([7, 3, 90]), 3)[1:], f(rng.of([3, 90]), 2))

@pytest.mark.parametrize('law', ['stratified', 'jittered'])
@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 300), seed=st.integers(0, 1000), data=st.data())
def test_one_time_in_each_stratum(law, n, seed, data):
    idx = data.draw(st.lists(st.integers(0, 2**40), min_size=n, max_size=n, unique=True))
    rng = Rng(seed, step=seed)
    f = create(law, kind='times')
    t = f(rng.of(idx), n)
    assert sorted((t*n).floor().long().tolist())==list(range(n))
    off = (t*n)%1
    assert (off-off[0]).abs().max()<1e-9 if law=='stratified' else len(off.unique())==n # one offset for all, or one each
    order = data.draw(st.permutations(range(n)))
    assert torch.equal(f(rng.of([idx[i] for i in order]), n), t[list(order)])

def test_extremes_stay_inside():
    rng = Rng(0)
    for f in (logit_normal(1e4, 1.), logit_normal(-1e4, 1.), log_normal(50., 1.), log_normal(-200., 1.)):
        t = f(rng, 50)
        assert (t>0).all() and (t<1).all()

def test_a_noise_level_is_the_same_on_every_schedule():
    a,b = (create(k, kind='schedule').ksigma(log_normal(0., .1, k)(Rng(0), 5)) for k in ('scaled_linear', 'edm'))
    assert torch.allclose(a, b, rtol=1e-9)

def test_sd3_densities_of_diffusers(training):
    def ref(scheme, **kw): return training.compute_density_for_timestep_sampling(scheme, 20000, generator=torch.Generator().manual_seed(0), **kw).numpy()
    for theirs, ours, other in [(ref('logit_normal', logit_mean=.3, logit_std=1.1), logit_normal(.3, 1.1), logit_normal(.4, 1.1)),
                                (ref('mode', mode_scale=1.29), mode(), mode(1.1))]:
        assert stats.ks_2samp(theirs, ours(Rng(1), 20000).numpy()).pvalue>.01
        assert stats.ks_2samp(theirs, other(Rng(1), 20000).numpy()).pvalue<.01

def test_bias_by_index_as_in_training_scripts():
    "On a table: each favoured index `multiplier` times as often, the portion of T counted as the scripts count it."
    for f,lo,hi in ((earlier(.25, 3.), 0, 250), (later(.25, 3.), 750, 1000), (biased(.3, .6, 3.), 300, 600)):
        i = (scaled_linear().snap(torch.cat([f(Rng(2, step=k), 50000) for k in range(4)]))*1000-1).round().long()
        count = i.bincount(minlength=1000).double()
        want = torch.ones(1000, dtype=torch.float64); want[lo:hi] *= 3
        want = want/want.sum()*len(i)
        z = (count-want)/want.sqrt()
        assert z.abs().max()<5 and abs((z**2).mean()-1)<.2 # counts are Poisson

def test_bad_parameters_of_times():
    for bad in (-1., 1.76, math.nan):
        with pytest.raises(ValueError, match='scale'): mode(bad)
    for bad in (dict(start=.5, end=.5), dict(start=-.1), dict(end=1.1), dict(multiplier=0.), dict(multiplier=math.inf), dict(start=math.nan)):
        with pytest.raises(ValueError, match='start < end'): biased(**bad)
    with pytest.raises(ValueError, match='start < end'): earlier(0.)
    with pytest.raises(ValueError, match='shift'): shifted_times(-1.)
    with pytest.raises(ValueError, match='did you mean'): shifted_times(3., 'unifrom_times')

def test_a_stratified_base_stays_stratified():
    t = shift_time(shifted_times(3., 'stratified')(Rng(0), 64), 1/3)
    assert sorted((t*64).floor().long().tolist())==list(range(64))

def test_times_and_grid_are_shifted_alike():
    "What is trained most is where the sampler's steps are: the quantiles of the shifted times are the shifted grid."
    from diffnb.grids import shifted
    t = shifted_times(3., 'stratified')(Rng(0), 8000).sort().values
    grid = shifted(3.)(Gaussian('straight', 'flow'), 8).t
    assert torch.allclose(t[[1000*k for k in range(1, 8)]], grid[1:-1].flip(0), atol=1e-3)
