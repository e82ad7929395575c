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
from diffnb.weights import log_normal, logit_normal, min_snr, stratified, uniform, uniform_times, weigh

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

# --- the rule ---
@pytest.mark.parametrize('process', list(pairs()))
@settings(max_examples=40, deadline=None)
@given(t=st.one_of(st.sampled_from([0., 1., 1e-12, 1-1e-12]), st.floats(0, 1)), which=st.sampled_from(sorted(x0_weights)))
def test_finite_and_not_negative_everywhere(process, t, which):
    w = weigh(process, t, x0_weights[which])
    assert w.dtype==torch.float64 and w.shape==() and w.isfinite() and w>=0
    w = min_snr()(process, t)
    assert w.isfinite() and w.float().isfinite() and 0<=w # a loss is float32

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
    assert abs(weigh(Gaussian('scaled_linear', 'eps'), t, x0_weights['p2']).item()/p2-1)<1e-7

@settings(max_examples=100, deadline=None)
@given(t=st.floats(1e-6, 1-1e-6), gamma=st.floats(.1, 100))
def test_closed_forms(t, gamma):
    u, w = f64(t), min_snr(gamma)
    snr = scaled_linear().snr(u)
    m = snr.clamp(max=gamma)
    for k,want in dict(eps=m/snr, v=m/(snr+1), x0=m).items():
        assert torch.allclose(w(Gaussian('scaled_linear', k), u), want, rtol=1e-9, atol=0)
    flow_snr = ((1-u)/u)**2
    assert torch.allclose(w(Gaussian('straight', 'flow'), u), u**2*flow_snr.clamp(max=gamma), rtol=1e-9, atol=0)
    assert torch.allclose(weigh(Gaussian('straight', 'flow'), u, lambda r: (1+r.sqrt())**2), f64(1.), rtol=1e-9)  # plain flow loss
    s, sd = 80*u, .5
    lam = lambda r: (1/r+sd**2)/(sd**2/r)
    assert torch.allclose(weigh(Gaussian('edm', 'edm'), u, lam), f64(1.), rtol=1e-9)
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

def test_snr_of_diffusers():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        training = pytest.importorskip('diffusers.training_utils')
        from diffusers import DDPMScheduler
    ref = DDPMScheduler(beta_schedule='scaled_linear', beta_start=.00085, beta_end=.012)
    i = torch.tensor([0, 100, 500, 900, 999])
    want = training.compute_snr(ref, i).double()
    got = weigh(Gaussian('scaled_linear', 'x0'), (i+1).double()/1000, lambda r: r)
    assert torch.allclose(got, want, rtol=2e-4) # theirs is float32

# --- times ---
laws = dict(uniform_times=(uniform_times(), lambda t: t, stats.uniform()),
            stratified=(stratified(), lambda t: t, stats.uniform()),
            logit_normal=(logit_normal(.5, .8), torch.logit, stats.norm(.5, .8)),
            log_normal=(log_normal(), lambda t: (80*t).log(), stats.norm(-1.2, 1.2)))

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

@pytest.mark.parametrize('name', sorted(set(made('times'))-{'stratified'}))
def test_a_time_does_not_depend_on_the_batch(name):
    f, rng = create(name, kind='times'), Rng(5)
    assert torch.equal(f(rng.of([7, 3, 90]), 3)[1:], f(rng.of([3, 90]), 2))

@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 300), seed=st.integers(0, 1000), data=st.data())
def test_one_time_in_each_stratum(n, seed, data):
    idx = data.draw(st.lists(st.integers(0, 2**40), min_size=n, max_size=n, unique=True))
    rng = Rng(seed, step=seed)
    t = stratified()(rng.of(idx), n)
    assert sorted((t*n).floor().long().tolist())==list(range(n))
    assert ((t*n)%1-(t[0]*n)%1).abs().max()<1e-9 # one offset for all
    order = data.draw(st.permutations(range(n)))
    assert torch.equal(stratified()(rng.of([idx[i] for i in order]), n), t[list(order)])

def test_extremes_stay_inside():
    rng = Rng(0)
    for f in (logit_normal(1e4, 1.), logit_normal(-1e4, 1.), log_normal(50., 1.), log_normal(-200., 1.)):
        t = f(rng, 50)
        assert (t>0).all() and (t<1).all()

def test_a_noise_level_is_the_same_on_every_schedule():
    a,b = (create(k, kind='schedule').ksigma(log_normal(0., .1, k)(Rng(0), 5)) for k in ('scaled_linear', 'edm'))
    assert torch.allclose(a, b, rtol=1e-9)

def test_sd3_density_of_diffusers():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        training = pytest.importorskip('diffusers.training_utils')
    g = torch.Generator().manual_seed(0)
    ref = training.compute_density_for_timestep_sampling('logit_normal', 20000, logit_mean=.3, logit_std=1.1, generator=g)
    ours = logit_normal(.3, 1.1)(Rng(1), 20000)
    assert stats.ks_2samp(ref.numpy(), ours.numpy()).pvalue>.01
    assert stats.ks_2samp(ref.numpy(), logit_normal(.4, 1.1)(Rng(1), 20000).numpy()).pvalue<.01
