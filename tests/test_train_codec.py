"Training of a codec: each term by hand, two networks in one step, several optimisers as one, a run that stops and goes on."
import math
from functools import partial
import numpy as np
import pytest, torch
import torch.nn.functional as F
from torch import nn
from diffnb.codec.core import Pixels
from diffnb.codec.latents import by_codec
from diffnb.codec.vae import kl, vae
from diffnb.core import create, mean_loss
from diffnb.data.images import batches, emoji, floats, hflip
from diffnb.process.gaussian import Gaussian
from diffnb.rng import Rng
from diffnb.saving import load
from diffnb.store import save_tensors
from diffnb.train.codec import (NUMBERS, VGG, CodecTask, Perceptual, balance, codec_of, finished, keep_codec, lpips, patch_critic,
                                pixel_error, psnr, reconstructed, several)
from diffnb.train.ema import halflife
from diffnb.train.loop import fit
from diffnb.train.muon import Muon, muon
from diffnb.train.task import DiffusionTask, adamw, constant

IMAGES = emoji('test')
def batch(n=4, first=0): return dict(x=IMAGES.pixels[:n,:,:16,:16].contiguous(), idx=torch.arange(first, first+n))

def parts(learn=True):
    torch.manual_seed(0)
    return vae(widths=(8,16), layers=1, z=4, groups=4, scale=1., learn=learn), patch_critic(width=16, layers=1)

def see():
    "A small network of features."
    torch.manual_seed(1)
    return Perceptual(VGG((8,16), (1,1)))

def task(critic=True, **kw):
    codec, other = parts()
    both = several(dict(codec=muon(0.), critic=adamw(0., (.5, .9))), dict(critic=.3))
    kw = dict(dict(optimiser=both if critic else muon(0.), lr=constant(3e-3)), **kw)
    return CodecTask(codec, other if critic else None, **kw)

# --- the terms
def test_terms_by_hand():
    t, b = task(perceptual=see(), error=pixel_error(.7, .4), beta=.01, seen=.3, fooled=.2), batch()
    got = t.loss(b, Rng(5)).value
    x = b['x'].float()/127.5-1
    mean, logvar = t.codec.encoder(x).chunk(2, 1)
    y = t.codec.decoder(mean+(logvar/2).exp()*Rng(5).of(range(4)).at('vae').normal(*mean.shape))
    d = y-x
    error = (.7*d.abs()+.4*d**2).flatten(1).mean(1)
    nats = .5*(mean**2+logvar.exp()-1-logvar).flatten(1).sum(1)
    maps = [(a/(a.norm(dim=1, keepdim=True)+1e-10), c/(c.norm(dim=1, keepdim=True)+1e-10)) for a,c in zip(t.perceptual.features(y), t.perceptual.features(x))]
    far = sum(((a-c)**2).sum(1).mean((1, 2)) for a,c in maps)
    scores = t.critic(y).flatten(1)
    main, fooled = error+.3*far, -scores.mean(1)
    w = t.codec.decoder.out.weight
    a, c = (torch.autograd.grad(o.mean(), w, retain_graph=True)[0].norm() for o in (main, fooled))
    hinge = (F.relu(1-t.critic(x)).flatten(1).mean(1)+F.relu(1+scores).mean(1))/2
    want = main+.01*nats/x[0].numel()+.2*a/(c+1e-4)*fooled+hinge
    torch.testing.assert_close(got, want[:,None], rtol=1e-4, atol=1e-5)
    assert t.terms.keys()=={'error', 'kl', 'perceptual', 'fooled', 'critic'}
    assert abs(sum(t.terms.values())-got.mean())<1e-5

@pytest.mark.parametrize('accumulate', [1, 2])
def test_each_network_its_own_gradient(accumulate):
    "One backward of the sum: the codec's is that of its terms with the critic as a constant, the critic's that of the hinge."
    t, b = task(perceptual=see(), seen=.5), batch()
    n = 4//accumulate
    some = [{k: v[i*n:(i+1)*n] for k,v in b.items()} for i in range(accumulate)]
    for o in some: (mean_loss(t.loss(o, Rng(0)))/accumulate).backward()
    want = {}
    for o in some:
        m = t.codec.moments(o['x'])
        y, x = t.codec.images(t.codec.latents(m, Rng(0).of(o['idx']))), Pixels().encode(o['x'])
        main, fooled = (y-x).abs().mean()+.5*t.perceptual(y, x).mean(), -t.critic(y).mean()
        total = main+1e-6*kl(m).sum()/x.numel()+.5*balance(main, fooled, t.codec.decoder.out.weight)*fooled
        hinge = F.relu(1-t.critic(x)).mean()/2+F.relu(1+t.critic(y.detach())).mean()/2
        for net,loss in ((t.codec, total), (t.critic, hinge)):
            for p,g in zip(net.parameters(), torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)): want[p] = want.get(p, 0)+g/accumulate
    for k,p in t.net.named_parameters(): torch.testing.assert_close(p.grad, want[p], rtol=1e-3, atol=1e-5, msg=k)

def test_balance():
    "Balanced, the critic pulls at the last layer exactly as hard as the rest; without gradients the weight is 1."
    t, b = task(), batch()
    m = t.codec.moments(b['x'])
    y = t.codec.images(t.codec.latents(m))
    w = t.codec.decoder.out.weight
    main, fooled = (y-Pixels().encode(b['x'])).abs().mean(), -100*t.critic(y).mean()
    g = [torch.autograd.grad(o, w, retain_graph=True)[0].norm() for o in (main, balance(main, fooled, w)*fooled)]
    assert abs(g[0]-g[1])<1e-3*g[0]
    assert not balance(main, fooled, w).requires_grad
    with torch.no_grad(): assert balance(main, fooled, w)==1 and t.loss(b, Rng(0)).value.isfinite().all()
    assert balance(w.sum(), 0*w.sum(), w)==1e4 # no slope at all: bounded

def test_critic_counts_later():
    "Before `start` there is no critic; within a batch it counts for the samples from there on."
    t = task(start=6)
    t.loss(batch(4), Rng(0))
    assert t.terms.keys()=={'error', 'kl'}
    late, half = t.loss(batch(4, 6), Rng(0)).value, t.loss(batch(4, 4), Rng(0)).value
    assert t.terms.keys()=={'error', 'kl', 'fooled', 'critic'}
    none = task(critic=False).loss(batch(4, 4), Rng(0)).value
    assert torch.equal(half[:2], none[:2]) and not torch.isclose(half[2:], none[2:]).any() and late.isfinite().all()

def test_bytes_and_floats():
    "Bytes, or floats in [0,1]; what is in [-1,1] is refused."
    t, b = task(critic=False), batch()
    a = t.loss(b, Rng(0)).value
    torch.testing.assert_close(t.loss({**b, 'x': b['x']/255}, Rng(0)).value, a)
    with pytest.raises(ValueError, match='scale them'): t.loss(floats(b, Rng(0)), Rng(0))

def test_psnr_by_hand():
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randint(256, (3, 3, 5, 4), generator=g, dtype=torch.uint8) for _ in range(2))
    mse = ((x.numpy().astype(float)-y.numpy())**2).mean((1, 2, 3))
    np.testing.assert_allclose(psnr(y, x), 10*np.log10(255**2/mse))
    assert psnr(x, x).isinf().all()

# --- features
def vgg_tensors(seed=0):
    g = torch.Generator().manual_seed(seed)
    ws, t = [3, 64, 64, 128, 128, *[256]*3, *[512]*6], {}
    for n,(a,b) in zip(NUMBERS, zip(ws, ws[1:])):
        t[f'{n}.weight'], t[f'{n}.bias'] = torch.randn(b, a, 3, 3, generator=g)*(2/(9*a))**.5, .1*torch.randn(b, generator=g)
    return t, {f'lin{i}.model.1.weight': torch.rand(1, w, 1, 1, generator=g) for i,w in enumerate((64, 128, 256, 512, 512))}

@pytest.fixture(scope='module')
def files(tmp_path_factory):
    "Random weights as they are found: two files of torchvision and LPIPS, and one of the lpips package."
    tmp, (net, lin) = tmp_path_factory.mktemp('lpips'), vgg_tensors()
    torch.save({f'features.{k}': v for k,v in net.items()}, tmp/'vgg16.pth')
    torch.save(lin, tmp/'vgg.pth')
    def part(k): return sum(int(k.split('.')[0])>=n for n in (0, 4, 9, 16, 23))
    save_tensors(tmp/'all.safetensors', {**{f'net.slice{part(k)}.{k}': v for k,v in net.items()}, **lin, 'scaling_layer.shift': torch.zeros(1)})
    return tmp

def test_lpips_as_torch_fidelity(files, monkeypatch):
    theirs = pytest.importorskip('torch_fidelity.sample_similarity_lpips')
    import torchvision
    def bare(*args, **kw):
        net = torchvision.models.vgg16(weights=None)
        net.load_state_dict(torch.load(files/'vgg16.pth', weights_only=True), strict=False)
        return net
    monkeypatch.setattr(theirs, 'torchvision_load_pretrained_vgg16', bare)
    monkeypatch.setattr(theirs, 'load_state_dict_from_url', lambda *args, **kw: torch.load(files/'vgg.pth', weights_only=True))
    oracle = theirs.SampleSimilarityLPIPS('lpips')
    x, y = IMAGES.pixels[:2], IMAGES.pixels[2:4]
    with torch.no_grad(): want = oracle(y, x).flatten()
    for f in (lpips(files/'vgg.pth', files/'vgg16.pth'), lpips(files/'all.safetensors')):
        with torch.no_grad(): got = f(y.float()/127.5-1, x.float()/127.5-1)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert want.min()>.01

def test_lpips_says_what_is_missing(files, tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere.pth is not there'): lpips(tmp_path/'nowhere.pth')
    with pytest.raises(ValueError, match=r'features.*0.*give vgg='): lpips(files/'vgg.pth')
    with pytest.raises(ValueError, match='lin0'): lpips(files/'vgg16.pth')

def test_perceptual_slopes():
    "0 and no slope at the picture itself, slopes for what is decoded alone, none for the features' weights."
    f, x = see(), torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))*2-1
    assert f(x, x).abs().max()<1e-9
    y, x = (x*.5).requires_grad_(), x.requires_grad_()
    f(y, x).sum().backward()
    assert y.grad.abs().max()>0 and x.grad is None and all(p.grad is None for p in f.parameters())

def test_any_function_of_features():
    f = Perceptual(lambda x: [x, F.avg_pool2d(x, 2)], [torch.tensor([1., 0., 0.]), torch.zeros(3)])
    x = torch.tensor([[1., 0, 0], [0, 1, 0], [0, 0, 1]])[:,:,None,None].expand(-1, -1, 2, 2)
    torch.testing.assert_close(f(x, x.roll(1, 0)), torch.tensor([1., 1., 0.])) # of unit vectors, the first component alone

# --- the critic
@pytest.mark.parametrize('layers,side', [(1, 14), (2, 6), (3, 2)])
def test_critic(layers, side):
    "Scores of parts, each picture's its own."
    torch.manual_seed(0)
    net, x = patch_critic(width=16, layers=layers), torch.rand(3, 3, 32, 32)
    assert net(x).shape==(3, 1, side, side)
    torch.testing.assert_close(net(x)[1:2], net(x[1:2]), rtol=1e-4, atol=1e-5)

# --- several optimisers
def test_several_is_each_alone():
    nets = [nn.ModuleDict(dict(codec=parts()[0], critic=parts()[1])) for _ in range(2)]
    both = several(dict(critic=adamw(.1), codec=muon(.1)), dict(critic=.5))(nets[0])
    alone = [muon(.1)(nets[1]['codec']), adamw(.1)(nets[1]['critic'])]
    g = torch.Generator().manual_seed(0)
    for k in range(4):
        for p,q in zip(nets[0].parameters(), nets[1].parameters()): p.grad = torch.randn(p.shape, generator=g); q.grad = p.grad.clone()
        for o in both.param_groups: o['lr'] = .01*o.get('lr_share', 1.)
        for o,lr in zip(alone, (.01, .005)):
            for group in o.param_groups: group['lr'] = lr
            o.step()
        both.step()
    for p,q in zip(nets[0].parameters(), nets[1].parameters()): assert torch.equal(p, q)
    both.zero_grad()
    assert all(p.grad is None for p in nets[0].parameters())
    assert isinstance(both.parts[0], Muon) and isinstance(both.parts[1], torch.optim.AdamW)

def test_several_asks_for_the_gradients():
    "A closure is called once, with gradients switched on, before any of them steps."
    net = task().net
    opt, was, calls = several({k: adamw() for k,_ in net.named_children()})(net), [p.detach().clone() for p in net.parameters()], []
    def closure():
        calls.append(all(torch.equal(p, q) for p,q in zip(net.parameters(), was)))
        loss = sum(p.square().sum() for p in net.parameters())
        loss.backward()
        return loss
    with torch.no_grad(): loss = opt.step(closure)
    assert calls==[True] and loss>0 and sum(not torch.equal(p, q) for p,q in zip(net.parameters(), was))>len(was)//2

@pytest.mark.parametrize('names,shares', [(('codec',), {}), (('codec', 'critic', 'other'), {}), (('codec', 'critic'), dict(critics=.1))])
def test_several_refuses(names, shares):
    with pytest.raises(ValueError, match='the parts are codec, critic'): several({k: adamw() for k in names}, shares)(task().net)

# --- runs
def go(steps, folder=None, t=None, **kw):
    data = partial(batches, IMAGES.take(torch.arange(20)), 4, Rng(0), transforms=[hflip])
    return fit(t or task(start=12, perceptual=see()), data, steps, folder, averages=dict(ema=halflife(20)), bar=False, **kw)

def bits(run):
    out = {f'net/{k}': v for k,v in run.task.net.state_dict().items()}
    out |= {f'ema/{k}': v for e in run.emas.values() for k,v in e.avg.items()}
    names = {id(p): k for k,p in run.task.net.named_parameters()}
    return out | {f'opt/{names[id(p)]}/{k}': v for p,s in run.opt.state.items() for k,v in s.items()}

@pytest.mark.parametrize('stops', [(5, 10), (2, 10), (1, 4, 10)])
def test_resume_bit_for_bit(tmp_path, stops):
    "10 steps are 5 and 5, and 2 and 8, with the critic entering after the third."
    whole = go(10)
    for n in stops: run = go(n, tmp_path/'run')
    a, b = bits(whole), bits(run)
    assert a.keys()==b.keys() and all(torch.equal(v, b[k]) for k,v in a.items())
    assert [g['lr'] for g in run.opt.param_groups]==[g['lr'] for g in whole.opt.param_groups]
    assert {g['lr'] for g in run.opt.param_groups}=={3e-3, 3e-3*.3}
    assert any('opt/critic' in k for k in a) and any('opt/codec' in k for k in a)

def test_resume_is_not_trivial():
    a, b = bits(go(4)), bits(go(4, t=task(start=8, perceptual=see())))
    assert any(not torch.equal(v, b[k]) for k,v in a.items())
    assert not any(k.startswith('opt/critic') for k in bits(go(3))) # not asked yet

@pytest.mark.parametrize('amp', [None, torch.bfloat16])
def test_learns(amp):
    "Twenty pictures, forty steps: half of the error is gone, and the critic tells apart better than one that says 0."
    told = []
    run = go(40, t=task(start=40, lr=constant(5e-3), fooled=.05), amp=amp, hooks=dict(step=lambda r: told.append({k: v.item() for k,v in r.task.terms.items()})))
    assert run.progress.skipped==0
    assert sum(o['error'] for o in told[-5:])<.5*sum(o['error'] for o in told[:5])
    assert sum(o['critic'] for o in told[-5:])/5<.95

def test_parts_of_a_batch_add_up():
    "Without the critic, whose voice is balanced in each part anew, the gradient is that of the whole batch."
    runs = [go(1, t=task(critic=False, optimiser=adamw(0.), lr=constant(0)), accumulate=k, clip=None) for k in (1, 2)]
    for p,q in zip(*(r.task.net.parameters() for r in runs)): torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-6)

def test_frozen_is_refused():
    with pytest.raises(ValueError, match='learn=True'): CodecTask(parts(learn=False)[0])

# --- what is left in the end
@pytest.mark.parametrize('critic', [True, False])
def test_codec_of_a_run(tmp_path, critic):
    "The folder that a run leaves: the average, frozen, of unit variance; a denoiser trains on its latents."
    run = go(3, tmp_path/'run', task(critic), hooks=dict(end=keep_codec(IMAGES.pixels)))
    codec = load(tmp_path/'run'/'codec')
    assert not any(p.requires_grad for p in codec.parameters())
    raw, avg = codec_of(run.task.net).state_dict(), run.emas['ema'].avg
    k = 'decoder.out.weight'
    assert torch.equal(codec.state_dict()[k], avg[f'codec.{k}' if critic else k]) and not torch.equal(codec.state_dict()[k], raw[k])
    with torch.no_grad(): z = codec.encode(IMAGES.pixels, Rng(0))
    assert abs(z.mean())<.01 and abs(z.std()-1)<.01
    net = create('dit_tiny', size=16, classes=9)
    latent = DiffusionTask(net, Gaussian('straight', 'flow'), codec)
    data = partial(batches, IMAGES, 4, Rng(0), transforms=[hflip, by_codec(codec)])
    assert math.isfinite(fit(latent, data, 1, averages={}, bar=False).last.loss)

def test_finished_gives_the_same_pictures():
    codec = parts()[0]
    done = finished(codec, IMAGES.pixels[:50])
    a, b = (reconstructed(o, IMAGES.pixels[:8]).int() for o in (codec, done))
    assert (a-b).abs().max()<=1 and done.scale!=1. and codec.scale==1.

def test_the_kept_run():
    "Held-out emoji at 24 decibels or better, above a linear code of the same size, in every category too."
    from pathlib import Path
    from diffnb.bench import kept
    rows = {r['what']: r for r in kept('vae', Path(__file__).resolve().parents[1]/'nbs/results')['rows']}
    own = [r for k,r in rows.items() if k.startswith('vae: ')]
    assert rows['vae']['n']==200==sum(r['n'] for r in own) and rows['vae']['value']>=24
    assert rows['vae']['value']>rows['linear code']['value'] and min(r['value'] for r in own)>=24
    assert abs(sum(r['value']*r['n'] for r in own)/200-rows['vae']['value'])<1e-6
