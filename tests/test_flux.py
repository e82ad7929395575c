"Flux against its equations, in float64 and with random weights: fresh ones hide faults behind zero gates."
import math
import pytest, torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from diffnb.core import create
from diffnb.grids import shifted_by_tokens
from diffnb.models import flux as module
from diffnb.models.flux import DoubleBlock, Flux, Heads, SingleBlock, flux_tiny, look, pack, positions, rotary, rotate, unpack
from diffnb.process.gaussian import Gaussian
from diffnb.samplers import euler, sample

F64 = torch.float64
def gen(seed=0): return torch.Generator().manual_seed(seed)
def normal(*s, seed=0): return torch.randn(*s, generator=gen(seed), dtype=F64)
def randomised(net, std=.15, seed=0):
    g = gen(seed)
    for p in net.parameters(): p.data = std*torch.randn(p.shape, generator=g, dtype=F64)
    return net.double().eval()
def diff(a, b): return (a-b).abs().max().item()
def small(**kw):
    sizes = dict(ch=4, dim=32, heads=2, doubles=1, singles=2, ctx=24, vec=12, axes=(4,6,6), demo=(6, 8, 5))
    return randomised(Flux(**{**sizes, **kw}))
def inputs(net, b=2, seed=0):
    x, t, cond = net.demo(b, seed)
    return x.double(), t, {k: v.double() for k,v in cond.items()}

# --- sizes
@pytest.fixture(scope='module')
def published():
    "Both networks and the work of a step of dev at 1024x1024, without memory."
    with torch.device('meta'): nets = {k: create(k) for k in ('flux_dev', 'flux_schnell')}
    x, t, cond = nets['flux_dev'].demo(1)
    x, t, cond = x.to('meta'), t.to('meta'), {k: v.to('meta') for k,v in cond.items()}
    with FlopCounterMode(display=False) as f: nets['flux_dev'](x, t, **cond)
    return nets, x, cond, f.get_total_flops()/2

def test_published_sizes(published):
    "Spec 4.1: parameters to the last digit, work within 0.5 % of 37.19 TMAC."
    nets, x, cond, macs = published
    counts = {k: sum(p.numel() for p in n.parameters()) for k,n in nets.items()}
    assert counts==dict(flux_dev=11_901_408_320, flux_schnell=11_891_178_560)
    assert x.shape==(1, 16, 128, 128) and cond['ctx'].shape==(1, 512, 4096) and abs(macs/37.19e12-1)<.005

def test_variants():
    "Fill reads 384 numbers a token, Depth and Canny 128."
    with torch.device('meta'):
        for extra,n in ((80, 384), (16, 128), (0, 64)):
            net = create('flux_dev', extra=extra)
            assert net.img_in.in_features==n and net.out.out_features==64

# --- packing
def test_pack():
    x = normal(2, 3, 6, 10)
    p = pack(x)
    assert p.shape==(2, 15, 12) and torch.equal(unpack(p, (3, 5)), x)
    assert p[1,7,(2*2+1)*2+0]==x[1,2,2+1,4+0] # token 7 is row 1, column 2; order channel, row, column
    for s in ((1, 3, 5, 6), (1, 3, 6, 5)):
        with pytest.raises(ValueError, match='odd side'): pack(normal(*s))

@pytest.fixture(scope='module')
def pipeline(): return pytest.importorskip('diffusers.pipelines.flux.pipeline_flux').FluxPipeline

def test_pack_and_positions_equal_the_reference(pipeline):
    "Spec 4, check 3."
    x = normal(2, 16, 8, 12)
    want = pipeline._pack_latents(x, 2, 16, 8, 12)
    assert torch.equal(pack(x), want)
    assert torch.equal(unpack(want, (4, 6)), pipeline._unpack_latents(want, 64, 96, 8))
    ids = pipeline._prepare_latent_image_ids(1, 4, 6, 'cpu', F64)
    assert torch.equal(positions(7, (4, 6)), torch.cat([torch.zeros(7, 3, dtype=F64), ids]))

def test_second_frame():
    p = positions(2, (2, 3), (1, 2))
    assert p.tolist()[2:]==[[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 1, 1], [0, 1, 2], [1, 0, 0], [1, 0, 1]]

# --- rotation
def test_rotation_by_hand():
    "Pair (2c, 2c+1) turned by p * 10000^(-2c/d), each axis with its own channels."
    pos, axes = torch.tensor([[2., 5., 11.]], dtype=F64), (4, 6, 6)
    x = normal(1, 1, 2, 16)
    got = rotate(x, rotary(pos, axes))
    first = 0
    for p,d in zip(pos[0].tolist(), axes):
        for c in range(0, d, 2):
            a, (i, j) = p*10_000**(-c/d), (first+c, first+c+1)
            want = torch.stack([x[...,i]*math.cos(a)-x[...,j]*math.sin(a), x[...,i]*math.sin(a)+x[...,j]*math.cos(a)], -1)
            assert diff(got[...,[i, j]], want)<1e-12
        first += d

def test_scores_depend_on_distances_alone():
    q, k = normal(1, 9, 2, 16), normal(1, 9, 2, 16, seed=1)
    pos, axes = positions(1, (2, 4)), (4, 6, 6)
    def scores(pos):
        a, b = (rotate(o, rotary(pos, axes))[0].transpose(0, 1) for o in (q, k))
        return a@b.mT
    far = torch.tensor([3., -40., 1000.], dtype=F64)
    assert diff(scores(pos+far), scores(pos))<1e-9 and diff(scores(pos*2), scores(pos))>.1

def test_moving_everything_changes_nothing(monkeypatch):
    "Spec 4, check 4: all positions shifted by a constant, output the same below 1e-9."
    net = small()
    x, t, cond = inputs(net)
    y = net(x, t, **cond)
    def moved(by): return lambda *a, **kw: positions(*a, **kw)+torch.tensor(by, dtype=F64)
    monkeypatch.setattr(module, 'positions', moved([2., 17., -5.]))
    assert diff(net(x, t, **cond), y)<1e-9
    monkeypatch.setattr(module, 'positions', lambda *a, **kw: positions(*a, **kw)*2)
    assert diff(net(x, t, **cond), y)>1e-4

def test_rotation_in_half_precision():
    "The angles are kept in float32, only the result is rounded."
    x, turn = normal(1, 40, 2, 16).bfloat16(), rotary(positions(0, (5, 8)), (4, 6, 6)).to(torch.complex64)
    got = rotate(x, turn)
    assert got.dtype==torch.bfloat16 and diff(got.float(), rotate(x.float(), turn))<=2**-8*4

# --- blocks, written out
def layer(l, x): return x@l.weight.T+l.bias
def ln(x): return (x-x.mean(-1, keepdim=True))/(x.var(-1, correction=0, keepdim=True)+1e-6).sqrt()
def rms(x, g): return g*x/((x**2).mean(-1, keepdim=True)+1e-6).sqrt()
def gelu(x): return .5*x*(1+torch.tanh(math.sqrt(2/math.pi)*(x+.044715*x**3)))

def attention(q, k, v, turn):
    "Head by head, softmax and all."
    out = []
    for h in range(q.shape[2]):
        a, b = (torch.view_as_real(torch.view_as_complex(o[:,:,h].unflatten(-1, (-1, 2)).contiguous())*turn).flatten(-2) for o in (q, k))
        s = (a@b.mT/q.shape[-1]**.5).exp()
        out.append(s/s.sum(-1, keepdim=True)@v[:,:,h])
    return torch.cat(out, -1)

def heads(m, x, h):
    q, k, v = (o.unflatten(-1, (h, -1)) for o in x.chunk(3, -1))
    return rms(q, m.q.weight), rms(k, m.k.weight), v

def test_double_block_by_hand():
    m = randomised(DoubleBlock(16, 2, mlp=3.), .4)
    img, txt, c = normal(2, 6, 16), normal(2, 3, 16, seed=1), normal(2, 16, seed=2)
    turn = rotary(positions(3, (2, 3)), (2, 2, 4))
    mods = {s: [o[:,None] for o in layer(getattr(m, s).mod, c).chunk(6, -1)] for s in ('img', 'txt')}
    def ask(s, x): return heads(getattr(m, s).heads, layer(getattr(m, s).qkv, ln(x)*(1+mods[s][1])+mods[s][0]), 2)
    o = attention(*(torch.cat(p, 1) for p in zip(ask('txt', txt), ask('img', img))), turn)
    def after(s, x, o):
        n, (_, _, gate, shift, scale, gate2) = getattr(m, s), mods[s]
        x = x+gate*layer(n.proj, o)
        return x+gate2*layer(n.mlp[2], gelu(layer(n.mlp[0], ln(x)*(1+scale)+shift)))
    got_img, got_txt = m(img, txt, c, turn)
    assert diff(got_img, after('img', img, o[:,3:]))<1e-10 and diff(got_txt, after('txt', txt, o[:,:3]))<1e-10

def test_single_block_by_hand():
    m = randomised(SingleBlock(16, 2, mlp=3.), .4)
    x, c, turn = normal(2, 9, 16), normal(2, 16, seed=2), rotary(positions(3, (2, 3)), (2, 2, 4))
    shift, scale, gate = (o[:,None] for o in layer(m.mod, c).chunk(3, -1))
    h = layer(m.lin1, ln(x)*(1+scale)+shift)
    want = x+gate*layer(m.lin2, torch.cat([attention(*heads(m.heads, h[...,:48], 2), turn), gelu(h[...,48:])], -1))
    assert diff(m(x, c, turn), want)<1e-10

def test_without_gradients_the_same():
    "Where no gradient is wanted, results are written over what is no longer needed; the input is not."
    net = small()
    x, t, cond = inputs(net)
    kept = {k: v.clone() for k,v in (('x', x), *cond.items())}
    want = net(x, t, **cond)
    with torch.no_grad():
        assert diff(net(x, t, **cond), want)<1e-12
        ready = net.prepare(**cond)
        assert diff(net(x, t, **ready), want)<1e-12 and diff(net(x, t, **ready), want)<1e-12
    assert all(torch.equal(kept[k], v) for k,v in (('x', x), *cond.items()))

def test_last_layer_and_vector_by_hand():
    "c = swish(time + guidance + text), times 1000 inside; the head's order is shift, scale."
    net = small(doubles=0, singles=0)
    x, t, cond = inputs(net)
    def clocks(t):
        a = 1000*t[:,None]*torch.tensor([10_000**(-i/128) for i in range(128)], dtype=F64)
        return torch.cat([a.cos(), a.sin()], -1)
    def two(m, x):
        h = layer(m[0], x)
        return layer(m[2], h*h.sigmoid())
    c = two(net.time.mlp, clocks(t))+two(net.guidance.mlp, clocks(cond['guidance']))+two(net.vec, cond['vec'])
    shift, scale = (o[:,None] for o in layer(net.mod, c*c.sigmoid()).chunk(2, -1))
    want = unpack(layer(net.out, ln(layer(net.img_in, pack(x)))*(1+scale)+shift), (3, 4))
    assert diff(net(x, t, **cond), want)<1e-9

def test_look_is_batched():
    q, k, v = Heads(8).double()(normal(3, 5, 48))
    turn = rotary(positions(1, (2, 2)), (2, 2, 4))
    assert diff(look(q, k, v, turn)[1:], look(q[1:], k[1:], v[1:], turn))<1e-12

# --- conditions
@pytest.mark.parametrize('name', ['ctx', 'vec', 'guidance'])
def test_conditions_act(name):
    net = small()
    x, t, cond = inputs(net)
    assert diff(net(x, t, **{**cond, name: cond[name].flip(0)}), net(x, t, **cond))>1e-4

def test_schnell_does_not_read_guidance():
    net = small(guidance=False)
    x, t, cond = inputs(net)
    assert 'guidance' not in cond and torch.equal(net(x, t, guidance=torch.ones(2), **cond), net(x, t, **cond))

def test_extra_channels():
    net = small(extra=3)
    x, t, cond = inputs(net)
    assert cond['concat'].shape==(2, 3, 6, 8) and net.img_in.in_features==28
    y = net(x, t, **cond)
    assert y.shape==x.shape and diff(net(x, t, **{**cond, 'concat': -cond['concat']}), y)>1e-4
    net.img_in.weight.data[:,16:] = 0 # channels come after the latents' own, so these are the concat's columns
    assert diff(net(x, t, **{**cond, 'concat': -cond['concat']}), net(x, t, **cond))<1e-12

def test_reference_is_a_second_frame():
    "A reference of any even size; its place in the sequence is after the picture, at frame 1."
    net = small()
    x, t, cond = inputs(net)
    ref = normal(2, 4, 4, 2, seed=5)
    y = net(x, t, ref=ref, **cond)
    assert y.shape==x.shape and diff(y, net(x, t, **cond))>1e-4 and diff(y, net(x, t, ref=ref.flip(0), **cond))>1e-4
    shuffled = net(x, t, ref=ref.flip(2), **cond) # places of its tokens matter
    assert diff(y, shuffled)>1e-5

def test_prepare_is_idempotent_and_changes_nothing():
    net = small(extra=2)
    x, t, cond = inputs(net)
    ready = net.prepare(**cond)
    assert set(ready)=={'txt', 'pooled', 'concat'} and net.prepare(**ready) is not None
    assert all(torch.equal(net.prepare(**ready)[k], v) for k,v in ready.items())
    assert torch.equal(net(x, t, **ready), net(x, t, **cond))

def test_equal_rows_are_computed_once(monkeypatch):
    "One text for the batch: every modulation of the network then runs on one row, and the result is the same."
    net = small()
    x, _, cond = inputs(net, 3)
    t, same = torch.full((1,), .4, dtype=F64), {k: v[:1].expand_as(v) for k,v in cond.items()}
    rows = []
    for m in [net.mod, *(s.mod for b in net.doubles for s in (b.img, b.txt)), *(b.mod for b in net.singles)]:
        m.register_forward_hook(lambda m, i, o: rows.append(len(o)))
    y = net(x, t, **same)
    assert set(rows)=={3} and len(rows)==5
    rows.clear()
    assert diff(net(x, t, **net.prepare(**same)), y)<1e-12 and rows==[1]*5
    mixed = net.prepare(**{**same, 'guidance': cond['guidance']}) # another guidance for each
    assert mixed['txt'].shape[0]==1 and mixed['pooled'].shape[0]==3
    assert diff(net(x, t, **mixed), net(x, t, **{**same, 'guidance': cond['guidance']}))<1e-12

def test_null_is_a_text_of_zeros():
    net = small(extra=2)
    x, t, cond = inputs(net)
    xu, u = net.null(x, **cond)
    assert xu is x and not u['ctx'].any() and not u['vec'].any() and u['ctx'].shape==cond['ctx'].shape
    assert u['guidance'] is cond['guidance'] and u['concat'] is cond['concat']

def test_samples_do_not_see_each_other():
    net = small()
    x, t, cond = inputs(net, 3)
    assert diff(net(x[1:], t[1:], **{k: v[1:] for k,v in cond.items()}), net(x, t, **cond)[1:])<1e-12

def test_any_even_size():
    net = small()
    _, t, cond = inputs(net)
    for s in ((2, 2), (10, 4)): assert net(normal(2, 4, *s), t, **cond).shape==(2, 4, *s)

def test_fresh_is_zero():
    net = flux_tiny()
    x, t, cond = net.demo(2)
    assert not net(x, t, **cond).any()

def test_gradient_reaches_every_parameter():
    net = small(extra=2)
    x, t, cond = inputs(net, 3)
    net(x, t, **cond).square().mean().backward()
    assert [n for n,p in net.named_parameters() if p.grad is None or not p.grad.any()]==[]

# --- precision
def test_times_of_float64_are_not_rounded():
    "The clocks run on float64 times, even in a network of half precision; guidance in at least float32."
    net = small().bfloat16()
    x, _, cond = net.demo(1)
    seen = {}
    for k in ('time', 'guidance'): getattr(net, k).register_forward_pre_hook(lambda m, a, k=k: seen.update({k: a[0].dtype}))
    net(x, torch.tensor([.3], dtype=F64), **{k: v.bfloat16() for k,v in cond.items()})
    assert seen==dict(time=F64, guidance=torch.float32)

def test_half_precision_weights_read_float32_inputs():
    net = small()
    x, t, cond = net.demo(2)
    want = net.float()(x, t, **cond)
    got = net.bfloat16()(x, t, **cond)
    assert got.dtype==torch.bfloat16 and diff(got.float(), want)<.05*want.std().item()*4

@pytest.mark.filterwarnings('ignore:Mismatch dtype')
def test_autocast():
    net = small().float()
    x, t, cond = net.demo(2)
    want = net(x, t, **cond)
    for c in (cond, net.prepare(**cond)):
        with torch.autocast('cpu', torch.bfloat16): got = net(x, t, **c)
        assert got.isfinite().all() and diff(got.float(), want)<.2*want.std().item()

# --- errors
@pytest.mark.parametrize('change,words', [
    (dict(ctx=None), r'ctx must be \(b,n,24\): got None'), (dict(ctx=torch.zeros(2, 5, 23)), r'ctx must be \(b,n,24\)'),
    (dict(vec=None), r'vec must be \(b,12\)'), (dict(vec=torch.zeros(2, 5, 12)), r'vec must be'), (dict(guidance=None), 'distilled'),
    (dict(concat=torch.zeros(2, 1, 6, 8)), 'extra=0'), (dict(ref=torch.zeros(2, 3, 6, 8)), r'ref must be \(2,4'),
    (dict(ref=torch.zeros(2, 4, 5, 8)), 'even')])
def test_conditions_that_are_refused(change, words):
    net = small()
    x, t, cond = inputs(net)
    with pytest.raises(ValueError, match=words): net(x, t, **{**cond, **change})

def test_other_things_that_are_refused():
    net = small()
    x, t, cond = inputs(net)
    for bad in (x[:,:3], x[:,:,:5], x[...,:7]):
        with pytest.raises(ValueError, match=r'\(b,4,h,w\)'): net(bad, t, **cond)
    wide = small(extra=3)
    x, t, cond = inputs(wide)
    with pytest.raises(ValueError, match='concat must be'): wide(x, t, **{**cond, 'concat': None})
    with pytest.raises(ValueError, match='concat must be'): wide(x, t, **{**cond, 'concat': cond['concat'][...,:4]})
    with pytest.raises(ValueError, match='second frame'): wide(x, t, ref=x, **cond)
    for kw in (dict(axes=(4, 6, 8)), dict(axes=(5, 5, 6)), dict(heads=4)):
        with pytest.raises(ValueError, match='add up'): small(**kw)

# --- at work
def test_time_shift():
    "Spec 4, check 5 and 4.3: mu by tokens, and the sigmas of diffusers' scheduler."
    schedulers = pytest.importorskip('diffusers.schedulers.scheduling_flow_match_euler_discrete')
    import numpy as np
    for tokens,mu in ((256, .5), (1024, .63), (4096, 1.15)):
        for n in (1, 4, 28):
            s = schedulers.FlowMatchEulerDiscreteScheduler(shift=3., use_dynamic_shifting=True)
            s.set_timesteps(sigmas=np.linspace(1, 1/n, n), mu=mu)
            g = shifted_by_tokens()(Gaussian('straight', 'flow'), n, tokens)
            assert (g.t-s.sigmas.double()).abs().max()<1e-6
    want = torch.tensor([1, .9045307667, .7595109169, .5128441015, 0], dtype=F64)
    assert diff(shifted_by_tokens()(Gaussian('straight', 'flow'), 4, 4096).t, want)<1e-9

def test_sampling():
    "A trajectory through the sampler is Euler's steps x += (s - t) v, and the conditions are prepared once."
    net = small().float()
    x, _, cond = net.demo(2)
    calls = []
    net.txt_in.register_forward_hook(lambda *a: calls.append(1))
    *_, got = sample(net, Gaussian('straight', 'flow'), x.shape, steps=4, step=euler(), cond=cond, x=x)
    assert len(calls)==1
    with torch.no_grad():
        for t,s in zip((1, .75, .5, .25), (.75, .5, .25, 0)):
            x = x+(s-t)*net(x, torch.tensor([t], dtype=F64), **cond)
    assert diff(got, x)<1e-5

def test_gelu_is_the_tanh_form():
    x = normal(100)
    assert diff(gelu(x), F.gelu(x, approximate='tanh'))<1e-12

@pytest.mark.parametrize('backend', ['eager', pytest.param('inductor', marks=pytest.mark.slow)])
def test_compiles_whole(backend):
    "One graph, with and without gradients, prepared or not; in a process of its own, where annotations are not checked."
    import os, subprocess, sys
    code = '''
import sys, torch
from diffnb.codec.vae import vae_tiny
from diffnb.models.flux import flux_tiny
net = flux_tiny()
for p in net.parameters(): p.data.normal_(std=.1)
x, t, cond = net.demo(2)
f = torch.compile(net, backend=sys.argv[1], fullgraph=True)
assert (f(x, t, **cond)-net(x, t, **cond)).abs().max()<1e-5
with torch.no_grad():
    ready, v, z = net.prepare(**cond), vae_tiny(), torch.randn(1, 4, 4, 4)
    assert (f(x, t, **ready)-net(x, t, **ready)).abs().max()<1e-5
    decode = torch.compile(v.decoder, backend=sys.argv[1], fullgraph=True)
    assert (decode(z)-v.decoder(z)).abs().max()<1e-4
'''
    subprocess.run([sys.executable, '-c', code, backend], check=True, env={**os.environ, 'DIFFNB_TYPECHECK': '0'})

def test_tokens():
    "As many as attention sees of the picture: grids that shift by their number are told so."
    from diffnb.grids import shifted_by_tokens, uniform
    from diffnb.process.gaussian import Gaussian
    from diffnb.samplers import sample
    net, p, told = create('flux_tiny'), Gaussian('straight', 'flow'), []
    x,t,cond = net.demo(2)
    assert net.tokens((1, 16, 128, 128))==4096 and net.tokens(x.shape)==net.features(x, t, **cond).h.shape[1]
    grid = shifted_by_tokens((4, .5), (64, 1.15))
    list(sample(net, p, tuple(x.shape), 2, grid=lambda *a: told.append(a[2]) or grid(*a), cond=cond))
    assert told==[net.tokens(x.shape)] and grid(p, 4, 16).t[1]!=grid(p, 4, 64).t[1]!=uniform()(p, 4).t[1]
