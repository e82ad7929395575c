"The image models and autoencoders that are published: each has its preset, and a tiny one of the same class that runs."
import os, subprocess, sys
import pytest, torch
from diffnb.codec.core import Codec
from diffnb.core import create, presets
from diffnb.process.gaussian import Gaussian, LearnedRange
from diffnb.samplers import ddim, sample

TINY = dict(dit_xl_2='dit_tiny', diffit_xl_2_256='diffit_latent_tiny', diffit_xl_2_512='diffit_latent_tiny', sd15_unet='sd_unet_tiny',
            sd21_unet='sd_unet_tiny', sdxl_unet='sdxl_unet_tiny', sd15_controlnet='controlnet_tiny', flux_dev='flux_tiny',
            flux_schnell='flux_tiny', sd_vae='vae_tiny', sdxl_vae='vae_tiny', flux_vae='vae_tiny')
MORE = dict(**{k: dict(sigma=True) for k in ('dit_xl_2', 'diffit_xl_2_256', 'diffit_xl_2_512')}, flux_schnell=dict(guidance=False), flux_vae=dict(z=16, quant=False)) # what sets one apart from another of its class

def kind(name): return 'codec' if name.endswith('_vae') else 'denoiser'
def tiny(name): return create(TINY[name], kind=kind(name), **MORE.get(name, {}))
def shape(net): return {k.rsplit('.', 1)[-1] for k in net.state_dict()}

@pytest.mark.parametrize('name', TINY)
def test_a_tiny_one_of_each(name):
    "Same class, the same sorts of tensors, under 200,000 parameters."
    with torch.device('meta'): large = create(name, kind=kind(name))
    net = tiny(name)
    assert type(net) is type(large) and sum(p.numel() for p in net.parameters())<200_000
    assert shape(net)==shape(large) and name in presets(kind(name))
    for k in dict(flux_schnell=['guidance'], flux_vae=['decoder.quant']).get(name, []): # which the other variant has
        assert not any(n.startswith(k+'.') for o in (net, large) for n in o.state_dict())

@pytest.mark.parametrize('name', [n for n in TINY if kind(n)=='denoiser'])
def test_tiny_ones_sample(name):
    "Two guided steps with random weights: a result of the right size, finite, the same with conditions prepared before."
    net = tiny(name).eval()
    for p in net.parameters(): p.data = .05*torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    x,_,cond = net.demo(2)
    learned = LearnedRange() if name.startswith('di') else None # twice the channels
    process = Gaussian('straight', 'flow') if name.startswith('flux') else Gaussian('scaled_linear', 'eps', learned=learned)
    *_,got = sample(net, process, x.shape, 2, ddim(), cond=cond, w=3.)
    *_,want = sample(lambda *a, **kw: net(*a, **kw), process, x.shape, 2, ddim(), cond=cond, uncond=net.null(x, **cond)[1], w=3.)
    assert got.shape==x.shape and got.isfinite().all() and (got-want).abs().max()<1e-4*want.abs().max()

@pytest.mark.parametrize('name', [n for n in TINY if kind(n)=='codec'])
def test_tiny_codecs_code(name):
    v = tiny(name)
    assert isinstance(v, Codec)
    x = torch.randint(256, (2, 3, 8, 12), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    z = v.encode(x)
    assert z.shape==(2, v.z, 2, 3) and v.decode(z).shape==x.shape and v.decode(z).dtype==torch.uint8

def test_first_thing_on_the_meta_device():
    "A preset that is asked for before anything is imported may be built without memory."
    code = "import torch\nfrom diffnb.core import create\nwith torch.device('meta'): net = create('dit_xl_2')\n" \
           "assert sum(p.numel() for p in net.parameters())==674_834_720 and all(p.is_meta for p in net.parameters())"
    subprocess.run([sys.executable, '-c', code], check=True, env={**os.environ, 'DIFFNB_TYPECHECK': '0'})
