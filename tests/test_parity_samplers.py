"""Every sampler against diffusers, step by step: the same point, the same network, the same noise.

Teacher-forced: each step starts from their point, so that an error shows where it is made. Their schedules are in float32 and count in sigma/alpha where
ours has x itself; compared is what ours calls x, in units of its size (atol 1e-5). Their known faults are shown at the end, not copied.
"""
import functools, warnings
import pytest, torch
from diffnb.grids import shifted
from diffnb.hub.schedulers import sampling
from diffnb.process.gaussian import Gaussian
from diffnb.rng import Rng
from diffnb.samplers import ddim, dpmpp_2m, euler, sample
from diffnb.schedules import table

ds = pytest.importorskip('diffusers')
ds.utils.logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::FutureWarning')

STEPS = (4, 10, 25, 50)
SD = dict(beta_schedule='scaled_linear', beta_start=.00085, beta_end=.012)
RAW = dict(clip_sample=False)
PREDS = ('epsilon', 'sample', 'v_prediction')
SHAPE = (2, 3, 4, 4)

def net(x, t): return torch.sin(3*x)+.3*x+torch.as_tensor(t, dtype=x.dtype)/1000

class Theirs(Rng):
    "The noise that diffusers draws from a generator with this seed."
    def at(self, *a, **k): return self
    def normal(self, like): return torch.randn(like.shape, generator=torch.Generator().manual_seed(self.seed), dtype=like.dtype)

@functools.cache
def made(cls, kw):
    s = getattr(ds, cls)(**dict(kw))
    return s, dict(s.config, _class_name=cls)

def close(got, want): return torch.allclose(got, want, atol=1e-5*max(1., want.abs().max().item()), rtol=0)

def own_table(s, process):
    "The process with their float32 table: what is left are the steps."
    if not process.schedule.T: return process
    return Gaussian(table('theirs', s.alphas_cumprod), process.pred, learned=process.learned)

def both(cls, n, f=net, told=1e-3, **kw):
    "Walk along their trajectory; before each step of theirs, make ours from the same point. Yields (ours, theirs, i)."
    s, config = made(cls, tuple(kw.items()))
    s.set_timesteps(n)
    o = sampling(config)
    p = own_table(s, o.process)
    g, state = o.grid(p, n), {}
    noisy = 'generator' in s.step.__code__.co_varnames
    kspace = hasattr(s, 'scale_model_input') and cls.startswith(('Euler', 'Heun'))
    x = Rng(0).normal(*SHAPE)*(s.init_noise_sigma if kspace else 1.)
    k = 0
    for i in range(len(g.t)-1):
        (a, _), (b, _) = p.schedule.wide(g.t[i:i+1], x), p.schedule.wide(g.t[i+1:i+2], x)
        assert abs(g.net_t[i]-s.timesteps[k])<told, (i, g.net_t[i], s.timesteps[k])
        same = f if told<1 else lambda x, t: f(x, s.timesteps[k]) # where the index is rounded, one of them may be 1 lower
        got = o.step(p, same, x*a if kspace else x, g, i, state, Theirs(i))
        while k<len(s.timesteps) and calls_of(s, cls, k, i):
            t = s.timesteps[k]
            z = dict(generator=torch.Generator().manual_seed(i)) if noisy else {}
            x = s.step(f(s.scale_model_input(x, t), t), t, x, **z).prev_sample
            k += 1
        yield got, x*b if kspace else x, i
    assert k==len(s.timesteps), 'another number of steps'

def calls_of(s, cls, k, i):
    "Whether their call k still belongs to our step i: Heun, PNDM and Runge-Kutta call several times a step."
    if cls=='HeunDiscreteScheduler': return k<2*i+2
    if cls=='PNDMScheduler': return k<i+2 if s.config.skip_prk_steps else k<(4*i+4 if i<3 else i+10)
    return k<i+1

DDIM, EULER, HEUN, DPM, UNI = (f'{k}Scheduler' for k in ('DDIM', 'EulerDiscrete', 'HeunDiscrete', 'DPMSolverMultistep', 'UniPCMultistep'))
MAIN = {'ddpm': ('DDPMScheduler', RAW), 'ddpm large': ('DDPMScheduler', dict(RAW, variance_type='fixed_large', timestep_spacing='linspace')),
        'ddim': (DDIM, dict(RAW, set_alpha_to_one=False, steps_offset=1)), 'euler': (EULER, {}), 'heun': (HEUN, {}),
        'euler ancestral': ('EulerAncestralDiscreteScheduler', {}), 'dpm++': (DPM, {}), 'dpm++ karras': (DPM, dict(use_karras_sigmas=True)),
        'sde dpm++': (DPM, dict(algorithm_type='sde-dpmsolver++')), 'unipc': (UNI, {}), 'lcm': ('LCMScheduler', {})}
SPARSE = dict(timestep_spacing='leading', steps_offset=1)
TRAILING = dict(timestep_spacing='trailing')
MORE = {'ddpm trailing': ('DDPMScheduler', {**RAW, **TRAILING}), 'ddpm clipped': ('DDPMScheduler', dict(clip_sample_range=.5)),
        'ddim to one': (DDIM, RAW), 'ddim trailing': (DDIM, {**RAW, **TRAILING}), 'ddim clipped': (DDIM, {}),
        'ddim zero snr': (DDIM, dict(RAW, **TRAILING, rescale_betas_zero_snr=True)),
        'euler leading': (EULER, SPARSE), 'euler trailing': (EULER, TRAILING), 'euler karras': (EULER, dict(use_karras_sigmas=True)),
        'euler karras leading': (EULER, dict(use_karras_sigmas=True, **SPARSE)), 'euler exponential': (EULER, dict(use_exponential_sigmas=True)),
        'euler beta': (EULER, dict(use_beta_sigmas=True)), 'euler to first': (EULER, dict(final_sigmas_type='sigma_min', **SPARSE)),
        'euler zero snr': (EULER, dict(TRAILING, rescale_betas_zero_snr=True)),
        'euler ancestral trailing': ('EulerAncestralDiscreteScheduler', TRAILING), 'heun karras': (HEUN, dict(use_karras_sigmas=True)),
        'heun leading': (HEUN, SPARSE), 'dpm++ leading': (DPM, SPARSE), 'dpm++ trailing': (DPM, TRAILING),
        'dpm++ exponential': (DPM, dict(use_exponential_sigmas=True)), 'dpm++ beta': (DPM, dict(use_beta_sigmas=True)),
        'dpm++ first order': (DPM, dict(solver_order=1)), 'dpm++ zero snr': (DPM, dict(TRAILING, rescale_betas_zero_snr=True)),
        'sde dpm++ karras': (DPM, dict(algorithm_type='sde-dpmsolver++', use_karras_sigmas=True)),
        'sde dpm++ first order': (DPM, dict(algorithm_type='sde-dpmsolver++', solver_order=1)),
        'unipc leading': (UNI, SPARSE), 'unipc trailing': (UNI, TRAILING), 'unipc karras': (UNI, dict(use_karras_sigmas=True)),
        'lcm clipped': ('LCMScheduler', dict(clip_sample=True))}

def check(case, pred, n):
    cls, kw = case
    if cls.startswith('EulerAnc') and pred=='sample': return # not in theirs
    told = 1.01 if cls in (DPM, UNI) and any(k.endswith('_sigmas') for k in kw) else 5e-3
    for got, want, i in both(cls, n, told=told, prediction_type=pred, **{**SD, **kw}): assert close(got, want), (i, (got-want).abs().max())

@pytest.mark.parametrize('n', STEPS)
@pytest.mark.parametrize('pred', PREDS)
@pytest.mark.parametrize('name', MAIN)
def test_step(name, pred, n): check(MAIN[name], pred, n)

@pytest.mark.parametrize('name', MORE)
def test_step_otherwise(name): check(MORE[name], 'v_prediction', 10)

@pytest.mark.parametrize('n', STEPS)
@pytest.mark.parametrize('skip', (True, False))
def test_pndm(skip, n):
    if n==4 and not skip: return # theirs has no way with so few
    for got, want, i in both('PNDMScheduler', n, skip_prk_steps=skip, **{**SD, **SPARSE}): assert close(got, want), (i, (got-want).abs().max())

# --- flows and EDM ---
def flow(cls, n, sigmas=None, mu=None, **kw):
    "As `both`, for classes that walk on the straight schedule; their sigma is our t."
    s, config = made(cls, tuple(kw.items()))
    given = {k: v for k,v in dict(sigmas=sigmas, mu=mu).items() if v is not None}
    s.set_timesteps(*(() if sigmas else (n,)), **given)
    o = sampling(config)
    return s, o, o.grid(o.process, n, 1024)

def walk(s, o, g, f, calls=1, noisy=False):
    "Teacher-forced on a flow, where x is the same in both."
    x, state, k = Rng(0).normal(*SHAPE), {}, 0
    for i in range(len(g.t)-1):
        got = o.step(o.process, f, x, g, i, state, Theirs(i))
        while k<len(s.timesteps) and k<calls*(i+1):
            z = dict(generator=torch.Generator().manual_seed(i)) if noisy else {}
            x = s.step(f(x, s.timesteps[k]/1000), s.timesteps[k], x, **z).prev_sample
            k += 1
        assert close(got, x), (i, (got-x).abs().max())
    assert k==len(s.timesteps)

def velocity(x, t): return torch.sin(3*x)+.3*x # without t: some of theirs cut it off to a whole thousandth

@pytest.mark.parametrize('n', STEPS)
@pytest.mark.parametrize('stochastic', (False, True))
def test_flow_euler(n, stochastic):
    "FLUX's way: even sigmas, a shift by the number of tokens (1024: mu 0.63)."
    s, o, g = flow('FlowMatchEulerDiscreteScheduler', n, [1-i/n for i in range(n)], .63, shift=3., use_dynamic_shifting=True, stochastic_sampling=stochastic)
    assert torch.allclose(g.t, s.sigmas.double(), atol=1e-6) and torch.allclose(g.net_t[:-1]*1000, s.timesteps.double(), atol=1e-3)
    walk(s, o, g, net, noisy=stochastic)

@pytest.mark.parametrize('n', STEPS)
@pytest.mark.parametrize('cls,calls', [('FlowMatchEulerDiscreteScheduler', 1), ('FlowMatchHeunDiscreteScheduler', 2), ('FlowMatchLCMScheduler', 1)])
def test_flow_unshifted(cls, calls, n):
    "Without a shift nothing is shifted twice, and their own times are ours."
    s, o, g = flow(cls, n)
    sigmas = torch.cat([s.sigmas[:1], s.sigmas[1::2]]) if calls==2 else s.sigmas
    assert torch.allclose(g.t, sigmas.double(), atol=1e-6)
    walk(s, o, g, net, calls, noisy='LCM' in cls)

FLOW = dict(use_flow_sigmas=True, prediction_type='flow_prediction', flow_shift=3.)
@pytest.mark.parametrize('n', STEPS)
@pytest.mark.parametrize('cls,kw', [(DPM, {}), (DPM, dict(algorithm_type='sde-dpmsolver++')), (UNI, {})])
def test_flow_solvers(cls, kw, n):
    s, o, g = flow(cls, n, **FLOW, **kw)
    assert torch.allclose(g.t, s.sigmas.double(), atol=2e-6)
    if cls==UNI: g.t[0] -= 1e-6 # where theirs begins, to have a finite ln(alpha/sigma)
    walk(s, o, g, velocity, noisy=bool(kw))

@pytest.mark.parametrize('n', STEPS)
@pytest.mark.parametrize('cls,kw', [('EDMEulerScheduler', {}), ('EDMEulerScheduler', dict(sigma_schedule='exponential')), ('EDMDPMSolverMultistepScheduler', {}),
                                    ('EDMDPMSolverMultistepScheduler', dict(algorithm_type='sde-dpmsolver++'))])
def test_edm(cls, kw, n):
    "EDM's preconditioning: what the network sees, what it is told, and each step."
    s, config = made(cls, tuple(kw.items()))
    s.set_timesteps(n)
    o = sampling(config)
    g, x, state = o.grid(o.process, n), Rng(0).normal(*SHAPE)*s.init_noise_sigma, {}
    assert torch.allclose(o.process.schedule.ksigma(g.t), s.sigmas.double(), atol=1e-5, rtol=1e-5)
    assert torch.allclose(g.net_t[:-1], s.timesteps.double(), atol=1e-5)
    assert abs(o.process.prior((1, 1), Rng(0)).item()/Rng(0).at('prior').normal(1, 1).item()-s.init_noise_sigma)<1e-4
    for i,t in enumerate(s.timesteps):
        got = o.step(o.process, net, x, g, i, state, Theirs(i))
        z = dict(generator=torch.Generator().manual_seed(i)) if kw.get('algorithm_type') else {}
        x = s.step(net(s.scale_model_input(x, t), t), t, x, **z).prev_sample
        assert close(got, x), (i, (got-x).abs().max())

# --- what theirs does wrong: shown, not copied ---
def test_fault_double_shift():
    "A static shift is applied to end points that are shifted already (their issue 13243)."
    s, o, g = flow('FlowMatchEulerDiscreteScheduler', 8, shift=3.)
    assert abs(s.sigmas[-2]-.0089)<1e-4 and abs(g.t[-2]-3*.001/(1+2*.001))<1e-9
    assert torch.allclose(shifted(3., 'uniform')(o.process, 8).t[:-1], 3*(u:=torch.arange(8, 0, -1, dtype=torch.float64)/8)/(1+2*u))

def test_fault_previous_timestep():
    "DDIM steps back by T//N, whatever the grid: with 7 trailing steps it believes to arrive at 857 and goes on from 856 (their issue 11347)."
    n, errors = 7, []
    for got, want, i in both(DDIM, n, told=1., **RAW, **SD, **TRAILING): errors.append((got-want).abs().max().item())
    assert max(errors)>1e-3
    s, config = made(DDIM, tuple({**RAW, **SD, **TRAILING}.items()))
    o = sampling(config)
    data = torch.full(SHAPE, .5)                      # perfect network of data at one point: every step must stay on the line
    eps, g = Rng(3).normal(*SHAPE), o.grid(o.process, n)
    s.set_timesteps(n)
    x = y = o.process.move(data, eps, g.t[:1])
    for i,t in enumerate(s.timesteps):
        y = o.step(o.process, lambda x, t: eps, y, g, i, {}, Rng(0))
        x = s.step((x-s.alphas_cumprod[t]**.5*data)/(1-s.alphas_cumprod[t])**.5, t, x).prev_sample
        if i<n-1:
            on_line = o.process.move(data, eps, g.t[i+1:i+2])
            assert torch.allclose(y, on_line, atol=1e-5)
            if i==1: assert (x-on_line).abs().max()>1e-3

def test_fault_one_step():
    "One step: not a number with a terminal shift (their issue 14411), an error in PNDM, and even spacing begins beside the data. Ours begins at the noise."
    s, _ = made('FlowMatchEulerDiscreteScheduler', (('shift_terminal', .1),))
    s.set_timesteps(1)
    assert s.sigmas[0].isnan()
    with pytest.raises(ValueError): made('PNDMScheduler', ())[0].set_timesteps(1)
    for cls in ('PNDMScheduler', EULER, HEUN, 'DDPMScheduler'):
        s, config = made(cls, tuple({**SD, 'timestep_spacing': 'linspace', **({'skip_prk_steps': True} if cls[0]=='P' else {})}.items()))
        s.set_timesteps(1)
        o = sampling(config)
        assert s.timesteps[0]==0 and o.grid(o.process, 1).t[0]==1.
        x, = sample(lambda x, t, **c: x/2, o.process, (2, 3), 1, o.step, o.grid)
        assert x.isfinite().all()

def test_fault_useless_step():
    "Leading steps without an offset end with a step from entry 0 to entry 0, which asks the network and moves nothing; ours leaves it out."
    kw = dict(RAW, **SD, set_alpha_to_one=False)
    s, config = made(DDIM, tuple(kw.items()))
    s.set_timesteps(10)
    x = Rng(0).normal(*SHAPE)
    assert s.timesteps[-1]==0 and torch.allclose(s.step(net(x, 0), 0, x).prev_sample, x, atol=1e-6)
    o = sampling(config)
    g = o.grid(o.process, 10)
    assert len(g.t)==10 and g.t[-1]==.001 # nine steps

def test_fault_mean_of_velocities():
    "PNDM averages v across times and reads the mean as if it belonged to one; the same knowledge as eps gives another picture there, and the same here."
    out = {}
    for pred in ('epsilon', 'v_prediction'):
        s, config = made('PNDMScheduler', tuple(dict(skip_prk_steps=True, prediction_type=pred, **SD, **SPARSE).items()))
        s.set_timesteps(10)
        o = sampling(config)
        def f(x, t):
            t = torch.as_tensor(t).long()
            a, b = s.alphas_cumprod[t]**.5, (1-s.alphas_cumprod[t])**.5
            eps = net(x, t)
            return eps if pred=='epsilon' else (eps-b*x)/a # v = (eps-sigma x)/alpha
        x = Rng(0).normal(*SHAPE)
        *_, ours = sample(lambda x, t, **c: f(x, t.round()), o.process, SHAPE, 10, o.step, o.grid, x=x)
        for t in s.timesteps: x = s.step(f(x, t), t, x).prev_sample
        out[pred] = x, ours
    theirs, ours = ((out['epsilon'][j]-out['v_prediction'][j]).abs().max()/out['epsilon'][j].abs().max() for j in (0, 1))
    assert ours<1e-3 and theirs>5e-2
