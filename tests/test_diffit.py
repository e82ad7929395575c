"DiffiT in image space and in latents against its equations and tables, in float64 and with random weights: fresh ones hide faults behind the zero head."
import pytest, torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from diffnb.core import create, presets
from diffnb.models.diffit import TMSA, DiffiT, DiffiTBlock, ResBlock, diffit_cifar10, diffit_fashion, diffit_ffhq64, diffit_tiny, plan
from diffnb.models.diffit_latent import MapBlock, SwishNorm, diffit_latent, diffit_latent_tiny, diffit_xl_2_256, diffit_xl_2_512
from diffnb.models.layers import attend, sinusoid

NAMES = ['diffit_cifar10', 'diffit_emoji', 'diffit_fashion', 'diffit_ffhq64', 'diffit_tiny']
TABLES = [(diffit_ffhq64, (4,4,4,4)), (diffit_ffhq64, (1,2,2,2)), (diffit_cifar10, (4,4,4)), (diffit_cifar10, (2,2,2))]

def gen(seed=0): return torch.Generator().manual_seed(seed)
def normal(*s, seed=0): return torch.randn(*s, generator=gen(seed), dtype=torch.float64)
def randomised(net, std=.2, seed=0):
    g = gen(seed)
    for p in net.parameters(): p.data = std*torch.randn(p.shape, generator=g, dtype=torch.float64)
    return net.double().eval()
def diff(a, b): return (a-b).abs().max().item()
def small(**kw): return randomised(DiffiT(**{**dict(size=16, ch=2, widths=(8,16), blocks=(1,2), window=4, heads=2, dt=32, classes=5, vec=3, mlp=2.), **kw}))
def run(net, b=2, seed=0, **kw):
    x,t,cond = net.demo(b, seed)
    return net(x.double(), t, **{**cond, **kw})

# --- spec 1, check 3
@pytest.mark.parametrize('biased', [False, True])
@pytest.mark.parametrize('torch_layer', [False, True])
def test_tmsa_is_attention_on_the_concatenation(biased, torch_layer):
    m = randomised(TMSA(16, 12, 4, 4))
    if not biased: nn.init.zeros_(m.bias.table)
    x,c = normal(3, 4, 4, 16),normal(3, 12, seed=1)
    both = torch.cat([x, c[:,None,None].expand(3, 4, 4, 12)], -1).flatten(1, 2)
    W,b = torch.cat([m.attn.qkv.weight, m.time.weight], 1),m.attn.qkv.bias+m.time.bias
    q,k,v = F.linear(both, W, b).chunk(3, -1)
    B = m.bias() if biased else None
    if torch_layer:
        q,k,v = (rearrange(o, 'b n (h d) -> b h n d', h=4) for o in (q, k, v))
        want = rearrange(F.scaled_dot_product_attention(q, k, v, attn_mask=B), 'b h n d -> b n (h d)')
    else: want = attend(q, k, v, 4, B)
    assert diff(m(x, c).flatten(1, 2), m.attn.proj(want))<1e-10

# --- check 5
def test_time_acts_through_W_t_alone():
    m = randomised(TMSA(16, 12, 4, 4))
    x,c = normal(2, 8, 8, 16),normal(2, 12, seed=1)
    assert diff(m(x, c), m(x, -c))>.1
    nn.init.zeros_(m.time.weight)
    assert torch.equal(m(x, c), m(x, -c))

def test_time_steers_questions_and_values_and_keys_cancel():
    "Eq. 4's time term adds one number to all scores of a row."
    for part,acts in ((0, True), (1, False), (2, True)):
        m = randomised(TMSA(16, 12, 4, 4))
        x,c = normal(2, 4, 4, 16),normal(2, 12, seed=1)
        before = m(x, c)
        m.time.weight.data.view(3, 16, 12)[part] = 0
        assert (diff(m(x, c), before)>.01)==acts and (acts or diff(m(x, c), before)<1e-10)

# --- check 6
def test_window_as_large_as_the_map_is_global_attention():
    m = randomised(TMSA(16, 12, 4, 8))
    x,c = normal(2, 8, 8, 16),normal(2, 12, seed=1)
    qkv = m.attn.qkv(x.flatten(1, 2))+m.time(c)[:,None]
    want = m.attn.proj(attend(*qkv.chunk(3, -1), 4, m.bias())).view(2, 8, 8, 16)
    assert diff(m(x, c), want)<1e-10

def test_windows_do_not_see_each_other():
    m = randomised(TMSA(16, 12, 4, 4))
    x,c = normal(2, 8, 12, 16),normal(2, 12, seed=1)
    moved = x.clone(); moved[0,5,6,0] += 1 # in the window of rows 4-7, columns 4-7 of sample 0
    d = (m(moved, c)-m(x, c)).abs().amax(-1)>0
    want = torch.zeros_like(d); want[0,4:8,4:8] = True
    assert torch.equal(d, want)

def test_each_window_is_the_same_layer():
    m = randomised(TMSA(16, 12, 4, 4))
    x,c = normal(1, 8, 8, 16),normal(1, 12, seed=1)
    assert diff(m(x, c)[:,4:,:4], m(x[:,4:,:4], c))<1e-12

# --- equations 7-10
def test_block():
    m = randomised(DiffiTBlock(16, 12, 4, 4, mlp=2.))
    x,c = normal(2, 8, 8, 16),normal(2, 12, seed=1)
    ln = lambda o: (o-o.mean(-1, keepdim=True))/(o.var(-1, correction=0, keepdim=True)+1e-6).sqrt()
    xh = m.attn(ln(x), c)+x
    want = m.mlp[2](F.gelu(m.mlp[0](ln(xh)), approximate='tanh'))+xh
    assert diff(m(x, c), want)<1e-10

@pytest.mark.parametrize('cin', [8, 16])
def test_res_block(cin):
    m = randomised(ResBlock(cin, 16, 12, heads=4, window=4))
    x,c = normal(2, cin, 8, 8),normal(2, 12, seed=1)
    gn = m.conv[0]
    h = rearrange(x, 'b (g c) h w -> b g (c h w)', g=gn.num_groups)
    h = ((h-h.mean(-1, keepdim=True))/(h.var(-1, correction=0, keepdim=True)+gn.eps).sqrt()).view_as(x)
    h = h*gn.weight[:,None,None]+gn.bias[:,None,None]
    xh = F.conv2d(h*h.sigmoid(), m.conv[3].weight, m.conv[3].bias, padding=1)
    res = x if cin==16 else F.conv2d(x, m.res.weight, m.res.bias)
    want = rearrange(m.block(rearrange(xh, 'b c h w -> b h w c'), c), 'b h w c -> b c h w')+res
    assert diff(m(x, c), want)<1e-10

# --- check 7: the tables
def shapes(net):
    "The maps after stem, stages, ways down and up, joins and head, in the order in which they occur."
    out,hooks = [],[]
    for m in (net.stem, *[s[-1] for s in net.enc], *net.down, *net.up, *[s[-1] for s in net.dec], net.out):
        hooks.append(m.register_forward_hook(lambda m,i,o: out.append(tuple(o.shape[1:]))))
    net(torch.empty(1, net.ch, net.size, net.size, device='meta'), torch.empty(1, device='meta'))
    for h in hooks: h.remove()
    return out

@pytest.mark.parametrize('f,blocks', TABLES)
def test_published_layouts(f, blocks):
    "Tables S.2 and S.3, both numbers of blocks, without allocating anything."
    with torch.device('meta'): net = f(blocks=blocks)
    want = [(128,64,64), (128,64,64), (128,32,32), (256,32,32), (256,16,16), (256,16,16), (256,8,8), (256,8,8),
            (256,16,16), (256,16,16), (256,32,32), (256,32,32), (256,64,64), (128,64,64), (3,64,64)]
    if f is diffit_cifar10:
        want = [(128,32,32), (128,32,32), (128,16,16), (256,16,16), (256,8,8), (256,8,8), (256,16,16), (256,16,16), (256,32,32), (128,32,32), (3,32,32)]
    assert shapes(net)==want
    assert [len(s) for s in net.enc]==list(blocks) and [len(s) for s in net.dec]==list(blocks[:-1])
    tmsa = [m for m in net.modules() if hasattr(m, 'window')]
    assert {m.window for m in tmsa}=={8 if f is diffit_ffhq64 else 4} and net.time.mlp[2].out_features==512

@pytest.mark.parametrize('f,blocks,n', [(*o, n) for o,n in zip(TABLES, (43_615_987, 22_612_915, 28_096_723, 15_284_523))])
def test_sizes(f, blocks, n):
    "Our sizes (the paper prints none for image space); they change only on purpose."
    with torch.device('meta'): assert sum(p.numel() for p in f(blocks=blocks).parameters())==n

@pytest.mark.parametrize('name', NAMES)
def test_presets(name):
    "Each can be made without memory, keeps its name, gives the shape it was given, and is exactly zero when fresh."
    assert presets('denoiser')[name].__name__==name
    with torch.device('meta'): net = create(name)
    assert net.preset==dict(kind='denoiser', name=name, kw={})
    if name in ('diffit_tiny', 'diffit_fashion', 'diffit_emoji'):
        net = create(name)
        x,t,cond = net.demo(3)
        y = net(x, t, **cond)
        assert y.shape==x.shape and y.dtype==x.dtype and (y==0).all() # check 9

def test_tiny_is_tiny(): assert sum(p.numel() for p in diffit_tiny().parameters())<200_000

@pytest.mark.parametrize('size', [32, 64])
def test_out_is_as_large_as_in(size):
    net = randomised(DiffiT(size, 3, (8,8,16), (1,1,1), 4, 2, dt=16))
    x = normal(2, 3, size, size)
    assert net(x, torch.rand(2)).shape==x.shape

@pytest.mark.parametrize('kw', [{}, dict(patch=2), dict(window=0), dict(window=(4, 8)), dict(classes=0, vec=0)])
def test_gradient_reaches_every_parameter(kw):
    net = small(**kw)
    run(net, 4).square().mean().backward()
    assert [n for n,p in net.named_parameters() if p.grad is None or p.grad.abs().max()<1e-12]==[]

# --- check 10
def test_token():
    net = small(classes=1000)
    t,y = torch.tensor([17.], dtype=torch.float64),torch.tensor([3])
    h = sinusoid(t, 256)@net.time.mlp[0].weight.T+net.time.mlp[0].bias
    want = (h*h.sigmoid())@net.time.mlp[2].weight.T+net.time.mlp[2].bias+net.label.table.weight[3]
    assert diff(net.token(t, y), want)<1e-10
    assert net.label.null==1000 and torch.equal(net.token(t), net.token(t, torch.tensor([1000])))

def test_conditions_act():
    net = small()
    x,t,cond = net.demo(2)
    x,y,base = x.double(),cond['y'],run(net)
    assert diff(net(x, t, **{**cond, 'y': (y+1)%5}), base)>1e-3 and diff(net(x, t+.1, **cond), base)>1e-3
    assert diff(net(x, t, **{**cond, 'vec': -cond['vec']}), base)>1e-3
    assert torch.equal(net(x, t, y=y), net(x, t, y=y, vec=torch.zeros(2, 3))) # no augmentation label, and none of its length

def test_null_is_the_null_label_and_nothing_else():
    net = small()
    x,t,cond = net.demo(2)
    x_u,u = net.null(x, **cond)
    assert x_u is x and u['y'].tolist()==[5, 5] and u['vec'] is cond['vec']
    assert diff(net(x.double(), t, **u), net(x.double(), t, **{**cond, 'y': None}))<1e-12
    assert small(classes=0).null(x)[1]=={'y': None}

def test_prepare_checks_labels():
    net = small()
    ok = dict(y=torch.tensor([0, 5]))
    assert net.prepare(**net.prepare(**ok))==ok
    for y in (torch.tensor([6]), torch.tensor([-1])):
        with pytest.raises(ValueError, match='labels must lie in 0..4'): net.prepare(y=y)
    with pytest.raises(ValueError, match='no labels'): small(classes=0)(normal(1, 2, 16, 16), torch.rand(1), y=torch.tensor([1]))

def test_one_time_for_all_is_the_same_as_one_each():
    net = small()
    x,_,cond = net.demo(3)
    one,each = torch.full((1,), .3, dtype=torch.float64),torch.full((3,), .3, dtype=torch.float64)
    assert diff(net(x.double(), one, **cond), net(x.double(), each, **cond))<1e-12

def test_samples_do_not_see_each_other():
    net = small()
    x,t,cond = net.demo(3)
    part = net(x[1:].double(), t[1:], **{k:v[1:] for k,v in cond.items()})
    assert diff(net(x.double(), t, **cond)[1:], part)<1e-12

def test_memory_format_is_no_matter():
    net = small()
    x,t,cond = net.demo(2)
    y = net(x.double().contiguous(memory_format=torch.channels_last), t, **cond)
    assert diff(y, net(x.double(), t, **cond))<1e-12 and diff(net.to(memory_format=torch.channels_last)(x.double(), t, **cond), y)<1e-12

def test_patches_are_moved_and_moved_back():
    "Stem and head in a row, as identities: the picture returns."
    net = DiffiT(8, 1, (4,), (0,), 0, 1, patch=2, dt=8)
    nn.init.dirac_(net.stem.weight); nn.init.zeros_(net.stem.bias)
    net.out = nn.Identity()
    x = torch.randn(2, 1, 8, 8, generator=gen())
    assert torch.equal(net(x, torch.rand(2)), x)

def test_dropout_only_in_training():
    net = small(dropout=.5)
    assert torch.equal(run(net), run(net)) and not torch.equal(run(net.train()), run(net))

@pytest.mark.parametrize('kw,words', [
    (dict(size=28, patch=1, widths=(8,8,8), blocks=(1,1,1), window=4), 'do not tile a map of 14x14'),
    (dict(size=30, patch=1, widths=(8,8,8), blocks=(1,1,1), window=0), 'multiples of 4'),
    (dict(size=32, patch=1, widths=(8,8), blocks=(1,1,1), window=0), 'one of each'),
    (dict(size=32, patch=1, widths=(8,8), blocks=(1,1), window=(4,)), '2 stages and 1 windows')])
def test_plans_that_do_not_fit(kw, words):
    with pytest.raises(ValueError, match=words): plan(**kw)
    with pytest.raises(ValueError, match=words): DiffiT(**kw)

def test_heads_for_each_stage():
    net = DiffiT(16, 1, (8,16), (1,1), 4, heads=(1,2), dt=8)
    assert [s[0].block.attn.attn.heads for s in (*net.enc, *net.dec)]==[1, 2, 1]
    with pytest.raises(ValueError, match='2 stages and 3 heads'): DiffiT(16, 1, (8,16), (1,1), 4, heads=(1,2,4), dt=8)

def test_wrong_pictures():
    net = small()
    for s,words in (((1, 3, 16, 16), 'b,2,h,w'), ((1, 2, 17, 16), 'multiples of 2'), ((1, 2, 12, 12), 'do not tile a map of 6x6')):
        with pytest.raises(ValueError, match=words): net(normal(*s), torch.rand(1))
    assert net(normal(1, 2, 24, 32), torch.rand(1)).shape==(1, 2, 24, 32) # windows tile it: any size goes

# --- in latents: checks 1, 2, 5, 9, 10 (its equations: test_hub_images)
@pytest.mark.parametrize('f,kw,params,places,gmac,linear', [(diffit_xl_2_256, {}, 561_035_232, 561_330_144, 118.51, 114.28),
    (diffit_xl_2_256, dict(depth=30), 600_906_752, 601_201_664, 126.97, 122.44), (diffit_xl_2_512, {}, 562_382_816, 563_562_464, 524.42, 456.78)])
def test_published_latent_sizes(f, kw, params, places, gmac, linear):
    "561 M and 114 G belong to 28 blocks; the sheet's counts to the last digit and place."
    with torch.device('meta'):
        net = f(**kw)
        with FlopCounterMode(display=False) as c: y = net(torch.empty(1, 4, net.size, net.size), torch.empty(1))
    n, macs = sum(p.numel() for p in net.parameters()), c.get_total_flops()/2e9
    assert (n, n+net.pos.numel())==(params, places) and y.shape==(1, 8, net.size, net.size)
    assert abs(macs-gmac)<.005 and abs(macs-2*len(net.pos)**2*1152*len(net.blocks)/1e9-linear)<.005

def small_latent(**kw): return randomised(diffit_latent(2, 32, 4, **{**dict(size=8, classes=5), **kw}))

def test_latent_starts_at_zero():
    net = diffit_latent(2, 32, 4, size=8, classes=5)
    x,t,cond = net.demo(3)
    assert (net(x, t, **cond)==0).all()
    c = torch.randn(3, 32, generator=gen())
    h = torch.randn(3, 16, 32, generator=gen(1))
    assert (net.blocks[0](h, c)-h).abs().max()>.1 # no gate: not the identity
    xavier = net.blocks[0].block.attn.time.weight
    assert .9*(6/(32+96))**.5<xavier.abs().max()<=(6/(32+96))**.5 and .01<net.blocks[0].block.attn.bias.table.std()<.03

def test_latent_block_is_the_image_block_in_one_window():
    m = randomised(MapBlock(16, 4, 6))
    x,c = normal(2, 36, 16),normal(2, 16, seed=1)
    assert m.block.attn.window==6 and diff(m(x, c), m.block(x.view(2, 6, 6, 16), c).view(2, 36, 16))==0
    moved = x.clone(); moved[0,35,0] += 1 # everyone hears of it, in its own sample
    d = (m(moved, c)-m(x, c)).abs().amax(-1)>0
    assert d[0].all() and not d[1].any()

def test_latent_head():
    x,c = normal(2, 5, 16),normal(2, 16, seed=1)
    h = (x-x.mean(-1, keepdim=True))/(x.var(-1, correction=0, keepdim=True)+1e-6).sqrt()
    assert diff(SwishNorm(16)(x, c), h*h.sigmoid())<1e-12

def test_latent_time_acts_through_attention_alone():
    net = small_latent()
    x,y = normal(2, 4, 8, 8),torch.tensor([1, 2])
    a,b = torch.tensor([.2]),torch.tensor([700.])
    assert diff(net(x, a, y=y), net(x, b, y=y))>.1
    for m in net.blocks: nn.init.zeros_(m.block.attn.time.weight)
    assert torch.equal(net(x, a, y=y), net(x, b, y=y)) and torch.equal(net(x, a, y=y), net(x, a))

def test_latent_token(): # check 10
    net = small_latent(classes=1000)
    t,y = torch.tensor([17.], dtype=torch.float64),torch.tensor([3])
    h = sinusoid(t, 256)@net.time.mlp[0].weight.T+net.time.mlp[0].bias
    want = (h*h.sigmoid())@net.time.mlp[2].weight.T+net.time.mlp[2].bias+net.label.table.weight[3]
    assert diff(net.token(t, y), want)<1e-10 and torch.equal(net.token(t), net.token(t, torch.tensor([1000])))

def test_latent_one_row_for_all():
    "One label for all samples: one time token, the same result."
    net = small_latent()
    x,one,y = normal(3, 4, 8, 8),torch.tensor([.3], dtype=torch.float64),torch.full((3,), 2)
    rows = []
    net.blocks[1].block.attn.time.register_forward_hook(lambda m,a,o: rows.append(len(o)))
    got = net(x, one, **net.prepare(y=y))
    assert rows==[1] and diff(got, net(x, one.expand(3), y=y))<1e-12

def test_latent_tiny_is_tiny():
    assert sum(p.numel() for p in diffit_latent_tiny().parameters())<200_000
