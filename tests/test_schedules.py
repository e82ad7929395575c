"""Schedules: golden tables, diffusers' and the papers' own formulas, digits near the ends, and what `wide` promises.

Tolerances: golden numbers have ten digits; diffusers keeps its tables in float32; digits are compared with 50-digit arithmetic.
"""
import copy, math, warnings
import mpmath, numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from diffnb.core import create, presets
from diffnb.grids import karras, uniform
from diffnb.process.gaussian import Gaussian
from diffnb.schedules import (cosine, edm, exponential, linear_beta, log_sigma, scaled_linear, sigmoid, sigmoid_beta, straight, survival,
                              table, tabulated, zero_snr)

F64 = torch.float64
def f64(*o): return torch.tensor(o, dtype=F64)
ENTRIES = torch.tensor([0, 249, 499, 749, 999])

# --- golden numbers ---
GOLDEN = {'linear_beta': (linear_beta, .9999, .5240853738, .07858724288, .003350550439, 4.035829765e-05),
          'scaled_linear': (scaled_linear, .99915, .6754324137, .2776696505, .0566234916, .004660098513),
          'cosine': (lambda: cosine(1000), .9999587158, .8470121613, .4938435904, .1442721024, 2.428766907e-09),
          'sigmoid_beta': (sigmoid_beta, .9998507948, .9037446654, .3019310566, .005732198886, 3.968181991e-05),
          'zero_snr': (zero_snr, .99915, .6541890065, .2423591666, .03317148283, 0.)}

@pytest.mark.parametrize('name', GOLDEN)
def test_golden_tables(name):
    f, *want = GOLDEN[name]
    s = f()
    np.testing.assert_allclose(s.abar[ENTRIES], want, rtol=2e-10, atol=0)
    alpha,sigma = s((ENTRIES+1).double()/1000)
    np.testing.assert_allclose(alpha**2, want, rtol=2e-10, atol=0)
    np.testing.assert_allclose(sigma**2, 1-f64(*want), rtol=1e-6) # the first entries of 1-abar have few of the ten digits

def test_ends_of_stable_diffusion():
    np.testing.assert_allclose(scaled_linear().ksigma(f64(.001, 1.)), [.0291671582, 14.6146412], rtol=1e-8)

# --- diffusers ---
@pytest.fixture(scope='module')
def diffusers():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return pytest.importorskip('diffusers')

ORACLES = {'linear': linear_beta, 'scaled_linear': lambda: scaled_linear(1000, 1e-4, .02), 'squaredcos_cap_v2': lambda: cosine(1000), 'sigmoid': sigmoid_beta}

@pytest.mark.parametrize('zero', [False, True])
@pytest.mark.parametrize('name', ORACLES)
def test_tables_of_diffusers(diffusers, name, zero):
    s = diffusers.DDPMScheduler(beta_schedule=name, rescale_betas_zero_snr=zero)
    ours = zero_snr(ORACLES[name]()) if zero else ORACLES[name]()
    np.testing.assert_allclose(ours.abar.sqrt(), s.alphas_cumprod.sqrt(), rtol=2e-4, atol=2e-5) # a product of 1000 float32 factors
    with pytest.raises(AssertionError): np.testing.assert_allclose(1.001*ours.abar.sqrt(), s.alphas_cumprod.sqrt(), rtol=2e-4, atol=2e-5)
    assert (ours(1.)[0]==0)==zero

def test_exponential_of_diffusers(diffusers):
    from diffusers.schedulers.scheduling_ddim import betas_for_alpha_bar
    beta = betas_for_alpha_bar(1000, alpha_transform_type='exp')
    np.testing.assert_allclose((1-beta.double()).cumprod(0), exponential(1000).abar, rtol=1e-4)
    np.testing.assert_allclose(exponential()(torch.arange(1, 1001)/1000)[0]**2, exponential(1000).abar, rtol=1e-6) # a constant rate needs no cap

def test_noising_of_diffusers(diffusers):
    "x_t and the v target, as the schedulers that train make them."
    s = diffusers.DDPMScheduler(beta_schedule='scaled_linear', beta_start=.00085, beta_end=.012)
    g = torch.Generator().manual_seed(0)
    x0, eps, i = torch.randn(5, 3, 4, generator=g), torch.randn(5, 3, 4, generator=g), torch.tensor([0, 1, 250, 700, 999])
    p, t = Gaussian('scaled_linear', 'v'), (i+1).double()/1000
    assert torch.allclose(p.move(x0, eps, t), s.add_noise(x0, eps, i), atol=1e-5)
    a,b = p.coef(p.pred.target, t, x0)
    assert torch.allclose(a*x0+b*eps, s.get_velocity(x0, eps, i), atol=1e-5)

# --- the papers' own formulas ---
@settings(max_examples=50, deadline=None)
@given(t=st.floats(0, 1), start=st.floats(-8, 2), width=st.floats(.1, 9), tau=st.floats(.2, 3))
def test_sigmoid_of_chen(t, start, width, tau):
    def S(x): return 1/(1+mpmath.exp(-x))
    end = start+width
    with mpmath.workdps(400): # 1-want has to have digits at any t
        a, b, u = (mpmath.mpf(o) for o in (start, end, t))
        want = (S(b/tau)-S((u*(b-a)+a)/tau))/(S(b/tau)-S(a/tau))
        alpha,sigma = sigmoid(start=start, end=end, tau=tau)(t)
        assert abs(alpha.item()**2-want)<1e-13*want+1e-300 and abs(sigma.item()**2-(1-want))<1e-13*(1-want)+1e-300

def lost_digits(s, exact, t):
    "Relative error of both amplitudes, against 50 digits."
    with mpmath.workdps(50):
        abar = exact(mpmath.mpf(t))
        alpha,sigma = (o.item() for o in s(t))
        return max(abs(alpha/mpmath.sqrt(abar)-1), abs(sigma/mpmath.sqrt(1-abar)-1))

def cos2(u, s=mpmath.mpf('0.008')):
    f = lambda v: mpmath.cos((v+s)/(1+s)*mpmath.pi/2)**2
    return f(u)/f(mpmath.mpf(0))

EXACT = {'cosine': (cosine(s=.008), lambda u: cos2(u, mpmath.mpf(.008))), 'exponential': (exponential(), lambda u: mpmath.exp(-12*u)),
         'sigmoid': (sigmoid(), lambda u: (1/(1+mpmath.exp(-3))-1/(1+mpmath.exp(3-6*u)))/(1/(1+mpmath.exp(-3))-1/(1+mpmath.exp(3)))),
         'zero_snr': (zero_snr(exponential()), lambda u: ((mpmath.exp(-6*u)-mpmath.exp(-6))/(1-mpmath.exp(-6)))**2)}

@pytest.mark.parametrize('name', EXACT)
@pytest.mark.parametrize('t', [1e-12, 1e-6, 1e-3, .1, .5, .9, .999])
def test_no_digit_is_lost(name, t): assert lost_digits(*EXACT[name], t)<1e-12

# --- from schedule to schedule ---
def test_every_variance_preserving_schedule_can_end_without_signal():
    n = 0
    for name in presets('schedule'):
        for kw in ({}, dict(T=7), dict(T=1000)):
            try: s = create(name, kind='schedule', **kw)
            except TypeError: continue
            if abs(sum(o**2 for o in s(.5))-1)>1e-9: # straight, edm, survival
                with pytest.raises(ValueError, match='preserve'): zero_snr(s)
                continue
            z, n = zero_snr(s), n+1
            assert z.T==s.T and z(1.)[0]==0 and z(1.)[1]==1 and z(0.)[0]==1 and z(0.)[1]==0
            first = 1/s.T if s.T else 1e-9
            assert abs(z(first)[0]-s(first)[0])<1e-8
            t = torch.arange(0, (s.T or 50)+1, dtype=F64)/(s.T or 50)
            a, b = s(t)[0], z(t)[0]
            a, b = (a[1:], b[1:]) if s.T else (a, b)
            assert torch.allclose((b-b[-1])/(b[0]-b[-1]), (a-a[-1])/(a[0]-a[-1]), atol=1e-9) # the same shape, stretched
            assert torch.allclose(zero_snr(z)(t)[0], z(t)[0], atol=1e-12) # once is enough
    assert n>10

def test_zero_snr_reads_between_entries_as_its_schedule_does():
    abar, t = scaled_linear(20).abar, f64(.325)
    a, b = (table('t', abar, space) for space in (log_sigma, create('linear_beta', kind='schedule').space))
    assert a(t)[0]!=b(t)[0] and zero_snr(a)(t)[0]!=zero_snr(b)(t)[0]

def test_tabulated_is_the_schedule_at_its_entries():
    for s in (sigmoid(), cosine(), exponential()):
        t = torch.arange(1, 500, dtype=F64)/500
        assert torch.allclose(tabulated(s, 500)(t)[0], s(t)[0], rtol=1e-9)
        assert 0<tabulated(s, 500)(1.)[0]

@pytest.mark.parametrize('make,message', [
    (lambda: sigmoid(start=1., end=1.), 'start < end'), (lambda: sigmoid(tau=0.), 'start < end'), (lambda: sigmoid(tau=1e-3), 'start < end'),
    (lambda: sigmoid(end=math.nan), 'start < end'), (lambda: exponential(rate=0.), 'rate'), (lambda: exponential(rate=math.nan), 'rate'),
    (lambda: exponential(rate=2000.), 'rate'), (lambda: table('t', f64()), 'decrease'), (lambda: table('t', f64(.5, .6)), 'decrease'),
    (lambda: table('t', f64(.5, -.1)), 'decrease'), (lambda: zero_snr(scaled_linear(1)), 'decrease'), (lambda: straight()(f64(.5, 1.1)), 'times'),
    (lambda: straight().wide(f64(-.1), torch.zeros(1)), 'times')])
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message): make()

def test_steep_sigmoids_stay_finite():
    for s in (sigmoid(tau=.005), sigmoid(start=-690., end=690.), sigmoid(start=600., end=601.), sigmoid(start=0., end=600.)):
        alpha,sigma = s(torch.linspace(0, 1, 101))
        assert alpha.isfinite().all() and sigma.isfinite().all() and (alpha.diff()<=1e-14).all() and (sigma.diff()>=-1e-14).all()
        assert alpha[0]==1 and sigma[0]==0 and alpha[-1]==0 and abs(sigma[-1]-1)<1e-14

# --- numbers for a single time, tensors for many ---
@pytest.mark.parametrize('name', sorted(presets('schedule')))
def test_wide(name):
    s, x, t = create(name, kind='schedule'), torch.zeros(4, 3, 2), f64(1e-9, .2, .7, 1.)
    each = s.wide(t, x)
    assert all(o.dtype==F64 and o.shape==(4, 1, 1) for o in each)
    assert torch.equal(torch.stack(each)[:,:,0,0], torch.stack(s(t)))
    for k in range(4):
        for one in (t[k], t[k:k+1], t[k].float()):
            got = s.wide(one, x)
            assert all(type(o) is float for o in got)
            assert np.allclose(got, [o.item() for o in s(one)], rtol=1e-14, atol=0)

def test_what_is_remembered_is_bounded_and_true():
    s = cosine()
    s.remember(torch.linspace(0, 1, 1001))
    assert len(s._known)==1001
    for k in range(40): s.remember(torch.rand(1000, generator=torch.Generator().manual_seed(k)))
    assert len(s._known)<20000
    for t,got in list(s._known.items())[::997]: assert np.allclose(got, [o.item() for o in s(t)], rtol=1e-14)
    other = copy.deepcopy(s)
    assert other._known is not s._known

@pytest.mark.parametrize('grid', [uniform(), karras()])
def test_a_grid_leaves_nothing_to_work_out(grid):
    "Along a trajectory the schedule is not evaluated again."
    p, calls = Gaussian(scaled_linear(), 'v'), []
    g = grid(p, 25)
    fn = p.schedule.fn
    object.__setattr__(p.schedule, 'fn', lambda t: calls.append(t) or fn(t))
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    for i in range(25):
        t, s = g.t[i:i+1], g.t[i+1:i+2]
        est = p.estimate(lambda x, net_t: x, x, t, net_t=g.net_t[i:i+1])
        p.step(x, est, t, s), p.move(est.x0, est.eps, s), p.eps_of(x, est.x0, t)
    assert calls==[]
    p.step(x, est, f64(.3333), f64(.1)) # times of no grid
    assert len(calls)==2

def test_survival_of_a_table_keeps_its_entries():
    s = survival(cosine(50))
    assert s.T==50 and torch.allclose(s((torch.arange(50)+1).double()/50)[0], cosine(50).abar.sqrt())
    assert edm()(1.)[1]==80.
