"ControlNet: exact identity at the start, what is added and how much, and what training moves."
import pytest, torch
from diffnb.core import create
from diffnb.models.controlnet import Control, ControlNet, control, controlled, controlnet_tiny
from diffnb.models.unet import sd_unet_tiny, sdxl_unet_tiny
from diffnb.process.gaussian import Gaussian
from diffnb.samplers import ddim, sample

F64 = torch.float64
def gen(seed=0): return torch.Generator().manual_seed(seed)
def diff(a, b): return (a-b).abs().max().item()
def randomise(net, seed=0, std=.2):
    g = gen(seed)
    for p in net.parameters(): p.data = std*torch.randn(p.shape, generator=g, dtype=F64)
    return net.double().eval()
def inputs(net, b=2, seed=0):
    x,t,cond = net.demo(b, seed)
    return x.double(),t,{k: v.double() if v.is_floating_point() else v for k,v in cond.items()}
def text(cond): return {k: v for k,v in cond.items() if k!='control'}
def both(make=sd_unet_tiny): return randomise(controlled(make(), 3, (4,8)))

# --- sizes: diffusers' ControlNetModel has as many (see test_hub_unet)
@pytest.mark.parametrize('name,n', [('sd15', 361_279_120), ('sd21', 364_228_240), ('sdxl', 1_251_014_160)])
def test_published(name, n):
    with torch.device('meta'): net = create(f'{name}_controlnet').control
    assert sum(p.numel() for p in net.parameters())==n

@pytest.mark.parametrize('make', [sd_unet_tiny, sdxl_unet_tiny])
def test_identity_at_the_start(make):
    "To the bit, with random weights in the U-Net; and the copy is one: nothing is shared, nothing frozen."
    base = randomise(make()).requires_grad_(False)
    net = controlled(base, 3, (4,8)).double()
    x,t,cond = inputs(net)
    with torch.no_grad(): assert torch.equal(net(x, t, **cond), base(x, t, **text(cond)))
    for (n,p),(m,q) in zip(net.control.enc.named_parameters(), base.enc.named_parameters()):
        assert n==m and torch.equal(p, q) and p.data_ptr()!=q.data_ptr() and p.requires_grad and not q.requires_grad

def test_it_learns_at_once():
    "The first step moves the zero convolutions; three steps move everything that is trained, and nothing of the base."
    torch.manual_seed(0)
    base = randomise(sd_unet_tiny()).requires_grad_(False)
    net = controlled(base, 3, (4,8)).double()
    before = {n: p.clone() for n,p in net.named_parameters()}
    x,t,cond = inputs(net)
    opt = torch.optim.SGD(net.control.parameters(), lr=.1)
    for i in range(3):
        opt.zero_grad(); net(x, t, **cond).square().mean().backward(); opt.step()
        moved = {n for n,p in net.named_parameters() if not torch.equal(p, before[n])}
        if i==0: assert moved and all(n.startswith('control.zero') for n in moved)
    assert moved=={n for n in before if n.startswith('control.')}

def test_is_its_equation():
    "The maps of the copy, which saw the picture after its stem, through the 1x1 convolutions, times the scale."
    net = both()
    x,t,cond = inputs(net)
    c,u = net.control,net.net
    enc,ctx = c.enc,cond['ctx']
    with torch.no_grad():
        stem = enc.stem.register_forward_hook(lambda m,i,o: o+c.hint(cond['control']))
        maps = enc(x, enc.token(t), enc.keys(ctx))
        stem.remove()
        want = u(x, t, ctx=ctx, add=[.3*z(m) for z,m in zip(c.zero, maps)])
        net.scale = .3
        assert diff(net(x, t, **cond), want)<1e-12 and diff(want, u(x, t, ctx=ctx))>1e-3

def test_scales():
    "One number for all maps, or one for each; each map matters; zero is the U-Net alone."
    net = both()
    x,t,cond = inputs(net)
    def run(scale):
        net.scale = scale
        with torch.no_grad(): return net(x, t, **cond)
    plain = run(0.)
    assert torch.equal(plain, net.net(x, t, **text(cond))) and diff(run([.5]*5), run(.5))==0
    assert all(diff(run([float(i==k) for i in range(5)]), plain)>1e-4 for k in range(5))
    with pytest.raises(ValueError, match='4 numbers, and 5 maps'): run([1.]*4)

def test_two_pictures():
    "One ControlNet around another: what both add is added, in either order, also with prepared conditions."
    a,b = both(),randomise(Control(sd_unet_tiny().enc, 1, (4,8)), seed=1)
    x,t,cond = inputs(a)
    pose = torch.rand(2, 1, 16, 16, generator=gen(3), dtype=F64)
    outer = ControlNet(a, b, .5, name='pose')
    inner = ControlNet(ControlNet(a.net, b, .5, name='pose'), a.control)
    with torch.no_grad():
        y = outer(x, t, **cond, pose=pose)
        assert diff(inner(x, t, **cond, pose=pose), y)<1e-12
        assert torch.equal(outer(x, t, **outer.prepare(**cond, pose=pose)), y)
        assert torch.equal(outer(x, t, **cond), a(x, t, **cond)) # without its picture a ControlNet is not there
        assert diff(y, a(x, t, **cond))>1e-3

@pytest.mark.parametrize('make', [sd_unet_tiny, sdxl_unet_tiny])
def test_prepared_once(make):
    "In a prepared step neither the picture's stack nor keys, values and added embeddings of the copy are asked."
    net = both(make)
    x,t,cond = inputs(net)
    ready,calls = net.prepare(**cond),[]
    for n,m in net.named_modules():
        if n.endswith(('cross.k', 'cross.v', 'enc.vec', 'control.hint')): m.register_forward_hook(lambda *a, n=n: calls.append(n))
    with torch.no_grad():
        y = net(x, t, **ready)
        assert calls==[] and torch.equal(net(x, t, **cond), y) and 'control.hint' in calls
    again = net.prepare(**ready)
    assert again.keys()==ready.keys() and all(again[k] is ready[k] for k in ready)

def test_mask_and_null():
    "The copy does not look at words that are not there; without text it still sees the picture."
    net = both()
    x,t,cond = inputs(net)
    mask = torch.arange(7)[None]<4
    with torch.no_grad():
        short = net(x, t, **{**cond, 'ctx': cond['ctx'][:,:4]})
        assert diff(net(x, t, **cond, ctx_mask=mask), short)<1e-12
        none = net.null(x, **cond)[1]
        assert none['control'] is cond['control'] and none['ctx'] is None
        assert diff(net(x, t, **none), net.net(x, t, **text(none)))>1e-3

def test_refused():
    net = controlnet_tiny()
    x,t,cond = net.demo(2)
    with pytest.raises(ValueError, match='the picture is for .4, 4. latents'): net(x, t, **{**cond, 'control': cond['control'][...,:8,:8]})
    with pytest.raises(ValueError, match='ctx must be'): net(x, t, **{**cond, 'ctx': cond['ctx'][...,1:]})
    maps = [torch.zeros(2, *m) for m in net.net.enc.maps(*x.shape[2:])]
    assert diff(net(x, t, **cond, add=maps), net(x, t, **cond))==0
    for bad in (maps[1:], maps[::-1], [m[:1] for m in maps]):
        with pytest.raises(ValueError, match='add must be 5 maps'): net(x, t, **cond, add=bad)

def test_alone():
    "A copy of any size, as files hold it."
    net = control(4, 1, (4,8,8), widths=(8,16), layers=1, depth=1, heads=2, ctx=12, groups=4)
    maps = net(torch.randn(1, 4, 8, 8), torch.zeros(1), **net.prepare(torch.rand(1, 1, 32, 32), torch.randn(1, 3, 12)))
    assert [m.shape[1] for m in maps]==[8,8,8,16,16] and all(m.eq(0).all() for m in maps)

def test_guided_sampling():
    "Sampling with a picture, guided by the text, is the loop written out."
    net = both()
    for p in net.parameters(): p.data *= .2
    cond = dict(ctx=torch.randn(2, 7, 24, generator=gen(), dtype=F64), control=torch.rand(2, 3, 16, 16, generator=gen(), dtype=F64))
    p = Gaussian('scaled_linear', 'eps')
    *_,got = sample(net, p, (2, 4, 8, 8), steps=5, step=ddim(), cond=cond, w=3., dtype=F64)
    def plain(x, net_t, **kw):
        no = net(x, net_t, control=cond['control'])
        return no+3*(net(x, net_t, **cond)-no)
    *_,want = sample(plain, p, (2, 4, 8, 8), steps=5, step=ddim(), dtype=F64)
    assert diff(got, want)<1e-9*want.abs().max()
