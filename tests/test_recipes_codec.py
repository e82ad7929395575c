"Recipes for autoencoders, from the command line, with tiny networks: train, go on, give back, measure, give away, and diffuse in their latents."
import json
from dataclasses import replace
from pathlib import Path
import numpy as np
import pytest
import torch
from diffnb import create, load, save
from diffnb.cli import main, open_model, weigh
from diffnb.data.images import emoji
from diffnb.recipes import build, check, consistent, read
from diffnb.recipes.codec import held_out, measure
from diffnb.rng import Rng
from diffnb.store import load_tensors, save_tensors
from diffnb.train.codec import NUMBERS, psnr
from shell import ask

TINY = '''
about: a tiny autoencoder
system: codec
model: {name: vae, widths: [8, 16], layers: 1, z: 4, groups: 4, scale: 1.0}
data: {set: emoji, transforms: [hflip, recolour]}
terms: {error: {name: pixel_error, l1: 0.2, l2: 1.0}, beta: 1.0e-5, critic: {name: patch_critic, width: 8, layers: 1}, start: 8, optimiser: adam, share: 0.5}
train: {steps: 4, batch: 4, log_every: 1, optimiser: {name: muon, decay: 0.0}, lr: {name: constant, lr: 3.0e-3}}
sample: {n: 16}
eval: {n: 30}
'''
LATENT = '''
model: {name: dit_tiny, size: 16, ch: 4, classes: 9}
data: {set: emoji, transforms: [hflip], latents: cache}
codec: {name: stored_codec, path: run}
train: {steps: 2, batch: 4, drop: 0.1, lr: {name: constant, lr: 1.0e-3}}
sample: {n: 2, steps: 2, sampler: euler}
'''

@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('vae.yaml').write_text(TINY); Path('latent.yaml').write_text(LATENT)
    return tmp_path

def test_the_whole_way(here, capsys):
    "A run leaves a codec that a latent recipe opens; pictures, numbers, and what is given away."
    code, out, err = ask('train vae.yaml --out run', capsys)
    assert code==0 and 'run has 4 steps, 16 samples' in out, err
    codec = load('run/codec')
    assert not any(p.requires_grad for p in codec.parameters())
    with torch.no_grad(): z = codec.encode(emoji().pixels[:300], Rng(0))
    assert abs(z.mean())<.1 and abs(z.std()-1)<.1
    # pictures: held-out ones, and what the run's averaged codec makes of them
    assert ask('sample run --out x.npz --n 5', capsys)[0]==0
    with np.load('x.npz') as f: x, y = f['x'], f['y']
    test = emoji('test').pixels
    assert x.shape==y.shape==(5, 32, 32, 3) and y.dtype==np.uint8
    assert (torch.from_numpy(x).permute(0, 3, 1, 2)==test[[0, 40, 80, 120, 160]]).all()
    with torch.no_grad(): theirs = codec.decode(codec.encode(test[[0, 40, 80, 120, 160]]))
    assert (torch.from_numpy(y).permute(0, 3, 1, 2).int()-theirs.int()).abs().max()<=1 # the scale rounds
    assert ask('sample run', capsys)[0]==0 and Path('samples.png').exists()
    # numbers
    code, out, err = ask('eval run', capsys)
    assert code==0 and out.startswith('psnr ') and 'detail' in out, err
    rows = [json.loads(o) for o in Path('run/eval.jsonl').read_text().splitlines()]
    some = test[torch.arange(30)*200//30]
    with torch.no_grad(): again = codec.decode(codec.encode(some))
    assert rows[0]['n']==30 and abs(rows[0]['value']-psnr(again, some).mean())<.05
    # given away: the weights with their recipe, and the codec beside them
    assert ask('export run --out away', capsys)[0]==0 and (load('away/codec').scale, load('away/codec').shift)==(codec.scale, codec.shift)
    assert ask('sample away --out z.npz --n 5', capsys)[0]==0
    with np.load('z.npz') as f: assert (f['y']==y).all()
    # a denoiser in its latents, from the run and from what was given away
    assert ask('train latent.yaml --out latent', capsys)[0]==0 and ask('sample latent --out s.npz', capsys)[0]==0
    with np.load('s.npz') as f: assert f['x'].shape==(2, 32, 32, 3)
    assert ask('train latent.yaml --out other --codec.path=away', capsys)[0]==0 # the same codec: its cache is taken
    a, b = (load_tensors(next(Path(o).glob('step-*2'))/'model.safetensors')[0] for o in ('latent', 'other'))
    assert all((v==b[k]).all() for k,v in a.items())

def test_goes_on_bit_for_bit(here):
    "4 steps are 2 and 2, with the critic entering after the second; and its optimiser is its own."
    assert main('train vae.yaml --out whole'.split())==0
    assert main('train vae.yaml --out two --train.steps=2'.split())==0 and main('train vae.yaml --out two'.split())==0
    a, b = (load_tensors(next(Path(o).glob('step-*4'))/'model.safetensors')[0] for o in ('whole', 'two'))
    assert a.keys()==b.keys() and all((a[k]==b[k]).all() for k in a) and any(k.startswith('critic.') for k in a)
    parts = build(check(read('vae.yaml'))).task
    opt = parts.optimiser(parts.net)
    assert [type(o).__name__ for o in opt.parts]==['Muon', 'Adam'] and {g['lr_share'] for g in opt.param_groups}=={1., .5}

def test_terms_reach_the_task(here, tmp_path):
    "Every key of `terms`; the perceptual network from files in LPIPS's form, with random weights."
    g = torch.Generator().manual_seed(0)
    ws, t = [3, 64, 64, 128, 128, *[256]*3, *[512]*6], {}
    for n,(a,b) in zip(NUMBERS, zip(ws, ws[1:])): t |= {f'features.{n}.weight': torch.randn(b, a, 3, 3, generator=g)*(2/(9*a))**.5, f'features.{n}.bias': torch.zeros(b)}
    t |= {f'lin{i}.model.1.weight': torch.rand(1, w, 1, 1, generator=g) for i,w in enumerate((64, 128, 256, 512, 512))}
    save_tensors(Path('lpips.safetensors'), t)
    more = ['--terms.perceptual={name: lpips, weights: lpips.safetensors}', '--terms.seen=.3', '--terms.fooled=.2', '--terms.beta=.01', '--terms.start=0']
    task = build(check(read('vae.yaml'), more)).task
    assert (task.beta, task.seen, task.fooled, task.start)==(.01, .3, .2, 0)
    x = dict(x=emoji().pixels[:2], idx=torch.arange(2))
    loss = task.loss(x, Rng(0)).value
    assert task.terms.keys()=={'error', 'kl', 'perceptual', 'fooled', 'critic'} and loss.isfinite().all()
    none = build(check(read('vae.yaml'), ['--terms.critic=null'])).task
    none.loss(x, Rng(0))
    assert none.terms.keys()=={'error', 'kl'} and none.net is none.codec
    missing = check(read('vae.yaml'), ['--terms.perceptual={name: lpips, weights: nowhere.pth}'])
    with pytest.raises(FileNotFoundError, match='nowhere.pth is not there'): build(missing)

def test_starts_from_weights(here, capsys):
    "`weights` and `stored_codec` both begin with somebody's codec; a run that is there does not ask for it again."
    torch.manual_seed(3)
    theirs = create('vae', 'codec', widths=[8, 16], layers=1, z=4, groups=4, scale=.5)
    save(theirs, 'theirs')
    for o in (['--weights=theirs'], ['--model={name: stored_codec, path: theirs}']):
        codec = build(check(read('vae.yaml'), o)).task.codec
        assert all(p.requires_grad for p in codec.parameters()) and all((v==theirs.state_dict()[k]).all() for k,v in codec.state_dict().items())
    assert ask('train vae.yaml --out run --weights=theirs --terms.critic=null', capsys)[0]==0
    Path('theirs').rename('gone')
    assert ask('sample run --out x.npz', capsys)[0]==0
    assert (weigh(open_model('run')).codec.decoder.out.weight!=theirs.decoder.out.weight).any()

def test_frechet(here):
    "Garments through the features that ship: decoded pictures are at a distance, the pictures themselves are not."
    more = ['--data.set=fashion_mnist', '--data.transforms=[]', '--model.ch=1', '--eval.n=200', '--eval.extractor=fashion_features', '--eval.metrics=[rfid, rkid, psnr]']
    r = check(read('vae.yaml'), more)
    task = build(r).task
    records, _ = measure(r, task)
    assert [o.metric for o in records]==['rfid', 'rkid', 'psnr'] and records[0].value>1 and records[0].n==records[0].n_reference==200
    task.codec.moments, task.codec.latents, task.codec.decode = (lambda x: x.float()), (lambda m, rng=None: m), (lambda z: z.byte())
    same, _ = measure(r, task)
    assert abs(same[0].value)<1e-3*records[0].value and same[2].value==float('inf')
    with pytest.raises(ValueError, match='50 samples are too few for 64 features'): measure(replace(r, eval=replace(r.eval, n=50)), task)

def test_held_out_pictures(here):
    "Of the test half; in turn where more are asked for."
    r = check(read('vae.yaml'))
    x = held_out(r, 203)
    assert (x[:200]==emoji('test').pixels).all() and (x[200:]==x[:3]).all()

WRONG = {
    'train vae.yaml --model=pixels': 'model pixels is no autoencoder',
    'train vae.yaml --model.name=dit_tiny': "no codec is called 'dit_tiny'",
    'train vae.yaml --data.set=fashion_mnist': 'takes 3 channels, and fashion_mnist has 1',
    'train vae.yaml --model.widths=[4,4,4,4,4,4,4]': 'multiples of 64, and emoji has 32x32',
    'train vae.yaml --terms.critic.layers=5': 'looks at larger parts than 32x32',
    'train vae.yaml --terms.beta=-1': 'terms.beta cannot be -1',
    'train vae.yaml --terms.critic.widht=3': "no argument 'widht' (did you mean 'width'?)",
    'train vae.yaml --data.transforms=[floats]': "no transform is called 'floats'",
    'train vae.yaml --train.drop=.1': 'a codec is told nothing',
    'train vae.yaml --codec=sd_vae': 'codec: a codec is trained alone',
    'train vae.yaml --eval.metrics=[rfid]': 'eval.extractor',
    'train vae.yaml --eval.metrics=[fid]': "eval.metrics cannot be 'fid'",
    'train vae.yaml --weights=nowhere': 'there is no folder nowhere',
    'train latent.yaml': 'codec.path: run is not there',
}
@pytest.mark.parametrize('words', WRONG)
def test_mistakes(words, here, capsys):
    code, out, err = ask(words, capsys)
    assert code==2 and WRONG[words] in err, err
    assert not Path('runs').exists()

def test_nothing_can_be_told_to_it(here, capsys):
    assert ask('train vae.yaml --out run --train.steps=1', capsys)[0]==0
    for words,why in {'--y 3': 'y: a codec', '--prompt cat': 'prompt: a codec', '--sampler ddim': 'a codec takes no steps', '--w 2': 'not guided'}.items():
        code, _, err = ask(f'sample run --out y.png {words}', capsys)
        assert code==2 and why in err, err
    for words in ('distill run --out few', 'sample run --out y.png --adapter run'):
        code, _, err = ask(words, capsys)
        assert code==2 and 'it has no denoiser' in err, err
    assert not Path('y.png').exists() and not Path('few').exists()

def test_what_ships_fits_together():
    "The latents of `emoji_vae` are what `emoji_latent` takes, and its codec is that recipe's usual run."
    vae, latent = consistent(read('emoji_vae')), consistent(read('emoji_latent'))
    assert latent.codec==dict(name='stored_codec', path='runs/emoji_vae') and latent.data.set==vae.data.set
    with torch.device('meta'): codec = create('vae', 'codec', **{k: v for k,v in vae.model.items() if k!='name'})
    assert (codec.z, 32//codec.factor)==(latent.model['ch'], latent.model['size'])
