"Pipelines against diffusers', from tiny folders with random weights: the same latents after every step, the same pictures; seeds, and what is refused."
import functools, json, shutil
import pytest, torch
from diffnb.core import create
from diffnb.guidance import interval
pytest.importorskip('diffusers'); pytest.importorskip('transformers')
import diffusers, folders
from folders import BETAS, STEPS
from diffnb.hub.pipelines import load_pipeline
from diffnb.pipelines import Pipeline, pictures
from PIL import Image

VAE_LAW = diffusers.models.autoencoders.vae.DiagonalGaussianDistribution
DDIM = ('DDIMScheduler', dict(clip_sample=False, set_alpha_to_one=False, **STEPS))
DPM = ('DPMSolverMultistepScheduler', {})
ZERO = ('DDIMScheduler', dict(clip_sample=False, rescale_betas_zero_snr=True, prediction_type='v_prediction', timestep_spacing='trailing'))
ANCESTRAL = ('EulerAncestralDiscreteScheduler', STEPS)
MAKERS = {
    'sd': lambda p: folders.sd(p), 'sd ddim': lambda p: folders.sd(p, sched=DDIM), 'sd dpm': lambda p: folders.sd(p, sched=DPM), 'sd zero': lambda p: folders.sd(p, sched=ZERO),
    'sd paint': lambda p: folders.sd(p, sched=DDIM, ch=9), 'sd control': lambda p: folders.sd(p, 'StableDiffusionControlNetPipeline', DDIM, control=True),
    'xl': lambda p: folders.xl(p), 'xl encoded': lambda p: folders.xl(p, zeros=False), 'xl control': lambda p: folders.xl(p, 'StableDiffusionXLControlNetPipeline', control=True),
    'dev': lambda p: folders.flux(p), 'schnell': lambda p: folders.flux(p, dev=False), 'fill': lambda p: folders.flux(p, 'FluxFillPipeline', extra=8)}

@pytest.fixture(scope='module')
def at(tmp_path_factory):
    "Folders by name, each made once."
    made = {}
    def get(name):
        if name not in made: made[name] = MAKERS[name](tmp_path_factory.mktemp('pipes')/name.replace(' ', '-'))
        return made[name]
    return get

@pytest.fixture(autouse=True)
def no_draw(monkeypatch):
    "Theirs draw a picture's latents, ours take their mean; so that both see the same, theirs do too."
    monkeypatch.setattr(VAE_LAW, 'sample', lambda self, generator=None: self.mean)

@functools.cache
def opened(path): return load_pipeline(path)
@functools.cache
def reference(path, cls):
    ref = getattr(diffusers, cls).from_pretrained(path)
    ref.set_progress_bar_config(disable=True)
    return ref

def noise(b=1, seed=3): return torch.randn(b, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
def theirs(path, cls=None, seed=None, **kw):
    "Their latents after each step, in our coordinates: Euler's are larger by the root of 1+sigma^2, FLUX.1's are packed."
    ref, xs = reference(path, cls or 'DiffusionPipeline'), []
    def look(pipe, i, t, kw):
        x = kw['latents']
        if hasattr(ref, '_unpack_latents'): x = ref._unpack_latents(x, 16, 16, 2)
        if 'Euler' in type(ref.scheduler).__name__ and 'Flow' not in type(ref.scheduler).__name__: x = x/(1+ref.scheduler.sigmas[ref.scheduler.step_index]**2)**.5
        xs.append(x.clone())
        return kw
    if seed is not None: kw['generator'] = torch.Generator().manual_seed(seed)
    elif hasattr(ref, '_pack_latents'): kw['latents'] = ref._pack_latents(kw['latents'], len(kw['latents']), 4, 8, 8)
    out = ref(callback_on_step_end=look, output_type='pt', **{k: v for k,v in {**dict(height=16, width=16), **kw}.items() if v is not None})
    return xs, out.images

def compare(path, ours, them, cls=None, tol=1e-4, **both):
    "Step by step, as far as both have steps; the largest value is the unit. Returns the last of ours."
    pipe = opened(path)
    got = list(pipe.latents(**both, **ours))
    with torch.no_grad(): want, images = theirs(path, cls, **both, **them)
    assert len(want)-len(got) in (0, 1) # PNDM counts its first step twice
    for a,b in zip(got, want[len(want)-len(got):]):
        assert a.isfinite().all() and b.std()>.1
        assert (a-b).abs().max()<tol*max(1, b.abs().max())
    if 'mask' not in ours:
        mine = pipe.codec.decode(got[-1])
        assert (mine.float()/255-images).abs().max()<.5/255+2e-3
    return got[-1]

TWO = dict(prompt=['a red cube', 'a cat'])
@pytest.mark.parametrize('name', ['sd', 'sd ddim', 'sd dpm', 'sd zero', 'xl', 'xl encoded'])
def test_text(at, name):
    "Two prompts at once, with and without a negative one."
    x = noise(2)
    size = dict(size=(16, 16))
    first = compare(at(name), dict(steps=4, w=5., noise=x, **size), dict(num_inference_steps=4, guidance_scale=5., latents=x), **TWO)
    other = compare(at(name), dict(steps=4, w=5., noise=x, negative=['blue', 'dog'], **size),
                    dict(num_inference_steps=4, guidance_scale=5., latents=x, negative_prompt=['blue', 'dog']), **TWO)
    assert (first-other).abs().max()>1e-2

def test_no_guidance(at):
    "w = 1 is their 1 and below: off."
    compare(at('sd ddim'), dict(steps=3, w=1., noise=noise(), size=(16, 16)), dict(num_inference_steps=3, guidance_scale=1., latents=noise()), prompt='a cat')

def test_xl_sizes(at):
    "The six numbers, as given."
    kw = dict(steps=3, w=1., noise=noise(), size=(16, 16))
    one = compare(at('xl'), dict(kw, original=(40, 30), crop=(5, 2)), dict(num_inference_steps=3, guidance_scale=1., latents=noise(), original_size=(40, 30), crops_coords_top_left=(5, 2)), prompt='a cat')
    assert (one-list(opened(at('xl')).latents('a cat', **kw))[-1]).abs().max()>1e-3

@pytest.mark.parametrize('name', ['dev', 'schnell'])
def test_flux(at, name):
    "FLUX.1: what the network itself applies, and true guidance by a negative prompt."
    words, more = (512, dict(guidance=2.5)) if name=='dev' else (256, {})
    x, size = noise(2), dict(size=(16, 16))
    them = dict(num_inference_steps=4, latents=x, max_sequence_length=words, guidance_scale=2.5)
    compare(at(name), dict(steps=4, noise=x, **more, **size), them, **TWO)
    compare(at(name), dict(steps=4, noise=x, w=3., negative='dog', **more, **size), dict(them, true_cfg_scale=3., negative_prompt=['dog', 'dog']), **TWO)

def picture(seed=0): return torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
def square():
    m = torch.zeros(1, 1, 16, 16)
    m[..., 4:12, 6:16] = 1 # whole latents of 2x2 pixels
    return m
FLUXES = dict(max_sequence_length=512, guidance_scale=3.5)

@pytest.mark.parametrize('name,cls,more', [('sd ddim', 'StableDiffusionImg2ImgPipeline', {}), ('sd dpm', 'StableDiffusionImg2ImgPipeline', {}),
                                           ('xl', 'StableDiffusionXLImg2ImgPipeline', {}), ('dev', 'FluxImg2ImgPipeline', FLUXES)])
def test_image_to_image(at, name, cls, more):
    "The last steps only, from a picture with noise: a whole number of them, since theirs round down for Stable Diffusion and up for FLUX.1."
    them = dict(num_inference_steps=5, strength=.6, image=picture(), seed=3, **(more or dict(guidance_scale=4.)))
    if name!='dev': them.update(height=None, width=None) # the picture's
    compare(at(name), dict(steps=5, strength=.6, image=picture(), w=1. if more else 4., noise=noise()), them, cls, prompt='a cat')

@pytest.mark.parametrize('name,cls,strength,more', [
    ('sd ddim', 'StableDiffusionInpaintPipeline', .6, {}), ('sd zero', 'StableDiffusionInpaintPipeline', 1., {}), ('sd paint', 'StableDiffusionInpaintPipeline', 1., {}),
    ('sd paint', 'StableDiffusionInpaintPipeline', .6, {}), ('xl', 'StableDiffusionXLInpaintPipeline', .6, {}), ('dev', 'FluxInpaintPipeline', .6, FLUXES),
    ('dev', 'FluxInpaintPipeline', 1., FLUXES), ('fill', 'FluxFillPipeline', 1., FLUXES)])
def test_inpaint(at, name, cls, strength, more):
    "Held by the line from noise to picture, or shown beside the latents. At strength 1 theirs begin with noise in the held part too, ours with what the first noise level leaves of the picture: nothing, where there is no signal."
    them = dict(num_inference_steps=5, strength=strength, image=picture(), mask_image=square(), seed=3, **(more or dict(guidance_scale=4.)))
    got = compare(at(name), dict(steps=5, strength=strength, image=picture(), mask=square(), w=1. if more else 4., noise=noise()), them, cls, prompt='a cat')
    pipe = opened(at(name))
    known, held = pipe.codec.encode(picture()), square()[..., ::2, ::2]==0
    assert ((got-known).abs()*held).max()<1e-6 or pipe.joined

def test_first_step_of_a_held_picture(at):
    "What the docstring above says: with a table that keeps some signal, the first estimate sees the picture here, and noise there."
    path, kw = at('sd ddim'), dict(prompt='a cat')
    got = list(opened(path).latents(steps=5, image=picture(), mask=square(), w=4., noise=noise(), **kw))[0]
    want = theirs(path, 'StableDiffusionInpaintPipeline', num_inference_steps=5, strength=1., image=picture(), mask_image=square(), seed=3, guidance_scale=4., **kw)[0][0]
    held = (square()[..., ::2, ::2]==0).expand_as(got)
    assert (got-want)[held].abs().max()<1e-4 and 1e-4<(got-want)[~held].abs().max()<.5

@pytest.mark.parametrize('name', ['sd control', 'xl control'])
def test_control(at, name):
    "A sketch is followed; without one the network is as it was."
    kw = dict(steps=4, w=4., noise=noise(), size=(16, 16))
    one = compare(at(name), dict(kw, control=picture(9)), dict(num_inference_steps=4, guidance_scale=4., latents=noise(), image=picture(9), controlnet_conditioning_scale=1.), prompt='a cat')
    pipe = load_pipeline(at(name))
    free = list(pipe.latents('a cat', **kw))[-1]
    assert (one-free).abs().max()>1e-2
    pipe.denoiser.scale = 0.
    assert torch.allclose(list(pipe.latents('a cat', control=picture(9), **kw))[-1], free, atol=1e-5)

def test_controlnet_of_another_folder(at):
    pipe = load_pipeline(at('sd ddim'), control=at('sd control')/'controlnet')
    kw = dict(steps=3, noise=noise(), size=(16, 16), control=picture())
    a, b = (list(p.latents('a cat', **kw))[-1] for p in (pipe, load_pipeline(at('sd control'))))
    assert torch.equal(a, b)

# --- what is ours
@pytest.mark.parametrize('name', ['sd dpm', 'xl', 'dev', 'ancestral'])
def test_a_seed_a_picture(at, name, tmp_path):
    "A picture is the same alone, in a batch and at another place of it; another seed gives another; also where the solver draws noise on the way."
    pipe = opened(folders.sd(tmp_path/'a', sched=ANCESTRAL) if name=='ancestral' else at(name))
    kw = dict(steps=4, size=(16, 16))
    many = list(pipe.latents(['a cat', 'a red cube', 'a cat'], seed=[5, 7, 6], **kw))[-1]
    for i,(text,seed) in enumerate([('a cat', 5), ('a red cube', 7), ('a cat', 6)]):
        assert torch.allclose(list(pipe.latents(text, seed=seed, **kw))[-1][0], many[i], atol=2e-4*many.abs().max().item())
    assert (many[0]-many[2]).abs().max()>.1
    assert pipe('a cat', seed=range(3), **kw).shape==(3, 3, 16, 16)
    run = pipe(['a cat']*2, seed=5, **kw)
    assert (run[1].float()-pipe('a cat', seed=6, **kw)[0].float()).abs().max()<=1 and run.dtype==torch.uint8

def test_mask_to_the_byte(at):
    "What the mask leaves out is the picture's, in bytes."
    pipe = opened(at('sd dpm'))
    image, mask = (255*picture()).byte(), square()
    out = pipe('a cat', image=image, mask=mask, steps=3)
    keep = (mask==0).expand_as(out)
    assert torch.equal(out[keep], image[keep]) and not torch.equal(out, image)
    thin = torch.zeros(1, 1, 16, 16); thin[..., 3, 3] = 1 # one pixel: its whole latent is painted
    assert (pipe('a cat', image=image, mask=thin, steps=3)[..., 3, 3]!=image[..., 3, 3]).any()

def test_pictures(tmp_path):
    "Paths, PIL's images, bytes and floats are one picture."
    x = (255*picture()).byte()
    im = Image.fromarray(x[0].permute(1, 2, 0).numpy())
    im.save(tmp_path/'a.png')
    for o in (tmp_path/'a.png', str(tmp_path/'a.png'), im, x, x[0], x.float()/255, [x, im]): assert torch.equal(pictures(o, 'image')[:1], x.float()/255)
    assert pictures(square()[0, 0], 'mask', 1).shape==pictures(square()>0, 'mask', 1).shape==pictures(im.convert('L'), 'mask', 1).shape==(1, 1, 16, 16)
    (tmp_path/'b.png').write_bytes(b'GIF9')
    for o,e,msg in [(tmp_path/'c.png', FileNotFoundError, 'c.png is not there'), (tmp_path/'b.png', ValueError, 'is no picture'), (7, ValueError, 'a tensor, a PIL image or a path'),
                    (x[:, :2], ValueError, '(b,3,h,w)'), (2*x.float(), ValueError, 'in [0,1]'), ([x, x[..., :8]], ValueError, 'different sizes'), ([], ValueError, 'list')]:
        with pytest.raises(e) as got: pictures(o, 'image')
        assert msg in str(got.value)

BAD = [(dict(prompt=['a', 'b', 'c'], negative=['d', 'e']), '3 of prompt and 2 of negative'), (dict(prompt=[]), 'prompt is empty'), (dict(prompt=[3]), 'text 0 of 1 is 3'),
       (dict(prompt=b'a'), 'text 0 of 1'), (dict(prompt='a', size=(16, 17)), 'multiples of 2'), (dict(prompt='a', size=(0, 16)), 'multiples of 2'), (dict(prompt='a', strength=.5), 'give image='),
       (dict(prompt='a', mask=square()), 'Give image='), (dict(prompt='a', control=picture()), 'no ControlNet'), (dict(prompt='a', image=picture(), strength=0.), 'strength=0'),
       (dict(prompt='a', image=picture(), strength=1.5), 'too many'), (dict(prompt='a', image=picture(), size=(32, 32)), 'image is 16x16'), (dict(prompt='a', w=1., negative='b'), 'w= above 1'),
       (dict(prompt='a', image=picture(), mask=torch.ones(1, 1, 8, 8)), 'mask is 8x8'), (dict(prompt='a', noise=torch.zeros(1, 4, 4, 4)), 'noise is (1, 4, 8, 8)'),
       (dict(prompt='a', image=picture(), strength=.05, steps=5), 'none of 5 steps'), (dict(prompt='a', image='/nowhere/x.png'), 'is not there')]
def test_refused(at):
    "One clear error, before the network runs."
    pipe = load_pipeline(at('sd ddim'))
    def never(*args, **kw): raise AssertionError('the network was asked')
    pipe.denoiser.forward = never
    for kw,msg in BAD:
        with pytest.raises((ValueError, FileNotFoundError)) as e: pipe.latents(**{**dict(steps=3), **({} if 'image' in kw else dict(size=(16, 16))), **kw})
        assert msg in str(e.value), (kw, str(e.value))
    with pytest.raises(TypeError, match="no argument 'crop'"): pipe.latents('a', crop=(1, 2))
    with pytest.raises(TypeError, match='original'): opened(at('xl')).latents('a', orignal=(1, 2), size=(16, 16))
    with pytest.raises(ValueError, match='paints into pictures'): opened(at('sd paint')).latents('a', size=(16, 16))

def test_another_guide(at):
    "A guide takes the place of w."
    pipe = opened(at('dev'))
    kw = dict(steps=3, size=(16, 16), negative='dog')
    a, b, c = (list(pipe.latents('a cat', **kw, **o))[-1] for o in (dict(guide=interval(3., 0., 1.)), dict(w=3.), dict(guide=interval(3., 0., .5))))
    assert torch.allclose(a, b, atol=1e-5) and (a-c).abs().max()>1e-3

def test_in_pixels():
    "Any network with channels and any conditioner will do: nothing here is a U-Net's or a VAE's affair."
    from diffnb.conditioners import Labels
    from diffnb.codec.core import Pixels
    class Said(Labels):
        pass
    net, labels = create('dit_tiny'), Labels(['cat', 'dog'])
    labels.key, labels.empty = 'text', 2
    pipe = Pipeline(net, folders_process(), Pixels(), labels, w=1., size=(8, 8), unit=2)
    assert list(pipe.latents('cat', steps=2, size=(net.size, net.size)))[-1].shape==(1, net.ch, net.size, net.size)
def folders_process():
    from diffnb.process.gaussian import Gaussian
    return Gaussian('cosine', 'v')

# --- folders that do not open
def broken(at, tmp_path, name, change):
    "A copy of a folder, with something done to it."
    shutil.copytree(at(name), tmp_path/'x')
    index = json.loads((tmp_path/'x'/'model_index.json').read_text())
    change(tmp_path/'x', index)
    if (tmp_path/'x'/'model_index.json').is_file(): (tmp_path/'x'/'model_index.json').write_text(json.dumps(index))
    return tmp_path/'x'
def cut(p): p.write_bytes(p.read_bytes()[:-100])
FOLDERS = [('sd', lambda p, i: shutil.rmtree(p/'text_encoder'), FileNotFoundError, 'no folder text_encoder'), ('sd', lambda p, i: i.pop('text_encoder'), ValueError, 'lists no text_encoder'),
    ('sd', lambda p, i: i.update(image_encoder=['transformers', 'CLIPVisionModelWithProjection']), ValueError, 'image_encoder (CLIPVisionModelWithProjection) is unknown'),
    ('sd', lambda p, i: i.update(_class_name='KolorsPipeline'), ValueError, "'KolorsPipeline'"), ('sd', lambda p, i: (p/'model_index.json').unlink(), FileNotFoundError, 'no model_index.json'),
    ('sd', lambda p, i: shutil.rmtree(p/'tokenizer') or (p/'tokenizer').mkdir(), FileNotFoundError, 'tokenizer has no tokenizer.json'), ('sd', lambda p, i: i.update(tiling=True), ValueError, 'tiling is True'),
    ('sd', lambda p, i: cut(p/'text_encoder'/'model.safetensors'), ValueError, 'text_encoder'), ('sd', lambda p, i: cut(p/'unet'/'diffusion_pytorch_model.safetensors'), ValueError, 'unet'),
    ('xl', lambda p, i: i.update(requires_aesthetics_score=True), ValueError, 'requires_aesthetics_score is True'), ('xl', lambda p, i: i.update(text_encoder=[None, None]), ValueError, 'lists no text_encoder,'),
    ('sd', lambda p, i: (p/'vae'/'config.json').write_text(json.dumps(dict(_class_name='AutoencoderTiny'))), ValueError, 'AutoencoderTiny')]
@pytest.mark.parametrize('n', range(len(FOLDERS)))
def test_folders_refused(at, tmp_path, n):
    name, change, error, msg = FOLDERS[n]
    with pytest.raises(error) as e: load_pipeline(broken(at, tmp_path, name, change))
    assert msg in str(e.value) and '\n' not in str(e.value), str(e.value)

def test_what_is_passed_over(at, tmp_path):
    "A safety checker is left where it lies; a scheduler that would clip latents does not."
    def old(p, i):
        i['safety_checker'] = ['stable_diffusion', 'StableDiffusionSafetyChecker']
        f = p/'scheduler'/'scheduler_config.json'
        f.write_text(json.dumps({**json.loads(f.read_text()), 'clip_sample': True}))
    kw = dict(steps=3, noise=noise(), size=(16, 16))
    a, b = (list(load_pipeline(p).latents('a cat', **kw))[-1] for p in (at('sd ddim'), broken(at, tmp_path, 'sd ddim', old)))
    assert torch.equal(a, b)

def test_half_precision(at):
    "All weights in bfloat16: another dtype, much the same picture."
    kw = dict(prompt='a cat', steps=3, noise=noise(), size=(16, 16))
    for name in ('sd ddim', 'xl', 'dev'):
        half = load_pipeline(at(name), dtype=torch.bfloat16)
        assert {p.dtype for m in (half.denoiser, half.codec, half.conditioner) for p in m.parameters()}=={torch.bfloat16}
        a, b = list(half.latents(**kw))[-1], list(load_pipeline(at(name)).latents(**kw))[-1]
        assert a.isfinite().all() and (a-b).std()<.2*b.std()
