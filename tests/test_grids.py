"Grids: what they promise for every process, and the arrays of diffusers."
import math, warnings
from fractions import Fraction
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from scipy import integrate, special, stats
import diffnb.grids
from diffnb.core import create
from diffnb.grids import (Grid, beta, edm_grid, exponential, gridded, karras, lcm_grid, leading, linspace, shift_time, shifted,
                          shifted_by_tokens, trailing, uniform, until)
from diffnb.process.gaussian import Gaussian
from diffnb.schedules import cosine, edm, linear_beta, scaled_linear, straight, survival, zero_snr

names = sorted(k for k,f in vars(diffnb.grids).items() if getattr(f, 'kind', None)=='grid')

class Tokens:
    "What a grid needs of a masked process."
    def __init__(self, schedule): self.schedule = schedule
    def net_t(self, t): return torch.as_tensor(t, dtype=torch.float64)

sd, flow, ed = Gaussian('scaled_linear', 'eps'), Gaussian('straight', 'flow'), Gaussian('edm', 'edm')
processes = dict(sd=sd, linear=Gaussian('linear_beta', 'eps'), small=Gaussian(linear_beta(10), 'x0'), flow=flow, edm=ed,
                 cosine=Gaussian(cosine(), 'v'), zero=Gaussian(zero_snr(), 'v'), tokens=Tokens(survival('straight')),
                 token_table=Tokens(survival(cosine(50))))

def check(g, process, n):
    "Everything a grid promises."
    assert isinstance(g, Grid)
    for o in g: assert o.dtype==torch.float64 and o.shape==(n+1,)
    assert g.t[0]<=1 and g.t[-1]==0 and (g.t[1:]<g.t[:-1]).all()
    assert g.net_t[:-1].isfinite().all() and (g.net_t[1:-1]<=g.net_t[:-2]).all() and g.net_t[-1].isnan()
    if process.schedule.T and hasattr(process, 'pred'): assert -1<=g.net_t[n-1] and g.net_t[0]<=process.schedule.T-1+1e-9

def finite_levels(process):
    "Can a Karras grid be made without being told the levels?"
    return process.schedule.T is not None and process.schedule.ksigma(1.)<math.inf

@pytest.mark.parametrize('name', names)
@pytest.mark.parametrize('which', processes)
@pytest.mark.parametrize('n', [1, 2, 3, 4, 9])
def test_every_grid_on_every_process(name, which, n):
    p, grid = processes[which], create(name, kind='grid')
    by_level = name in ('karras', 'exponential', 'beta')
    needs_levels = by_level and not finite_levels(p) or name=='edm_grid' and p.schedule.ksigma(1.)==math.inf
    if needs_levels:
        with pytest.raises(ValueError, match='smin'): grid(p, n)
        grid = create(name if by_level else 'karras', kind='grid', smin=.02, smax=5.)
    if name=='lcm_grid' and which=='small': grid = create(name, kind='grid', origin=10)
    if name=='leading' and which=='small' and n==9: assert p.schedule.T==10 # 8+1 is its last entry: still inside
    g = grid(p, n, 1024)
    check(g, p, n)
    again = grid(p, n, 1024)
    assert torch.equal(g.t, again.t) and torch.equal(g.net_t[:-1], again.net_t[:-1])

@pytest.mark.parametrize('name', sorted(set(names)-{'leading'}))
def test_as_many_steps_as_entries_and_no_more(name):
    p, grid = processes['small'], create(name, kind='grid', **({'origin': 10} if name=='lcm_grid' else {}))
    check(grid(p, 10, 64), p, 10)
    with pytest.raises(ValueError, match='10 entries'): grid(p, 11, 64)

@pytest.mark.parametrize('n,error', [(0, ValueError), (-3, ValueError), (2.5, TypeError), (None, TypeError)])
def test_bad_numbers_of_steps(n, error):
    for name in names:
        with pytest.raises(error): create(name, kind='grid')(sd, n, 64)

def test_bad_arguments():
    for bad in (0., -1., math.inf, math.nan):
        with pytest.raises(ValueError, match='shift'): shifted(bad)(flow, 4)
    with pytest.raises(ValueError, match='tokens'): shifted_by_tokens()(flow, 4)
    with pytest.raises(ValueError, match='above 0'): karras(rho=0.)
    for kw in (dict(smin=0.), dict(smin=-1.), dict(smin=5., smax=1.), dict(smax=15.), dict(smax=math.inf)):
        for f in (karras, exponential, beta):
            with pytest.raises(ValueError, match='give 0 < smin < smax'): f(**kw)(sd, 4)
    for kw in (dict(a=0.), dict(b=-1.), dict(a=math.nan)):
        with pytest.raises(ValueError, match='above 0'): beta(**kw)
    for bad in (0., -.1, 1.01, math.nan):
        with pytest.raises(ValueError, match='within'): uniform(bad)
    with pytest.raises(ValueError, match='fewer'): lcm_grid()(sd, 51)
    with pytest.raises(ValueError, match='fewer'): lcm_grid(11)(processes['small'], 3)
    for bad in (0., .002, .5, math.nan):
        with pytest.raises(ValueError, match='no end'): until(bad)(sd, 4)
    with pytest.raises(ValueError, match='no first entry'): until(base='uniform')(flow, 4)
    with pytest.raises(ValueError, match='another offset'): leading(-1)(sd, 4)
    with pytest.raises(ValueError, match='did you mean'): shifted(3., 'trialing')

def test_a_rule_that_breaks_its_word_is_refused():
    for rule in ([.5, .5], [.2, .7], [1.1, .5], [.5, 0.], [.5, -.1], [math.nan, .5]):
        with pytest.raises(ValueError, match='fall'): gridded(lambda p, n, k: torch.tensor(rule, dtype=torch.float64))(flow, 2)
    with pytest.raises(TypeError, match='float64'): gridded(lambda p, n, k: torch.tensor([.9, .5]))(flow, 2)
    with pytest.raises(TypeError, match='times'): gridded(lambda p, n, k: torch.tensor([.9], dtype=torch.float64))(flow, 2)

@settings(max_examples=25, deadline=None)
@given(T=st.integers(1, 1200), data=st.data())
def test_tables_of_any_length(T, data):
    p = Gaussian(linear_beta(T, 1e-4, .02), 'eps')
    n = data.draw(st.integers(1, T))
    for grid in (uniform(), trailing(), linspace(), leading(0), karras()):
        g = grid(p, n)
        check(g, p, n)
    for grid in (uniform(), trailing(), linspace(), leading(0)): # they visit entries only
        i = grid(p, n).net_t[:-1]
        assert (i-i.round()).abs().max()<1e-9

@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 300), shift=st.floats(1e-3, 1e3), rho=st.floats(.5, 50), lo=st.floats(1e-3, .5), hi=st.floats(.6, 70))
def test_continuous_schedules_at_any_setting(n, shift, rho, lo, hi):
    for p in (flow, ed, processes['cosine']):
        check(shifted(shift)(p, n), p, n)
        for f in (karras(rho, lo, hi), exponential(lo, hi), beta(.6, .6, lo, hi)):
            g = f(p, n)
            check(g, p, n)
            k = p.schedule.ksigma(g.t)
            assert abs(k[0]/hi-1)<1e-9 and (n==1 or abs(k[-2]/lo-1)<1e-9)

@settings(max_examples=50, deadline=None)
@given(a=st.floats(.01, 100), b=st.floats(.01, 100), t=st.floats(0, 1))
def test_shifts_multiply(a, b, t):
    t = torch.tensor(t, dtype=torch.float64)
    assert torch.allclose(shift_time(shift_time(t, a), b), shift_time(t, a*b), rtol=1e-9, atol=1e-12)

def test_the_ends_are_exact():
    for shift in [1/3, .1, .7, 1/7, 3., *(k/17 for k in range(1, 60))]: assert shifted(shift)(flow, 4).t[0]==1, shift
    for n in (1, 2, 10):
        g = karras()(sd, n)
        assert g.t[0]==1 and g.net_t[0]==999 and (n==1 or g.t[-2]==.001 and g.net_t[-2]==0)

# --- golden numbers ---
def test_karras_grids_of_the_papers():
    k10 = [14.614641, 9.102928, 5.478392, 3.168603, 1.749417, .914072, .446918, .201398, .08191, .029167, 0]
    np.testing.assert_allclose(sd.schedule.ksigma(karras()(sd, 10).t), k10, atol=1e-6)
    k18 = [80, 57.585985, 40.785574, 28.374585, 19.352453, 12.910082, 8.400935, 5.315195, 3.256822, 1.92334, 1.088171, .585348,
           .296442, .139516, .059947, .022935, .007528, .002, 0]
    np.testing.assert_allclose(ed.schedule.ksigma(edm_grid()(ed, 18).t), k18, atol=1e-6)

@pytest.mark.parametrize('tokens,shift', [(256, math.exp(.5)), (1024, 1.8776105793), (4096, 3.1581929097)])
def test_shift_by_tokens(tokens, shift):
    got = shifted_by_tokens()(flow, 7, tokens).t
    assert torch.allclose(got, shifted(shift)(flow, 7).t, rtol=0, atol=1e-9)
    with pytest.raises(AssertionError): np.testing.assert_allclose(got, shifted(1.01*shift)(flow, 7).t, atol=1e-9)

def test_four_steps_of_flux():
    np.testing.assert_allclose(shifted_by_tokens()(flow, 4, 4096).t, [1, .9045307667, .7595109169, .5128441015, 0], atol=1e-9)

def test_four_steps_of_lcm(): np.testing.assert_allclose(lcm_grid()(sd, 4).net_t[:-1], [999, 759, 499, 259], atol=1e-9)

@pytest.mark.parametrize('a,b', [(.6, .6), (.3, 2.), (1., 1.), (5., .5)])
def test_beta_levels_are_quantiles(a, b):
    "Where the levels are, the distribution function is even: by numerical integration of the density, not by its inverse."
    n, s = 11, sd.schedule
    k = s.ksigma(beta(a, b)(sd, n).t)[:-1]
    x = ((k-k[-1])/(k[0]-k[-1])).flip(0)
    for i in range(1, n-1): assert abs(stats.beta.cdf(x[i], a, b)-i/(n-1))<1e-7
    quad = integrate.quad(lambda u: u**(a-1)*(1-u)**(b-1), x[2].item(), x[5].item())[0]/special.beta(a, b)
    assert abs(quad-.3)<1e-6

def test_a_start_in_the_middle():
    g = uniform(.3)(sd, 7)
    check(g, sd, 7)
    assert g.t[0]==.3 and g.net_t[0].round()==299
    assert torch.equal(uniform(.5)(flow, 4).t, uniform()(flow, 8).t[4:])

@pytest.mark.parametrize('n', [1, 2, 20])
def test_until_ends_where_it_says(n):
    g, base = until()(sd, n), leading()(sd, n)
    assert torch.equal(g.t[:-1], base.t[:-1]) and torch.equal(g.net_t[:-1], base.net_t[:-1])
    assert g.t[-1]==.001 and abs(g.net_t[-1])<1e-9 # the network may be asked there
    assert until(.01, uniform())(flow, n).t[-1]==.01

# --- diffusers ---
@pytest.fixture(scope='module')
def diffusers():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return pytest.importorskip('diffusers')

betas = dict(beta_schedule='scaled_linear', beta_start=.00085, beta_end=.012, num_train_timesteps=1000)
Ns = [2, 3, 4, 7, 10, 16, 18, 25, 30, 48, 50, 64, 80, 100, 333, 999]

def half_even(num, den): return float(round(Fraction(num, den)))
exact = dict(leading=lambda T, n, more: [(T//(n+more))*k+1 for k in range(more, n+more)][::-1],
             trailing=lambda T, n, more: [half_even(T*(n-k), n)-1 for k in range(n)],
             linspace=lambda T, n, more: [half_even((T-1)*(n+more-1-k), n+more-1) for k in range(n)])
ties = dict(leading=lambda *a: [False]*a[1],
            trailing=lambda T, n, more: [2*T*(n-k)%(2*n)==n for k in range(n)],
            linspace=lambda T, n, more: [2*(T-1)*(n+more-1-k)%(2*(n+more-1))==n+more-1 for k in range(n)])

@pytest.mark.parametrize('solver,more', [('DDIM', 0), ('DPMSolverMultistep', 1), ('UniPCMultistep', 1)])
@pytest.mark.parametrize('spacing', exact)
def test_timesteps(diffusers, spacing, solver, more):
    s = getattr(diffusers, solver+'Scheduler')(**betas, timestep_spacing=spacing, steps_offset=1)
    grid = dict(leading=leading(1, spare=more), trailing=trailing(), linspace=linspace(spare=more))[spacing]
    for n in Ns[:-2] if more else Ns:
        s.set_timesteps(n)
        g = grid(sd, n)
        np.testing.assert_allclose(g.net_t[:-1], exact[spacing](1000, n, more), atol=1e-9, err_msg=f'{n} steps')
        off = g.net_t[:-1].round()-s.timesteps # at a tie, theirs goes where the rounding of a product falls
        assert (off.abs()<=torch.tensor(ties[spacing](1000, n, more))).all(), f'{n} steps: {off}'
        if more and not off.any(): np.testing.assert_allclose(sd.schedule.ksigma(g.t), s.sigmas, rtol=1e-4, atol=1e-5)

def test_euler_linspace_asks_between_entries(diffusers):
    s = diffusers.EulerDiscreteScheduler(**betas, timestep_spacing='linspace')
    for n in Ns:
        s.set_timesteps(n)
        g = linspace(entry=lambda i: i)(sd, n)
        np.testing.assert_allclose(g.net_t[:-1], s.timesteps, atol=2e-4) # theirs are float32
        np.testing.assert_allclose(sd.schedule.ksigma(g.t), s.sigmas, rtol=2e-5, atol=1e-5)

def test_euler_karras(diffusers):
    s = diffusers.EulerDiscreteScheduler(**betas, use_karras_sigmas=True)
    for n in Ns[:-2]:
        s.set_timesteps(n)
        g = karras()(sd, n)
        np.testing.assert_allclose(sd.schedule.ksigma(g.t), s.sigmas, rtol=2e-5, atol=1e-5)
        np.testing.assert_allclose(g.net_t[:-1], s.timesteps, atol=5e-3) # theirs: float32 logarithms of float32 sigmas

@pytest.mark.parametrize('kind,grid', [('exponential', exponential()), ('beta', beta())])
@pytest.mark.parametrize('solver', ['EulerDiscrete', 'DPMSolverMultistep', 'UniPCMultistep'])
def test_other_levels(diffusers, kind, grid, solver):
    s = getattr(diffusers, solver+'Scheduler')(**betas, **{f'use_{kind}_sigmas': True})
    for n in (2, 3, 10, 25, 50):
        s.set_timesteps(n)
        g = grid(sd, n)
        np.testing.assert_allclose(sd.schedule.ksigma(g.t), s.sigmas, rtol=5e-5, atol=1e-5)
        whole = 0 if solver=='EulerDiscrete' else 1 # the others cut the index off
        assert (g.net_t[:-1]-s.timesteps).abs().max()<whole+5e-3

def test_dpm_solver_rounds_the_index_of_karras(diffusers):
    s = diffusers.DPMSolverMultistepScheduler(**betas, use_karras_sigmas=True)
    for n in (2, 3, 10, 25, 50):
        s.set_timesteps(n)
        g = karras(entry=torch.round)(sd, n)
        np.testing.assert_allclose(sd.schedule.ksigma(g.t), s.sigmas, rtol=2e-5, atol=1e-5)
        assert torch.equal(g.net_t[:-1].round().long(), s.timesteps)

def test_flow_sigmas_of_dpm_solver(diffusers):
    for shift in (1., 3.):
        s = diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type='flow_prediction', flow_shift=shift)
        for n in (2, 10, 25):
            s.set_timesteps(n)
            np.testing.assert_allclose(shifted(shift, uniform(.999))(flow, n).t, s.sigmas, rtol=1e-5, atol=1e-6)

def test_lcm_timesteps(diffusers):
    s = diffusers.LCMScheduler(**betas)
    for n in (1, 2, 3, 4, 7, 8, 16, 33, 50):
        s.set_timesteps(n)
        np.testing.assert_allclose(lcm_grid()(sd, n).net_t[:-1], s.timesteps, atol=1e-9, err_msg=f'{n} steps')

def test_edm_sigmas(diffusers):
    s = diffusers.EDMEulerScheduler()
    for n in Ns:
        s.set_timesteps(n)
        g = edm_grid()(ed, n)
        np.testing.assert_allclose(ed.schedule.ksigma(g.t), s.sigmas, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(g.net_t[:-1], s.timesteps, atol=1e-5)

def test_flow_shift_once(diffusers):
    for n in (2, 4, 8, 28):
        given_ = np.linspace(1, 1/n, n)
        s = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.)
        s.set_timesteps(sigmas=given_)
        np.testing.assert_allclose(shifted(3.)(flow, n).t, s.sigmas, atol=1e-6)
        plain = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.)
        plain.set_timesteps(n)
        np.testing.assert_allclose(linspace()(flow, n).t, plain.sigmas, atol=1e-6)
        np.testing.assert_allclose(shifted(3., linspace())(flow, n).t[:-1], shift_time(plain.sigmas[:-1].double(), 3.), atol=1e-6)
    s = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.) # without sigmas it shifts its already shifted ends again
    s.set_timesteps(8)
    assert abs(s.sigmas[-2].item()-.0089)<1e-4 and abs(shifted(3., linspace())(flow, 8).t[-2].item()-.0029940)<1e-6
