"Stable Diffusion's U-Net against its equations and published sizes, with random weights."
import os, subprocess, sys
import pytest, torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from diffnb.core import create
from diffnb.models.unet import Conv3, CrossAttention, Encoder, Resnet, Transformer, UNet, sd_unet_tiny, sdxl_unet_tiny
from diffnb.process.gaussian import Gaussian
from diffnb.samplers import ddim, sample

F64 = torch.float64
def gen(seed=0): return torch.Generator().manual_seed(seed)
def normal(*s, seed=0, dtype=F64): return torch.randn(*s, generator=gen(seed), dtype=dtype)
def diff(a, b): return (a-b).abs().max().item()
def randomise(net, seed=0, std=None):
    "Weights of a size that keeps activations near 1, so that no part is lost beside another."
    g = gen(seed)
    for p in net.parameters():
        n = p[0].numel() if p.ndim>1 else 1
        p.data = (std or n**-.5 if p.ndim>1 else .2)*torch.randn(p.shape, generator=g, dtype=F64)+(p.ndim==1 and bool((p==1).all()))
    return net.double().eval()
def wide(o): return o.double() if torch.is_tensor(o) and o.is_floating_point() else o
def inputs(net, b=2, seed=0):
    x,t,cond = net.demo(b, seed)
    return x.double(),t,{k: wide(v) for k,v in cond.items()}
def small(**kw): return randomise(UNet(**{**dict(size=8, widths=(16,24), layers=1, depth=(1,1), heads=2, ctx=12, groups=4), **kw}))
@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad(): yield

# --- published sizes: spec 3, check 1
PUBLISHED = {'sd15_unet': (859_520_964, 686, 401.6), 'sd21_unet': (865_910_724, 686, 1074.6), 'sdxl_unet': (2_567_463_684, 1680, 3380.6)}

@pytest.mark.parametrize('name', PUBLISHED)
def test_published(name):
    "Parameters and tensors to the last digit; multiply-accumulates at the size of training, 77 words, within 0.5 %."
    n,tensors,gmac = PUBLISHED[name]
    with torch.device('meta'):
        net = create(name)
        cond = dict(ctx=torch.empty(1, 77, net.enc.ctx))
        if net.enc.added: cond |= dict(vec=torch.empty(1, 1280), ids=torch.empty(1, 6))
        with FlopCounterMode(display=False) as f: net(torch.empty(1, 4, net.size, net.size), torch.empty(1), **cond)
    assert sum(p.numel() for p in net.parameters())==n and len(net.state_dict())==tensors
    assert abs(f.get_total_flops()/2e9/gmac-1)<.005

def test_counts_of_the_small_ones():
    "Spec 3, checks 2 and 3."
    kw = dict(widths=(32,64), ctx=24, groups=8)
    for n,net in ((1_102_628, UNet(**kw, depth=(1,0), heads=4)),
                  (1_913_028, UNet(**kw, depth=(0,2), mid=2, heads=(2,4), added=64, freqs=8, linear=True))):
        assert sum(p.numel() for p in net.parameters())==n

@pytest.mark.parametrize('extra', [1, 4, 5])
def test_extra_channels(extra):
    net = sd_unet_tiny(extra=extra)
    x,t,cond = net.demo(2)
    assert net(x, t, **cond).shape==x.shape and cond['concat'].shape[1]==extra
    assert diff(net(x, t, **{**cond, 'concat': cond['concat'].flip(0)}), net(x, t, **cond))>1e-3

# --- convolutions
class Ops(TorchDispatchMode):
    "The names of the operations that run."
    def __enter__(self):
        self.names = []
        return super().__enter__()
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__.split('.')[0])
        return func(*args, **(kwargs or {}))

BIG = Conv3(912, 1040) # 34 MB of weights
@pytest.mark.parametrize('last', [False, True])
@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('size', [(2,2), (7,9), (1,5)])
def test_conv_of_few_positions(size, stride, last):
    "One matrix product, in either order of memory, is the convolution; the result keeps that order."
    m = Conv3(912, 1040, stride)
    m.load_state_dict(BIG.state_dict())
    x = normal(2, 912, *size, dtype=torch.float32)
    if last: m,x = m.to(memory_format=torch.channels_last),x.contiguous(memory_format=torch.channels_last)
    with Ops() as ops: y = m(x)
    assert 'convolution' not in ops.names and 'addmm' in ops.names
    assert not any(o in ops.names for o in ('to', '_to_copy'))
    assert diff(y, F.conv2d(x, BIG.weight, BIG.bias, stride, 1))<1e-5
    if y.shape[2]>1 and y.shape[3]>1: assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)

def test_conv_of_many_positions_or_few_weights():
    for m,x in ((BIG, normal(1, 912, 16, 16, dtype=torch.float32)), (Conv3(8, 16), normal(1, 8, 2, 2, dtype=torch.float32))):
        with Ops() as ops: m(x)
        assert 'convolution' in ops.names and 'addmm' not in ops.names

def test_conv_gradient():
    "Both ways give the same gradients."
    with torch.enable_grad():
        x = normal(1, 912, 3, 3, dtype=torch.float32)
        got = []
        for f in (BIG, lambda o: F.conv2d(o, BIG.weight, BIG.bias, padding=1)):
            a = x.clone().requires_grad_()
            got.append(torch.autograd.grad(f(a).square().sum(), (a, BIG.weight, BIG.bias)))
    assert all(diff(a, b)<1e-4*b.abs().max() for a,b in zip(*got))

# --- the equations
def test_resnet_is_its_equation():
    m = randomise(Resnet(8, 12, 16, 4, 1e-5))
    x,c = normal(2, 8, 5, 5),normal(2, 16, seed=1)
    h = F.conv2d(F.silu(F.group_norm(x, 4, m.norm1.weight, m.norm1.bias, 1e-5)), m.conv1.weight, m.conv1.bias, padding=1)
    h = h+F.linear(c, m.time.weight, m.time.bias).view(2, 12, 1, 1)
    h = F.conv2d(F.silu(F.group_norm(h, 4, m.norm2.weight, m.norm2.bias, 1e-5)), m.conv2.weight, m.conv2.bias, padding=1)
    assert diff(m(x, c), F.conv2d(x, m.skip.weight, m.skip.bias)+h)<1e-12

def test_cross_attention_is_its_equation():
    m = randomise(CrossAttention(12, 3, 8))
    x,ctx = normal(2, 9, 12),normal(2, 5, 8, seed=1)
    out = torch.zeros(2, 9, 12, dtype=F64)
    for h in range(3):
        s = slice(4*h, 4*h+4)
        q,k,v = x@m.q.weight[s].T,ctx@m.k.weight[s].T,ctx@m.v.weight[s].T
        out[...,s] = (q@k.mT/2).softmax(-1)@v
    assert diff(m(x, m.keys(ctx)), m.out(out))<1e-12
    with pytest.raises(ValueError, match='3 heads do not divide'): CrossAttention(16, 3)

def test_transformer_is_its_equation():
    m = randomise(Transformer(12, 3, 2, 8, 4))
    x,ctx = normal(2, 12, 3, 4),normal(2, 5, 8, seed=1)
    h = m.norm(x).permute(0, 2, 3, 1).reshape(2, 12, 12)@m.proj_in.weight.T+m.proj_in.bias
    for b in m.blocks:
        n = b.norm1(h); h = h+b.attn(n, b.attn.keys(n))
        h = h+b.cross(b.norm2(h), b.cross.keys(ctx))
        u = b.up(b.norm3(h)); h = h+b.down(u[...,:48]*F.gelu(u[...,48:]))
    assert diff(m(x, m.keys(ctx)), x+m.proj_out(h).reshape(2, 3, 4, 12).permute(0, 3, 1, 2))<1e-12

@pytest.mark.parametrize('kw', [dict(), dict(layers=(2,1,3)), dict(depth=(0,0,2), mid=0), dict(widths=(16,), depth=1, layers=3)])
def test_maps(kw):
    "The way down leaves the maps that `maps` names, each stage at half the side."
    e = randomise(Encoder(**{**dict(ch=4, widths=(8,16,24), layers=1, depth=1, heads=2, ctx=12, groups=4), **kw}))
    x = normal(2, 4, 16, 16)
    maps = e(x, e.token(torch.tensor([7.], dtype=F64)), e.keys(normal(2, 5, 12)))
    assert [tuple(m.shape[1:]) for m in maps]==e.maps(16, 16)
    sides = [16, *(16>>i+(j==l) for i,l in enumerate(e.layers) for j in range(l+(i<len(e.layers)-1)))]
    assert [m.shape[2] for m in maps[:-1]]==sides and maps[-1].shape==maps[-2].shape

# --- the contract
@pytest.mark.parametrize('make', [sd_unet_tiny, sdxl_unet_tiny])
def test_prepared_once(make):
    "A prepared step makes no key, no value and no added embedding again, and gives the same, bit for bit."
    net = randomise(make())
    x,t,cond = inputs(net)
    ready,calls = net.prepare(**cond),[]
    for n,m in net.named_modules():
        if n.endswith(('cross.k', 'cross.v', 'enc.vec')): m.register_forward_hook(lambda *a, n=n: calls.append(n))
    y = net(x, t, **ready)
    assert calls==[]
    assert torch.equal(net(x, t, **cond), y) and len(calls)==2*sum('cross.k' in n for n,_ in net.named_parameters())+(net.enc.vec is not None)
    again = net.prepare(**ready)
    assert again.keys()==ready.keys() and all(again[k] is ready[k] for k in ready)

def test_one_time_for_all_samples():
    "A time of batch 1 stands for the batch, and its embedding is of batch 1."
    net,seen = small(),[]
    x,t,cond = inputs(net)
    net.enc.time.register_forward_hook(lambda m,i,o: seen.append(len(o)))
    assert diff(net(x, t[:1], **cond), net(x, t[:1].expand(2), **cond))<1e-12 and seen==[1, 2]

def test_one_text_for_all_samples():
    net = small()
    x,t,cond = inputs(net)
    one = {'ctx': cond['ctx'][:1]}
    assert diff(net(x, t, **one), net(x, t, ctx=one['ctx'].expand(2, -1, -1)))<1e-12
    assert len(net.prepare(**one)['kv'][0][0][0][0])==1

def test_mask():
    "Words that do not exist are not looked at; the others are, in any order."
    net = small()
    x,t,cond = inputs(net)
    ctx,mask = cond['ctx'],torch.arange(7)[None]<torch.tensor([[4],[7]])
    y = net(x, t, ctx=ctx, ctx_mask=mask)
    assert diff(y[:1], net(x[:1], t[:1], ctx=ctx[:1,:4]))<1e-12 and diff(y[1:], net(x[1:], t[1:], ctx=ctx[1:]))<1e-12
    assert diff(net(x, t, ctx=ctx.flip(1), ctx_mask=mask.flip(1)), y)<1e-12
    assert diff(net(x, t, ctx=ctx), y)>1e-4

@pytest.mark.parametrize('make', [sd_unet_tiny, sdxl_unet_tiny])
def test_no_text_is_zeros(make):
    net = randomise(make())
    x,t,cond = inputs(net)
    none = net.null(x, ctx_mask=torch.ones(2, 7, dtype=torch.bool), **cond)[1]
    zeros = {k: 0*v if k in ('ctx', 'vec') else v for k,v in cond.items()}
    assert diff(net(x, t, **none), net(x, t, **zeros))<1e-12
    assert diff(net(x, t, **none), net(x, t, **cond))>1e-3
    if net.enc.added: assert diff(net(x, t, **none), net(x, t, **{**none, 'ids': none['ids']+1}))>1e-4 # sizes stay

def test_added_embedding():
    "Clocks of each number side by side, behind the vector: cosines first, the fastest turns by 1."
    net = randomise(sdxl_unet_tiny())
    vec,ids = normal(1, 16),torch.tensor([[3,1,4,1,5,9]])
    clocks = [f(torch.tensor(float(i), dtype=F64)*10_000**(-k/4)) for i in ids[0] for f in (torch.cos, torch.sin) for k in range(4)]
    assert diff(net.enc.embed(vec, ids), net.enc.vec(torch.cat([vec, torch.stack(clocks)[None]], 1)))<1e-12

@pytest.mark.parametrize('size', [(1,1), (5,7), (9,4)])
def test_any_size(size):
    net = small(widths=(8,8,8), depth=1)
    x,t,cond = inputs(net)
    assert net(x.repeat(1, 1, 2, 2)[...,:size[0],:size[1]], t, **cond).shape[2:]==size

def test_memory_format_and_dtype():
    net = small()
    x,t,cond = inputs(net)
    y = net(x, t, **cond)
    assert diff(net.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last), t, **cond), y)<1e-12
    half = net.bfloat16()(x.float(), t, **cond) # latents in float32, as samplers keep them
    assert half.dtype==torch.bfloat16 and diff(half.double(), y)<.3

def test_maps_added():
    "`add` reaches every map, the middle's too; of the wrong number it is refused."
    net = small()
    x,t,cond = inputs(net)
    y,maps = net(x, t, **cond),net.enc(x, net.enc.token(t), net.enc.keys(cond['ctx']))
    none = [torch.zeros_like(m) for m in maps]
    assert torch.equal(net(x, t, **cond, add=none), y)
    for i,m in enumerate(maps): assert diff(net(x, t, **cond, add=[*none[:i], m, *none[i+1:]]), y)>1e-3
    calls = []
    net.enc.stem.register_forward_hook(lambda *a: calls.append(1))
    for bad in (none[1:], [*none, none[-1]], [], [m[:1] for m in none], [*none[:2], none[2][...,:3], *none[3:]], [none[2], *none[1:]], none[::-1]):
        with pytest.raises(ValueError, match=fr'add must be 5 maps, \[\(2, 16, 8, 8\).*: got {len(bad)}, '): net(x, t, **cond, add=bad)
    assert not calls # before compute

@pytest.mark.parametrize('bad,say', [
    (dict(ctx=torch.zeros(2, 7, 13)), 'ctx must be .b,m,24.'), (dict(ctx=torch.zeros(2, 24)), 'ctx must be'),
    (dict(ctx_mask=torch.ones(2, 6).bool()), 'ctx_mask must be .b,7.'), (dict(vec=torch.zeros(2, 16)), 'must be 0 numbers'),
    (dict(ids=torch.zeros(2, 6)), 'must be 0 numbers'), (dict(concat=torch.zeros(2, 1, 8, 8)), 'must have 4 and 0 channels')])
def test_refused(bad, say):
    net = sd_unet_tiny()
    x,t,cond = net.demo(2)
    with pytest.raises(ValueError, match=say): net(x, t, **{**cond, **bad})

def test_refused_shapes():
    net,xl = sd_unet_tiny(extra=5),sdxl_unet_tiny()
    x,t,cond = net.demo(2)
    with pytest.raises(ValueError, match='4 and 5 channels'): net(x, t, ctx=cond['ctx'])
    with pytest.raises(ValueError, match='4 and 5 channels'): net(x[:,:3], t, **cond)
    with pytest.raises(ValueError, match='4 and 5 channels'): net(x, t, **{**cond, 'concat': cond['concat'][...,:4]})
    x,t,cond = xl.demo(2)
    for bad in (dict(ids=cond['ids'][:,:5]), dict(vec=cond['vec'][:,:9]), dict(vec=None, ids=None)):
        with pytest.raises(ValueError, match='must be 64 numbers'): xl(x, t, **{**cond, **bad})
    with pytest.raises(ValueError, match='3 numbers of heads'): UNet(heads=(1,2,3))
    with pytest.raises(ValueError, match='2 stages and 4 depths'): UNet(widths=(32,64))

# --- use
def test_guided_sampling():
    "Twenty steps with the empty sentence as `uncond` are the loop written out."
    net = randomise(sd_unet_tiny(), std=.05)
    ctx,none = normal(2, 7, 24),normal(1, 7, 24, seed=1)
    p = Gaussian('scaled_linear', 'eps')
    *_,got = sample(net, p, (2, 4, 8, 8), steps=20, step=ddim(), cond=dict(ctx=ctx), uncond=dict(ctx=none), w=7.5, dtype=F64)
    def plain(x, net_t, **cond): # knows nothing of `prepare`
        no = net(x, net_t, ctx=none)
        return no+7.5*(net(x, net_t, ctx=ctx)-no)
    *_,want = sample(plain, p, (2, 4, 8, 8), steps=20, step=ddim(), dtype=F64)
    assert diff(got, want)<1e-9*want.abs().max()

COMPILED = '''
import torch
from diffnb.models.unet import sdxl_unet_tiny
net = sdxl_unet_tiny().eval()
x,t,cond = net.demo(2)
with torch.no_grad():
    ready = net.prepare(**cond)
    got = torch.compile(net, fullgraph=True)(x, t, **ready)
    assert (got-net(x, t, **cond)).abs().max()<1e-5
'''
@pytest.mark.slow
def test_compiles():
    "In one graph, with the same result."
    env = {**os.environ, 'DIFFNB_TYPECHECK': '0'}
    subprocess.run([sys.executable, '-c', COMPILED], check=True, env=env)
