"The VAE against its equations: blocks, summed kernels, tiles, moments, precision, memory."
import math, os, subprocess, sys
import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from diffnb.bench.flux import Alive
from diffnb.codec.core import Pixels
from diffnb.codec.vae import VAE, Down, Look, ResBlock, Up, blends, kl, smear, spans, tiled, vae_tiny
from diffnb.core import create
from diffnb.process.gaussian import Gaussian
from diffnb.rng import Rng
from diffnb.train.task import DiffusionTask

F64 = torch.float64
def gen(seed=0): return torch.Generator().manual_seed(seed)
def normal(*s, seed=0): return torch.randn(*s, generator=gen(seed), dtype=F64)
def diff(a, b): return (a-b).abs().max().item()
def randomised(net, seed=0):
    g = gen(seed)
    for p in net.parameters():
        n = p[0].numel()**-.5 if p.ndim>1 else .2
        p.data = n*torch.randn(p.shape, generator=g, dtype=F64)+(p.ndim==1 and bool((p==1).all()))
    return net.double()
def tiny(**kw): return randomised(vae_tiny(**kw))
def bytes_(*s, seed=0): return torch.randint(256, s, generator=gen(seed), dtype=torch.uint8)

# --- blocks, written out
def gn(m, x):
    h = x.reshape(len(x), m.num_groups, -1)
    h = ((h-h.mean(-1, keepdim=True))/(h.var(-1, correction=0, keepdim=True)+1e-6).sqrt()).view_as(x)
    return h*m.weight[:,None,None]+m.bias[:,None,None]
def swish(x): return x*x.sigmoid()
def conv(m, x, pad=1): return F.conv2d(x, m.weight, m.bias, padding=pad)

@pytest.mark.parametrize('cout', [8, 16])
def test_res_block_by_hand(cout):
    m, x = randomised(ResBlock(8, cout, 4)), normal(2, 8, 5, 6)
    h = conv(m.conv2, swish(gn(m.norm2, conv(m.conv1, swish(gn(m.norm1, x))))))
    want = h+(x if cout==8 else conv(m.skip, x, 0))
    assert diff(m(x), want)<1e-10
    with torch.no_grad(): assert diff(m(x), want)<1e-10

def test_attention_by_hand():
    m, x = randomised(Look(8, 4)), normal(2, 8, 3, 5)
    h = gn(m.norm, x).flatten(2).mT
    q, k, v = (h@m.attn.qkv.weight.T+m.attn.qkv.bias).chunk(3, -1)
    o = torch.softmax(q@k.mT/8**.5, -1)@v@m.attn.proj.weight.T+m.attn.proj.bias
    assert diff(m(x), x+o.mT.reshape(x.shape))<1e-10

def test_down_is_padded_right_and_below():
    m, x = randomised(Down(4)), normal(2, 4, 6, 8)
    wide = torch.zeros(2, 4, 7, 9, dtype=F64)
    wide[:,:,:6,:8] = x
    want = F.conv2d(wide, m.conv.weight, m.conv.bias)[:,:,::2,::2]
    assert diff(m(x), want)<1e-12 and m(x).shape==(2, 4, 3, 4)

@settings(max_examples=30, deadline=None)
@given(h=st.integers(1, 7), w=st.integers(1, 7), cin=st.integers(1, 3), cout=st.integers(1, 3), seed=st.integers(0, 99))
def test_summed_kernel(h, w, cin, cout, seed):
    "Enlarging and convolving, borders included, is the transposed convolution with the smeared kernel."
    x, k = normal(2, cin, h, w, seed=seed), normal(cout, cin, 3, 3, seed=seed+1)
    want = F.conv2d(F.interpolate(x, scale_factor=2, mode='nearest'), k, padding=1)
    assert diff(F.conv_transpose2d(x, smear(k), stride=2, padding=1), want)<1e-12

def test_gradients_through_the_summed_kernel():
    m, x = randomised(Up(4)), normal(1, 4, 3, 3).requires_grad_()
    def grads(f): return torch.autograd.grad(f(x).square().sum(), [x, m.conv.weight, m.conv.bias])
    want = grads(lambda x: m.conv(F.interpolate(x, scale_factor=2, mode='nearest')))
    assert all(diff(a, b)<1e-10 for a,b in zip(grads(m), want))

def test_structure_by_hand():
    "The whole decoder and encoder from their parts, in order."
    v = tiny()
    def through(x, blocks):
        for b in blocks: x = b(x)
        return x
    d, e, z, x = v.decoder, v.encoder, normal(1, 4, 4, 4), normal(1, 3, 8, 12)
    h = through(conv(d.stem, conv(d.quant, z, 0)), d.mid)
    assert [len(s) for s in d.stages]==[2, 2, 2] and [len(s) for s in e.stages]==[1, 1, 1]
    for i in range(3):
        h = through(h, d.stages[i])
        if i<2: h = d.up[i](h)
    assert diff(d(z), conv(d.out, swish(gn(d.norm, h))))<1e-10
    h = conv(e.stem, x)
    for i in range(3):
        h = through(h, e.stages[i])
        if i<2: h = e.down[i](h)
    assert diff(e(x), conv(e.quant, conv(e.out, swish(gn(e.norm, through(h, e.mid)))), 0))<1e-10

def test_every_parameter_learns_and_overwriting_harms_no_gradient():
    v = tiny(learn=True)
    x = bytes_(2, 3, 8, 8)
    m = v.moments(x)
    v.images(v.latents(m, Rng(0))).square().mean().backward()
    assert [k for k,p in v.named_parameters() if p.grad is None or not p.grad.any()]==[]

def test_gradient_mode_and_memory_format_change_nothing():
    v, z = tiny(), normal(2, 4, 4, 6)
    want = v.images(z)
    with torch.inference_mode(): assert diff(v.images(z), want)<1e-12
    assert diff(v.images(z.contiguous(memory_format=torch.channels_last)), want)<1e-12
    before = z.clone()
    with torch.no_grad(): v.images(z)
    assert torch.equal(z, before)

# --- the codec
def test_frozen_unless_asked():
    assert not any(p.requires_grad for p in vae_tiny().parameters()) and all(p.requires_grad for p in vae_tiny(learn=True).parameters())

def test_encode_is_the_scaled_mean():
    v = VAE((8, 16), 1, 4, 4, scale=.3, shift=.7)
    x = bytes_(2, 3, 8, 8)
    m = v.moments(x)
    assert m.shape==(2, 8, 4, 4) and torch.equal(v.encode(x), (m[:,:4]-.7)*.3)
    want = v.decoder(v.encode(x)/.3+.7)
    assert diff(v.images(v.encode(x)), want)<1e-6 and torch.equal(v.decode(v.encode(x)), Pixels().decode(v.images(v.encode(x))))
    assert torch.equal(v.moments(x/255.), m)

def test_draws():
    "Mean and spread are those of the moments, log-variance clamped; a draw belongs to its sample."
    v = vae_tiny()
    m = torch.cat([torch.full((400, 4, 5, 5), 2.), torch.full((400, 4, 5, 5), math.log(.25))], 1)
    z = v.latents(m, Rng(3))
    assert abs(z.mean()-2)<.02 and abs(z.std()-.5)<.01 # 40,000 draws: their mean has sd .0025
    assert torch.equal(v.latents(m[3:5], Rng(3).of([3, 4])), z[3:5]) and not torch.equal(v.latents(m, Rng(4)), z)
    for logvar,want in ((-1000., math.exp(-15)), (1000., math.exp(10))):
        m[:,4:] = logvar
        assert abs((v.latents(m, Rng(3))-2).std()/want-1)<.05 or want<1e-6 and (v.latents(m, Rng(3))-2).abs().max()<1e-5

def test_kl():
    "Against torch's own for two normal laws."
    m = normal(2, 6, 3, 3)
    mean, logvar = m.chunk(2, 1)
    N = torch.distributions.Normal
    want = torch.distributions.kl_divergence(N(mean, (logvar/2).exp()), N(torch.zeros_like(mean), torch.ones_like(mean)))
    assert diff(kl(m), want)<1e-12

def test_in_a_task():
    "A frozen autoencoder trains no weight of its own; latents from the cache give the same loss as pictures."
    class Zero(nn.Module):
        "Always zero, with one weight."
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(()))
        def forward(self, x, net_t, **cond): return x*self.w
    v = vae_tiny()
    task = DiffusionTask(Zero(), Gaussian('straight', 'flow'), codec=v)
    assert [k for k,_ in task.net.named_parameters()]==['w'] and torch.equal(task.codec.encode(bytes_(1, 3, 8, 8)), v.encode(bytes_(1, 3, 8, 8)))

@pytest.mark.parametrize('shape,words', [((3, 8, 8), 'b,c,h,w'), ((1, 3, 10, 8), 'multiples of 4'), ((1, 3, 8, 6), 'multiples of 4')])
def test_pictures_that_do_not_fit(shape, words):
    with pytest.raises(ValueError, match=words): vae_tiny().moments(bytes_(*shape))

def test_other_things_that_do_not_fit():
    v = vae_tiny()
    with pytest.raises(ValueError, match=r'\(b,4,h,w\)'): v.decode(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match='0,1'): v.encode(torch.full((1, 3, 8, 8), -.5))
    with pytest.raises(ValueError, match='groups do not divide'): VAE((8, 12), groups=8)
    with pytest.raises(ValueError, match='NaN'): v.decode(torch.full((1, 4, 2, 2), torch.nan))

# --- precision
def overflowing():
    "A decoder whose first convolution leaves float16's range; the normalisation behind it takes the factor out again."
    v = randomised(vae_tiny()).float()
    for b in v.decoder.stages[0]: b.conv1.weight.data *= 2e5
    return v

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    v, z = overflowing(), torch.randn(1, 4, 4, 4, generator=gen())
    want = v.to(dtype).float().images(z) # of the rounded weights
    half = v.to(dtype)
    got = half.images(z)
    assert got.dtype==torch.float32 and torch.equal(got, want)
    assert {p.dtype for p in half.parameters()}=={dtype} # and the weights stay as they are
    with torch.autocast('cpu', torch.bfloat16): assert torch.equal(half.images(z), want)
    half.upcast = False
    assert half.images(z).dtype==dtype
    if dtype==torch.float16: assert not half.images(z).isfinite().all() # what would have come of it

def test_encoding_in_half_precision():
    v, x = randomised(vae_tiny()).float(), bytes_(1, 3, 8, 8)
    want = v.half().float().moments(x)
    assert torch.equal(v.half().moments(x), want)

# --- tiles
@settings(max_examples=200, deadline=None)
@given(n=st.integers(1, 300), tile=st.integers(1, 80), overlap=st.integers(0, 79))
def test_spans(n, tile, overlap):
    "The whole is covered in order by spans of one length within the bound, neighbours overlap enough, none is superfluous."
    if overlap>=tile and n>tile:
        with pytest.raises(ValueError, match='cannot overlap'): spans(n, tile, overlap)
        return
    s = spans(n, tile, overlap)
    assert s[0][0]==0 and s[-1][1]==n and len({b-a for a,b in s})==1
    assert s[0][1]<=max(tile, 0) or s==[(0, n)] and n<=tile
    assert all(b-c>=overlap for (_,b),(c,_) in zip(s, s[1:])) and all(a<c for (a,_),(c,_) in zip(s, s[1:]))
    if len(s)>1: assert (len(s)-1)*tile-(len(s)-2)*overlap<n # one fewer would not do

@settings(max_examples=100, deadline=None)
@given(n=st.integers(1, 120), tile=st.integers(2, 40), overlap=st.integers(0, 39), factor=st.sampled_from([1, 2, 8]))
def test_blends_add_up(n, tile, overlap, factor):
    if overlap>=tile: return
    s, total = spans(n, tile, overlap), torch.zeros(n*factor, dtype=F64)
    for (a,b),w in zip(s, blends(s, factor, total)):
        assert len(w)==(b-a)*factor and (w>=0).all()
        total[factor*a:factor*b] += w
    assert diff(total, torch.ones_like(total))<1e-12

def test_tiles_change_nothing_where_nobody_looks_around():
    z = normal(2, 4, 23, 37)
    def f(z): return F.interpolate(z, scale_factor=8, mode='nearest')
    for tile,overlap in ((8, 2), (8, 7), (16, 0), (64, 4), (0, 0)): assert diff(tiled(f, z, tile, overlap, 8), f(z))<1e-12

def test_tiles_of_convolutions_are_exact_beyond_their_reach():
    "Two 3x3 convolutions see 2 pixels: where a tile's weight is 0 nearer to its border than that, tiles are exact."
    net = randomised(nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1)))
    z = normal(1, 4, 8, 40)
    err = (tiled(net, z, 16, 8, 2)-net(z)).abs().amax((0, 1, 2))
    cuts = spans(40, 16, 8)
    edges = {p for a,b in cuts for e in (a, b) if 0<e<40 for p in range(2*e-2, 2*e+2)}
    assert {i for i in range(80) if err[i]>1e-12}<=edges and err.max()>0

def test_tiles_are_small_and_seams_are_blended():
    "Each call sees a tile within the bound; the step at the borders is smaller with overlap than without."
    v = randomised(vae_tiny())
    z, sizes = F.interpolate(normal(1, 4, 3, 3), size=(24, 24), mode='bilinear'), []
    whole = v.images(z)
    v.decoder.register_forward_pre_hook(lambda m, a: sizes.append(tuple(a[0].shape[2:])))
    def step(overlap):
        v.tile, v.overlap = 8, overlap
        e = v.images(z)-whole
        return (e[...,32::32]-e[...,31:-1:32]).abs().mean()
    plain, blended = step(0), step(4)
    assert max(max(s) for s in sizes)==8 and len(sizes)==9+25 and blended<.7*plain

def test_one_at_a_time():
    v, z, seen = tiny(), normal(5, 4, 2, 2), []
    want = v.images(z)
    v.decoder.register_forward_pre_hook(lambda m, a: seen.append(len(a[0])))
    v.at_once = 2
    assert diff(v.images(z), want)<1e-12 and seen==[2, 2, 1]
    v.at_once = 0
    assert diff(v.images(z), want)<1e-12 and seen[3:]==[5]

# --- sizes and memory
def test_published_counts():
    "Spec 3.2, 4.2; encoder and decoder without the 1x1 convolutions are in test_hub_flux."
    with torch.device('meta'):
        got = {k: sum(p.numel() for p in create(k, kind='codec').parameters()) for k in ('sd_vae', 'sdxl_vae', 'flux_vae')}
    assert got==dict(sd_vae=83_653_863, sdxl_vae=83_653_863, flux_vae=83_819_683)

# --- memory
def peak(name, side, tile, at_once=0, b=1):
    "Bytes of all tensors that are alive at once while a batch is decoded, at most: counted without the bytes."
    with torch.device('meta'), torch.no_grad():
        v = create(name, kind='codec')
        v.tile, v.overlap, v.at_once = tile, tile//4, at_once
        z = torch.empty(b, v.z, side, side)
        with Alive() as alive: v.images(z)
    return alive.peak

@pytest.mark.parametrize('name', ['sd_vae', 'sdxl_vae', 'flux_vae'])
def test_tiles_take_a_third_of_the_memory(name):
    "At 1024x1024, tiles of at most 64 latents."
    assert peak(name, 128, 64)<peak(name, 128, 0)/3

def test_memory_of_tiles_does_not_grow_with_the_picture():
    "But for the picture itself; and one sample at a time takes less than all."
    whole, picture = peak('vae_tiny', 64, 0), 3*16*4*64**2 # bytes
    small, large = peak('vae_tiny', 64, 16), peak('vae_tiny', 128, 16)
    assert small<whole/3 and 3*picture<=large-small<8*picture
    assert peak('vae_tiny', 64, 0, b=4)>3.5*whole and peak('vae_tiny', 64, 0, 1, b=4)<whole+4*picture+1e5

def test_bytes_are_counted():
    with Alive() as m:
        a = torch.zeros(1000)
        b = a+1
        del a
        c = b.view(10, 100).mul_(2) # in place: no new memory
        d = c+1
    assert m.trace==[0, 4000, 8000, 8000] and m.now==8000 and d.shape==c.shape

GROWN = '''
import resource, sys, torch
from diffnb.core import create
torch.set_num_threads(1)
def most(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024
v = create('sd_vae', kind='codec')
with torch.inference_mode():
    v.images(torch.zeros(1, v.z, 2, 2)) # what loads at the first use is not the picture's
    before, v.tile = most(), int(sys.argv[1])
    v.images(torch.zeros(1, v.z, 128, 128))
print(most()-before)
'''
@pytest.mark.slow
def test_tiles_in_a_real_process():
    "At 1024x1024 the most memory that a process ever has grows by a third, what the library of convolutions borrows included."
    env = {**os.environ, 'DIFFNB_TYPECHECK': '0'}
    def grown(tile): return int(subprocess.run([sys.executable, '-c', GROWN, str(tile)], check=True, capture_output=True, text=True, env=env).stdout)
    assert 2**20<grown(64)<grown(0)/3
