"""What must hold for every schedule, prediction, weighting and grid, drawn at random: at the ends above all.

A schedule is drawn by its preset with random arguments, or as a table of random betas; then with no signal left at the end, if it can be so.
"""
import inspect, math
import torch
from hypothesis import HealthCheck, assume, given, settings, strategies as st
from diffnb.core import Est, create, presets
from diffnb.process.gaussian import Gaussian, LearnedRange, predictions
from diffnb.rng import Rng
from diffnb.schedules import (betas_to_abar, cosine, edm, exponential, linear_beta, linear_sigma, log_sigma, scaled_linear, sigmoid,
                              sigmoid_beta, straight, table, zero_snr)
from diffnb.samplers import ancestral, ddim, sample

F64 = torch.float64
def f64(*o): return torch.tensor(o, dtype=F64)
quick = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])

# --- what is drawn ---
entries = st.one_of(st.none(), st.integers(2, 300))
random_table = st.builds(lambda b, space: table('random', betas_to_abar(f64(*b)), space),
                         st.lists(st.floats(1e-4, .9), min_size=2, max_size=40), st.sampled_from([linear_sigma, log_sigma]))
base_schedules = st.one_of(
    st.just(straight()), st.builds(edm, st.floats(1., 1000.)), st.builds(cosine, entries, st.floats(0., .05)),
    st.builds(lambda T, a, w, tau: sigmoid(T, a, a+w, tau), entries, st.floats(-6, 0), st.floats(1, 8), st.floats(.3, 2)),
    st.builds(exponential, entries, st.floats(.5, 30)), st.builds(linear_beta, st.integers(2, 300), st.floats(1e-5, .01), st.floats(.011, .5)),
    st.builds(scaled_linear, st.integers(2, 300), st.floats(1e-5, .01), st.floats(.011, .5)),
    st.builds(sigmoid_beta, st.integers(2, 300), st.floats(1e-5, .01), st.floats(.011, .5)), random_table)

def ended(s, end):
    "Perhaps with no signal left at the end; tables down to nothing are left out, as their own last entries underflow."
    a,_ = s(1.)
    vp = abs(sum(o**2 for o in s(.5))-1)<1e-9
    return zero_snr(s) if end and vp and a>1e-6 else s
schedules = st.builds(ended, base_schedules, st.booleans())

@st.composite
def processes(draw, learned=st.none()):
    s = draw(schedules)
    able = [k for k in predictions if not (k=='eps' and s(1.)[0]==0) and not (k=='edm' and s(1.)[0]!=1)]
    return Gaussian(s, draw(st.sampled_from(able)), learned=draw(learned))

times = st.one_of(st.sampled_from([0., 1., 1e-9, 1-1e-9]), st.floats(0, 1))
NO_LEVELS = {'karras', 'exponential', 'beta', 'edm_grid'} # want a finite range of noise levels
def free(f): return all(p.default is not p.empty for p in inspect.signature(f).parameters.values())
grids = st.sampled_from(sorted(k for k,f in presets('grid').items() if free(f) and k not in NO_LEVELS))

@st.composite
def trajectories(draw):
    "A process, a grid that suits it, its number of steps."
    p, n = draw(processes()), draw(st.integers(1, 12))
    try: g = create(draw(grids), kind='grid')(p, n, tokens=draw(st.integers(1, 10000)))
    except ValueError: assume(False) # more steps than entries
    return p, g

# --- schedules ---
@quick
@given(s=schedules, ts=st.lists(st.floats(0, 1), min_size=2, max_size=20))
def test_a_schedule_falls_from_data_to_noise(s, ts):
    t = f64(0., *sorted(set(ts)-{0., 1.}), 1.)
    alpha,sigma = s(t)
    assert alpha[0]==1 and sigma[0]==0 and alpha.isfinite().all() and sigma.isfinite().all() and (alpha>=0).all()
    # rounding: t counts in units of 2^-53, and so do both amplitudes
    assert (alpha.diff()<=4e-16*len(t)).all() and (sigma.diff()>=-1e-15*sigma.max()).all()
    far = t.diff()>1e-6
    assert (s.log_snr(t).diff()[far]<0).all()

@quick
@given(s=schedules, t=times)
def test_a_noise_level_leads_back_to_its_time(s, t):
    for t in (t, *((.4/s.T, 1-.4/s.T) if s.T else ())): # and within a table's first and last interval
        k = s.ksigma(t)
        back = s.t_of(k)
        assert 0<=back<=1
        assert abs(back-t)<1e-7 or abs(s.ksigma(back)/k-1)<1e-9
        if t in (0., 1.): assert back==t or abs(s.ksigma(back)/k-1)<1e-12

@quick
@given(s=schedules, ts=st.lists(times, min_size=2, max_size=5))
def test_numbers_are_the_tensors(s, ts):
    x, t = torch.zeros(len(ts), 2), f64(*ts)
    alpha,sigma = s.wide(t, x)
    for i,o in enumerate(ts):
        a,b = s.wide(f64(o), x)
        assert math.isclose(a, alpha[i].item(), rel_tol=1e-12, abs_tol=1e-300) and math.isclose(b, sigma[i].item(), rel_tol=1e-12, abs_tol=1e-300)

@quick
@given(s=schedules, t=st.floats(0, 1))
def test_snap_goes_up_to_an_entry(s, t):
    got = s.snap(f64(t))
    assert 0<=got<=1 and (got>0 or t==0)
    if s.T is None: assert got==t
    else: assert got>=t-1e-9 and got-t<1/s.T+1e-9 and abs(got*s.T-(got*s.T).round())<1e-9

# --- predictions ---
@quick
@given(p=processes(), t=times, seed=st.integers(0, 1000), x0=st.floats(-3, 3))
def test_the_exact_target_gives_back_what_it_was_made_of(p, t, seed, x0):
    x0, t = torch.full((3, 2), x0, dtype=F64), f64(t)
    x_t,eps = p.corrupt(x0, t, rng=Rng(seed))
    a,b = p.pred.target(*p.schedule.wide(t, x0))
    y = a*x0+b*eps
    est = p.estimate(lambda x, net_t: y, x_t, t)
    assert est.x0.isfinite().all() and est.eps.isfinite().all()
    alpha,sigma = p.schedule.wide(t, x0)
    # what divides by alpha or sigma loses as many digits as these have lost
    ex = 1e-13*(1+sigma/alpha if p.pred.name=='eps' else 1+abs(p.pred.x0(alpha, sigma)[1]))*(1+eps.abs().max())
    assert (est.x0-x0).abs().max()<=ex*10
    if sigma>0:
        ey = 1e-13*(1+max(map(abs, p.pred.eps(alpha, sigma))))*(4+x_t.abs().max())
        assert (est.eps-eps).abs().max()<=ey*10
    assert torch.allclose(p.move(est.x0, est.eps, t), x_t, rtol=1e-9, atol=1e-9*(1+float(x_t.abs().max())))

@quick
@given(p=processes(st.sampled_from([None, LearnedRange()])), ts=st.lists(times, min_size=2, max_size=4), seed=st.integers(0, 99),
       dtype=st.sampled_from([torch.float32, F64, torch.bfloat16]))
def test_a_time_for_each_sample_is_the_same_as_one_by_one(p, ts, seed, dtype):
    b = len(ts)
    x = Rng(seed).normal(b, 3, 2).to(dtype)
    k = 1 if p.learned is None else 2
    call = lambda x, net_t: torch.cat([.7*x.sin()]*k, 1)
    whole = p.estimate(call, x, f64(*ts))
    for i,t in enumerate(ts):
        one = p.estimate(call, x[i:i+1], f64(t))
        for u,v in ((getattr(o, k) for o in (one, whole)) for k in ('x0', 'eps', 'logvar')):
            assert (u is None)==(v is None)
            if u is not None:
                tol = {torch.float32: 1e-5, F64: 1e-12, torch.bfloat16: .05}[dtype]
                if max(map(abs, p.pred.eps(*p.schedule.wide(f64(t), x))))<1e6: assert torch.allclose(u, v[i:i+1], rtol=tol, atol=tol*float(v[i].abs().max()+1))

# --- steps ---
@quick
@given(p=processes(), pair=st.tuples(times, times), x0=st.floats(-2, 2), eps=st.floats(-3, 3), share=st.one_of(st.none(), st.floats(0, 1)))
def test_a_step_with_the_true_data_has_the_right_mean_and_spread(p, pair, x0, eps, share):
    "q(x_s|x_t,x0), put together with q(x_t|x0), is q(x_s|x0): in coefficients, without a draw."
    s, t = sorted(pair)
    assume(t-s>1e-6)
    x0, eps, t, s = f64(x0), f64(eps), f64(t), f64(s)
    (at,st_), (as_,ss) = p.schedule.wide(t, x0), p.schedule.wide(s, x0)
    cx, c0, var, ratio = p.posterior(t, s, x0)
    tol = 1e-9*(1+st_) # amplitudes of edm go up to 1000
    assert math.isclose(cx*at+c0, as_, rel_tol=0, abs_tol=tol)
    assert math.isclose((cx*st_)**2+var*ratio**2, ss**2, rel_tol=1e-7, abs_tol=tol)
    x_t = (at*x0+st_*eps).view(1, 1)
    got = p.step(x_t, Est(x0.view(1, 1), logvar=share), t, s, Rng(0))
    z = Rng(0).at('step').normal(1, 1, dtype=F64)
    want = cx*x_t+c0*x0+z*math.sqrt(var)*(ratio**(1-(share or 0.)) if ss>0 else 0.)
    assert torch.allclose(got, want, rtol=1e-9, atol=tol) and got.isfinite().all()

@quick
@given(p=processes(), s=times)
def test_from_pure_noise_a_step_is_finite(p, s):
    assume(s<1)
    x = Rng(1).normal(2, 3)*float(sum(o**2 for o in p.schedule(1.))**.5)
    est = p.estimate(lambda x, net_t: x/2, x, torch.ones(1))
    assert est.x0.isfinite().all() and est.eps.isfinite().all()
    for o in (p.step(x, est, torch.ones(1), f64(s)), p.move(est.x0, est.eps, f64(s)), p.eps_of(x, est.x0, torch.ones(1))): assert o.isfinite().all()

# --- trajectories ---
@quick
@given(pg=trajectories())
def test_a_grid_falls_and_the_network_is_asked_sensibly(pg):
    p, g = pg
    assert 0<g.t[0]<=1 and g.t[-1]==0 and (g.t.diff()<0).all() and g.net_t[:-1].isfinite().all() and (g.net_t[:-1].diff()<0).all()
    if p.schedule.T and not p.pred.log_time: assert (g.net_t[:-1]>=-1).all() and (g.net_t[:-1]<=p.schedule.T-1+1e-9).all()

@settings(quick, max_examples=25)
@given(pg=trajectories(), eta=st.sampled_from([None, 0., .5, 1.]), point=st.floats(-2, 2))
def test_a_network_that_knows_the_data_leads_there(pg, eta, point):
    "Data at one point: whatever the schedule, the row, the grid and the noise on the way."
    p, g = pg
    step = ancestral() if eta is None else ddim(eta)
    net = p.oracle(lambda x, alpha, sigma: torch.full_like(x, point))
    xs = list(sample(net, p, (3, 2), steps=len(g.t)-1, step=step, grid=lambda *a, **k: g, dtype=F64, rng=Rng(4)))
    assert len(xs)==len(g.t)-1 and all(x.isfinite().all() for x in xs)
    # eps has to be divided by alpha, which may be as small as 1e-5
    assert (xs[-1]-point).abs().max()<1e-6*(1+float(p.schedule(g.t[:1])[1]/p.schedule(g.t[:1])[0].clamp(min=1e-9)) if p.pred.name=='eps' else 1.)

# --- weights and loss ---
@quick
@given(p=processes(), t=times, name=st.sampled_from(sorted(presets('weight'))))
def test_a_weight_is_finite_and_the_same_loss_for_every_row(p, t, name):
    w = create(name, kind='weight')(p, t)
    assert w.isfinite() and w>=0 and w.float().isfinite()
    # stated for x0, it is the same in every row: w_row = w_x0 cy^2
    if name in ('uniform', 'learned') or not 1e-4<t<1-1e-4 or p.schedule(t)[0]<1e-4: return
    other = Gaussian(p.schedule, 'x0')
    cy = p.pred.x0(*p.schedule(t))[1]
    assert torch.allclose(w.detach(), create(name, kind='weight')(other, t).detach()*cy**2, rtol=1e-6)

@quick
@given(p=processes(st.sampled_from([None, LearnedRange(), LearnedRange(levels=None, steps=50)])), ts=st.lists(times, min_size=1, max_size=4),
       name=st.sampled_from(sorted(presets('weight'))))
def test_a_loss_and_its_gradient_are_finite(p, ts, name):
    p.weight = create(name, kind='weight')
    x0, k = Rng(0).normal(len(ts), 2, 3).clamp(-1, 1), 1 if p.learned is None else 2
    t = p.schedule.snap(f64(*ts).clamp(min=1e-6)) # training never asks at 0
    scale = torch.ones((), requires_grad=True)
    loss = p.loss(lambda x, net_t: torch.cat([scale*x.tanh()]*k, 1), x0, t, rng=Rng(1))
    assert loss.value.isfinite().all() and loss.value.shape==x0.shape and loss.value.dtype==torch.float32
    loss.value.sum().backward()
    assert scale.grad.isfinite()
