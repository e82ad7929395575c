"Configurations of diffusers' schedulers: read from where they lie, every option honoured, harmless or refused by name. Parity of steps: test_parity_samplers.py."
import inspect
import pytest, torch
from diffnb.hub.schedulers import Sampling, readers, sampling
from diffnb.rng import Rng
from diffnb.samplers import sample

ds = pytest.importorskip('diffusers')
ds.utils.logging.set_verbosity_error()

def options(cls): return {k: p.default for k,p in inspect.signature(getattr(ds, cls).__init__).parameters.items() if k!='self'}
def own(cls, **kw): return {**{k: v for k,v in options(cls).items()}, **kw, '_class_name': cls}
def net(x, t, **cond): return .3*x.sin()

@pytest.mark.parametrize('cls', readers)
def test_their_defaults(cls):
    "The class's own defaults are read, whole and empty alike, and walk to finite samples in 5 steps; PNDM's default ends where it begins with 1."
    a, b = sampling(own(cls)), sampling(dict(_class_name=cls))
    for n in (2, 5):
        (ga, gb), (x, y) = (o.grid(o.process, n, 1024) for o in (a, b)), (list(sample(net, o.process, (2, 3, 4, 4), n, o.step, o.grid))[-1] for o in (a, b))
        assert torch.equal(ga.t, gb.t) and torch.equal(x, y) and x.isfinite().all()

@pytest.mark.parametrize('cls', readers)
def test_as_they_write_it(cls, tmp_path):
    "save_config's file, its folder, and a pipeline's folder give the same."
    s = getattr(ds, cls)()
    s.save_pretrained(tmp_path/'scheduler')
    want = sampling(own(cls))
    for at in (tmp_path/'scheduler'/'scheduler_config.json', tmp_path/'scheduler', tmp_path, str(tmp_path)):
        o = sampling(at)
        assert isinstance(o, Sampling) and torch.equal(o.grid(o.process, 3, 64).t, want.grid(want.process, 3, 64).t)

# An option of a class is honoured (another value changes what comes out), harmless (it changes nothing there either), or refused. Values that differ from the default:
OTHER = dict(num_train_timesteps=500, beta_start=.001, beta_end=.03, beta_schedule='scaled_linear', trained_betas=[.01+.0001*i for i in range(1000)],
    variance_type='fixed_large', clip_sample_range=.2, prediction_type='v_prediction', thresholding=True, dynamic_thresholding_ratio=.9,
    sample_max_value=2., timestep_spacing='trailing', steps_offset=3, rescale_betas_zero_snr=True, skip_prk_steps=True, interpolation_type='log_linear',
    use_karras_sigmas=True, use_exponential_sigmas=True, use_beta_sigmas=True, sigma_min=.1, sigma_max=5., timestep_type='continuous',
    final_sigmas_type='sigma_min', solver_order=3, algorithm_type='sde-dpmsolver++', solver_type='heun', lower_order_final=False, euler_at_final=True,
    use_lu_lambdas=True, use_flow_sigmas=True, flow_shift=2., lambda_min_clipped=-5.1, use_dynamic_shifting=True, time_shift_type='linear', predict_x0=False,
    disable_corrector=[0], solver_p={}, shift_terminal=.1, original_inference_steps=33, timestep_scaling=5., shift=2., base_shift=.2, max_shift=2.,
    base_image_seq_len=16, max_image_seq_len=100, invert_sigmas=True, stochastic_sampling=True, scale_factors=[2], upscale_mode='nearest', sigma_data=.7,
    sigma_schedule='exponential', rho=5.)
# what an option needs to matter in the first place
NEEDS = dict(clip_sample_range=dict(clip_sample=True), flow_shift=dict(use_flow_sigmas=True, prediction_type='flow_prediction'),
    base_shift=dict(use_dynamic_shifting=True), max_shift=dict(use_dynamic_shifting=True), base_image_seq_len=dict(use_dynamic_shifting=True),
    max_image_seq_len=dict(use_dynamic_shifting=True), steps_offset=dict(timestep_spacing='leading'), use_flow_sigmas=dict(prediction_type='flow_prediction'),
    rescale_betas_zero_snr=dict(prediction_type='v_prediction'), sigma_min=dict(use_karras_sigmas=True), sigma_max=dict(use_karras_sigmas=True))
# harmless: they go with what is refused, or, as theirs, change nothing where the last step leads to 0
DPMS = {'DPMSolverMultistepScheduler', 'EDMDPMSolverMultistepScheduler'}
HARMLESS = dict(dynamic_thresholding_ratio=readers, sample_max_value=readers, upscale_mode=readers, lower_order_final=DPMS, euler_at_final=DPMS,
    set_alpha_to_one={'LCMScheduler'}, steps_offset={'LCMScheduler'}, timestep_spacing={'LCMScheduler'},
    use_dynamic_shifting={'DPMSolverMultistepScheduler', 'UniPCMultistepScheduler'}, time_shift_type={'DPMSolverMultistepScheduler', 'UniPCMultistepScheduler'},
    num_train_timesteps={'EDMEulerScheduler', 'EDMDPMSolverMultistepScheduler'})

def outcome(config):
    "What a configuration leads to: times, what the network is told and samples from the same noise."
    o = sampling(config)
    g = o.grid(o.process, 5, 1024)
    f = (lambda x, t, **c: torch.cat([net(x, t)]*2, 1)) if o.process.learned else net
    return g.t, g.net_t, list(sample(f, o.process, (2, 3, 4, 4), 5, o.step, o.grid, rng=Rng(1)))[-1]

@pytest.mark.parametrize('cls,k', [(c, k) for c in readers for k in options(c)])
def test_every_option(cls, k):
    "No option of theirs is passed over in silence."
    usual = options(cls)[k]
    value = {**OTHER, 'clip_sample': not options(cls).get('clip_sample'), 'set_alpha_to_one': not options(cls).get('set_alpha_to_one')}[k]
    if k=='beta_schedule' and usual==value: value = 'squaredcos_cap_v2'
    if k=='solver_type' and cls.startswith('Uni'): value = 'bh1'
    needs = {a: b for a,b in NEEDS.get(k, {}).items() if a in options(cls)}
    try: before = outcome(own(cls, **needs))
    except ValueError: # what it goes with is refused, or it is what makes the rest valid
        assert k in ('use_flow_sigmas', 'clip_sample_range')
        return
    try: after = outcome(own(cls, **{**needs, k: value}))
    except ValueError as e:
        assert k in str(e) and repr(value) in str(e) and cls in str(e), e
        return
    same = all(a.shape==b.shape and torch.equal(a.nan_to_num(), b.nan_to_num()) for a,b in zip(before, after))
    assert same==(cls in HARMLESS.get(k, ())), f'{k}={value!r} changes {"nothing" if same else "something"} in {cls}'

def test_unknown():
    for config, msg in [(dict(_class_name='DDIMScheduler', sharpness=2), "sharpness is 2"), (dict(_class_name='Nothing'), "'Nothing'"), ({}, 'None'),
                        (dict(_class_name='DDIMSchedular'), "did you mean 'DDIMScheduler'"), (dict(_class_name='DDIMScheduler', beta_start='x'), 'DDIMScheduler'),
                        (dict(_class_name='DDIMScheduler', num_train_timesteps=10**12), 'num_train_timesteps is 1000000000000'),
                        (dict(_class_name='DDIMScheduler', beta_schedule=['linear']), "beta_schedule is ['linear']"),
                        (dict(_class_name='EulerDiscreteScheduler', use_karras_sigmas=True, use_beta_sigmas=True), 'both')]:
        with pytest.raises(ValueError) as e: sampling(config)
        assert msg in str(e.value)

def test_not_a_configuration(tmp_path):
    (tmp_path/'scheduler_config.json').write_text('[1]')
    with pytest.raises(ValueError, match='JSON object'): sampling(tmp_path)
    (tmp_path/'scheduler_config.json').write_text('{')
    with pytest.raises(ValueError): sampling(tmp_path)
    with pytest.raises(OSError): sampling(tmp_path/'nowhere')

def test_options_of_other_classes_are_ignored():
    "SDXL's Euler carries options of the schedulers that it was converted from, and theirs ignores them too."
    plain = dict(_class_name='EulerDiscreteScheduler', beta_schedule='scaled_linear', beta_start=.00085, beta_end=.012)
    foreign = dict(clip_sample=True, set_alpha_to_one=False, skip_prk_steps=True, sample_max_value=1., _diffusers_version='0.19.0')
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a,b in zip(outcome(plain), outcome({**plain, **foreign})))

def test_infinity_in_json(tmp_path):
    "DPM-Solver's file holds -Infinity, which strict readers of JSON refuse."
    ds.DPMSolverMultistepScheduler().save_pretrained(tmp_path)
    assert '-Infinity' in (tmp_path/'scheduler_config.json').read_text() and sampling(tmp_path).process.pred.name=='eps'

def test_learned_variance():
    "A network with variance channels: DDPM uses them, DPM-Solver++ cuts them off."
    for cls in ('DDPMScheduler', 'DPMSolverMultistepScheduler'):
        o = sampling(dict(_class_name=cls, variance_type='learned_range'))
        f = lambda x, t, **c: torch.cat([net(x, t), torch.ones_like(x)], 1)
        *_, x = sample(f, o.process, (2, 3, 4, 4), 4, o.step, o.grid)
        *_, y = sample(lambda x, t, **c: torch.cat([net(x, t), -torch.ones_like(x)], 1), o.process, (2, 3, 4, 4), 4, o.step, o.grid)
        assert x.isfinite().all() and torch.equal(x, y)==(cls[1]=='P')

def test_no_code_from_data(tmp_path):
    "A class name is looked up in a table and never imported."
    for name in ('os.system', '__import__', 'diffnb.core.Denoiser', 'Sampling'):
        with pytest.raises(ValueError, match='no scheduler of ours'): sampling(dict(_class_name=name))
