"Cached latents: the same training steps as with the codec, nothing half there, and no folder of somebody else's."
import multiprocessing, shutil, signal, time
from functools import partial
import pytest, torch
from diffnb.codec.latents import NOTE, CachedLatents, by_cache, by_codec, cache_latents, codec_stamp, set_stamp
from diffnb.codec.vae import vae_tiny
from diffnb.core import create
from diffnb.data.files import folder as folder_of
from diffnb.data.images import Images, batches, emoji, hflip
from diffnb.process.gaussian import Gaussian
from diffnb.rng import Rng
from diffnb.store import Damaged, load_json, save_json
from diffnb.train.ema import halflife
from diffnb.train.loop import fit
from diffnb.train.task import DiffusionTask, constant

@pytest.fixture(scope='module')
def codec():
    "Weights at random, the spreads not small: a draw that differs is seen."
    g = torch.Generator().manual_seed(0)
    net = vae_tiny()
    for p in net.parameters(): p.data += .05*torch.randn(p.shape, generator=g)
    return net

@pytest.fixture(scope='module')
def images(): return emoji('test').take(torch.arange(40))

@pytest.fixture(scope='module')
def folder(codec, images, tmp_path_factory):
    where = tmp_path_factory.mktemp('latents')/'latents'
    cache_latents(images, codec, where, batch=16, shard=16) # of three files, the last not full
    return where

def train(images, codec, transforms, steps=6, workers=0, **kw):
    torch.manual_seed(0)
    net = create('dit_tiny', size=8, classes=9)
    with torch.no_grad(): # a new DiT's last layer is zero, so for a step or two only that would learn
        for k,p in net.named_parameters(): p.add_(.02*torch.randn(p.shape))
    task = DiffusionTask(net, Gaussian('straight', 'flow'), codec, drop=.2, lr=constant(1e-4))
    data = partial(batches, images, 8, Rng(0), transforms=transforms, workers=workers)
    losses = []
    run = fit(task, data, steps, averages=dict(ema=halflife(100)), bar=False, hooks=dict(step=lambda r: losses.append(r.last.loss)), **kw)
    return losses, run

def apart(a, b): return max((p-q).abs().max().item() for p,q in zip(a.task.net.parameters(), b.task.net.parameters()))

@pytest.mark.parametrize('draw,p,workers', [(True, .5, 0), (True, .5, 2), (False, 0., 0)])
def test_the_same_steps(images, codec, folder, draw, p, workers):
    """Two epochs begun: 48 samples of 40 pictures. Losses and weights agree to 1e-6, flips and draws included. (The codec sees
    other batches when it caches, so the last bit of a latent may differ; Adam, which divides by the gradient's size, makes the most of it.)"""
    la, a = train(images, codec, [partial(hflip, p=p), by_codec(codec, draw)])
    lb, b = train(images, codec, [CachedLatents(folder, codec, images, draw, p)], workers=workers)
    assert len(la)==6 and max(abs(x-y) for x,y in zip(la, lb))<1e-6
    assert apart(a, b)<1e-6
    assert not any(q.grad is not None for q in codec.parameters())

def test_the_same_steps_is_not_trivial(images, codec, folder):
    "What the equality would see: no flips, no draws, the pictures in another order."
    la, _ = train(images, codec, [partial(hflip, p=.5), by_codec(codec)])
    for kw in (dict(p=0.), dict(p=.5, draw=False)):
        lb, _ = train(images, codec, [CachedLatents(folder, codec, images, **kw)])
        assert max(abs(x-y) for x,y in zip(la, lb))>1e-3
    kept = CachedLatents(folder, codec, images)
    a, b = (kept(dict(sample=torch.tensor([i]), idx=torch.tensor([0])), Rng(0).of([0]))['z'] for i in (0, 1))
    assert (a-b).abs().max()>.01

def test_every_picture_is_its_own(images, codec, folder):
    "Moments of all pictures and mirror images, across the files, against the codec picture by picture."
    kept = CachedLatents(folder, codec, images, draw=False)
    for i in (0, 1, 15, 16, 31, 32, 39):
        with torch.no_grad():
            for side,x in (('plain', images.pixels[i:i+1]), ('mirrored', images.pixels[i:i+1].flip(-1))):
                assert (kept.moments(i, side)-codec.moments(x)).abs().max()<1e-5

def test_stops_and_goes_on(images, codec, folder, tmp_path):
    t = [CachedLatents(folder, codec, images, p=.5)]
    _, whole = train(images, codec, t)
    train(images, codec, t, 3, folder=tmp_path/'run')
    _, parts = train(images, codec, t, 6, folder=tmp_path/'run')
    assert apart(whole, parts)==0

def test_one_number_of_the_codec(images, codec, folder):
    "Weights that differ in one place, another scale, other layers: all refused."
    one = vae_tiny()
    one.load_state_dict(codec.state_dict())
    assert codec_stamp(one)==codec_stamp(codec)
    CachedLatents(folder, one, images)
    one.decoder.out.bias.data[0] += 1e-3
    scaled = create('vae', kind='codec', **{**codec.sizes, 'scale': .5})
    scaled.load_state_dict(codec.state_dict())
    for other in (one, scaled, vae_tiny(z=3)):
        with pytest.raises(ValueError, match='made by another codec.*take another folder, or delete it'): CachedLatents(folder, other, images)
    with pytest.raises(ValueError, match='another codec'): by_cache(images, one, folder) # not replaced either
    CachedLatents(folder, codec, images)

def test_other_pictures(images, codec, folder):
    other = Images(images.pixels.clone(), names=images.names)
    CachedLatents(folder, codec, other)
    other.pixels[-1,0,0,0] ^= 1
    renamed = Images(images.pixels, names=[*images.names[:-1], 'else'])
    for o in (other, renamed, images.take(torch.arange(39)), images.take(torch.arange(40).flip(0))):
        with pytest.raises(ValueError, match='from other pictures'): CachedLatents(folder, codec, o)

@pytest.mark.parametrize('spoil', ['manifest.json', NOTE, 'moments-00001.safetensors', 'shorter', 'format'])
def test_damaged(images, codec, folder, tmp_path, spoil):
    bad = tmp_path/'bad'
    shutil.copytree(folder, bad)
    if spoil=='shorter': (bad/'moments-00000.safetensors').write_bytes((bad/'moments-00000.safetensors').read_bytes()[:-1])
    elif spoil=='format': save_json(bad/NOTE, {**load_json(bad/NOTE), 'format': 2})
    else: (bad/spoil).unlink()
    with pytest.raises(Damaged): CachedLatents(bad, codec, images)

def test_one_bit(images, codec, folder, tmp_path):
    "A file is looked at, byte by byte, when it is first read from."
    bad = tmp_path/'bad'
    shutil.copytree(folder, bad)
    kept, f = CachedLatents(bad, codec, images), bad/'moments-00001.safetensors'
    raw = f.read_bytes()
    f.write_bytes(raw[:-1]+bytes([raw[-1]^1]))
    kept.moments(0, 'plain')
    with pytest.raises(Damaged, match='moments-00001.* not as it was written: delete'): kept.moments(kept.shard, 'plain')

def test_refused_before_any_work(images, tmp_path):
    with pytest.raises(ValueError, match='codec is trained.*freeze it'): cache_latents(images, vae_tiny(learn=True), tmp_path/'a')
    with pytest.raises(ValueError, match='has no images'): cache_latents(Images(images.pixels[:0], source='none'), vae_tiny(), tmp_path/'a')
    assert list(tmp_path.iterdir())==[]

def test_missing_picture(images, codec, tmp_path):
    "A file that went away after the set was opened: its name, once, and no folder."
    from PIL import Image
    (tmp_path/'set').mkdir()
    for i in range(6): Image.fromarray(images.pixels[i].permute(1, 2, 0).numpy()).save(tmp_path/'set'/f'{i}.png')
    ds = folder_of(tmp_path/'set', limit=0)
    (tmp_path/'set/4.png').unlink()
    with pytest.raises(ValueError, match='4.png cannot be read'): by_cache(ds, codec, tmp_path/'latents')
    assert [p.name for p in tmp_path.iterdir()]==['set']

class Slow:
    "Pixels that take their time."
    def __init__(self, pixels): self.all, self.shape = pixels, pixels.shape
    def __getitem__(self, i):
        time.sleep(.05)
        return self.all[i]

class Set:
    source, names = 'slow', None
    def __init__(self, pixels): self.pixels = pixels

def work(images, codec, folder):
    torch.set_num_threads(1)
    cache_latents(Set(Slow(images.pixels)), codec, folder, batch=4, shard=8)

def test_killed_in_the_middle(images, codec, tmp_path):
    "kill -9 after the first files are written: no folder; the next one cleans up, and is whole."
    where = tmp_path/'latents'
    p = multiprocessing.get_context('fork').Process(target=work, args=(images, codec, where))
    p.start()
    limit = time.monotonic()+60
    while not list(tmp_path.glob('.tmp-*/moments-00001.safetensors')) and time.monotonic()<limit: time.sleep(.002)
    p.kill()
    p.join()
    assert p.exitcode==-signal.SIGKILL and [o.name[:5] for o in tmp_path.iterdir()]==['.tmp-']
    with pytest.raises(Damaged): CachedLatents(where, codec, images)
    kept = by_cache(images, codec, where)
    assert [o.name for o in tmp_path.iterdir()]==['latents'] and kept.moments(39, 'plain').shape==(1, 8, 8, 8)

def test_stamp_looks_at_few(images):
    "Of a large set some pictures are read, not all."
    class Counting(Slow):
        n = 0
        def __getitem__(self, i): self.n += len(i); return self.all[i]
    o = Set(Counting(images.pixels))
    set_stamp(o)
    assert o.pixels.n<=16
